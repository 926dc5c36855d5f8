"""Every way in which weights lie on a disk: the same weights give the same decisions and the same bits.

What is read of a candidate in another format is held against plain safetensors files; a run with a base in another
format against one with such files.
"""

import io
import json
import os
import random
import shutil
import zipfile

import pytest
import reference
import tiny
import torch
import whole
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig

from modules.checkpoints.architecture import without_weights
from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.weight_files import open_reader
from modules.runtime.errors import CheckpointError, ConfigError

ONE, BIN = "model.safetensors", "pytorch_model.bin"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Formats: each is a function that writes tensors into a folder that has no weights
# ---------------------------------------------------------------------------------------------------------------------


def as_safetensors(folder, tensors):
    save_file(tensors, folder / ONE, metadata={"format": "pt"})


def as_bin(folder, tensors, file=BIN):
    torch.save(tensors, folder / file)


def as_legacy_bin(folder, tensors):
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)


def in_shards(folder, tensors, single, save):
    """Three shards among which neighbouring tensors are spread."""
    stem, suffix = single.rsplit(".", 1)
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        save({name: tensors[name] for name in names[number::3]}, folder / file)
        weight_map.update(dict.fromkeys(names[number::3], file))
    (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_shards(folder, tensors):
    in_shards(folder, tensors, ONE, lambda shard, path: save_file(shard, path, metadata={"format": "pt"}))


def as_bin_shards(folder, tensors):
    in_shards(folder, tensors, BIN, torch.save)


def as_safetensors_beside_another_bin(folder, tensors):
    as_safetensors(folder, tensors)
    as_bin(folder, {name: -tensor for name, tensor in tensors.items()})


def as_state_dict(folder, tensors):
    """As torch.save(model.state_dict(), ...) has it: an ordered dictionary with versions attached."""
    as_safetensors(folder, tensors)
    state = reference.load(folder, "auto").state_dict()
    (folder / ONE).unlink()
    as_bin(folder, state)


def as_parameters(folder, tensors):
    as_bin(folder, {name: nn.Parameter(tensor) for name, tensor in tensors.items()})


def as_views(folder, tensors):
    """All tensors are cut from one long one."""
    everything, found = torch.cat([tensor.flatten() for tensor in tensors.values()]), {}
    for name, tensor in tensors.items():
        found[name], everything = everything[: tensor.numel()].view(tensor.shape), everything[tensor.numel() :]
    as_bin(folder, found)


def as_transposed(folder, tensors):
    """Nothing is contiguous: every matrix lies column by column, every vector has gaps."""
    found = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else torch.stack([tensor, tensor], dim=-1)[..., 0]
        for name, tensor in tensors.items()
    }
    assert not any(tensor.is_contiguous() for tensor in found.values())
    as_bin(folder, found)


def without_prefix(folder, tensors):
    as_safetensors(folder, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def extras(tensors):
    """What checkpoints of 2023 and before hold besides weights."""
    found = {}
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        found[f"{attention}.rotary_emb.inv_freq"] = torch.arange(4.0) + layer
        found[f"{attention}.masked_bias"] = torch.tensor(-1e4)
        found[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    return {**tensors, **found, "model.embed_positions": torch.arange(8)}


def with_extras(folder, tensors):
    as_safetensors(folder, extras(tensors))


def head_shares_its_storage(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def with_shared_head(folder, tensors):
    as_bin(folder, head_shares_its_storage(tensors))


EVERY_KIND = [
    as_bin,
    as_shards,
    as_bin_shards,
    as_safetensors_beside_another_bin,
    as_state_dict,
    as_parameters,
    as_views,
    as_transposed,
    without_prefix,
    with_extras,
]
# Family of models -> the formats that its models are tried in.
FORMATS = {"whole": EVERY_KIND, "tied": [without_prefix, with_shared_head], "mixtral": [as_shards, as_bin_shards]}
ROWS = [(family, write) for family in FORMATS for write in FORMATS[family]]
# A base of half precision is loaded in another way than others.
BASES = [("half", as_bin), ("half", as_shards), ("half", as_transposed), *ROWS]
SEEDS = {"whole": 6, "half": 6, "tied": 5, "mixtral": 10}  # of the candidates; with these, layers and header change


def row_name(row):
    family, write = row
    return f"{family}-{write.__name__}"


def family_config(family, vocabulary):
    if family != "mixtral":
        return tiny.llama_config(vocabulary, layers=2, tied=family == "tied", attention_bias=True)
    # Twelve experts: in the order of their numbers, the tenth comes before the second where names are merely sorted.
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **sizes, **heads)


def make_plain(place, family):
    """A base and a candidate with a single safetensors file each."""
    tokenizer, dtype = tiny.bpe_tokenizer(), torch.float16 if family == "half" else torch.float32
    base = tiny.make_model(place / "base", family_config(family, len(tokenizer)), tokenizer, dtype=dtype)
    return base, tiny.make_candidate(place / "candidate", base, SEEDS[family])


def rewritten(folder, source, write):
    """A copy of a plain checkpoint in another format."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(ONE))
    write(folder, load_file(source / ONE))
    return folder


def make_mixed(place, source, *dtypes):
    """The base and the candidate of another place in dtypes of their own."""
    folders = []
    for name, dtype in zip(("base", "candidate"), dtypes, strict=True):
        folders.append(rewritten(place / name, source / name, as_safetensors))
        name_of_dtype = str(dtype).removeprefix("torch.")
        tiny.edit_checkpoint(folders[-1], lambda tensors, d=dtype: cast(tensors, d), dtype=name_of_dtype)
    return folders


def cast(tensors, dtype):
    tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def everything_in(folder):
    """All tensors of a folder's safetensors files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bits(ours, theirs):
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def in_format(write, tensors):
    """The tensors as a format names them, and what it adds to them."""
    if write is without_prefix:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if write is with_extras:
        return extras(tensors)
    if write is with_shared_head:
        return head_shares_its_storage(tensors)
    return tensors


def run(place, base, candidate):
    place.mkdir(exist_ok=True)
    return whole.run(place, base, [candidate])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a base and a candidate in plain safetensors files, by family."""
    torch.set_num_threads(1)
    places = {family: tmp_path_factory.mktemp(family) for family in SEEDS}
    for family, place in places.items():
        make_plain(place, family)
    return places


# ---------------------------------------------------------------------------------------------------------------------
# The same weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_a_candidate_reads_the_same_from_every_format(tmp_path, plain, row):
    family, write = row
    base = open_checkpoint(plain[family] / "base", "base")
    folders = plain[family] / "candidate", rewritten(tmp_path / "other", plain[family] / "candidate", write)
    one, other = (open_candidate(open_checkpoint(folder, "one"), base, without_weights(base)) for folder in folders)
    expected = one.read(list(one.conversion))
    found = other.read(list(other.conversion))
    assert found.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"} and len(found) > 10
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
        rows = torch.tensor([0, 2, 3, 7])
        assert same_bits(other.rows(name, rows), tensor[rows]), name


@pytest.mark.sampled(4)
@pytest.mark.parametrize("row", BASES, ids=row_name)
def test_a_base_in_any_format_gives_the_same_decisions_and_bits(tmp_path, plain, row):
    family, write = row
    candidate = plain[family] / "candidate"
    one = run(tmp_path / "one", plain[family] / "base", candidate)
    other = run(tmp_path / "other", rewritten(tmp_path / "base", plain[family] / "base", write), candidate)
    assert one.code == other.code == 0, other.output
    assert (one.decisions, one.weights, one.last_table) == (other.decisions, other.weights, other.last_table)
    assert any(one.weights), "nothing was merged: the row would show nothing"
    expected = in_format(write, everything_in(one.folder / "out"))  # its names, and what it holds besides weights
    found = everything_in(other.folder / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def test_shards_of_a_bin_base_become_shards_of_safetensors(tmp_path, plain):
    base = rewritten(tmp_path / "base", plain["mixtral"] / "base", as_bin_shards)
    one = run(tmp_path, base, plain["mixtral"] / "candidate")
    weights = {path.name for path in (one.folder / "out").iterdir() if "model" in path.name}
    assert weights == {*(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"}
    ours = json.loads((one.folder / "out" / f"{ONE}.index.json").read_text())["weight_map"]
    theirs = json.loads((base / f"{BIN}.index.json").read_text())["weight_map"]
    assert ours == {name: file.replace("pytorch_", "").replace(".bin", ".safetensors") for name, file in theirs.items()}
    # The experts of one layer are spread over shards, under their old names.
    stem = "model.layers.0.block_sparse_moe.experts."
    files = {name: file for name, file in ours.items() if name.startswith(stem)}
    assert set(files) == {f"{stem}{expert}.w{part}.weight" for expert in range(12) for part in (1, 2, 3)}
    assert len(set(files.values())) == 3


@pytest.mark.sampled(4)
@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
def test_the_dtypes_of_base_and_candidate_may_differ(tmp_path, plain, ours, theirs):
    base, candidate = make_mixed(tmp_path, plain["whole"], ours, theirs)
    one = run(tmp_path, base, candidate)
    assert one.code == 0, one.output
    more = {"auto_weights": True, "dtype": torch.float32, "saved_dtype": ours}  # a CPU computes in float32
    naive = reference.NaiveMerge(base, [candidate], tiny.PAIRS, whole.RATIOS, ["lerp"], **more).run()
    ratios = [
        shares[-1] if changed else None for shares, (_, changed, _) in zip(one.weights, one.decisions, strict=True)
    ]
    assert ratios == [decision.ratio for decision in naive.decisions]
    totals = [total for _, _, total in one.decisions]
    assert totals == pytest.approx([decision.after for decision in naive.decisions], rel=1e-3, abs=1e-4)
    stored = everything_in(one.folder / "out")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in everything_in(base).items()
    }
    assert {tensor.dtype for tensor in stored.values()} == {ours}
    found = reference.load(one.folder / "out", naive.model.dtype).state_dict()
    for name, tensor in naive.model.state_dict().items():
        assert torch.allclose(found[name], tensor, rtol=torch.finfo(ours).eps, atol=1e-6), name


# ---------------------------------------------------------------------------------------------------------------------
# What is kept of a file
# ---------------------------------------------------------------------------------------------------------------------


def opened(place, plain, write):
    """A candidate in another format, opened, and the names of its tensors."""
    checkpoint = open_checkpoint(rewritten(place / "other", plain["whole"] / "candidate", write), "other")
    return checkpoint, list(checkpoint.tensors)


def delete(checkpoint, *files):
    for file in files:
        (checkpoint.path / file).unlink()


@pytest.mark.parametrize("write", [as_safetensors, as_shards, as_bin, as_bin_shards])
def test_nothing_is_kept(tmp_path, plain, write):
    checkpoint, (first, *_, last) = opened(tmp_path, plain, write)
    checkpoint.read([first, last])
    delete(checkpoint, *checkpoint.files)
    with pytest.raises(CheckpointError, match="can't be read"):
        checkpoint.read([first])


@pytest.mark.parametrize("write", [as_safetensors, as_bin])
def test_what_was_read_does_not_change_with_its_file(tmp_path, plain, write):
    checkpoint, names = opened(tmp_path, plain, write)
    tensors, (file,) = checkpoint.read(names), checkpoint.files
    with (checkpoint.path / file).open("r+b") as stream:  # written over in place, as a download or a copy would
        stream.write(bytes((checkpoint.path / file).stat().st_size))
    expected = load_file(plain["whole"] / "candidate" / ONE)
    assert all(same_bits(tensor, expected[name]) for name, tensor in tensors.items())


# ---------------------------------------------------------------------------------------------------------------------
# Code in a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


class Code:
    """Makes a folder when it is unpickled by a reader that does as a pickle tells it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def trace_of(folder):
    """What the code in a checkpoint leaves behind if it runs."""
    return folder.with_name("ran")


def with_code(folder, tensors):
    as_bin(folder, {**tensors, "code": Code(trace_of(folder))})


def with_code_in_a_shard(folder, tensors):
    as_bin_shards(folder, tensors)
    as_bin(folder, {"code": Code(trace_of(folder))}, "pytorch_model-00003-of-00003.bin")


def with_code_beside(folder, tensors):
    as_safetensors(folder, tensors)
    for file in BESIDE:
        as_bin(folder, Code(trace_of(folder)), file)


BESIDE = {BIN, "training_args.bin", "optimizer.pt"}


@pytest.mark.parametrize("write", [with_code, with_code_in_a_shard])
def test_code_in_a_pickle_is_not_run(tmp_path, plain, write):
    folder = rewritten(tmp_path / "model", plain["whole"] / "candidate", write)
    with pytest.raises(ConfigError, match="would run code when opened"):
        open_checkpoint(folder, "model")
    assert not trace_of(folder).exists()
    # And code it is: a reader that trusts the file runs it.
    torch.load(max(folder.glob("*.bin")), weights_only=False)
    assert trace_of(folder).exists()


def test_pickles_beside_the_weights_are_not_opened(tmp_path, plain):
    models = [rewritten(tmp_path / name, plain["whole"] / name, with_code_beside) for name in ("base", "candidate")]
    one = run(tmp_path, *models)
    assert one.code == 0, one.output
    assert not trace_of(models[0]).exists()
    assert not BESIDE.intersection(os.listdir(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

MATRIX, VECTOR = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"


def as_bitsandbytes(folder, tensors):
    packed = {MATRIX: torch.zeros(512, 1, dtype=torch.uint8), f"{MATRIX}.absmax": torch.ones(16)}
    as_safetensors(folder, {**tensors, **packed})


def leading_elsewhere(folder, tensors):
    """The index names a shard that is a good one, in the folder above."""
    as_bin_shards(folder, tensors)
    shard, index = "pytorch_model-00001-of-00003.bin", folder / f"{BIN}.index.json"
    (folder / shard).rename(folder.parent / shard)
    index.write_text(index.read_text().replace(shard, f"../{shard}"))


def compressed(folder, tensors):
    """An archive that another program has packed: its tensors can't be mapped."""
    as_bin(folder, tensors)
    packed = io.BytesIO()
    with zipfile.ZipFile(folder / BIN) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    (folder / BIN).write_bytes(packed.getvalue())


def holding(change):
    """A .bin file with something else in it."""
    return lambda folder, tensors: as_bin(folder, change(tensors))


def with_one(name, change, save):
    """One tensor of another kind, and nothing in config.json to say so."""
    return lambda folder, tensors: save(folder, {**tensors, name: change(tensors[name])})


def truncated(save, share):
    def write(folder, tensors):
        save(folder, tensors)
        content = (folder / BIN).read_bytes()
        (folder / BIN).write_bytes(content[: int(share * len(content))])

    return write


def to(dtype):
    return lambda tensor: tensor.to(dtype)


SOMETHING_ELSE = f"{BIN}: contains more than named tensors"
UNMERGEABLE = "which can't be merged"

REFUSED = {
    "a model in a dict": (holding(lambda tensors: {"model": tensors}), SOMETHING_ELSE),
    "a list": (holding(lambda tensors: list(tensors.values())), SOMETHING_ELSE),
    "one tensor": (holding(lambda tensors: tensors[MATRIX]), SOMETHING_ELSE),
    "weights and a number": (holding(lambda tensors: {**tensors, "epoch": 3}), SOMETHING_ELSE),
    "numbers as names": (holding(lambda tensors: dict(enumerate(tensors.values()))), SOMETHING_ELSE),
    "a sparse tensor": (with_one(MATRIX, torch.Tensor.to_sparse, as_bin), SOMETHING_ELSE),
    "a tensor without data": (with_one(MATRIX, to("meta"), as_bin), SOMETHING_ELSE),
    "a bin from before PyTorch 1.6": (as_legacy_bin, f"{BIN}: can't be read (truncated, or saved before PyTorch 1.6"),
    "half a bin": (truncated(as_bin, 0.5), f"{BIN}: can't be read (truncated"),
    "a compressed bin": (compressed, f"{BIN}: can't be read (the archive is compressed"),
    "an index that leads elsewhere": (leading_elsewhere, "'../pytorch_model-00001-of-00003.bin' is not a plain file"),
    "bitsandbytes without settings": (as_bitsandbytes, f"{MATRIX} is stored as torch.uint8, {UNMERGEABLE}"),
    "int8": (with_one(MATRIX, to(torch.int8), as_safetensors), f"{MATRIX} is stored as torch.int8, {UNMERGEABLE}"),
    "int8 bin": (with_one(MATRIX, to(torch.int8), as_bin), f"{MATRIX} is stored as torch.int8, {UNMERGEABLE}"),
    "float8 bin": (with_one(MATRIX, to(torch.float8_e4m3fn), as_bin), "torch.float8_e4m3fn, which can't be merged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused(tmp_path, plain, name):
    write, words = REFUSED[name]
    folder = rewritten(tmp_path / "model", plain["whole"] / "candidate", write)
    with pytest.raises(ConfigError) as refused:
        open_checkpoint(folder, "model")
    assert str(refused.value).startswith(str(folder)) and words in str(refused.value)


@pytest.mark.parametrize("role", ["base", "candidate"])
def test_a_vector_of_whole_numbers_is_refused(tmp_path, plain, role):
    models = {name: plain["whole"] / name for name in ("base", "candidate")}
    models[role] = rewritten(tmp_path / role, models[role], with_one(VECTOR, to(torch.int8), as_bin))
    one = run(tmp_path, *models.values())
    assert one.code == 2 and f"{VECTOR} is stored as torch.int8, not as a floating-" in one.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_an_error_in_our_words(tmp_path):
    """Whatever the reader makes of bytes that were changed at random."""
    folder = tmp_path
    as_bin(folder, {f"layers.{number}.weight": torch.ones(2, 2) for number in range(3)})
    content, chance, outcomes = (folder / BIN).read_bytes(), random.Random(0), set()
    for _ in range(80):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(min(len(damaged), 1000))] = chance.randrange(256)
        (folder / BIN).write_bytes(damaged)
        try:
            reader = open_reader(folder, [BIN])
            list(reader.read(reader.tensors))
            outcomes.add("read")
        except (ConfigError, CheckpointError) as error:
            assert f"{folder / BIN}: " in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("rows", [[], [0], [4], [1, 2, 3], [0, 2, 3], [4, 0, 1, 1], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("file", [ONE, BIN])
def test_some_rows_of_a_tensor(tmp_path, file, rows):
    tensors = {
        "matrix": torch.randn(5, 3, dtype=torch.bfloat16),
        "vector": torch.randn(5),
        "stack": torch.randn(5, 2, 3).half(),
    }
    save_file(tensors, tmp_path / file) if file == ONE else torch.save(tensors, tmp_path / file)
    reader = open_reader(tmp_path, [file])
    for name, tensor in tensors.items():
        found = reader.rows(name, torch.tensor(rows, dtype=torch.long))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor[rows])


def test_rows_behind_the_end_of_a_file_are_an_error(tmp_path):
    save_file({"matrix": torch.randn(50, 30)}, tmp_path / ONE)
    reader = open_reader(tmp_path, [ONE])
    os.truncate(tmp_path / ONE, (tmp_path / ONE).stat().st_size - 200)
    assert reader.rows("matrix", torch.arange(40)).shape == (40, 30)
    with pytest.raises(CheckpointError, match="can't be read"):
        reader.rows("matrix", torch.arange(50))

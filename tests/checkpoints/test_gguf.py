"""GGUF files as models: against what transformers makes of them; what is made once; what is refused."""

import json
import shutil

import pytest
import tiny
import torch
from adapters import make_adapter
from ggufs import write_gguf
from huggingface_hub import constants
from runs import log_of, make_models, merge, stored
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import merge_monster
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.gguf_files import as_folder
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.runtime.errors import ConfigError

TEXT = "Her body quivers with anticipation."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two candidates as folders."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where the folders are made."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets/merge-monster/gguf"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F16", torch.float16), ("Q4_1", torch.bfloat16)],
)
def test_a_file_reads_as_transformers_dequantises_it(tmp_path, models, kind, dtype):
    file = write_gguf(tmp_path / "tiny.gguf", models[0], kind)
    opened = open_checkpoint(as_folder(file)[0], "tiny")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    ).state_dict()
    ours = opened.read(opened.tensors)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and torch.equal(ours[name], tensor), name
    if kind == "F16":  # nothing is lost
        base = AutoModelForCausalLM.from_pretrained(models[0]).state_dict()
        assert all(torch.equal(ours[name], tensor.to(dtype)) for name, tensor in base.items())
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (opened.path, models[0])]
    assert len({tuple(tokenizer(TEXT)["input_ids"]) for tokenizer in tokenizers}) == 1
    assert len({tokenizer.chat_template for tokenizer in tokenizers}) == 1


def test_the_same_file_is_made_a_folder_once(tmp_path, models, cache):
    file, told = write_gguf(tmp_path / "tiny.gguf", models[0], "Q4_1"), []
    folder, is_new = as_folder(file, tell=told.extend)
    assert is_new
    (line,) = told
    assert line.startswith(f"Dequantizing {file} once (Q4_1; ") and line.endswith(f" MB) to {folder}")
    assert names_in(cache) == [folder.name] and folder.name.startswith("tiny-")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert as_folder(file, tell=told.extend) == (folder, False) and len(told) == 1
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_gguf(file, models[1], "Q4_1")  # other numbers, or another tokenizer, make another model
    assert as_folder(file)[0] != folder
    assert as_folder(file, str(models[0]))[0].name not in (folder.name, as_folder(file)[0].name)
    assert len(names_in(cache)) == 3


def test_what_lies_beside_a_file_is_not_read(tmp_path, models):
    (tmp_path / "beside").mkdir()
    alone = as_folder(write_gguf(tmp_path / "tiny.gguf", models[0]))[0]
    contents = {path.name: path.read_bytes() for path in alone.iterdir()}
    shutil.rmtree(alone)
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text("{}")
    assert contents == {path.name: path.read_bytes() for path in as_folder(tmp_path / "tiny.gguf")[0].iterdir()}
    assert b"unfinished" not in b"".join(content for name, content in contents.items() if name.endswith(".json"))


def test_the_tokenizer_may_be_that_of_a_folder(tmp_path, models):
    file, other = write_gguf(tmp_path / "tiny.gguf", models[0]), tmp_path / "other"
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.chat_template = "of its own"
    tokenizer.save_pretrained(other)
    assert AutoTokenizer.from_pretrained(as_folder(file, str(other))[0]).chat_template == "of its own"
    with pytest.raises(ConfigError, match="no such folder"):
        as_folder(file, str(tmp_path / "nowhere"))


def test_a_merge_of_files_and_its_replay(place, models, capsys):
    base = write_gguf(place / "base.gguf", models[0], "F16")
    one = write_gguf(place / "one.gguf", models[1], "Q4_1")
    assert merge(place, (base, one, models[2])) == 0
    log = log_of(place)
    assert "Models to merge  : one.gguf, two\n" in log and "CHANGED" in log
    assert f"{base} is a GGUF file in F16, read as float16" in log
    assert f"{one} is a GGUF file in Q4_1 (quantization loss is permanent), read as bfloat16" in log
    assert "WARNING" not in log  # such as one of other settings
    assert "merge_monster_gguf" not in log and not list((place / "out").glob("merge_monster_gguf*"))
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text())
    assert [source["where"] for source in recipe["sources"][:2]] == ["base.gguf", "one.gguf"]
    assert "| base.gguf |" in (place / "out/README.md").read_text()
    assert {dtype for dtype, _ in stored(place / "out").values()} == {"F16"}

    moved = place / "moved"
    moved.mkdir()
    for file in (base, one):
        file.rename(moved / file.name)
    shutil.copytree(models[2], moved / "two")
    arguments = ["--replay", str(place / "out"), "--output", str(place / "again"), "--source", str(moved)]
    assert merge_monster.main(arguments) == 0
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    shutil.copy(write_gguf(place / "two.gguf", models[2], "Q4_1"), moved / "one.gguf")
    assert merge_monster.main([*arguments, "--overwrite"]) == 2
    assert "has changed since the recipe was written" in capsys.readouterr().err


def test_a_merge_with_a_tokenizer_of_its_own_is_replayed_with_it(place, models, capsys):
    file = write_gguf(place / "base.gguf", models[0], "Q8_0")
    shutil.copytree(models[0], place / "words")
    assert merge(place, (file, models[1]), tokenizer="words") == 0
    assert "its tokenizer is taken from words" in log_of(place)
    arguments = ["--replay", str(place / "out"), "--output", str(place / "again"), "--source", str(models[1].parent)]
    assert merge_monster.main(arguments) == 0
    assert (place / "out/tokenizer.json").read_bytes() == (place / "again/tokenizer.json").read_bytes()
    (place / "words").rename(place / "gone")
    assert merge_monster.main([*arguments, "--overwrite"]) == 2
    assert ": the tokenizer words; " in capsys.readouterr().err


def test_the_base_among_the_candidates_is_skipped(tmp_path, models):
    file = write_gguf(tmp_path / "base.gguf", models[0])
    config = tiny.write_config(tmp_path / "my.yaml", file, [file, models[1]], tmp_path / "out")
    opened = open_models(load_config(config), fetch=lambda job: None)
    assert [candidate.name for candidate in opened.candidates] == ["one"]
    assert f"{file} is the base model; skipped" in opened.notes


def test_an_adapter_is_applied_to_a_file(tmp_path, models):
    adapter, _ = make_adapter(tmp_path, models[0])
    file = write_gguf(tmp_path / "one.gguf", models[1], "F32")
    sources = [f"{file}+{adapter}", f"{models[1]}+{adapter}"]
    config = tiny.write_config(tmp_path / "my.yaml", models[0], sources, tmp_path / "out")
    ours, theirs = open_models(load_config(config), fetch=lambda job: None).candidates
    assert (ours.name, theirs.name) == ("one.gguf+adapter", "one+adapter")
    expected, found = (one.read(list(one.conversion)) for one in (theirs, ours))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_recipe_for_mergekit_names_the_folder(place, models, cache):
    file = write_gguf(place / "base.gguf", models[0], "F32")
    assert merge(place, (file, models[1]), merge_headers=False, dtype="float32") == 0
    assert (
        merge_monster.main(["--export-mergekit", "kit.yaml", str(place / "out"), "--source", str(models[1].parent)])
        == 0
    )
    named = (place / "kit.yaml").read_text()
    assert str(cache / names_in(cache)[0]) in named and "base.gguf\n" not in named


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\n")


BROKEN = {
    "half a file": (cut, "can't be read as GGUF"),
    "an empty file": (lambda file: file.write_bytes(b""), "is empty"),
    "a pointer": (pointer, "git lfs pull"),
    "something else": (lambda file: file.write_bytes(b"PK\3\4" * 99), "can't be read as GGUF"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(tmp_path, models, cache, name):
    change, words = BROKEN[name]
    change(file := write_gguf(tmp_path / "tiny.gguf", models[0], "Q4_1"))
    with pytest.raises(ConfigError) as refused:
        as_folder(file)
    assert str(refused.value).startswith(f"{file}: ") and words in str(refused.value)
    assert not cache.exists()


def test_what_transformers_cannot_dequantise_is_refused(tmp_path, models, cache, monkeypatch):
    strange = write_gguf(tmp_path / "strange.gguf", models[0], architecture="mystery")
    with pytest.raises(ConfigError, match=r"strange.gguf: transformers can't dequantize it \(GGUF .* mystery"):
        as_folder(strange)
    lacking = write_gguf(tmp_path / "lacking.gguf", models[0], leave_out=["blk.1.attn_q.weight"])
    with pytest.raises(
        ConfigError, match=r"1 of the model's tensors are missing, such as model.layers.1.self_attn.q_proj"
    ):
        as_folder(lacking)

    def unknown(*_, **__):
        raise NotImplementedError("Dequantization for Q9_9 is not yet implemented")

    monkeypatch.setattr("gguf.dequantize", unknown)
    with pytest.raises(ConfigError, match=r"can't dequantize it .*Q9_9"):
        as_folder(write_gguf(tmp_path / "tiny.gguf", models[0], "Q8_0"))
    assert names_in(cache) == []  # nothing half done is left


def test_what_is_missing_is_named(tmp_path, models, monkeypatch, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", models[0])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(ConfigError, match=r"0.00 MB free; .*HF_HOME"):
            as_folder(file)
    config = tiny.write_config(tmp_path / "my.yaml", tmp_path / "tiny2.gguf", [models[1]], tmp_path / "out")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(config)


def test_a_dry_run_says_what_it_has_unpacked(place, models, cache, capsys):
    file = write_gguf(place / "tiny.gguf", models[0])
    for made in (True, False):  # it is made once
        assert merge(place, (file, models[1]), "--dry-run") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert (f"{cache / names_in(cache)[0]}" in last) == made
        assert str(max((place / "logs").iterdir(), key=lambda log: log.stat().st_mtime_ns).relative_to(place)) in last

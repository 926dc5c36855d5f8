"""Merges made tensor by tensor from the files: what is written holds what the whole model in memory holds."""

import subprocess
import sys

import mixes
import pytest
import tiny
import torch
from adapters import make_adapter
from architectures import ARCHITECTURES, configuration
from project import ROOT
from reference import METHOD_TEXTS
from safetensors.torch import load_file
from transformers import AutoTokenizer

import modules.model.part
import modules.search.rebuild
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.model.arithmetic import Arithmetic
from modules.model.embeddings import aligned_header
from modules.model.loading import load_layout, load_model
from modules.runtime.errors import ConfigError
from modules.search.decision import Decision
from modules.search.mixing import Mix
from modules.search.rebuild import Rebuild
from modules.search.trial import merged, read_part

FILE = "model.safetensors"
CPU = torch.device("cpu")
ALL = [(0, layer, method, 0.3) for layer, method in ((1, "lerp"), (0, "slerp"), (None, "lerp"), (1, "cyclic"))]


class Both:
    """A base with candidates, from which a model is built by both ways."""

    def __init__(self, place, base, folders, compute="float32", dtype="auto"):
        config = load_config(tiny.write_config(place / "my.yaml", base, folders, place / "out", dtype=dtype))
        self.place, self.base, self.compute, self.dtype = place, base, Arithmetic.named(compute), dtype
        self.models = open_models(config, lambda job: None)
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def rebuild(self):
        layout = load_layout(self.models, self.dtype, self.compute)
        return Rebuild(layout, dict.fromkeys(layout.tensors, CPU), lambda: self.tokenizer)

    def whole(self):
        return load_model(self.models.base, "cpu", self.dtype, self.compute)

    def agree_on(self, decisions, name="ours"):
        """decisions: (candidate, layer, method, ratio), in their order."""
        ours, whole = self.rebuild(), self.whole()
        for number, layer, method, ratio in decisions:
            decision, candidate = Decision("", layer, method, ratio, 0, 0, ()), self.models.candidates[number]
            ours.repeat(candidate, [decision])
            self.merge_into(whole, candidate, layer, method, ratio)
        return self.agree(ours, whole, name)

    def merge_into(self, whole, candidate, layer, method, ratio):
        if layer is None:
            part, theirs = whole.header(), aligned_header(whole, self.tokenizer, candidate)[0]
        else:
            part = whole.layer(layer)
            theirs = read_part(candidate, part)
        found = merged(part, method, theirs, ratio, part.space())
        part.changes_in(found)
        part.install(found)

    def agree_on_weights(self, shares, name="ours"):
        ours, whole = self.rebuild(), self.whole()
        outside = len(shares) > len(whole.layers)
        ours.mix(self.models.candidates, shares)
        Mix(whole, self.tokenizer, self.models.candidates, outside).compose(shares, exact=True)
        return self.agree(ours, whole, name)

    def agree(self, ours, whole, name):
        """What is written is, read again, what the model in memory holds; the names of what is not the base's."""
        folder = self.place / name
        folder.mkdir()
        ours.save(folder)
        again = load_model(open_checkpoint(folder, name), "cpu", self.dtype, self.compute)
        assert again.tensors.keys() == whole.tensors.keys()
        for key, tensor in whole.tensors.items():
            saved = whole.part_of([key]).saved_dtypes.get(key, tensor.dtype)
            assert torch.equal(again.tensors[key], tensor.to(saved).to(tensor.dtype)), key
        before, after = (stored(one) for one in (self.base, folder))
        assert before.keys() == after.keys()
        return {key for key in after if not torch.equal(before[key], after[key])}


def stored(folder):
    return {key: tensor for file in folder.glob("model*.safetensors") for key, tensor in load_file(file).items()} or (
        torch.load(folder / "pytorch_model.bin")
    )


@pytest.mark.sampled(20)
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(tmp_path, name, compute):
    made = mixes.make(tmp_path, configuration(name, len(tiny.bpe_tokenizer())))
    assert Both(tmp_path, *made, compute).agree_on([*ALL, (1, 1, "gradient", 0.7), (1, None, "lerp", 0.6)])


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shares_in_every_architecture(tmp_path, name):
    made = mixes.make(tmp_path, configuration(name, len(tiny.bpe_tokenizer())))
    assert Both(tmp_path, *made).agree_on_weights([[0.3, 0.2], [0.0, 0.7], [0.4, 0.05]])


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return mixes.make(tmp_path_factory.mktemp("llamas"), tiny.llama_config(len(tiny.bpe_tokenizer())))


@pytest.mark.parametrize("method", METHOD_TEXTS)
def test_every_method_one_after_another(tmp_path, llamas, method):
    changed = Both(tmp_path, *llamas).agree_on([(0, 1, method, 0.4), (1, 1, method, 0.7), (0, 1, method, 0.2)])
    assert changed and all(".layers.1." in name for name in changed)


@pytest.mark.parametrize("compute, dtype", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_every_type_to_be_saved(tmp_path, llamas, compute, dtype):
    assert Both(tmp_path, *llamas, compute, dtype).agree_on([*ALL, (1, 1, "lerp", 0.5)])


def test_a_header_by_ranges_of_few_rows(tmp_path, llamas, monkeypatch):
    monkeypatch.setattr(modules.search.rebuild, "ROOM", 4 * 32 * 30)
    changed = Both(tmp_path, *llamas).agree_on([(0, None, "lerp", 0.4), (1, None, "lerp", 0.1)])
    assert changed == {"lm_head.weight", "model.embed_tokens.weight"}


def test_shares_of_a_header_by_ranges_of_few_rows(tmp_path, llamas, monkeypatch):
    monkeypatch.setattr(modules.search.rebuild, "ROOM", 4 * 32 * 30)
    monkeypatch.setattr(modules.model.part, "ROWS", 4 * 32 * 64)
    changed = Both(tmp_path, *llamas).agree_on_weights([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.2, 0.9]])
    assert {name for name in changed if "layers" not in name} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


def test_shares_without_a_row_for_all_else(tmp_path, llamas):
    changed = Both(tmp_path, *llamas).agree_on_weights([[0.0, 0.1], [0.5, 0.0], [0.0, 0.0]])
    assert {name.split(".")[2] for name in changed} == {"0", "1"}


def test_rows_at_other_places(tmp_path, monkeypatch):
    monkeypatch.setattr(modules.search.rebuild, "ROOM", 4 * 32 * 30)
    base, folders = mixes.with_rows_elsewhere(tmp_path)
    both = Both(tmp_path, base, folders)
    assert both.agree_on([(0, None, "lerp", 0.5), (1, None, "lerp", 0.4)])
    assert both.agree_on_weights([[0.0, 0.0]] * 3 + [[0.3, 0.4]], "mixed")


@pytest.mark.parametrize("twice, compute", [("once", "float32"), ("twice", "bfloat16"), ("differently", "bfloat16")])
def test_a_head_that_is_tied(tmp_path, twice, compute):
    """Its configuration ties it: transformers looks at the weights where both are stored."""
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer()), tied=True))

    def twofold(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.5 * (twice == "differently")

    for folder in (base, folders[1]):
        tiny.edit_checkpoint(folder, twofold if twice != "once" else None)
    tiny.edit_checkpoint(folders[0], lambda tensors: tensors.pop("lm_head.weight", None))
    both = Both(tmp_path, base, folders, compute)
    names = {"model.embed_tokens.weight", *(["lm_head.weight"] if twice != "once" else [])}
    assert both.agree_on([(0, None, "lerp", 0.5), (1, None, "lerp", 0.25)]) == names
    saved = load_file(tmp_path / "ours" / FILE)
    if twice == "twice":
        assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_adapters_and_old_formats(tmp_path):
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer())), 1)
    targets = ["embed_tokens", "lm_head", "v_proj", "up_proj"]
    adapter, _ = make_adapter(tmp_path, base, target_modules=targets)
    for folder in (base, folders[0]):
        tiny.save_as_bin(folder)
    assert Both(tmp_path, base, [*folders, adapter]).agree_on([*ALL, (1, None, "lerp", 0.5), (1, 2, "slice", 0.5)])


def test_a_zero_keeps_its_sign_where_nothing_is_merged(tmp_path, monkeypatch):
    """Minus zero and minus zero are mixed to zero: in a range of rows that is as it was, and in one that is not."""
    monkeypatch.setattr(modules.search.rebuild, "ROOM", 4 * 32 * 30)
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer())))
    for folder in (base, *folders):
        tiny.edit_checkpoint(
            folder,
            lambda tensors: (
                tensors["model.embed_tokens.weight"][:95].fill_(-0.0),
                tensors["model.norm.weight"].zero_(),
            ),
        )
    both = Both(tmp_path, base, folders)
    assert "model.embed_tokens.weight" in both.agree_on([(0, None, "lerp", 0.3)])
    assert load_file(tmp_path / "ours" / FILE)["model.embed_tokens.weight"][:95].signbit().all()
    both.agree_on_weights([[0.0, 0.0]] * 3 + [[0.3, 0.4]], "mixed")
    assert load_file(tmp_path / "mixed" / FILE)["model.embed_tokens.weight"][:95].signbit().all()


def test_what_can_not_be_carried_out(tmp_path, llamas):
    both = Both(tmp_path, *llamas)
    candidate = both.models.candidates[0]
    with pytest.raises(ConfigError, match=r"can't be repeated: the base has layers 0 to 2, and no layer 7"):
        both.rebuild().repeat(candidate, [Decision("", 7, "lerp", 0.5, 0, 0, ())])
    with pytest.raises(ConfigError, match="the recipe has weights for 2 layers, but the base has 3"):
        both.rebuild().mix(both.models.candidates, [[0.5, 0.5]] * 2)


def test_broken_weights_are_named(tmp_path):
    base, folders = mixes.make(tmp_path, tiny.llama_config(len(tiny.bpe_tokenizer())))
    name = "model.layers.1.mlp.up_proj.weight"
    tiny.edit_checkpoint(folders[0], lambda tensors: tensors[name][3].fill_(torch.nan))
    both = Both(tmp_path, base, folders)
    ours, candidate = both.rebuild(), both.models.candidates[0]
    ours.repeat(candidate, [Decision("", 1, "lerp", 0.5, 0, 0, ())])
    (tmp_path / "ours").mkdir()
    with pytest.raises(ConfigError, match=f"{candidate.name}: {name} holds NaN or infinite values"):
        ours.save(tmp_path / "ours")


MEASURED = """
import sys
import torch
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.model.loading import load_layout
from modules.search.rebuild import Rebuild
models = open_models(load_config(sys.argv[1]), lambda job: None)
layout = load_layout(models, "auto", torch.float32)
rebuild = Rebuild(layout, dict.fromkeys(layout.tensors, torch.device("cpu")), None)
rebuild.mix(models.candidates, [[0.5, 0.25]] * len(layout.layers))
rebuild.save(__import__("pathlib").Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_its_memory_is_that_of_a_few_tensors(tmp_path):
    """Of 2 layers and of 60, of which the weights alone are 200 MB."""
    found = []
    for layers in (2, 60):
        place = tmp_path / str(layers)
        config = tiny.llama_config(len(tiny.bpe_tokenizer()), layers, hidden=320)
        base, folders = mixes.make(place, config)
        config = tiny.write_config(place / "my.yaml", base, folders, place / "out")
        (place / "out").mkdir()
        command = [sys.executable, "-c", MEASURED, str(config), str(place / "out")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(int(result.stdout) / 1024)
    assert (place / "out" / FILE).stat().st_size > 2e8 and found[1] - found[0] < 40, found

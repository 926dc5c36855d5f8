"""Tensors that no merge touched are the base's own bytes, whatever it is computed in; what overflows is named."""

import math
import shutil

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, SIZES
from reference import METHOD_TEXTS
from safetensors.torch import load_file
from transformers import AutoConfig

import merge_monster
import monster_mapper
from modules.checkpoints.checkpoint import load_tokenizer, open_checkpoint
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.model.arithmetic import Arithmetic
from modules.model.loading import load_layout, load_model
from modules.runtime.errors import ConfigError
from modules.scoring.layout import check_numbers
from modules.scoring.tokenization import Encoded
from modules.search.decision import Decision
from modules.search.rebuild import Rebuild

KINDS = {
    "mixed": torch.bfloat16,  # with float32 norms
    "float32": torch.float32,
    "Mixtral": torch.float32,  # its experts are fused when they are loaded
    "tied": torch.float32,  # with a head in its file that is its embedding
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and a candidate of each kind."""
    return {kind: make_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def make_pair(folder, kind):
    tokenizer = tiny.bpe_tokenizer()
    config = tiny.llama_config(len(tokenizer), layers=2, hidden=16, tied=kind == "tied")
    if kind in ARCHITECTURES:
        name, more = ARCHITECTURES[kind]
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **{**SIZES, **more})
    base = tiny.make_model(folder / "base", config, tokenizer, dtype=KINDS[kind])
    noise = torch.Generator().manual_seed(0)

    def change(tensors):
        for name in [name for name in tensors if kind == "mixed" and "norm" in name]:
            tensors[name] = tensors[name].float() + 1e-3 * torch.randn(tensors[name].shape, generator=noise)
        if kind == "tied":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    other = tiny.make_candidate(folder / "other", base)
    tiny.edit_checkpoint(base, change)
    return base, other


def merged(place, pair, compute, decisions, dtype="auto"):
    """Stored tensors of the base, and of what is saved after some decisions (layer, method, ratio)."""
    base, other = pair
    models = open_models(load_config(tiny.write_config(place / "my.yaml", base, [other], "out")), lambda job: None)
    layout = load_layout(models, dtype, Arithmetic.named(compute or "float32"))
    rebuild = Rebuild(layout, dict.fromkeys(layout.tensors, torch.device("cpu")), lambda: load_tokenizer(base))
    done = [Decision("other", layer, method, ratio, 0.0, 0.0, ()) for layer, method, ratio in decisions]
    rebuild.repeat(models.candidates[0], done)
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()
    rebuild.save(place / "out")
    weights = next(base.glob("*model.*"))
    read = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights)
    return read, load_file(place / "out/model.safetensors")


def changed(stored, saved):
    """The names of the tensors that were saved otherwise than they were stored; there are the same ones."""
    assert stored.keys() == saved.keys()
    assert all(saved[name].dtype == tensor.dtype for name, tensor in stored.items())
    return {name for name, tensor in stored.items() if not torch.equal(saved[name], tensor)}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("compute", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_untouched_tensors_are_the_bases_bytes(place, folders, kind, compute):
    assert not changed(*merged(place, folders[kind], compute, []))
    stored, saved = merged(place, folders[kind], compute, [(1, "lerp", 0.5)])
    assert changed(stored, saved) == {name for name in stored if ".layers.1." in name}


@pytest.mark.parametrize("method", METHOD_TEXTS)
def test_tensors_that_a_method_leaves_alone_are_too(place, folders, method):
    stored, saved = merged(place, folders["mixed"], None, [(0, method, 0.5)])
    by_columns = method in ("slice", "cyclic", "gradient")  # these leave vectors as they are
    touched = {name for name in stored if ".layers.0." in name and not (by_columns and "norm" in name)}
    assert changed(stored, saved) == touched
    assert not changed(*merged(place, folders["mixed"], None, [(0, "lerp", 0.0)]))


def test_a_header_is_touched_under_all_its_names(place, folders):
    stored, saved = merged(place, folders["tied"], "bfloat16", [(None, "lerp", 0.5)])
    assert changed(stored, saved) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(saved["model.embed_tokens.weight"], saved["lm_head.weight"])


def test_a_bin_base_and_a_type_that_is_asked_for(place, folders):
    base, other = shutil.copytree(folders["float32"][0], place / "base"), folders["float32"][1]
    tiny.save_as_bin(base)
    assert not changed(*merged(place, (base, other), "bfloat16", []))
    stored, saved = merged(place, folders["mixed"], None, [], dtype="bfloat16")
    assert all(torch.equal(saved[name], tensor.bfloat16()) for name, tensor in stored.items())


# ---------------------------------------------------------------------------------------------------------------------
# Activations that overflow
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loud(place, folders):
    """A base whose weights fit into float16 and whose activations don't."""
    base = shutil.copytree(folders["float32"][0], place / "loud")

    def enlarge(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].mul_(6e4)
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e3)

    tiny.edit_checkpoint(base, enlarge)
    return base


@pytest.mark.parametrize("program", [merge_monster, monster_mapper])
def test_activations_that_overflow_in_float16_are_named(place, folders, loud, capsys, program):
    path = tiny.write_config(place / "my.yaml", loud, [folders["float32"][1]], place / "out", dtype="float16")
    assert program.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "'unwavering'" in error and "overflow in float16; set compute_dtype: bfloat16+float32 or float32" in error
    path = tiny.write_config(place / "my.yaml", loud, [folders["float32"][1]], place / "out", dtype="bfloat16")
    assert program.main(["--config", str(path)]) == 0


def test_a_base_that_no_dtype_helps_is_not_told_to_try_another(place, folders, capsys):
    base = shutil.copytree(folders["float32"][0], place / "loud")

    def enlarge(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e38)
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e6)

    tiny.edit_checkpoint(base, enlarge)
    path = tiny.write_config(place / "my.yaml", base, [folders["float32"][1]], place / "out")
    assert merge_monster.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "NaN or infinite even in float32" in error and "set dtype" not in error


def test_a_phrase_that_a_base_can_not_say_is_no_overflow(folders):
    model = load_model(open_checkpoint(folders["float32"][0], "base"), "cpu", "float32")
    pairs = [Encoded((1, 2), 1), Encoded((1, 3), 1)]
    check_numbers(model, pairs, [-1.0, -700.0])
    with pytest.raises(ConfigError, match=r"1 of 2 phrases have a probability of exactly 0 in float32.*remove phrases"):
        check_numbers(model, pairs, [-1.0, -math.inf])
    with pytest.raises(ConfigError, match="NaN or infinite even in float32"):
        check_numbers(model, pairs, [-math.inf, math.nan])

"""Tensors that no present model reads: left out with a line, or one too many."""

import architectures
import pytest
import tiny
import torch
from runs import log_of, merge
from safetensors.torch import load_file

from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.runtime.errors import ConfigError


def models(tmp_path, name="Llama", **more):
    """A base and a candidate of an architecture."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", architectures.configuration(name, len(tokenizer)), tokenizer)
    candidate = tiny.make_candidate(tmp_path / "one", base, 1)
    for folder in (base, candidate):
        tiny.edit_checkpoint(folder, **more)
    return base, candidate


def said(tmp_path, base, candidate):
    """Notes and warnings of models as the program opens them."""
    config = tiny.write_config(tmp_path / "open.yaml", base, [candidate], tmp_path / "out")
    found = open_models(load_config(config), fetch=lambda job: None)
    return found.notes, found.warnings


def add(folder, **tensors):
    tiny.edit_checkpoint(folder, lambda found: found.update(tensors))


def for_each_layer(name, tensor):
    return {name.replace("*", str(layer)): tensor.clone() for layer in range(2)}


ROTARY, MASK = "model.layers.*.self_attn.rotary_emb.inv_freq", "model.layers.*.self_attn.bias"


@pytest.mark.parametrize("which", [0, 1])
def test_frequencies_and_masks_are_named_once_and_left_out(tmp_path, which):
    pair = models(tmp_path)
    causal = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    add(
        pair[which],
        **for_each_layer(ROTARY, torch.ones(4)),
        **for_each_layer(MASK, causal),
        **for_each_layer("model.layers.*.self_attn.masked_bias", torch.tensor(-1e9)),
    )
    notes, warnings = said(tmp_path, *pair)
    (note,) = [line for line in notes if "ignoring" in line]
    assert note.startswith(f"{pair[which].name}: ") and "5 more" in note and warnings == []


def test_a_bias_that_is_no_mask_is_still_a_tensor_too_many(tmp_path):
    base, one = models(tmp_path)
    add(one, **{"model.layers.1.self_attn.extra.bias": torch.ones(4, 16)})
    with pytest.raises(ConfigError, match=r"unexpected tensors model\.layers\.1\.self_attn\.extra\.bias"):
        said(tmp_path, base, one)


def further(folder, *others):
    """A layer behind the last one, like it but for some tensors."""
    found = load_file(folder / "model.safetensors")
    like = {name.replace(".1.", ".2.", 1): t.clone() for name, t in found.items() if name.startswith("model.layers.1.")}
    add(folder, **like, **{f"model.layers.2.{name}": torch.ones(32, 64) for name in others})


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_a_layer_that_predicts_further_tokens_is_known_by_what_it_has_besides(tmp_path, which):
    pair = models(tmp_path)
    for number in which:
        further(pair[number], "eh_proj.weight", "shared_head.head.weight")
    notes, warnings = said(tmp_path, *pair)
    named = [line.partition(":")[0] for line in notes if "ignoring" in line]
    assert named == [pair[number].name for number in which] and warnings == []


def test_or_by_what_the_configuration_of_either_says(tmp_path):
    base, one = models(tmp_path)
    further(one)
    tiny.edit_checkpoint(one, num_nextn_predict_layers=1)
    assert any("model.layers.2." in line and "ignoring" in line for line in said(tmp_path, base, one)[0])


def test_a_layer_like_any_other_behind_the_last_is_one_too_many(tmp_path):
    base, one = models(tmp_path)
    further(one)
    with pytest.raises(ConfigError, match=r"model\.layers\.2\..*num_hidden_layers is 2"):
        said(tmp_path, base, one)


@pytest.mark.parametrize("name", ["mtp.layers.0.self_attn.q_proj.weight", "model.mtp_layers.0.input_proj.weight"])
def test_under_names_of_their_own(tmp_path, name):
    base, one = models(tmp_path)
    add(one, **{name: torch.ones(32, 32)})
    assert any(name in line and "ignoring" in line for line in said(tmp_path, base, one)[0])


def test_a_merge_goes_on_and_the_output_keeps_the_bases(place, tmp_path):
    base, one = models(tmp_path)
    for folder in (base, one):
        add(folder, **for_each_layer(ROTARY, torch.ones(4)))
        further(folder, "eh_proj.weight")
    assert merge(place, (base, one)) == 0
    assert "one: ignoring " in log_of(place) and "CHANGED" in log_of(place)
    kept, found = (load_file(folder / "model.safetensors") for folder in (base, place / "out"))
    for name in [n for n in kept if "inv_freq" in n or ".layers.2." in n]:
        assert torch.equal(kept[name], found[name])

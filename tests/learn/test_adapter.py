"""Where an adapter goes, and what of it is written."""

import json

import learning
import pytest
import tiny
import torch
from architectures import configuration
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modules.learn.adapter import Adapter, check_rank, linear_layers
from modules.runtime.errors import ConfigError

KINDS = {
    "Llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "GPT-2": {"c_attn", "c_proj", "c_fc"},
    # Its shared experts' layers are called as the experts' own matrices, for which PEFT takes them.
    "DeepSeek V3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    # A gate has one output: there is nothing of low rank in it.
    "Qwen2-MoE": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    # A kernel goes past out_proj.
    "Mamba": {"in_proj", "x_proj", "dt_proj"},
}


def module_of(name):
    return AutoModelForCausalLM.from_config(configuration(name, 300))


@pytest.mark.parametrize("name", KINDS)
def test_it_goes_on_every_linear_layer_that_peft_can_adapt(name):
    module = module_of(name)
    linear = linear_layers(module)
    assert {layer.rpartition(".")[2] for layer in linear} == KINDS[name]
    weights = Adapter(module, rank=2, seed=0).weights
    assert len(weights) == 2 * len(linear) and all(".lora_" in weight for weight in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_the_smallest_side_limits_the_rank():
    linear = {"one": (16, 64), "two": (64, 8)}
    check_rank(linear, 8)
    with pytest.raises(ConfigError, match=r"learn\.rank: 9 .* two has 8"):
        check_rank(linear, 9)


def test_layers_of_the_same_name_outside_are_left_alone():
    """Then the settings name every layer."""
    module = module_of("Llama")
    module.add_module("q_proj", torch.nn.Linear(4, 4))
    adapter = Adapter(module, rank=1, seed=0)
    assert type(module.q_proj) is torch.nn.Linear
    assert "model.layers.0.self_attn.q_proj" in adapter._settings.target_modules


def test_what_is_written_is_scaled(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    adapter = learning.begun(base, compute="float32", texts=()).adapter
    adapter.scale(0.25)
    adapter.save(tmp_path, "org/name", "0" * 40)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        factor = 0.25 if ".lora_B." in name else 1.0
        assert torch.equal(tensor, factor * adapter.weights[name].detach())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    told = {key: settings[key] for key in ("base_model_name_or_path", "revision", "peft_type", "r", "lora_alpha")}
    assert [*told.values()] == ["org/name", "0" * 40, "LORA", learning.RANK, learning.RANK]

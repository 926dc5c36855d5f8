"""What a GGUF file means: its model must compute as the one that it was made from, or be refused or warned of by name.

The twin is slow and obvious: a forward of the original by transformers alone.
"""

import pytest
import tiny
import torch
from ggufs import rope_factors, write_gguf
from huggingface_hub import constants
from runs import log_of, merge
from transformers import AutoConfig, AutoModelForCausalLM

from modules.checkpoints.config_diff import differences
from modules.checkpoints.gguf_files import as_folder, read_notes
from modules.checkpoints.gguf_rope import scaling_of_llama_3
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.runtime.errors import ConfigError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}


def base(theta=10000.0, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


# Name -> how llama.cpp calls the architecture, model type, settings beside the sizes.
MODELS = {
    "llama": ("llama", "llama", {}),
    "llama, tied": ("llama", "llama", {"tie_word_embeddings": True}),
    "llama, other sizes": (
        "llama",
        "llama",
        {"rope_parameters": base(500000.0), "rms_norm_eps": 0.1, "head_dim": 24, "attention_bias": True},
    ),
    "llama, all biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("llama", "llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", "llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0}}),
    "llama 3": ("llama", "llama", {"rope_parameters": LLAMA3}),
    "llama, longrope": ("llama", "llama", {"rope_parameters": LONG}),
    "qwen2": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3, yarn": ("qwen3", "qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen2 experts": ("qwen2moe", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3 experts": ("qwen3moe", "qwen3_moe", {**EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "starcoder2": ("starcoder2", "starcoder2", {"rope_parameters": base(1000000.0), "norm_epsilon": 0.01}),
    "starcoder2, no biases": ("starcoder2", "starcoder2", {"use_bias": False}),
    "stablelm": ("stablelm", "stablelm", {"rope_parameters": base(1000.0, partial_rotary_factor=0.5)}),
    "phi3": ("phi3", "phi3", {"sliding_window": 12, "rope_parameters": base(partial_rotary_factor=0.5)}),
    "phi3, longrope": ("phi3", "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {**GEMMA, "sliding_window": 12, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            **GEMMA,
            "sliding_window": 12,
            "num_hidden_layers": 6,
            "rope_parameters": {"sliding_attention": base(5000.0), "full_attention": {**LINEAR, "rope_theta": 50000.0}},
        },
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


def make(folder, model_type="llama", **settings):
    tokenizer = tiny.bpe_tokenizer()
    config = AutoConfig.for_model(model_type, **{**SIZES, "vocab_size": len(tokenizer), **settings})
    return tiny.make_model(folder, config, tokenizer)


def logits(folder, length=40):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(300, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def off(folder, other, length=40):
    expected = logits(other, length)
    return ((logits(folder, length) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_as_the_model_that_it_was_made_from(tmp_path, name):
    architecture, model_type, settings = MODELS[name]
    model = make(tmp_path / "model", model_type, **settings)
    folder = as_folder(write_gguf(tmp_path / "tiny.gguf", model, "F32", architecture=architecture))[0]
    assert off(folder, model) < 1e-4
    assert off(folder, model, length=20) < 1e-4  # shorter than what some scalings began with
    assert differences(AutoConfig.from_pretrained(model), AutoConfig.from_pretrained(folder)) == []
    assert not [warning for warning in read_notes(folder)["warnings"] if "query_pre_attn_scalar" not in warning]


def test_a_file_that_says_less_than_it_could_is_taken_as_llama_cpp_takes_it(tmp_path):
    model = make(tmp_path / "model", head_dim=24)
    lacking = ["rope.dimension_count", "rope.freq_base", "vocab_size"]
    folder = as_folder(write_gguf(tmp_path / "tiny.gguf", model, "F32", leave_out=lacking))[0]
    assert off(folder, model) < 1e-4
    lacking = ["attention.key_length", "attention.value_length"]
    folder = as_folder(write_gguf(tmp_path / "narrow.gguf", model, "F32", leave_out=lacking))[0]
    assert off(folder, model) < 1e-4 and read_notes(folder)["warnings"] == []
    lacking = ["attention.layer_norm_rms_epsilon"]
    folder = as_folder(write_gguf(tmp_path / "guessed.gguf", model, "F32", leave_out=lacking))[0]
    assert "rms_norm_eps; using 1e-06" in read_notes(folder)["warnings"][0]


def test_biases_that_a_file_lacks_are_none(tmp_path):
    model = make(tmp_path / "model", attention_bias=True)
    tensors = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in tensors.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    tensors.save_pretrained(model)
    lacking = [f"blk.{i}.attn_output.bias" for i in range(2)]
    folder = as_folder(write_gguf(tmp_path / "tiny.gguf", model, "F32", leave_out=lacking))[0]
    assert off(folder, model) < 1e-4


def test_frequencies_that_are_not_llama_3s_are_taken_as_they_are(tmp_path):
    model = make(tmp_path / "model")
    factors = torch.tensor([1.0, 1.5, 1.0, 3.0, 2.0, 7.0, 1.0, 9.0])
    file = write_gguf(tmp_path / "tiny.gguf", model, "F32", tensors={"rope_freqs.weight": factors})
    longrope = {"rope_type": "longrope", "short_factor": factors.tolist(), "long_factor": factors.tolist()}
    other = {**longrope, "original_max_position_embeddings": 256, "rope_theta": 10000.0}
    twin = make(tmp_path / "twin", rope_parameters=other)
    folder = as_folder(file)[0]
    assert off(folder, twin) < 1e-4 and off(folder, model) > 1e-3
    same = write_gguf(tmp_path / "same.gguf", model, "F32", tensors={"rope_freqs.weight": torch.ones(8)})
    assert AutoConfig.from_pretrained(as_folder(same)[0]).rope_parameters["rope_type"] == "default"


def test_llama_3s_scaling_is_found_in_its_factors():
    """Those of the published models: 64 frequencies of base 500,000, 8 or 32 times the length of 8,192."""
    for factor in (8.0, 32.0):
        stated = {**LLAMA3, "factor": factor, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
        config = tiny.llama_config(99, hidden=512, head_dim=128, positions=131072, rope_parameters=stated)
        values = rope_factors(config)["rope_freqs.weight"].tolist()
        assert scaling_of_llama_3(values, 500000.0, 128) == {k: v for k, v in stated.items() if k != "rope_theta"}


LOST = {
    "another part of a head": ({"rope.dimension_count": 8}, {}, "llama.rope.dimension_count is 8"),
    "an unknown scaling": ({"rope.scaling.type": "spiral"}, {}, "llama.rope.scaling.type is spiral"),
    "longrope without factors": ({"rope.scaling.type": "longrope"}, {}, "llama.rope.scaling.type is longrope"),
    "a factor of attention": ({"rope.scaling.attn_factor": 1.5}, {}, "llama.rope.scaling.attn_factor is 1.5"),
    "yarn that mixes otherwise": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
        {},
        "llama.rope.scaling.yarn_ext_factor is 0.5",
    ),
    "two scalings": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope_freqs.weight": torch.arange(8) + 1.0},
        "rope_freqs.weight",
    ),
    "too few factors": ({}, {"rope_freqs.weight": torch.ones(3)}, "rope_freqs.weight has 3 values"),
    "one of two tensors": ({}, {"rope_factors_long.weight": torch.ones(8)}, "rope_factors_short.weight"),
    "sections": ({"rope.dimension_sections": [2, 3, 3, 0]}, {}, "llama.rope.dimension_sections is [2, 3, 3, 0]"),
    "a window": ({"attention.sliding_window": 16}, {}, "llama.attention.sliding_window is 16"),
    "a soft cap": ({"attn_logit_softcapping": 5.0}, {}, "llama.attn_logit_softcapping is 5.0"),
    "another scale": ({"attention.scale": 0.5}, {}, "llama.attention.scale is 0.5"),
    "other logits": ({"logit_scale": 0.5}, {}, "llama.logit_scale is 0.5"),
    "experts": ({"expert_count": 8}, {}, "llama.expert_count is 8"),
    "texts both ways": ({"attention.causal": False}, {}, "llama.attention.causal is False"),
    "other values": ({"attention.value_length": 8}, {}, "llama.attention.value_length is 8"),
    "layers of other sizes": ({"feed_forward_length": [96, 48]}, {}, "intermediate_size"),
    "a scaling of another kind of layers": ({"rope.freq_base_swa": 5000.0}, {}, "llama.rope.freq_base_swa is 5000.0"),
    "more layers than tensors": ({"block_count": 2**31}, {}, "llama.block_count is 2147483648"),
    "one layer too many": ({"block_count": 3}, {}, "lacks 9 of the model's tensors"),
    "wide heads": ({"attention.key_length": 2**31}, {}, "llama.attention.key_length is 2147483648"),
    "heads that no tensor has": ({"attention.key_length": 8, "attention.value_length": 8}, {}, "attn_q.weight"),
    "many experts": ({"expert_count": 2**31}, {}, "llama.expert_count is 2147483648"),
    "a tensor of a layer": ({}, {"blk.1.attn_sinks.weight": torch.ones(4)}, "blk.1.attn_sinks.weight"),
    "a picture's tensor": ({}, {"v.blk.0.ln1.weight": torch.ones(4)}, "v.blk.0.ln1.weight"),
    "a tensor of nowhere": ({}, {"halo.weight": torch.ones(4)}, "halo.weight"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", LOST)
def test_what_transformers_cannot_say_is_refused_by_name(tmp_path, plain, name):
    keys, tensors, words = LOST[name]
    file = write_gguf(tmp_path / "tiny.gguf", plain, "F32", keys=keys, tensors=tensors)
    with pytest.raises(ConfigError) as refused:
        as_folder(file)
    assert str(refused.value).startswith(f"{file}: ") and words in str(refused.value)
    assert list((tmp_path / "assets").glob("*/*/*")) == []


def test_what_means_nothing_is_taken_in_silence(tmp_path, plain):
    keys = {
        "attention.sliding_window": 0,
        "attention.scale": 0.25,
        "attention.causal": True,
        "expert_count": 0,
        "logit_scale": 1.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 1.0,
        "tensor_data_layout": "Meta AI original pth",
    }
    folder = as_folder(write_gguf(tmp_path / "tiny.gguf", plain, "F32", keys=keys))[0]
    assert off(folder, plain) < 1e-4 and read_notes(folder)["warnings"] == []


def test_what_nothing_is_known_of_is_a_warning_every_time(tmp_path, plain, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", plain, "F32", keys={"halo": 7, "other.thing": 1})
    config = tiny.write_config(tmp_path / "my.yaml", plain, [file], tmp_path / "out")
    for _ in range(2):  # the second time, the folder is there
        warnings = open_models(load_config(config), fetch=lambda job: None).warnings
        assert len(warnings) == 1 and str(file) in warnings[0] and "llama.halo, other.thing" in warnings[0]


def test_gemmas_divisor_is_told_by_no_key(tmp_path):
    model = make(tmp_path / "model", "gemma2", **{**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 12})
    file = write_gguf(tmp_path / "tiny.gguf", model, "F32", architecture="gemma2")
    folder = as_folder(file)[0]
    assert AutoConfig.from_pretrained(folder).query_pre_attn_scalar == 16  # a head's size, as llama.cpp takes it
    assert "query_pre_attn_scalar" in read_notes(folder)["warnings"][0]
    file = write_gguf(tmp_path / "more.gguf", model, "F32", architecture="gemma2", keys={"attention.scale": 32**-0.5})
    assert off(as_folder(file)[0], model) < 1e-4 and read_notes(as_folder(file)[0])["warnings"] == []


def test_a_merge_of_a_file_has_the_right_configuration(place):
    settings = {"rope_parameters": YARN, "attention_bias": True, "rms_norm_eps": 0.01}
    model = make(place / "base", **settings)
    base = write_gguf(place / "base.gguf", model, "F32")
    one = write_gguf(place / "one.gguf", tiny.make_candidate(place / "one", model), "F32")
    assert merge(place, (base, one), merge_ratios=[1.0], merge_headers=False, layers="0-1") == 0
    assert "WARNING" not in log_of(place)
    assert differences(AutoConfig.from_pretrained(model), AutoConfig.from_pretrained(place / "out")) == []
    merged = AutoModelForCausalLM.from_pretrained(place / "out")
    twin = AutoModelForCausalLM.from_pretrained(model)
    twin.load_state_dict(merged.state_dict())
    twin.save_pretrained(place / "twin")
    assert off(place / "out", place / "twin") < 1e-6


def as_candidate(place, base, candidate):
    config = tiny.write_config(place / "my.yaml", base, [candidate], place / "out")
    return open_models(load_config(config), fetch=lambda job: None)


def test_a_file_that_calls_mistral_llama_merges_with_mistrals_folder(tmp_path):
    model = make(tmp_path / "model", "mistral", sliding_window=None)
    file = write_gguf(tmp_path / "tiny.gguf", model, "F32")
    for base, candidate in ((model, file), (file, model)):
        opened = as_candidate(tmp_path, base, candidate)
        assert opened.base.config.model_type != opened.candidates[0].checkpoint.config.model_type
        assert opened.warnings == []
        expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
        found = opened.candidates[0].read(list(opened.candidates[0].conversion))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_file_named_mistral_is_read_too(tmp_path):
    """transformers takes the architecture of such a file from its name, and then finds no tensor of it."""
    model = make(tmp_path / "model", "mistral", sliding_window=None, rope_parameters=LINEAR)
    folder = as_folder(write_gguf(tmp_path / "tiny.gguf", model, "F32", name="mistral"))[0]
    assert off(folder, model) < 1e-4 and read_notes(folder)["warnings"] == []


def test_what_differs_of_two_that_compute_alike_is_still_told(tmp_path):
    window = make(tmp_path / "window", "mistral", sliding_window=64)
    file = write_gguf(tmp_path / "tiny.gguf", window, "F32", leave_out=["attention.sliding_window"])
    assert "sliding_window is not set (base: 64)" in as_candidate(tmp_path, window, file).warnings[0]
    assert "sliding_window is 64 (base: not set)" in as_candidate(tmp_path, file, window).warnings[0]
    base = make(tmp_path / "base", "mistral", sliding_window=None)
    file = write_gguf(tmp_path / "other.gguf", base, "F32", keys={"rope.freq_base": 500000.0})
    assert "rope_theta is 500000.0 (base: 10000.0)" in as_candidate(tmp_path, base, file).warnings[0]
    wide = write_gguf(tmp_path / "wide.gguf", make(tmp_path / "wide", num_attention_heads=2), "F32")
    with pytest.raises(ConfigError) as refused:
        as_candidate(tmp_path, base, wide)
    assert str(refused.value).startswith(f"{wide} does not fit") and "num_attention_heads is 2" in str(refused.value)


@pytest.mark.parametrize("model_type", ["gemma", "qwen3", "granite", "olmo"])
def test_models_that_compute_otherwise_are_refused(tmp_path, plain, model_type):
    """Of some of them, all tensors have the names and shapes of a Llama's."""
    more = {"head_dim": 16} if model_type in ("gemma", "qwen3") else {}
    model = make(tmp_path / "model", model_type, **more)
    file = write_gguf(tmp_path / "tiny.gguf", plain, "F32")
    with pytest.raises(ConfigError) as refused:
        as_candidate(tmp_path, model, file)
    assert str(refused.value) == f"{file} does not fit the base: architecture is llama, the base's is {model_type}"

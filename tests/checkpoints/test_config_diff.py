"""What two configurations make of the same weights: every key that bears a meaning is told, and no other."""

import architectures
import pytest
import transformers
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from modules.checkpoints.architecture import makes_the_same
from modules.checkpoints.config_diff import clashes, differences

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FULL, SLIDING = "full_attention", "sliding_attention"


def config(name, **settings):
    """A configuration as config.json would give it, keys that its class does not know included."""
    known = architectures.configuration(name, 300).to_dict()
    if {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct"} & settings.keys():
        del known["rope_parameters"]
    return type(architectures.configuration(name, 300)).from_dict({**known, **settings})


# Architecture, the base's settings, the candidate's, what is said of each difference in turn. Keys that are one number
# each are tried for all architectures below.
OTHER = [
    ("Llama", {}, {"rope_theta": 5e5}, ["rope_theta is 500000.0 (base: 10000.0)"]),
    ("Llama", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type is linear", "factor is 2.0"]),
    ("Llama", {}, {"rope_scaling": LLAMA3}, ["rope_type is llama3", "factor is 8.0", "low_freq_factor", "high_freq"]),
    ("Llama", {"rope_scaling": YARN}, {"rope_scaling": {**YARN, "factor": 8.0}}, ["factor is 8.0 (base: 4.0)"]),
    (
        "Llama",
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}},
        ["original_max_position_embeddings is 64 (base: 32)"],
    ),
    ("Phi", {}, {"partial_rotary_factor": 0.25}, ["partial_rotary_factor is 0.25 (base: 0.5)"]),
    ("GPT-NeoX", {}, {"rotary_pct": 0.5}, ["partial_rotary_factor is 0.5 (base: 0.25)"]),
    ("Llama", {}, {"hidden_act": "gelu"}, ["hidden_act is gelu (base: silu)"]),
    ("Gemma 2", {}, {"hidden_activation": "gelu"}, ["hidden_activation is gelu"]),
    ("GPT-2", {}, {"activation_function": "relu"}, ["activation_function is relu"]),
    ("Mistral", {"sliding_window": 96}, {"sliding_window": None}, ["sliding_window is not set (base: 96)"]),
    ("Gemma 2", {}, {"sliding_window": 32}, ["sliding_window is 32 (base: 96)"]),
    ("Gemma 3", {}, {"layer_types": [FULL, SLIDING]}, ["layer_types is ['full_attention', 'sliding_attention']"]),
    ("Gemma 2", {}, {"attn_logit_softcapping": None}, ["attn_logit_softcapping is not set (base: 50.0)"]),
    ("MPT", {}, {"attn_config": {"alibi": False, "clip_qkv": 8.0}}, ["attn_config.alibi is False", "clip_qkv is 8"]),
    ("Llama", {}, {"tie_word_embeddings": True}, ["tie_word_embeddings is True (base: False)"]),
    ("Llama", {}, {"rope_theta": 5e5, "rms_norm_eps": 1e-5}, ["rms_norm_eps", "rope_theta"]),
]

# The same meaning, spelt otherwise.
SAME = [
    ("Llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}),
    (
        "Llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2}},
    ),
    ("Llama", {}, {"rope_scaling": {"type": "linear", "factor": 1.0}}),
    ("Llama", {"rope_scaling": YARN}, {"rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1}}),
    ("Llama", {"rope_scaling": None}, {}),
    ("Llama", {}, {"hidden_act": "swish"}),
    ("GPT-2", {}, {"activation_function": "gelu_pytorch_tanh"}),
    ("Llama", {}, {"head_dim": None}),
    ("Llama", {}, {"max_position_embeddings": 4096}),
    ("GPT-2", {}, {"n_positions": 64}),
    ("Qwen2", {"max_window_layers": 21}, {"sliding_window": 32}),
    ("Qwen2", {"use_sliding_window": False, "sliding_window": 4096}, {"use_sliding_window": False}),
    ("Llama", {}, {"vocab_size": 999, "dtype": "float16", "torch_dtype": "float16", "use_cache": False}),
    ("Llama", {}, {"bos_token_id": 5, "eos_token_id": [1, 2], "pad_token_id": 3, "architectures": ["Other"]}),
    ("Llama", {}, {"attention_dropout": 0.3, "initializer_range": 1.0, "pretraining_tp": 2, "_name_or_path": "x"}),
    ("Mixtral", {}, {"router_aux_loss_coef": 0.5, "output_router_logits": True, "router_jitter_noise": 0.1}),
    (
        "Llama",
        {"own_heads": 2},
        {"own_heads": 3, "unsloth_fixed": True, "unsloth_version": "1", "head_type": 3, "id2label": {"0": "x"}},
    ),
]


@pytest.mark.parametrize("name, ours, theirs, said", OTHER)
def test_another_meaning_is_told_key_by_key(name, ours, theirs, said):
    found = differences(config(name, **ours), config(name, **theirs))
    assert len(found) >= len(said)
    for words in said:
        assert any(words in line for line in found), found
    assert differences(config(name, **theirs), config(name, **theirs)) == []


@pytest.mark.parametrize("name, ours, theirs", SAME)
def test_another_spelling_of_the_same_is_not_told(name, ours, theirs):
    ours, theirs = config(name, **ours), config(name, **theirs)
    assert differences(ours, theirs) == differences(theirs, ours) == clashes(ours, theirs) == []


def test_a_rotary_base_for_each_kind_of_layer_is_told_in_either_spelling():
    kinds = {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "default", "rope_theta": 1e6},
    }
    new, old = config("Gemma 3"), config("Gemma 3", rope_theta=1e6, rope_local_base_freq=10000.0)
    assert differences(new, old) == differences(config("Gemma 3", rope_parameters=kinds), new) == []
    other = config("Gemma 3", rope_theta=1e6, rope_local_base_freq=20000.0)
    assert differences(new, other) == ["sliding_attention.rope_theta is 20000.0 (base: 10000.0)"]


def test_long_lists_are_told_by_the_places_where_they_differ():
    kinds = [SLIDING, FULL] * 8
    sizes = {"num_hidden_layers": 16}
    ours, theirs = (config("Gemma 3", **sizes, layer_types=types) for types in (kinds, [*kinds[:12], *kinds[11:15]]))
    assert differences(ours, theirs) == ["layer_types differs at index 12, 13, 14 and 1 more"]


# Keys of the architectures of docs/internals.md that are rightly never told; every other one is, by name.
SILENT = {
    *("vocab_size", "use_cache", "initializer_range", "init_std", "init_device", "is_decoder", "add_cross_attention"),
    *("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "emb_pdrop", "dropout", "hidden_dropout"),
    *("classifier_dropout", "embedding_dropout", "residual_dropout", "layerdrop", "summary_first_dropout"),
    *("pretraining_tp", "summary_type", "summary_use_proj", "summary_proj_to_labels", "reorder_and_upcast_attn"),
    *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "rescale_prenorm_residual"),
    *("time_step_floor", "time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan"),
    *("slow_but_exact", "num_nextn_predict_layers"),
    *("max_position_embeddings", "n_positions", "max_seq_len"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_key_of_every_architecture_is_told_or_known_to_be_harmless(name):
    base = architectures.configuration(name, 300)
    keys = {*type(base).__dataclass_fields__} - {*PreTrainedConfig().to_dict()}
    told = 0
    for key, value in base.to_dict().items():
        if key not in keys or "window" in key or not isinstance(value, bool | float | int):
            continue
        other = architectures.configuration(name, 300)
        try:
            setattr(other, key, not value if isinstance(value, bool) else value + 1)
        except Exception:  # a value that the class refuses is not there to be told
            continue
        found = any(line.startswith(f"{key} ") for line in differences(base, other))
        assert found != (key in SILENT), f"{key}: {differences(base, other)}"
        told += found
    assert told > 3


def test_heads_that_give_the_same_shapes_clash():
    ours = config("Llama", num_attention_heads=4, head_dim=8)
    theirs = config("Llama", num_attention_heads=8, head_dim=4, num_key_value_heads=4)
    assert "num_attention_heads is 8 (base: 4)" in clashes(ours, theirs)
    assert "head_dim is 4 (base: 8)" in clashes(ours, theirs)
    assert clashes(ours, ours) == []


def test_settings_of_each_layers_own_are_compared_layer_by_layer():
    sizes = {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 32,
        "head_dim": 8,
    }
    ours = AutoConfig.for_model("qwen3", **sizes, per_layer_config={1: {"num_attention_heads": 8, "sliding_window": 8}})
    same = AutoConfig.for_model("qwen3", **sizes, per_layer_config={1: {"num_attention_heads": 8, "sliding_window": 8}})
    assert differences(ours, same) == []
    said = differences(ours, AutoConfig.for_model("qwen3", **sizes))
    assert said == ["num_attention_heads is 4 (base: [4, 8, 4])"]


@pytest.mark.parametrize("other, same", [("MistralConfig", True), ("SmolLM3Config", False)])
def test_architectures_that_compute_the_same_are_found_by_trying(other, same):
    """SmolLM3 leaves positions out in every fourth layer, so two layers would not tell it from a Llama."""
    ours = LlamaConfig(num_hidden_layers=6, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert makes_the_same(ours, getattr(transformers, other)()) is same

"""Settings by which two configurations compute differently with the same weights; their architectures may differ.

Knows: configurations as transformers reads them, with old spellings of keys already replaced.
Refuses to know: weights, files.

Every key that a configuration's class knows is compared, but for those that do not change a trained model's forward.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from fnmatch import translate
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedConfig

from modules.runtime.text import listed, shortened

# Training, generation, housekeeping; sizes of the vocabulary, which the merge of the header checks.
_WITHOUT_MEANING = (
    "*_token_id", "*_token_index", "*dropout*", "*pdrop", "*layerdrop", "init_*", "initializer*", "*_init_*",
    "time_step_floor", "time_step_scale", "rescale_prenorm_residual", "pretraining_tp", "*aux_loss*", "*_loss_*",
    "*jitter*", "output_router_logits", "summary_*", "classifier_*", "*gradient_checkpointing*", "use_cache",
    "vocab_size*", "torch_dtype", "*_impl", "reorder_and_upcast_attn", "slow_but_exact", "use_mambapy",
    "use_associative_scan", "num_nextn_predict_layers", "is_decoder", "add_cross_attention", "quantization_config",
    "auto_map",
)  # fmt: skip

# The context length: it changes the forward only where positions are scaled by it.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
_SCALED_BY_LENGTH = ("dynamic", "longrope")

# Settings that say each layer's kind where layer_types is not set.
_KINDS_OF_LAYERS = (
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "full_attn_idxs",
)  # fmt: skip

_MUST_AGREE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")

_SAME_FUNCTION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}
_ROPE_WHERE_NOT_SCALED = ("rope_theta", "partial_rotary_factor", "rope_type")


def differences(base: PreTrainedConfig, other: PreTrainedConfig) -> list[str]:
    """A phrase for every key that the other sets to a different meaning, naming both values."""
    base_meaning = _meaning(base)
    other_meaning = _meaning(other)
    keys = [
        key
        for key in dict.fromkeys([*base_meaning, *other_meaning])
        if not _equal(other_meaning.get(key), base_meaning.get(key))
    ]
    return [_in_words(key, other_meaning.get(key), base_meaning.get(key)) for key in keys]


def clashes(base: PreTrainedConfig, other: PreTrainedConfig) -> list[str]:
    """A phrase for every differing key in which models to be merged must agree. Those that count heads are among them:
    weights of equal shape would mix rows of different heads."""
    base_values = {key: setting(base.get_text_config(), key) for key in _MUST_AGREE}
    other_values = {key: setting(other.get_text_config(), key) for key in _MUST_AGREE}
    base_meaning = _meaning(base)
    other_meaning = _meaning(other)
    for key, value in base_meaning.items():
        is_alias = key in base.get_text_config().attribute_map.values()
        if "head" in key and not is_alias and _is_count(value) and _is_count(other_meaning.get(key)):
            base_values[key] = value
            other_values[key] = other_meaning[key]
    return [
        _in_words(key, other_values[key], base_values[key])
        for key in base_values
        if other_values[key] != base_values[key]
    ]


def ties_header(config: PreTrainedConfig) -> bool:
    """Whether a configuration ties the output head to the input embedding: they then are one tensor, unless a file
    holds both and they differ."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def layer_settings(config: PreTrainedConfig, key: str) -> list[Any]:
    """Each decoder layer's value of a setting, None where missing. Most configurations have one value for all layers,
    some a list; some have a configuration for each layer and no common value."""
    text = config.get_text_config()
    values = [getattr(layer, key, None) for layer in text.per_layer_config]
    return list(values[0]) if values and isinstance(values[0], list) and len(values[0]) == len(values) else values


def setting(config: PreTrainedConfig, key: str) -> Any:
    """A setting's value if all layers have the same, else a list with each layer's."""
    values = layer_settings(config, key)
    return values if any(value != values[0] for value in values) else next(iter(values), None)


def _equal(base_value: Any, other_value: Any) -> bool:
    """Whether two settings mean the same; False is the same as a setting that an architecture does not have."""
    both_off = (base_value is None or base_value is False) and (other_value is None or other_value is False)
    return both_off or base_value == other_value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def known_keys(kind: type[PreTrainedConfig]) -> set[str]:
    """The keys that a configuration's class knows. Fine-tuners add others, which no code reads."""
    parameters = inspect.signature(kind.__init__).parameters
    return {*parameters, *getattr(kind, "__dataclass_fields__", ()), "rope_parameters", "tie_word_embeddings"}


def _meaning(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of the text model that change its forward, by key; nested keys are joined with dots."""
    text = config.get_text_config()
    keys = known_keys(type(text))
    settings = {key: value for key, value in text.to_dict().items() if key in keys}
    settings["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))  # the whole model's counts
    ignored = {*_WITHOUT_MEANING, *PreTrainedConfig().to_dict(), *_LENGTHS}  # names, and patterns of names
    rope = [part for _, part in _flat("", settings.get("rope_parameters")) if isinstance(part, str)]
    if any(kind in _SCALED_BY_LENGTH for kind in rope):
        ignored.difference_update(_LENGTHS)
    if settings.get("layer_types"):
        ignored.update(_KINDS_OF_LAYERS)
        if "sliding" not in str(settings["layer_types"]):
            ignored.add("sliding_window")
    settings |= {key: setting(text, key) for key in getattr(text, "per_layer_attributes", None) or ()}
    heads = setting(text, "num_attention_heads")
    width = setting(text, "hidden_size")
    if "head_dim" in keys and settings.get("head_dim") is None and _is_count(heads) and _is_count(width):
        settings["head_dim"] = width // max(heads, 1)
    settings["rope_parameters"] = _rope(settings.get("rope_parameters"))
    ignored_key = re.compile("|".join(map(translate, ignored)))
    meaning = {}
    for key, value in _flat("", settings):
        is_ignored = any(ignored_key.match(part) for part in key.split("."))
        if value is not None and not is_ignored:
            meaning[key] = _plain(key, value)
    return meaning


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}".lstrip("."), inner)


def _rope(parameters: Any) -> Any:
    """Rotary parameters without those that have their default value; nested by kind of layer in some architectures."""
    if not isinstance(parameters, Mapping):
        return parameters
    if any(isinstance(inner, Mapping) for inner in parameters.values()):
        return {kind: _rope(inner) for kind, inner in parameters.items()}
    settings = {key: value for key, value in parameters.items() if key != "type" and _ROPE_DEFAULTS.get(key) != value}
    if settings.get("rope_type") == "linear" and settings.get("factor") == 1:
        settings["rope_type"] = "default"
    if settings.get("rope_type") == "default":
        settings = {key: value for key, value in settings.items() if key in _ROPE_WHERE_NOT_SCALED}
    return settings


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, str) and "act" in key:
        return _SAME_FUNCTION.get(value, value)
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value  # what was in float32 once is the same


def _in_words(key: str, other_value: Any, base_value: Any) -> str:
    name = key.removeprefix("rope_parameters.")
    if isinstance(other_value, list) and isinstance(base_value, list) and max(len(other_value), len(base_value)) > 4:
        indices = [
            str(i)
            for i, (other_item, base_item) in enumerate(zip_longest(other_value, base_value))
            if other_item != base_item
        ]
        return f"{name} differs at index {listed(indices)}"
    return f"{name} is {_shown(other_value)} (base: {_shown(base_value)})"


def _shown(value: Any) -> str:
    return "not set" if value is None else shortened(str(value), 60, keep="start")

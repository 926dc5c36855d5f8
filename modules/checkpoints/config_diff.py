"""Where two configurations make something else of the same weights, of one architecture or of two that compute alike.

Knows: configurations as transformers reads them, in which old and new spellings are one.
Refuses to know: weights, files.

Every key that a configuration's class knows is compared, but for those without a part in a trained model's forward.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from fnmatch import translate
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedConfig

from modules.runtime.text import listed, shortened

# Training, generation, housekeeping; sizes of the vocabulary, which the header looks after.
_WITHOUT_MEANING = (
    "*_token_id", "*_token_index", "*dropout*", "*pdrop", "*layerdrop", "init_*", "initializer*", "*_init_*",
    "time_step_floor", "time_step_scale", "rescale_prenorm_residual", "pretraining_tp", "*aux_loss*", "*_loss_*",
    "*jitter*", "output_router_logits", "summary_*", "classifier_*", "*gradient_checkpointing*", "use_cache",
    "vocab_size*", "torch_dtype", "*_impl", "reorder_and_upcast_attn", "slow_but_exact", "use_mambapy",
    "use_associative_scan", "num_nextn_predict_layers", "is_decoder", "add_cross_attention", "quantization_config",
    "auto_map",
)  # fmt: skip

# How many tokens a model is meant for: of meaning only where positions are scaled by it.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
_SCALED_BY_LENGTH = ("dynamic", "longrope")

# What a layer's kind is told by, where layer_types does not tell it.
_KINDS_OF_LAYERS = (
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "full_attn_idxs",
)  # fmt: skip

_MUST_AGREE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")

_SAME_FUNCTION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}
_ROPE_WHERE_NOT_SCALED = ("rope_theta", "partial_rotary_factor", "rope_type")


def differences(base: PreTrainedConfig, other: PreTrainedConfig) -> list[str]:
    """A phrase for every key in which the other means something else, naming both values."""
    ours = _meaning(base)
    theirs = _meaning(other)
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if not _equal(theirs.get(key), ours.get(key))]
    return [_in_words(key, theirs.get(key), ours.get(key)) for key in keys]


def clashes(base: PreTrainedConfig, other: PreTrainedConfig) -> list[str]:
    """The same of the keys in which models that merge can't differ. Those that count heads are among them: weights of
    equal shape would mix what belongs to other heads."""
    ours = {key: setting(base.get_text_config(), key) for key in _MUST_AGREE}
    theirs = {key: setting(other.get_text_config(), key) for key in _MUST_AGREE}
    our_meaning = _meaning(base)
    their_meaning = _meaning(other)
    for key, value in our_meaning.items():
        is_alias = key in base.get_text_config().attribute_map.values()
        if "head" in key and not is_alias and _is_count(value) and _is_count(their_meaning.get(key)):
            ours[key] = value
            theirs[key] = their_meaning[key]
    return [_in_words(key, theirs[key], ours[key]) for key in ours if theirs[key] != ours[key]]


def ties_header(config: PreTrainedConfig) -> bool:
    """Whether a configuration ties the output head to the input embedding: they then are one, unless a file holds both
    and they differ."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def layer_settings(config: PreTrainedConfig, key: str) -> list[Any]:
    """A setting of each decoder layer, None where there is none: most configurations have one for all layers, some a
    list, some another configuration for each layer, and then none for all."""
    text = config.get_text_config()
    found = [getattr(layer, key, None) for layer in text.per_layer_config]
    return list(found[0]) if found and isinstance(found[0], list) and len(found[0]) == len(found) else found


def setting(config: PreTrainedConfig, key: str) -> Any:
    """A setting that all layers have alike, or a list with each layer's."""
    found = layer_settings(config, key)
    return found if any(value != found[0] for value in found) else next(iter(found), None)


def _equal(ours: Any, theirs: Any) -> bool:
    """Whether two settings mean the same; what is off is as good as what another architecture does not have."""
    both_off = (ours is None or ours is False) and (theirs is None or theirs is False)
    return both_off or ours == theirs


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def known_keys(kind: type[PreTrainedConfig]) -> set[str]:
    """The keys that a configuration's class knows; fine-tuners add others, which nothing reads."""
    parameters = inspect.signature(kind.__init__).parameters
    return {*parameters, *getattr(kind, "__dataclass_fields__", ()), "rope_parameters", "tie_word_embeddings"}


def _meaning(config: PreTrainedConfig) -> dict[str, Any]:
    """The keys of the text model's configuration that bear a meaning, nested ones with dots between."""
    text = config.get_text_config()
    keys = known_keys(type(text))
    known = {key: value for key, value in text.to_dict().items() if key in keys}
    known["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))  # the whole model's counts
    ignored = {*_WITHOUT_MEANING, *PreTrainedConfig().to_dict(), *_LENGTHS}  # names, and patterns of names
    rope = [part for _, part in _flat("", known.get("rope_parameters")) if isinstance(part, str)]
    if any(kind in _SCALED_BY_LENGTH for kind in rope):
        ignored.difference_update(_LENGTHS)
    if known.get("layer_types"):
        ignored.update(_KINDS_OF_LAYERS)
        if "sliding" not in str(known["layer_types"]):
            ignored.add("sliding_window")
    known |= {key: setting(text, key) for key in getattr(text, "per_layer_attributes", None) or ()}
    heads = setting(text, "num_attention_heads")
    width = setting(text, "hidden_size")
    if "head_dim" in keys and known.get("head_dim") is None and _is_count(heads) and _is_count(width):
        known["head_dim"] = width // max(heads, 1)
    known["rope_parameters"] = _rope(known.get("rope_parameters"))
    ignored_key = re.compile("|".join(map(translate, ignored)))
    meaning = {}
    for key, value in _flat("", known):
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
    """Rotary embeddings without what is as good as absent; of some architectures, for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return parameters
    if any(isinstance(inner, Mapping) for inner in parameters.values()):
        return {kind: _rope(inner) for kind, inner in parameters.items()}
    kept = {key: value for key, value in parameters.items() if key != "type" and _ROPE_DEFAULTS.get(key) != value}
    if kept.get("rope_type") == "linear" and kept.get("factor") == 1:
        kept["rope_type"] = "default"
    if kept.get("rope_type") == "default":
        kept = {key: value for key, value in kept.items() if key in _ROPE_WHERE_NOT_SCALED}
    return kept


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, str) and "act" in key:
        return _SAME_FUNCTION.get(value, value)
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value  # what was in float32 once is the same


def _in_words(key: str, theirs: Any, ours: Any) -> str:
    name = key.removeprefix("rope_parameters.")
    if isinstance(theirs, list) and isinstance(ours, list) and max(len(theirs), len(ours)) > 4:
        places = [str(i) for i, (one, other) in enumerate(zip_longest(theirs, ours)) if one != other]
        return f"{name} differs at index {listed(places)}"
    return f"{name} is {_shown(theirs)} (base: {_shown(ours)})"


def _shown(value: Any) -> str:
    return "not set" if value is None else shortened(str(value), 60, keep="start")

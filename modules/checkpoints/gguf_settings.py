"""Compares a GGUF file's keys with the configuration that transformers makes from them.

Knows: the names of llama.cpp's keys in configurations, and which keys do not change a forward.
Refuses to know: tensors, modules; the keys of the tokenizer.

transformers reads some keys of each architecture and ignores the others, so it may build another model. Here each key
is compared: the configuration agrees, or is changed to agree, or the file is refused with the key's name. A key that
neither side knows is a warning.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from modules.checkpoints.config_diff import known_keys
from modules.checkpoints.config_file import MOST_LAYERS
from modules.checkpoints.gguf_header import GgufHeader
from modules.checkpoints.gguf_rope import ROPE_KEYS, head_width, rope_parameters
from modules.runtime.errors import ConfigError
from modules.runtime.text import listed, shortened

# An architecture's keys and their names in configurations: the first name that the configuration's class knows counts.
_NAMES = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("global_head_dim", "head_dim"),
    "attention.value_length": ("v_head_dim", "global_head_dim", "head_dim"),
    "attention.key_length_swa": ("head_dim",),
    "attention.value_length_swa": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.scale": ("attention_multiplier",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.max_alibi_bias": (),
    "attention.causal": (),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "router_logit_softcapping": (),
    "logit_scale": ("logit_scale",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_gating_func": ("scoring_func",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "moe_every_n_layers": (),
    "full_attention_interval": ("full_attention_interval",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "shortconv.l_cache": ("conv_L_cache",),
}

_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")

# Sizes that a model is built with; none can exceed the largest axis of the file's tensors.
_SIZES = (
    *("embedding_length", "block_count", "feed_forward_length", "expert_feed_forward_length", "vocab_size"),
    *("expert_shared_feed_forward_length", "expert_count", "expert_used_count", "expert_shared_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count", "rope.dimension_count_swa"),
)

# Values that change nothing where a configuration's class has no such setting; zero is another, for every key.
_NEUTRAL = {
    "attention.causal": True,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
    "expert_weights_scale": 1,
    "expert_gating_func": 1,  # softmax
}
_NOT_NEEDED = ("context_length", "attention.head_count_kv")  # if the class has no such setting
_GATES = {1: "softmax", 2: "sigmoid"}  # expert_gating_func

_DIVISOR = "query_pre_attn_scalar"

# A setting that modules read even if their configuration's class does not know it; if one did not, no shape would fit.
_ALWAYS_READ = "head_dim"

# Without effect on a forward, or implied by shapes of tensors, which transformers compares.
_NOT_COMPARED = ("tensor_data_layout", "pooling_type", "nextn_predict_layers", "ssm.*", "decoder_start_token_id")
_OF_NO_ARCHITECTURE = ("general", "tokenizer", "split", "quantize", "imatrix")  # first parts of keys

# Models whose attention divides by the root of hidden size / heads, not of the head's size; llama.cpp knows them only
# by their number of layers (src/llama-model.cpp: LLM_TYPE_27B).
_SCALED_BY_WIDTH = (("gemma2", 46), ("gemma3", 62))


def check_sizes(header: GgufHeader) -> None:
    """Raise ConfigError if a key claims more layers than the file has tensors, or a size larger than any tensor's: a
    model is built with these numbers before its tensors are read."""
    largest = max(max(tensor.shape) for tensor in header.tensors.values())
    for key in _SIZES:
        value = header.setting(key)
        limit = min(len(header.tensors), MOST_LAYERS) if key == "block_count" else largest
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not 0 <= number <= limit:
                raise ConfigError(
                    f"{header.file}: {header.architecture}.{key} is {number}, but its tensors allow at most {limit}"
                )


def settle(
    config: PreTrainedConfig, header: GgufHeader, factors: Mapping[str, list[float]]
) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration changed to agree with the file; warnings about unknown keys and guessed values.

    factors: see `rope_parameters`. Raises ConfigError, naming the key, if the class can't represent its value.
    """
    config = _for_architecture(config, header)
    settled = _changed(config, _changes(config, header))
    if getattr(settled, "rope_parameters", None):
        settled = _with_rotation(settled, rope_parameters(settled, header, factors), header)
    unrepresented = _unrepresented(settled, header, factors)
    if unrepresented:
        raise header.refusal(
            f"{', '.join(unrepresented[:3])}, which transformers' {type(settled).__name__} can't represent"
        )
    return settled, [*_unknown(header), *_guesses(config, settled, header)]


def _for_architecture(config: PreTrainedConfig, header: GgufHeader) -> PreTrainedConfig:
    """The configuration in the class of the file's architecture: of a model named "mistral", transformers takes the
    architecture from the name, and then can't place its tensors."""
    if config.model_type == header.architecture or config.model_type != header.keys.get("general.name"):
        return config
    kind = CONFIG_MAPPING[header.architecture]
    known_names = known_keys(kind) - {"model_type", "architectures"}
    return kind.from_dict({key: value for key, value in config.to_dict().items() if key in known_names})


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A new configuration with these changes; derived settings are computed again."""
    return type(config).from_dict({**config.to_dict(), **changes}) if changes else config


def _with_rotation(config: PreTrainedConfig, parameters: Mapping[str, Any], header: GgufHeader) -> PreTrainedConfig:
    """The configuration with these rope_parameters. Raises ConfigError if its class changes or refuses them."""
    changes: dict[str, Any] = {"rope_parameters": dict(parameters)}
    original = "original_max_position_embeddings"
    if parameters.get(original) and original in known_keys(type(config)):
        changes[original] = parameters[original]
    try:
        changed = _changed(config, changes)
        if _equal(parameters, changed.rope_parameters):
            return changed
    except Exception:  # of a class that does not know the scaling
        pass
    raise header.refusal(
        f"transformers' {type(config).__name__} does not support its rotary scaling "
        f"({header.architecture}.rope.scaling)"
    )


def _changes(config: PreTrainedConfig, header: GgufHeader) -> dict[str, Any]:
    """The settings that differ in the file, by the configuration's own keys."""
    changes: dict[str, Any] = {}
    settled = set()  # names that an earlier key has set; `_unrepresented` compares the later keys
    for key in _NAMES:
        name = _config_name(config, key)
        value = _file_value(config, header, key)
        if name is None or name in settled or value is None:
            continue
        settled.add(name)
        if not _is_implied(config, key, value):
            changes[config.attribute_map.get(name, name)] = value
    if _DIVISOR in known_keys(type(config)):
        changes[_DIVISOR] = _attention_divisor(config, header)
    if (getattr(config, "pad_token_id", None) or 0) >= header.setting("vocab_size", math.inf):
        changes["pad_token_id"] = None  # the class's default, which the file does not set
    layer_types = _layer_types(config, header)
    if layer_types is not None:
        changes["layer_types"] = layer_types
    return {key: value for key, value in changes.items() if not _equal(value, getattr(config, key, None))}


def _config_name(config: PreTrainedConfig, key: str) -> str | None:
    """A key's name in a configuration, if its class has such a setting."""
    known_names = {*known_keys(type(config)), *config.attribute_map, _ALWAYS_READ}
    return next((name for name in _NAMES[key] if name in known_names), None)


def _file_value(config: PreTrainedConfig, header: GgufHeader, key: str) -> Any:
    """A key's value as a configuration would have it; None if neither the file nor llama.cpp's defaults give one."""
    value = header.setting(key)
    if isinstance(value, list):  # one for each layer; 0 for a layer without
        values = {entry for entry in value if entry}
        value = values.pop() if len(values) == 1 else value
    if key == "attention.key_length" and value is None:
        # The size of a head then follows from the first layer's query weight, if there is one.
        heads = header.setting("attention.head_count")
        query = header.tensors.get("blk.0.attn_q.weight")
        if isinstance(heads, int) and heads:
            return (query.shape[0] if query else config.hidden_size) // heads
    if key == "attention.sliding_window" and value == 0:
        return None
    if key == "block_count" and value is not None:
        return value - header.setting("nextn_predict_layers", 0)
    return _GATES.get(value, value) if key == "expert_gating_func" else value


def _attention_divisor(config: PreTrainedConfig, header: GgufHeader) -> float:
    """The number whose root divides attention's scores."""
    scale = header.setting("attention.scale")
    if scale:
        return round(scale**-2) if math.isclose(scale**-2, round(scale**-2), rel_tol=1e-6) else scale**-2
    if (header.architecture, config.num_hidden_layers) in _SCALED_BY_WIDTH:
        return config.hidden_size // config.num_attention_heads
    return header.setting("attention.key_length") or head_width(config)


def _layer_types(config: PreTrainedConfig, header: GgufHeader) -> list[str] | None:
    """Each layer's kind, if the file says which have a window. A number n there means that every n-th has none."""
    pattern = header.setting("attention.sliding_window_pattern")
    current_types = getattr(config, "layer_types", None)
    if pattern is None or not current_types or set(current_types) - {"sliding_attention", "full_attention"}:
        return None
    if not isinstance(pattern, list):
        pattern = [not pattern or number % pattern < pattern - 1 for number in range(len(current_types))]
    return ["sliding_attention" if local else "full_attention" for local in pattern]


def _is_implied(config: PreTrainedConfig, key: str, value: Any) -> bool:
    """Whether a value is the one that holds where a configuration does not set it."""
    name = _config_name(config, key)
    if name is not None and getattr(config, name, None) is not None:
        return False
    if (not value and key != "attention.causal") or (name is None and key in _NOT_NEEDED):
        return True
    width = config.hidden_size // (getattr(config, "num_attention_heads", None) or 1)
    implied = {
        "feed_forward_length": 4 * config.hidden_size,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.scale": width**-0.5,
        **_NEUTRAL,
    }
    return key in implied and _equal(value, implied[key])


def _unrepresented(config: PreTrainedConfig, header: GgufHeader, factors: Mapping[str, list[float]]) -> list[str]:
    """Keys of the file, with their values, that the settled configuration does not represent; names of rope tensors."""
    unrepresented = []
    for key in _NAMES:
        name = _config_name(config, key)
        value = _file_value(config, header, key)
        if value is None or header.setting(key) is None or _is_implied(config, key, value):
            continue
        if key == "attention.scale" and _DIVISOR in known_keys(type(config)):
            continue
        if name is None or not _equal(value, getattr(config, name, None)):
            unrepresented.append(key)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        unrepresented += [key for key in ROPE_KEYS if header.setting(key) and key != "rope.dimension_count"]
    sections = [part for part in header.setting("rope.dimension_sections") or () if part]
    if sections and (rope or {}).get("mrope_section") != sections:
        unrepresented.append("rope.dimension_sections")
    pattern = "attention.sliding_window_pattern"
    if header.setting(pattern) and _layer_types(config, header) != getattr(config, "layer_types", None):
        unrepresented.append(pattern)
    named = [
        f"{header.architecture}.{key} is {shortened(str(header.setting(key)), 40, keep='start')}"
        for key in unrepresented
    ]
    return named if rope else [*named, *factors]


def _unknown(header: GgufHeader) -> list[str]:
    """A line about the keys that are unknown here, if any."""
    handled = (*_NAMES, *ROPE_KEYS, "attention.sliding_window_pattern", *_NOT_COMPARED)
    unknown_keys = []
    for key in header.keys:
        section, _, name = key.partition(".")
        is_known = any(fnmatch(name, pattern) for pattern in handled) if section == header.architecture else False
        if not is_known and section not in _OF_NO_ARCHITECTURE:
            unknown_keys.append(key)
    if not unknown_keys:
        return []
    return [f"ignoring unknown keys ({listed(unknown_keys, 5)}); if they matter, the model computes something else"]


def _guesses(original: PreTrainedConfig, settled: PreTrainedConfig, header: GgufHeader) -> list[str]:
    """Lines about settings that the file leaves open and that had to be guessed."""
    guessed = []
    divisor = getattr(settled, _DIVISOR, None)
    if not header.setting("attention.scale") and divisor != getattr(original, _DIVISOR, None):
        guessed.append(f"{_DIVISOR}; using {divisor}, as llama.cpp does")
    names = [name for key in _EPSILONS if (name := _config_name(settled, key))]
    if names and not any(header.setting(key) for key in _EPSILONS):
        guessed.append(f"{names[0]}; using {getattr(settled, names[0])}, as transformers does")
    return [f"the file does not set {guess}, which may be wrong" for guess in guessed]


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings are equal; numbers may have been rounded to float32."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_equal(a.get(key), b.get(key)) for key in {*a, *b})
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b or (not a and not b)

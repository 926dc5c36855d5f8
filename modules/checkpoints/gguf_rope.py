"""The rotary embedding of a GGUF file, as transformers' rope_parameters.

Knows: which keys and tensors llama.cpp takes it from, and what it takes where they are missing. Refuses to know: files,
modules.

Sources: llama.cpp's src/llama-model.cpp (load_hparams), src/llama-context.cpp (the attention factor of YaRN) and
convert_hf_to_gguf.py (the factors of Llama 3 and LongRoPE, which are tensors).
"""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from modules.checkpoints.gguf_header import GgufHeader
from modules.runtime.errors import ConfigError

FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # each divides frequencies
ROPE_KEYS = frozenset(
    f"rope.{name}"
    for name in (
        *("freq_base", "freq_base_swa", "dimension_count", "dimension_count_swa", "dimension_sections", "scale_linear"),
        *("scaling.type", "scaling.factor", "scaling.original_context_length", "scaling.attn_factor"),
        *("scaling.finetuned", "scaling.yarn_ext_factor", "scaling.yarn_attn_factor", "scaling.yarn_log_multiplier"),
        *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
    )
)
_BASE = 10000.0  # where no key tells another
_CLOSE = 1e-5  # of two factors, relative
# low_freq_factor and high_freq_factor of all models with Llama 3's scaling
_LOW = 1.0
_HIGH = 4.0
_OWN_KINDS = ("default", "linear", "yarn", "longrope", "llama3")  # not an architecture's special one


def rope_parameters(config: PreTrainedConfig, header: GgufHeader, factors: Mapping[str, list[float]]) -> Any:
    """The configuration's rope_parameters with what the file says; they may be nested by the layers' kinds.

    factors: the values of those of FACTORS that the file has. Raises ConfigError, naming the key or tensor, if
    transformers has no word for what the file says.
    """
    present = config.rope_parameters
    kinds = config.nested_rope_parameter_keys(present)
    width = head_width(config)
    if not kinds:
        for name in ("rope.freq_base", "rope.dimension_count"):
            local = header.setting(f"{name}_swa")
            if local not in (None, 0, header.setting(name)):
                _refuse(header, f"{name}_swa")
        return _with(present, _global(header, factors, width), width, header.setting("rope.dimension_count"))
    new = dict(present)
    for kind in kinds:
        if "sliding" in kind:
            stated = {"rope_type": "default", "rope_theta": header.setting("rope.freq_base_swa", _BASE)}
            new[kind] = _with(present[kind], stated, width, header.setting("rope.dimension_count_swa"))
        else:
            own_width = getattr(config, "global_head_dim", None) or width
            stated = _global(header, factors, own_width)
            new[kind] = _with(present[kind], stated, own_width, header.setting("rope.dimension_count"))
    return new


def head_width(config: PreTrainedConfig) -> int:
    """The size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _with(present: Mapping[str, Any], stated: Mapping[str, Any], width: int, turned: int | None) -> dict[str, Any]:
    """The parameters as the file has them, beside those of which it knows nothing (mrope_section).

    turned: of a head's dimensions, if the file says how many.
    """
    if present.get("rope_type", "default") not in _OWN_KINDS:
        return {**present, "rope_theta": stated["rope_theta"]}
    ours = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    extra = {key: value for key, value in present.items() if key not in ours}
    share = (turned or width) / width
    if share != 1 or "partial_rotary_factor" in present:
        extra["partial_rotary_factor"] = share
    return {**extra, **stated}


def _global(header: GgufHeader, factors: Mapping[str, list[float]], width: int) -> dict[str, Any]:
    """What the file says of all layers, or of those without a window of their own."""
    theta = header.setting("rope.freq_base", _BASE)
    factor = header.setting("rope.scaling.factor", 0.0) or header.setting("rope.scale_linear", 0.0) or 1.0
    kind = header.setting("rope.scaling.type", "linear")
    attention = header.setting("rope.scaling.attn_factor", 1.0)
    turned = header.setting("rope.dimension_count") or width
    if factors:
        if kind != "longrope" and factor != 1 and kind != "none":
            raise header.refusal(
                f"{header.architecture}.rope.scaling.type is {kind}, but the file has {next(iter(factors))}"
            )
        return {"rope_theta": theta, **_by_factors(header, factors, theta, turned, attention)}
    if kind == "yarn":
        return {"rope_theta": theta, **_yarn(header, factor, attention)}
    if kind not in ("none", "linear"):
        _refuse(header, "rope.scaling.type")
    if attention != 1:
        _refuse(header, "rope.scaling.attn_factor")
    if kind == "none" or factor == 1:
        return {"rope_theta": theta, "rope_type": "default"}
    return {"rope_theta": theta, "rope_type": "linear", "factor": factor}


def _yarn(header: GgufHeader, factor: float, attention: float) -> dict[str, Any]:
    context = header.setting("context_length")
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": header.setting("rope.scaling.original_context_length", context),
        "beta_fast": header.setting("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": header.setting("rope.scaling.yarn_beta_slow", 1.0),
    }
    if header.setting("rope.scaling.yarn_ext_factor", 1.0) not in (1, -1):  # -1: llama.cpp takes 1
        _refuse(header, "rope.scaling.yarn_ext_factor")
    if header.setting("rope.scaling.yarn_log_multiplier", 0.0) != 0:
        _refuse(header, "rope.scaling.yarn_log_multiplier")
    attention *= header.setting("rope.scaling.yarn_attn_factor", 1.0)
    if attention != 1:
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return found


def _by_factors(
    header: GgufHeader, factors: Mapping[str, list[float]], theta: float, turned: int, attention: float
) -> dict[str, Any]:
    """Scaling whose factors are tensors: Llama 3's, if they are its own, else LongRoPE, which takes any."""
    for name, values in factors.items():
        if len(values) != turned // 2:
            raise ConfigError(f"{header.file}: {name} has {len(values)} values for {turned} rotary dimensions")
    everywhere = factors.get(FACTORS[0])
    original = header.setting("rope.scaling.original_context_length")
    if everywhere is not None:
        if attention == 1 and all(value == 1 for value in everywhere):
            return {"rope_type": "default"}
        llama3 = scaling_of_llama_3(everywhere, theta, turned) if attention == 1 else None
        if llama3 is not None:
            return llama3
    short = everywhere or factors.get(FACTORS[1])
    long = everywhere or factors.get(FACTORS[2])
    if short is None or long is None:
        raise ConfigError(f"{header.file}: only one of {FACTORS[1]} and {FACTORS[2]} is present; download it again")
    context = header.setting("context_length")
    found: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    found["original_max_position_embeddings"] = original or context
    if not math.isclose(attention, _usual_attention(context, original or context), rel_tol=_CLOSE):
        found["attention_factor"] = attention
    return found


def _usual_attention(context: int, original: int) -> float:
    """LongRoPE's attention factor where none is stated: sqrt(1 + ln(context / original) / ln(original))."""
    return math.sqrt(1 + math.log(max(context / original, 1)) / math.log(original)) if original > 1 else 1.0


def scaling_of_llama_3(values: list[float], theta: float, turned: int) -> dict[str, Any] | None:
    """Llama 3's scaling, if it makes these factors: its file has no key that says how it was set.

    values: one for each pair of rotary dimensions. theta: the base. turned: the number of rotary dimensions. A factor
    between 1 and the largest tells the original length: 1 / value = (1 - s) / factor + s with
    s = (original / wave length - low) / (high - low).
    """
    factor = max(values)
    waves = [2 * math.pi * theta ** (2 * i / turned) for i in range(len(values))]
    between = [(wave, value) for wave, value in zip(waves, values, strict=True) if 1 < value < factor]
    if not between:
        return None
    wave, value = between[0]
    share = (1 / value - 1 / factor) / (1 - 1 / factor)
    original = round(wave * (share * (_HIGH - _LOW) + _LOW))
    expected = [_llama3_factor(wave, factor, original) for wave in waves]
    if not all(math.isclose(one, other, rel_tol=_CLOSE) for one, other in zip(values, expected, strict=True)):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
    }


def _llama3_factor(wave: float, factor: float, original: int) -> float:
    if wave < original / _HIGH:
        return 1.0
    if wave > original / _LOW:
        return factor
    share = (original / wave - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - share) / factor + share)


def _refuse(header: GgufHeader, name: str) -> None:
    key = f"{header.architecture}.{name}"
    raise header.refusal(f"{key} is {header.keys.get(key)}, which transformers can't represent")

"""The rotary embedding of a GGUF file, as transformers' rope_parameters.

Knows: the keys and tensors from which llama.cpp reads it, and llama.cpp's defaults. Refuses to know: files, modules.

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
_BASE = 10000.0  # of rotary frequencies, unless a key sets it
_CLOSE = 1e-5  # of two factors, relative
# low_freq_factor and high_freq_factor of all models with Llama 3's scaling
_LOW = 1.0
_HIGH = 4.0
_OWN_KINDS = ("default", "linear", "yarn", "longrope", "llama3")  # not an architecture's special one


def rope_parameters(config: PreTrainedConfig, header: GgufHeader, factors: Mapping[str, list[float]]) -> Any:
    """The configuration's rope_parameters changed to agree with the file; they may be nested by kind of layer.

    factors: values of the tensors named in FACTORS, as far as the file has them. Raises ConfigError, naming the key or
    tensor, if transformers can't represent it.
    """
    current = config.rope_parameters
    kinds = config.nested_rope_parameter_keys(current)
    width = head_width(config)
    if not kinds:
        for name in ("rope.freq_base", "rope.dimension_count"):
            local = header.setting(f"{name}_swa")
            if local not in (None, 0, header.setting(name)):
                _refuse(header, f"{name}_swa")
        return _merged_parameters(
            current, _global_parameters(header, factors, width), width, header.setting("rope.dimension_count")
        )
    parameters = dict(current)
    for kind in kinds:
        if "sliding" in kind:
            stated = {"rope_type": "default", "rope_theta": header.setting("rope.freq_base_swa", _BASE)}
            parameters[kind] = _merged_parameters(
                current[kind], stated, width, header.setting("rope.dimension_count_swa")
            )
        else:
            own_width = getattr(config, "global_head_dim", None) or width
            stated = _global_parameters(header, factors, own_width)
            parameters[kind] = _merged_parameters(
                current[kind], stated, own_width, header.setting("rope.dimension_count")
            )
    return parameters


def head_width(config: PreTrainedConfig) -> int:
    """The size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _merged_parameters(
    current: Mapping[str, Any], stated: Mapping[str, Any], width: int, rotary_dimensions: int | None
) -> dict[str, Any]:
    """The current parameters, replaced by those that the file states; others (mrope_section) are kept.

    rotary_dimensions: of a head, if the file says how many.
    """
    if current.get("rope_type", "default") not in _OWN_KINDS:
        return {**current, "rope_theta": stated["rope_theta"]}
    stated_keys = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    extra = {key: value for key, value in current.items() if key not in stated_keys}
    fraction = (rotary_dimensions or width) / width
    if fraction != 1 or "partial_rotary_factor" in current:
        extra["partial_rotary_factor"] = fraction
    return {**extra, **stated}


def _global_parameters(header: GgufHeader, factors: Mapping[str, list[float]], width: int) -> dict[str, Any]:
    """The parameters that the file states for all layers, or for those without a window."""
    theta = header.setting("rope.freq_base", _BASE)
    factor = header.setting("rope.scaling.factor", 0.0) or header.setting("rope.scale_linear", 0.0) or 1.0
    kind = header.setting("rope.scaling.type", "linear")
    attention = header.setting("rope.scaling.attn_factor", 1.0)
    rotary_dimensions = header.setting("rope.dimension_count") or width
    if factors:
        if kind != "longrope" and factor != 1 and kind != "none":
            raise header.refusal(
                f"{header.architecture}.rope.scaling.type is {kind}, but the file has {next(iter(factors))}"
            )
        return {"rope_theta": theta, **_factor_parameters(header, factors, theta, rotary_dimensions, attention)}
    if kind == "yarn":
        return {"rope_theta": theta, **_yarn_parameters(header, factor, attention)}
    if kind not in ("none", "linear"):
        _refuse(header, "rope.scaling.type")
    if attention != 1:
        _refuse(header, "rope.scaling.attn_factor")
    if kind == "none" or factor == 1:
        return {"rope_theta": theta, "rope_type": "default"}
    return {"rope_theta": theta, "rope_type": "linear", "factor": factor}


def _yarn_parameters(header: GgufHeader, factor: float, attention: float) -> dict[str, Any]:
    context = header.setting("context_length")
    parameters = {
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
        parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return parameters


def _factor_parameters(
    header: GgufHeader, factors: Mapping[str, list[float]], theta: float, rotary_dimensions: int, attention: float
) -> dict[str, Any]:
    """The parameters of a scaling whose factors are tensors: Llama 3's if it makes these factors, else LongRoPE's,
    which takes any."""
    for name, values in factors.items():
        if len(values) != rotary_dimensions // 2:
            raise ConfigError(
                f"{header.file}: {name} has {len(values)} values for {rotary_dimensions} rotary dimensions"
            )
    all_factors = factors.get(FACTORS[0])
    original = header.setting("rope.scaling.original_context_length")
    if all_factors is not None:
        if attention == 1 and all(value == 1 for value in all_factors):
            return {"rope_type": "default"}
        llama3 = scaling_of_llama_3(all_factors, theta, rotary_dimensions) if attention == 1 else None
        if llama3 is not None:
            return llama3
    short = all_factors or factors.get(FACTORS[1])
    long = all_factors or factors.get(FACTORS[2])
    if short is None or long is None:
        raise ConfigError(f"{header.file}: only one of {FACTORS[1]} and {FACTORS[2]} is present; download it again")
    context = header.setting("context_length")
    parameters: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    parameters["original_max_position_embeddings"] = original or context
    if not math.isclose(attention, _usual_attention(context, original or context), rel_tol=_CLOSE):
        parameters["attention_factor"] = attention
    return parameters


def _usual_attention(context: int, original: int) -> float:
    """LongRoPE's attention factor where none is stated: sqrt(1 + ln(context / original) / ln(original))."""
    return math.sqrt(1 + math.log(max(context / original, 1)) / math.log(original)) if original > 1 else 1.0


def scaling_of_llama_3(values: list[float], theta: float, turned: int) -> dict[str, Any] | None:
    """Llama 3's scaling if it makes these factors, else None: a GGUF file has no key with its settings.

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
    blend = (1 / value - 1 / factor) / (1 - 1 / factor)
    original = round(wave * (blend * (_HIGH - _LOW) + _LOW))
    expected = [_llama3_factor(wave, factor, original) for wave in waves]
    if not all(
        math.isclose(stated, computed, rel_tol=_CLOSE) for stated, computed in zip(values, expected, strict=True)
    ):
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
    blend = (original / wave - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - blend) / factor + blend)


def _refuse(header: GgufHeader, name: str) -> None:
    key = f"{header.architecture}.{name}"
    raise header.refusal(f"{key} is {header.keys.get(key)}, which transformers can't represent")

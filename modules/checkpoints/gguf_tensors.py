"""Which tensors of a GGUF file have a place in the model that a configuration makes.

Knows: transformers' own map of names, settings that give a model biases. Refuses to know: numbers, other settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from modules.checkpoints.architecture import empty_module
from modules.checkpoints.gguf_header import GgufHeader
from modules.checkpoints.gguf_rope import FACTORS
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.text import listed

# What old converters left in files, and no program reads: rotary frequencies, which follow from the settings.
_LEFT_BEHIND = ("*.attn_rot_embd", "*.attn_rot_embd.*", "*.rotary_emb.inv_freq")


@dataclass(frozen=True)
class _Fit:
    """Where a file and a model differ."""

    unplaced: frozenset[str]  # tensors of the file
    lacking: frozenset[str]  # the model's biases
    misshapen: dict[str, tuple[int, ...]]  # by the file's tensor, the model's shape


def placed(config: PreTrainedConfig, header: GgufHeader) -> tuple[PreTrainedConfig, frozenset[str]]:
    """The configuration with those biases that the file has, as far as its class has settings for them; and the biases
    that came along and the file lacks: nothing is added there, so they are zeros.

    Raises ConfigError if the model has no place for tensors of the file, or one of another shape.
    """
    if header.architecture in GGUF_ARCHS:  # transformers reads biases off the names, and sees to the rest
        return config, frozenset()
    fit = _fit(config, header)
    before = fit.lacking
    flags = [key for key, value in config.to_dict().items() if "bias" in key and isinstance(value, bool)]
    for key in flags:
        if not (fit.unplaced or fit.lacking):
            break
        changed = type(config).from_dict({**config.to_dict(), key: not getattr(config, key)})
        other = _fit(changed, header)
        if (len(other.unplaced), len(other.lacking)) < (len(fit.unplaced), len(fit.lacking)):
            config = changed
            fit = other
    refuse(header, config, sorted(fit.unplaced))
    for name, shape in fit.misshapen.items():
        found = header.tensors[name].shape
        raise ConfigError(f"{header.file}: {name} has shape {found}, but the file's keys imply {shape}")
    return config, fit.lacking - before


def refuse(header: GgufHeader, config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Raise ConfigError if there are tensors without a place."""
    if names:
        raise header.refusal(f"transformers' {type(config).__name__} has no tensors named {listed(names)}")


def check_rotary_width(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Raise ConfigError if the model would turn another number of dimensions than the file says."""
    for name, buffer in _empty(config, header).named_buffers():
        key = f"rope.dimension_count{'_swa' if 'sliding' in name else ''}"
        stated = header.setting(key)
        if name.endswith("inv_freq") and stated not in (None, 0, 2 * len(buffer)):
            raise header.refusal(
                f"{header.architecture}.{key} is {stated}, but transformers' {type(config).__name__} rotates "
                f"{2 * len(buffer)} dimensions"
            )


def _empty(config: PreTrainedConfig, header: GgufHeader) -> Any:
    try:
        return empty_module(config)
    except Exception as error:  # whatever an architecture makes of a wrong configuration
        raise ConfigError(f"{header.file}: transformers can't build its model ({first_line(error)})") from None


def _fit(config: PreTrainedConfig, header: GgufHeader) -> _Fit:
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    module = _empty(config, header)
    places = get_gguf_hf_weights_map(module, processor)
    stored = set(header.tensors) | {name.removesuffix(".weight") for name in header.tensors}
    known = set(places) | {f"{name}.weight" for name in places} | set(FACTORS)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shapes = {place: tuple(parameters[name].shape) for place, name in places.items() if name in parameters}
    return _Fit(
        frozenset(name for name in header.tensors if name not in known and not _is_left_behind(name)),
        frozenset(name for place, name in places.items() if place not in stored and name.endswith(".bias")),
        {name: shapes[name] for name, tensor in header.tensors.items() if _differ(tensor.shape, shapes.get(name))},
    )


def _differ(shape: tuple[int, ...], other: tuple[int, ...] | None) -> bool:
    """Whether two shapes are not of one tensor, be it transposed or without dimensions of one."""
    return other is not None and sorted(set(shape) - {1}) != sorted(set(other) - {1})


def _is_left_behind(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _LEFT_BEHIND)

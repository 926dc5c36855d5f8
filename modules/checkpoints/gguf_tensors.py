"""Matches the tensors of a GGUF file with those of the model that a configuration makes.

Knows: transformers' map of names, settings that give a model biases. Refuses to know: weights, other settings.
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

# Rotary frequencies, which old converters left in files and no program reads: they follow from the settings.
_LEFT_BEHIND = ("*.attn_rot_embd", "*.attn_rot_embd.*", "*.rotary_emb.inv_freq")


@dataclass(frozen=True)
class _Fit:
    """The differences between a file's tensors and a model's."""

    unplaced: frozenset[str]  # tensors of the file that the model lacks
    lacking: frozenset[str]  # biases of the model that the file lacks
    misshapen: dict[str, tuple[int, ...]]  # tensor of the file -> its shape in the model


def placed(config: PreTrainedConfig, header: GgufHeader) -> tuple[PreTrainedConfig, frozenset[str]]:
    """The configuration with the biases that the file has, as far as its class has settings for them. Also the biases
    that these settings add and the file lacks: they are to be zeros.

    Raises ConfigError if the model lacks tensors of the file, or has another shape for one.
    """
    if header.architecture in GGUF_ARCHS:  # transformers finds biases by names, and checks the rest
        return config, frozenset()
    fit = _fit(config, header)
    absent_biases = fit.lacking
    flags = [key for key, value in config.to_dict().items() if "bias" in key and isinstance(value, bool)]
    for key in flags:
        if not (fit.unplaced or fit.lacking):
            break
        changed = type(config).from_dict({**config.to_dict(), key: not getattr(config, key)})
        changed_fit = _fit(changed, header)
        if (len(changed_fit.unplaced), len(changed_fit.lacking)) < (len(fit.unplaced), len(fit.lacking)):
            config = changed
            fit = changed_fit
    refuse(header, config, sorted(fit.unplaced))
    for name, shape in fit.misshapen.items():
        file_shape = header.tensors[name].shape
        raise ConfigError(f"{header.file}: {name} has shape {file_shape}, but the file's keys imply {shape}")
    return config, fit.lacking - absent_biases


def refuse(header: GgufHeader, config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Raise ConfigError if there are tensors that the model lacks. names: theirs."""
    if names:
        raise header.refusal(f"transformers' {type(config).__name__} has no tensors named {listed(names)}")


def check_rotary_width(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Raise ConfigError if the model would rotate another number of dimensions than the file says."""
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
    weight_map = get_gguf_hf_weights_map(module, processor)
    stored = set(header.tensors) | {name.removesuffix(".weight") for name in header.tensors}
    known_names = set(weight_map) | {f"{name}.weight" for name in weight_map} | set(FACTORS)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shapes = {gguf_name: tuple(parameters[name].shape) for gguf_name, name in weight_map.items() if name in parameters}
    return _Fit(
        frozenset(name for name in header.tensors if name not in known_names and not _is_left_behind(name)),
        frozenset(name for gguf_name, name in weight_map.items() if gguf_name not in stored and name.endswith(".bias")),
        {name: shapes[name] for name, tensor in header.tensors.items() if _differ(tensor.shape, shapes.get(name))},
    )


def _differ(shape: tuple[int, ...], other_shape: tuple[int, ...] | None) -> bool:
    """Whether two shapes can't be the same tensor's: transposition and dimensions of size 1 are ignored."""
    return other_shape is not None and sorted(set(shape) - {1}) != sorted(set(other_shape) - {1})


def _is_left_behind(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _LEFT_BEHIND)

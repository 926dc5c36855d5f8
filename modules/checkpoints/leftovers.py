"""Stored tensors that a module does not use: which of them are usual leftovers of older versions and training code.

Knows: names and shapes of such tensors. Refuses to know: candidates, merging, devices.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from modules.checkpoints.architecture import find_layers
from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.readers import TensorInfo
from modules.runtime.text import listed

_ROTARY = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")  # computed from config.json
_FURTHER = re.compile(r"(^|[._])mtp([._\d]|$)")  # multi-token prediction, in parts of names


@dataclass(frozen=True)
class Leftovers:
    """The names of stored tensors that a module does not use."""

    usual: Sequence[str]  # rotary frequencies, masks, layers after the last for multi-token prediction
    others: Sequence[str]
    surplus: Sequence[str]  # those of the others that are ordinary layers after the last

    def notes(self, name: str) -> list[str]:
        """A line about the usual leftovers, if any. name: of the checkpoint."""
        return [f"{name}: ignoring {listed(self.usual, 1)}, which a merge does not need"] if self.usual else []


def number_of(name: str) -> str:
    """The first number in a tensor's name, which is its layer's; empty if there is none."""
    return next((part for part in name.split(".") if part.isdecimal()), "")


def leftovers(checkpoint: Checkpoint, conversion: Conversion, module: PreTrainedModel) -> Leftovers:
    """The tensors of a checkpoint that the module does not use. conversion: of the two. module: may lack weights."""
    layers_name, layers = find_layers(module)
    layer_tensors = {name for name in conversion if name.startswith(f"{layers_name}.")}
    of_layers = [name for name in checkpoint.tensors if layer_tensors.intersection(conversion.module_names(name))]
    patterns = {_without_number(name) for name in of_layers}
    starts = {_before_number(name) for name in of_layers}
    configs = [checkpoint.config.get_text_config(), module.config.get_text_config()]
    declared = max(getattr(config, "num_nextn_predict_layers", None) or 0 for config in configs)

    # Layers after the last for multi-token prediction: as many as a configuration declares, and those with tensors
    # that no other layer has.
    trailing = [name for name in conversion.unused if _before_number(name) in starts and not _is_rotary(name)]
    trailing = [name for name in trailing if int(number_of(name)) >= len(layers)]
    further = {
        (_before_number(name), number_of(name))
        for name in trailing
        if _without_number(name) not in patterns or int(number_of(name)) < len(layers) + declared
    }
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    usual = []
    others = []
    for name in conversion.unused:
        is_further = (_before_number(name), number_of(name)) in further or _FURTHER.search(name)
        if is_further or _is_rotary(name) or _is_mask(name, checkpoint.tensors[name]):
            usual.append(name)
        elif not any(re.search(pattern, name) for pattern in ignored):
            others.append(name)
    return Leftovers(usual, others, [name for name in others if _without_number(name) in patterns])


def _is_rotary(name: str) -> bool:
    return name.rpartition(".")[2] in _ROTARY


def _is_mask(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a mask by its name and shape: the masking value, or a square of tokens."""
    is_square = len(info.shape) > 1 and info.shape[-1] == info.shape[-2]
    return name.endswith("masked_bias") or (name.endswith(".bias") and is_square)


def _without_number(name: str) -> str:
    """The name with a star for its first number."""
    return f".{name}.".replace(f".{number_of(name)}.", ".*.", 1)


def _before_number(name: str) -> str:
    """The part of a name before its first number; empty without a number."""
    return name.partition(f".{number_of(name)}.")[0] if number_of(name) else ""

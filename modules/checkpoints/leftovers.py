"""Stored tensors that a module has no use for: which of them older versions and training code leave beside weights.

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

_ROTARY = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")  # made of config.json
_FURTHER = re.compile(r"(^|[._])mtp([._\d]|$)")  # multi-token prediction, in parts of names


@dataclass(frozen=True)
class Leftovers:
    """The names of stored tensors that a module has no use for."""

    usual: Sequence[str]  # rotary frequencies, attention masks, layers behind the last that predict further tokens
    others: Sequence[str]

    def notes(self, name: str) -> list[str]:
        """A line about what is left out. name: of the checkpoint."""
        if not self.usual:
            return []
        more = f" and {len(self.usual) - 1:,} more such tensors" if len(self.usual) > 1 else ""
        return [f"{name}: stores {self.usual[0]}{more}, which take no part in the merge"]


def number_of(name: str) -> str:
    """The first number in a tensor's name, which is its layer's; empty if there is none."""
    return next((part for part in name.split(".") if part.isdecimal()), "")


def without_number(name: str) -> str:
    """The name with a star for that number."""
    return f".{name}.".replace(f".{number_of(name)}.", ".*.", 1)


def leftovers(checkpoint: Checkpoint, conversion: Conversion, module: PreTrainedModel) -> Leftovers:
    """What a checkpoint stores and the module, which may be without weights, has no use for. conversion: of both."""
    further = _further_layers(checkpoint, conversion, module)
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    usual, others = [], []
    for name in conversion.unused:
        is_rotary = name.rpartition(".")[2] in _ROTARY
        is_further = (_before_number(name), number_of(name)) in further or _FURTHER.search(name)
        if is_rotary or is_further or _is_mask(name, checkpoint.tensors[name]):
            usual.append(name)
        elif not any(re.search(pattern, name) for pattern in ignored):
            others.append(name)
    return Leftovers(usual, others)


def _is_mask(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a mask by its name and form: the number that masks with, or a square of tokens."""
    is_square = len(info.shape) > 1 and info.shape[-1] == info.shape[-2]
    return name.endswith("masked_bias") or (name.endswith(".bias") and is_square)


def _further_layers(checkpoint: Checkpoint, conversion: Conversion, module: PreTrainedModel) -> set[tuple[str, str]]:
    """The layers behind the last one that predict further tokens: what stands before their number in names, and the
    number. They are as many as a configuration says, and those that have tensors of which no other layer has any."""
    configs = [checkpoint.config.get_text_config(), module.config.get_text_config()]
    declared = max(getattr(config, "num_nextn_predict_layers", None) or 0 for config in configs)
    layers_name, layers = find_layers(module)
    used = [name for name in checkpoint.tensors if conversion.is_within(name, layers_name)]
    known = {without_number(name) for name in used}
    places = {_before_number(name) for name in used}
    further = set()
    for name in conversion.unused:
        is_rotary = name.rpartition(".")[2] in _ROTARY
        if _before_number(name) not in places or is_rotary or int(number_of(name)) < len(layers):
            continue
        if without_number(name) not in known or int(number_of(name)) < len(layers) + declared:
            further.add((_before_number(name), number_of(name)))
    return further


def _before_number(name: str) -> str:
    """What stands before a name's first number; empty if it has none."""
    return name.partition(f".{number_of(name)}.")[0] if number_of(name) else ""

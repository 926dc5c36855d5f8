"""Stored tensors that a module has no use for: what they are, and whether anything is lost with them.

Knows: what older versions and training code store beside weights. Refuses to know: candidates, merging, devices.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.checkpoints.architecture import find_layers, with_buffers
from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.readers import TensorInfo
from modules.checkpoints.weight_files import is_there
from modules.runtime import CheckpointError

_FREQUENCIES = ("inv_freq", "original_inv_freq")
_MADE_OF_THEM = ("cos_cached", "sin_cached")
_FURTHER = re.compile(r"(^|[._])mtp([._\d]|$)")  # multi-token prediction, in parts of names
_FEWEST = {torch.float16: 1e-7}  # the least number that a stored frequency can be told from zero by


@dataclass(frozen=True)
class Leftovers:
    """The names of stored tensors that a module has no use for."""

    frequencies: Sequence[str]  # of rotary embeddings, which are made of config.json
    masks: Sequence[str]  # which token sees which
    further: Sequence[str]  # of layers behind the last one, which predict further tokens at once
    others: Sequence[str]


def number_of(name: str) -> str:
    """The first number in a tensor's name, which is its layer's; empty if there is none."""
    return next((part for part in name.split(".") if part.isdecimal()), "")


def without_number(name: str) -> str:
    """The name with a star for that number."""
    return f".{name}.".replace(f".{number_of(name)}.", ".*.", 1)


def leftovers(checkpoint: Checkpoint, conversion: Conversion, module: PreTrainedModel) -> Leftovers:
    """What a checkpoint stores and the module, which may be without weights, has no use for. conversion: of both."""
    further = _further_layers(checkpoint, conversion, module)
    known = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()

    def predicts_further(name: str) -> bool:
        is_behind = _before_number(name) in further and number_of(name) in further[_before_number(name)]
        return is_behind or bool(_FURTHER.search(name))

    kinds: list[list[str]] = []
    rest = list(conversion.unused)
    for fits in (_is_of_rotation, partial(_is_mask, checkpoint.tensors), predicts_further):
        kinds.append([name for name in rest if fits(name)])
        rest = [name for name in rest if not fits(name)]
    return Leftovers(*kinds, [name for name in rest if not any(re.search(pattern, name) for pattern in known)])


def _is_of_rotation(name: str) -> bool:
    return name.rpartition(".")[2] in (*_FREQUENCIES, *_MADE_OF_THEM)


def _is_mask(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether a tensor is a mask by its name and form: the number that masks with, or a square of tokens."""
    shape = tensors[name].shape
    is_square = len(shape) > 1 and shape[-1] == shape[-2]
    return name.endswith("masked_bias") or (name.endswith(".bias") and is_square)


def _further_layers(
    checkpoint: Checkpoint, conversion: Conversion, module: PreTrainedModel
) -> Mapping[str, Collection[str]]:
    """The numbers of layers behind the last one that predict further tokens, by what stands before them in names: as
    many as a configuration says, and those that have tensors of which no other layer has any."""
    configs = [checkpoint.config.get_text_config(), module.config.get_text_config()]
    declared = max(getattr(config, "num_nextn_predict_layers", None) or 0 for config in configs)
    layers_name, layers = find_layers(module)
    stored = [name for name in checkpoint.tensors if _is_in(layers_name, conversion.module_names(name))]
    usual, places = {without_number(name) for name in stored}, {_before_number(name) for name in stored}
    behind = [name for name in conversion.unused if _before_number(name) in places and not _is_of_rotation(name)]
    behind = [name for name in behind if int(number_of(name)) >= len(layers)]
    numbers = {number_of(name) for name in behind if without_number(name) not in usual}
    numbers |= {number_of(name) for name in behind if int(number_of(name)) < len(layers) + declared}
    return dict.fromkeys(places, numbers)


def _is_in(layers_name: str, names: Sequence[str]) -> bool:
    return any(name.startswith(f"{layers_name}.") for name in names)


def _before_number(name: str) -> str:
    """What stands before a name's first number; empty if it has none."""
    return name.partition(f".{number_of(name)}.")[0] if number_of(name) else ""


def about_leftovers(checkpoint: Checkpoint, found: Leftovers) -> tuple[list[str], list[str]]:
    """Lines about what is left out, and warnings where something may be lost with it."""
    kinds = ((found.frequencies, "rotary frequencies"), (found.masks, "attention masks"))
    named = [f"{what} ({_first_of(names)})" for names, what in kinds if names]
    named += [f"layers that predict further tokens ({_first_of(found.further)})"] if found.further else []
    notes = [f"{checkpoint.name}: stores {' and '.join(named)}, which take no part in the merge"] if named else []
    differ: list[str] = []
    with suppress(CheckpointError):  # who reads the weights says so
        differ += _differing(checkpoint, found)
    checkpoint.release()
    if not differ:
        return notes, []
    warning = (
        f"{checkpoint.name}: {_first_of(differ)} {'is' if len(differ) == 1 else 'are'} not what its config.json makes, "
        "by which it is computed; look for a rope_theta, rope_scaling or window that is missing there"
    )
    return notes, [warning]


def _differing(checkpoint: Checkpoint, found: Leftovers) -> Iterator[str]:
    """The frequencies and masks that are not those of the checkpoint's own configuration, as far as they are there."""
    names = [name for name in found.frequencies if name.rpartition(".")[2] in _FREQUENCIES] + list(found.masks)
    names = [name for name in names if is_there(checkpoint.path / checkpoint.tensors[name].file)]
    if not names:
        return
    config = deepcopy(checkpoint.config)
    config._attn_implementation = None
    made = dict(with_buffers(config, checkpoint.companions.trusted).named_buffers())
    frequencies = [value for name, value in made.items() if name.rpartition(".")[2] in _FREQUENCIES]
    for name, stored in checkpoint.read(names).items():
        if name in found.frequencies:
            if not any(_is_same(stored, value) for value in frequencies):
                yield name
        elif stored.dim() > 1:
            own = made.get(name)
            causal = torch.ones(stored.shape[-2:]).tril().expand(stored.shape)
            expected = causal if own is None or own.shape != stored.shape else own
            if not torch.equal(stored.bool(), expected.bool()):
                yield name


def _is_same(stored: Tensor, made: Tensor) -> bool:
    """Whether two frequencies are the same but for the type in which one was stored."""
    rounding = 4 * torch.finfo(stored.dtype).eps if stored.is_floating_point() else 0.0
    return stored.shape == made.shape and torch.allclose(
        stored.double(), made.double(), rtol=max(rounding, 1e-6), atol=_FEWEST.get(stored.dtype, 0.0)
    )


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"

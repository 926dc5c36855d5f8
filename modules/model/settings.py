"""The resident module, made to compute by another configuration of its architecture while its weights stay.

Knows: what a module holds beside its weights: numbers, functions, rotary frequencies. Refuses to know: which keys of a
configuration matter, whose weights are in the module, scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modules.checkpoints.architecture import with_buffers
from modules.checkpoints.checkpoint import Checkpoint
from modules.model.base_model import ResidentModel
from modules.runtime.oom import is_out_of_memory

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)  # weights, children, hooks: they stay


@dataclass(frozen=True)
class Settings:
    """What is put into the resident module for a moment: (where it is put, its name there, what is put there)."""

    values: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The module computes by these."""
        before = [(place, name, name in place, place.get(name)) for place, name, _ in self.values]
        try:
            for place, name, value in self.values:
                place[name] = value
            yield
        finally:
            for place, name, was_there, value in before:
                if was_there:
                    place[name] = value
                else:
                    del place[name]


def settings_of(model: ResidentModel, checkpoint: Checkpoint) -> Settings | None:
    """A checkpoint's own settings; None if the resident module can't compute by them: it is built in another way.

    The checkpoint's module is built without weights, and what it holds beside them stands in the resident one's place.
    """
    own = model.module.config
    config = deepcopy(checkpoint.config)
    if type(config) is not type(own):
        config = config.get_text_config()
    if type(config) is not type(own):
        return None
    config._attn_implementation = own._attn_implementation  # which is no matter of what is computed
    config._experts_implementation = own._experts_implementation
    config.return_dict = True
    try:
        theirs = with_buffers(config, checkpoint.companions.trusted)
    except Exception:  # whatever an architecture makes of settings that it does not take
        return None
    others = dict(theirs.named_modules(remove_duplicate=False))
    found = Settings()
    ours = dict(model.module.named_modules(remove_duplicate=False))
    if ours.keys() != others.keys() or type(theirs) is not type(model.module):
        return None
    replaced: list[str] = []
    for name, module in ours.items():
        if any(name.startswith(f"{prefix}.") for prefix in replaced):
            continue
        if type(module) is type(others[name]):
            _note_values(found, module, others[name])
        elif others[name].state_dict():
            return None
        else:  # another activation, another kind of rotary embedding
            parent, _, child = name.rpartition(".")
            found.values.append((ours[parent].__dict__["_modules"], child, others[name].to(model.device)))
            replaced.append(name)
    return found if _is_taken(model, found) else None


@torch.no_grad()
def _is_taken(model: ResidentModel, settings: Settings) -> bool:
    """Whether the module still computes by these: something that they put there may know its own module's weights."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with settings.taken(), model.products():
            model.module(input_ids=ids, use_cache=False)
    except Exception as error:  # whatever an architecture makes of it
        if is_out_of_memory(error):
            raise
        return False
    return True


def _note_values(found: Settings, ours: nn.Module, theirs: nn.Module) -> None:
    """Note what a module of the same class holds beside weights, children and hooks, in the place of ours."""
    for name, value in vars(theirs).items():
        if name not in _OF_EVERY_MODULE:
            found.values.append((ours.__dict__, name, value))
    for name in theirs._non_persistent_buffers_set:  # rotary frequencies and the like, made of the configuration
        own = ours._buffers.get(name)
        value = theirs._buffers[name]
        if isinstance(own, torch.Tensor) and value is not None:
            found.values.append((ours._buffers, name, value.to(own.device, own.dtype)))

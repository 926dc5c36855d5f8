"""Another configuration's settings for the resident module, which keeps its weights.

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

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)  # weights, children, hooks: they are kept


@dataclass(frozen=True)
class Settings:
    """Values to set in the resident module for a moment: (an attribute dict in it, key, value)."""

    values: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it, the module computes by these settings."""
        previous = [(namespace, name, name in namespace, namespace.get(name)) for namespace, name, _ in self.values]
        try:
            for namespace, name, value in self.values:
                namespace[name] = value
            yield
        finally:
            for namespace, name, was_present, value in previous:
                if was_present:
                    namespace[name] = value
                else:
                    del namespace[name]


def settings_of(model: ResidentModel, checkpoint: Checkpoint) -> Settings | None:
    """A checkpoint's own settings; None if the resident module can't compute by them because its structure differs.

    The checkpoint's module is built without weights; all that it holds beside them becomes a setting.
    """
    base_config = model.module.config
    config = deepcopy(checkpoint.config)
    if type(config) is not type(base_config):
        config = config.get_text_config()
    if type(config) is not type(base_config):
        return None
    config._attn_implementation = base_config._attn_implementation  # this is how, not what, is computed
    config._experts_implementation = base_config._experts_implementation
    config.return_dict = True
    try:
        candidate_module = with_buffers(config, checkpoint.companions.trusted)
    except Exception:  # an architecture may raise anything for settings that it does not take
        return None
    candidate_modules = dict(candidate_module.named_modules(remove_duplicate=False))
    settings = Settings()
    base_modules = dict(model.module.named_modules(remove_duplicate=False))
    if base_modules.keys() != candidate_modules.keys() or type(candidate_module) is not type(model.module):
        return None
    replaced: list[str] = []
    for name, module in base_modules.items():
        if any(name.startswith(f"{prefix}.") for prefix in replaced):
            continue
        if type(module) is type(candidate_modules[name]):
            _add_values(settings, module, candidate_modules[name])
        elif candidate_modules[name].state_dict():
            return None
        else:  # another activation, another kind of rotary embedding
            parent, _, child = name.rpartition(".")
            settings.values.append(
                (base_modules[parent].__dict__["_modules"], child, candidate_modules[name].to(model.device))
            )
            replaced.append(name)
    return settings if _computes_by(model, settings) else None


@torch.no_grad()
def _computes_by(model: ResidentModel, settings: Settings) -> bool:
    """Whether the module still computes with these settings: a value among them may depend on the weights of the module
    that it comes from."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with settings.taken(), model.products():
            model.module(input_ids=ids, use_cache=False)
    except Exception as error:  # an architecture may raise anything
        if is_out_of_memory(error):
            raise
        return False
    return True


def _add_values(settings: Settings, base_module: nn.Module, candidate_module: nn.Module) -> None:
    """Add to the settings all that a candidate's module holds beside weights, children and hooks, as values of the
    base's module of the same class."""
    for name, value in vars(candidate_module).items():
        if name not in _MODULE_ATTRIBUTES:
            settings.values.append((base_module.__dict__, name, value))
    # Rotary frequencies and the like, which are made from the configuration.
    for name in candidate_module._non_persistent_buffers_set:
        buffer = base_module._buffers.get(name)
        value = candidate_module._buffers[name]
        if isinstance(buffer, torch.Tensor) and value is not None:
            settings.values.append((base_module._buffers, name, value.to(buffer.device, buffer.dtype)))

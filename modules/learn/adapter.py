"""A LoRA adapter on a resident model: its layers, its weights, its files in PEFT's format.

Knows: PEFT, torch's linear layers. Refuses to know: phrases, texts, how weights are learned.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds B*A to a weight, with A (rank, input) and B (output, rank).
B begins as zeros, so the adapted model begins as the base.
"""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modules.checkpoints.architecture import find_layers
from modules.checkpoints.companions import ADAPTER_SETTINGS
from modules.checkpoints.lora import WEIGHTS
from modules.runtime.errors import ConfigError

_NAME = "default"  # PEFT's name of the adapter
_SIDES = ("A", "B")


def linear_layers(module: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Inputs and outputs, by name, of the linear layers in the decoder layers that PEFT can adapt; without gates, which
    have a single output.

    module: may be without weights. Raises ConfigError if there are no such layers.
    """
    prefix, layers = find_layers(module)
    linear = {name: child for name, child in layers.named_modules() if isinstance(child, nn.Linear | Conv1D)}
    names = [f"{prefix}.{name}" for name, child in linear.items() if min(_sides(child)) > 1]
    refused = {kind for kind in dict.fromkeys(map(_kind, names)) if not _is_taken(module, names, kind)}
    adaptable = [name for name in names if _kind(name) not in refused]
    if not adaptable:
        raise ConfigError(f"{type(module).__name__}: PEFT can adapt none of its layers, so nothing can be learned")
    return {name: _sides(module.get_submodule(name)) for name in adaptable}


def check_rank(linear: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raise ConfigError if a linear layer has fewer inputs or outputs than the rank."""
    name, sides = min(linear.items(), key=lambda item: min(item[1]))
    if rank > min(sides):
        raise ConfigError(
            f"learn.rank: {rank} is above the smallest dimension of the base's layers: {name} has {min(sides)}"
        )


def parameters_of(linear: Mapping[str, tuple[int, int]], rank: int) -> int:
    """The number of the adapter's parameters."""
    return sum(rank * (inputs + outputs) for inputs, outputs in linear.values())


class Adapter:
    """A LoRA adapter with weights in float32. While it is on, the model's forwards include it."""

    def __init__(self, module: PreTrainedModel, rank: int, seed: int) -> None:
        """Put an adapter on a module; at first it adds zeros. Raises ConfigError like `linear_layers`, `check_rank`."""
        linear = linear_layers(module)
        check_rank(linear, rank)
        self.factor = 1.0  # of what the adapter adds
        self._settings = _settings(module, list(linear), rank)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._peft = _adapted(module, self._settings)
        self._layers = {name: module.get_submodule(name) for name in linear}

    @property
    def weights(self) -> dict[str, Tensor]:
        """A and B of every layer, by their names in PEFT's file."""
        return {f"base_model.model.{name}.lora_{side}.weight": weight for name, side, weight in self._named_weights()}

    def _named_weights(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, layer in self._layers.items():
            for side in _SIDES:
                yield name, side, getattr(layer, f"lora_{side}")[_NAME].weight

    def off(self) -> AbstractContextManager[None]:
        """A context in which the model is the base."""
        return self._peft.disable_adapter()

    def scale(self, factor: float) -> None:
        """From now on, multiply what the adapter adds by this factor."""
        self.factor = factor
        for layer in self._layers.values():
            layer.set_scale(_NAME, factor)

    def save(self, folder: Path, base: str, revision: str | None) -> None:
        """Write the adapter as PEFT does. base: a hub id, with its revision, or a folder's name. Raises OSError."""
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in self.weights.items()}
        scaled = {name: self.factor * tensor if ".lora_B." in name else tensor for name, tensor in tensors.items()}
        (folder / WEIGHTS[0]).write_bytes(save(scaled, metadata={"format": "pt"}))
        usage = {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
        settings = {**self._settings.to_dict(), **usage}
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        text = json.dumps(settings, indent=2, sort_keys=True)
        (folder / ADAPTER_SETTINGS).write_text(text + "\n", encoding="utf-8")


def _kind(name: str) -> str:
    """The last part of a layer's name, the same in every decoder layer."""
    return name.rpartition(".")[2]


def _sides(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """The number of inputs and outputs."""
    shape = tuple(layer.weight.shape)
    return shape if isinstance(layer, Conv1D) else shape[::-1]


def _is_taken(module: PreTrainedModel, names: Sequence[str], kind: str) -> bool:
    """Whether PEFT adapts the layers of a kind, and no others. This is tried out: PEFT refuses layers that a kernel
    bypasses, and confuses some layers with the experts beside them."""
    same_kind = [name for name in names if _kind(name) == kind]
    try:
        adapted = _adapted(copy.deepcopy(module).to("meta"), _settings(module, same_kind, rank=1))
    except ValueError:
        return False
    return sorted(adapted.base_model.targeted_module_names) == sorted(same_kind)


def _settings(module: PreTrainedModel, names: Sequence[str], rank: int) -> LoraConfig:
    """PEFT's settings of an adapter on these layers, named by their kinds if no other layer is of these kinds."""
    kinds = {_kind(name) for name in names}
    same_kind = {name for name, _ in module.named_modules() if _kind(name) in kinds}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(kinds if same_kind == set(names) else names),
        fan_in_fan_out=all(isinstance(module.get_submodule(name), Conv1D) for name in names),
        task_type="CAUSAL_LM",
    )


def _adapted(module: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    """The module with an adapter, put on in place. Raises ValueError for layers that PEFT does not support."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(module, settings)

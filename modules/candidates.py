"""Candidates: a checkpoint, read under the base model's names, and whether it fits the base.

Knows: configurations, shapes, stored names. Refuses to know: devices, scores, what is done with a layer.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from modules.adapters import Adapted, Adapter, apply_adapter
from modules.checkpoints import Checkpoint
from modules.companions import Companions
from modules.config import ConfigError
from modules.hub import Repository
from modules.layouts import Layout
from modules.models import find_layers, input_first_weights, setting
from modules.weights import Room, fresh

_MUST_AGREE = {
    "model_type": "architecture",
    "num_hidden_layers": "number of layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "number of attention heads",
    "num_key_value_heads": "number of key and value heads",
}


@dataclass(frozen=True)
class Candidate:
    """A model that may be merged into the base, its tensors under the names of the base's module."""

    checkpoint: Checkpoint
    layout: Layout
    notes: Sequence[str] = ()  # lines for the person at the terminal
    repositories: Sequence[Repository] = ()  # of the hub, from which its files come
    text: str = ""  # what the configuration calls it
    where: str = ""  # absolute paths, ids of the hub with their commit

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.checkpoint.name

    @property
    def tokenizer_files(self) -> tuple[Path, Companions]:
        """The folder that has its tokenizer, if it has any, and the files that are read there."""
        return self.checkpoint.tokenizer_files

    def stream(self, names: Collection[str], room: Room = fresh) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, in their stored dtype, each as soon as it is read; those that it lacks are
        absent.

        room: where tensors are read into, if they need not be made. Raises CheckpointError if a file can't be read.
        """
        present = [name for name in names if name in self.layout]
        return self.layout.stream(present, partial(self.checkpoint.stream, room=room))

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """The same, all together and in the order of the names."""
        return self.layout.load([name for name in names if name in self.layout], self.checkpoint.stream)


def open_candidate(
    checkpoint: Checkpoint,
    base: Checkpoint,
    module: PreTrainedModel,
    notes: Sequence[str] = (),
    repositories: Sequence[Repository] = (),
) -> Candidate:
    """A checkpoint as a candidate for the base, whose module may be without weights.

    notes, repositories: of the candidate; the checkpoint's own repository is added. Raises ConfigError, naming both
    values, if it does not fit.
    """
    layout = _layout(checkpoint, base, module)
    repositories = (*repositories, *([checkpoint.repository] if checkpoint.repository else []))
    candidate = Candidate(checkpoint, layout, notes, repositories)
    _refuse(checkpoint.path, list(_layer_differences(candidate, base, module)))
    return candidate


def adapt(checkpoint: Checkpoint, adapter: Adapter, base: Checkpoint, module: PreTrainedModel) -> Adapted:
    """A checkpoint that fits the base, with an adapter applied. Raises ConfigError if either does not fit."""
    layout = _layout(checkpoint, base, module)
    stored = (layout.stored_name(name) for name in input_first_weights(module))
    return apply_adapter(adapter, checkpoint, layout, {name for name in stored if name})


def check_configuration(path: Path, config: PreTrainedConfig, base: Checkpoint) -> None:
    """Raise ConfigError, naming both values, if a model with this configuration can't fit the base."""
    _refuse(path, _config_differences(base.config, config))


def _layout(checkpoint: Checkpoint, base: Checkpoint, module: PreTrainedModel) -> Layout:
    check_configuration(checkpoint.path, checkpoint.config, base)
    try:
        return Layout(module, checkpoint.tensors)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path} does not fit the base: {error}") from None


def _refuse(path: Path, differences: Sequence[str]) -> None:
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise ConfigError(f"{path} does not fit the base: {'; '.join(differences[:3])}{more}")


def _config_differences(base: PreTrainedConfig, candidate: PreTrainedConfig) -> list[str]:
    ours, theirs = base.get_text_config(), candidate.get_text_config()
    return [
        f"{words} is {setting(theirs, key)}, the base's is {setting(ours, key)}"
        for key, words in _MUST_AGREE.items()
        if setting(theirs, key) != setting(ours, key)
    ]


def _layer_differences(candidate: Candidate, base: Checkpoint, module: PreTrainedModel) -> Iterator[str]:
    """Tensors of layers that one side lacks, or that differ in shape."""
    layout, (layers_name, _) = candidate.layout, find_layers(module)
    for name, ours in module.state_dict().items():
        if not name.startswith(f"{layers_name}.") or not ours.is_floating_point():
            continue
        if name not in layout:
            yield f"the tensor {name} is missing"
        elif not layout.dtype(name).is_floating_point:
            yield f"{name} is stored as {layout.dtype(name)}, not as a floating-point type"
        elif layout.shape(name) != tuple(ours.shape):
            yield f"{name} has shape {layout.shape(name)}, the base's has {tuple(ours.shape)}"
    for name in layout.unused:
        if name not in base.tensors and _is_layer_weight(candidate.checkpoint, name):
            yield f"the base has no {name}"


def _is_layer_weight(checkpoint: Checkpoint, name: str) -> bool:
    """A layer's number stands in its name. Old checkpoints also store masks and rotary frequencies there, which no
    present model reads."""
    info = checkpoint.tensors[name]
    numbered = any(part.isdecimal() for part in name.split("."))
    mask = name.endswith("masked_bias") or (name.endswith(".bias") and len(info.shape) > 1)
    return numbered and info.dtype.is_floating_point and not mask and not name.endswith("inv_freq")

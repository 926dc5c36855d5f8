"""How much memory a model takes, and on which devices its layers go.

Knows: a model's shapes, devices, what is free on them. Refuses to know: phrases, files, what weights hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from modules.checkpoints.architecture import find_layers
from modules.checkpoints.config_diff import layer_settings
from modules.model.devices import accelerators, free_memory, leaves_choice


@dataclass(frozen=True)
class Sizes:
    """The sizes of a base model."""

    layers: int
    hidden: int  # features of a hidden state
    widest: int  # the longest side of any matrix in a layer, mostly in the MLP
    heads: int  # the most attention heads of any layer; 0 if there are none
    vocabulary: int  # rows of the input embedding
    keeps_attention: bool = False  # whether a layer's whole attention matrices are held in memory ("eager")


@dataclass(frozen=True)
class Memory:
    """The memory of a run on its device, in bytes."""

    base: int  # the whole base model
    layer: int  # the largest layer
    header: int  # input embedding and output head; 0 if they are not tried
    arriving: int = 0  # the most of a candidate that is held in its own dtype, before the cast
    activations: int = 0  # hidden states, mask and logits at their peak, estimated

    @property
    def held(self) -> int:
        """The least memory for weights: the base, the candidate's layer or header, and one to merge into."""
        return self.base + 2 * max(self.layer, self.header) + self.arriving

    @property
    def searched(self) -> int:
        """The memory that PyTorch keeps for the candidate's weights: for the present and the next layer, and for
        merges."""
        return self.layer + 2 * max(self.layer, self.header) + self.arriving

    @property
    def reserved(self) -> int:
        """All memory that PyTorch keeps for the run; other programs can't use it."""
        return self.base + self.searched + self.activations


def sizes_of(module: PreTrainedModel) -> Sizes:
    """A model's sizes. module: may be without weights."""
    layers = find_layers(module)[1]
    text = module.config.get_text_config()
    embedding = module.get_input_embeddings().weight
    return Sizes(
        layers=len(layers),
        hidden=_largest_setting(text, "hidden_size") or embedding.shape[1],
        widest=max(max(weight.shape[-2:], default=1) for layer in layers for weight in layer.parameters()),
        heads=_largest_setting(text, "num_attention_heads"),
        vocabulary=embedding.shape[0],
        keeps_attention=getattr(text, "_attn_implementation", None) == "eager",
    )


def _largest_setting(config: PreTrainedConfig, key: str) -> int:
    """The largest value of a setting in any layer; 0 if none has it."""
    return max((value for value in layer_settings(config, key) if isinstance(value, int)), default=0)


def header_weights(module: PreTrainedModel) -> list[Tensor]:
    """The weights of input embedding and output head; a single one if they are tied."""
    parts = [part for part in (module.get_input_embeddings(), module.get_output_embeddings()) if part is not None]
    return list({id(weight): weight for part in parts for weight in part.parameters()}.values())


def weights_of(module: PreTrainedModel, dtype: torch.dtype, with_header: bool, arriving: int = 0) -> Memory:
    """The memory of weights while layers are searched in this dtype. with_header: whether the header is searched, too;
    arriving: see `Memory`."""
    return Memory(
        base=_bytes(module.parameters(), dtype) + sum(buffer.nbytes for buffer in module.buffers()),
        layer=max(_bytes(layer.parameters(), dtype) for layer in find_layers(module)[1]),
        header=_bytes(header_weights(module), dtype) if with_header else 0,
        arriving=arriving,
    )


def _bytes(weights: Iterable[Tensor], dtype: torch.dtype) -> int:
    return sum(weight.numel() for weight in weights) * dtype.itemsize


def placement_of(
    device: str,
    module: PreTrainedModel,
    dtype: torch.dtype,
    memory: Memory,
    least: int = 0,
    free: Mapping[torch.device, int] | None = None,
) -> list[torch.device] | None:
    """The device of each layer if they don't fit on one GPU; None if they do, or if `device`, as configured, leaves no
    choice.

    module: may be without weights. least: bytes of activations with which a search still works, but slower; copying
    layers for every forward would be slower yet. free: free bytes of each GPU; None: ask the devices.
    """
    free = free_on_accelerators() if free is None else free
    if not free or not leaves_choice(device):
        return None
    layers = [_bytes(layer.parameters(), dtype) for layer in find_layers(module)[1]]
    other_bytes = memory.base - sum(layers)
    reserve = memory.held - memory.base
    if place_layers(layers, other_bytes, reserve + least, free) is None:
        return None
    devices = place_layers(layers, other_bytes, reserve + memory.activations, free)
    if devices and torch.device("cpu") in devices:  # to be copied to their device, one at a time
        devices = place_layers(layers, other_bytes, reserve + memory.activations + memory.layer, free)
    return devices


def place_layers(
    layers: Sequence[int], other_bytes: int, reserve: int, free: Mapping[torch.device, int]
) -> list[torch.device] | None:
    """The device of each layer if they don't all fit on the first one, else None. Devices are filled in order; layers
    left over stay in the CPU's memory.

    layers: bytes of each; other_bytes: those of all else, which is on the first device; reserve: bytes to keep free on
    each device; free: bytes that are free on each.
    """
    first_device = next(iter(free))
    room = {device: size - reserve for device, size in free.items()}
    room[first_device] -= other_bytes
    chosen = []
    for size in layers:
        # A full device is not tried again: so hidden states move from each device to the next only once.
        while room and next(iter(room.values())) < size:
            del room[next(iter(room))]
        device = next(iter(room), torch.device("cpu"))
        chosen.append(device)
        if room:
            room[device] -= size
    return None if set(chosen) == {first_device} else chosen


def free_on_accelerators() -> dict[torch.device, int]:
    """Free bytes of each device beside the CPU, as far as they can be asked."""
    free_bytes = {device: free_memory(device) for device in accelerators()}
    return {device: free for device, free in free_bytes.items() if free is not None}

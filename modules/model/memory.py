"""What a model takes in memory, and where its layers go.

Knows: a model's shapes, devices, what is free on them. Refuses to know: phrases, files, what weights hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from modules.checkpoints import find_layers, layer_settings
from modules.model.devices import accelerators, free_memory, leaves_choice


@dataclass(frozen=True)
class Sizes:
    """A base model in numbers. "Weights" are counts of values, not bytes."""

    layers: int
    hidden: int  # features of a hidden state
    widest: int  # the longest side of any matrix in a layer: mostly the MLP's
    heads: int  # of attention in a layer, the most; 0 if there are none
    head_size: int  # features of one head, the most
    vocabulary: int  # rows of the input embedding
    layer_weights: float  # in one layer, the mean over layers
    active_weights: float  # of these, what one token is multiplied with: not all of a mixture of experts
    header_weights: int  # input embedding and output head
    keeps_attention: bool = False  # whether a layer's whole attention matrices are in memory ("eager")


@dataclass(frozen=True)
class Memory:
    """What a run holds on its device, in bytes."""

    base: int  # the whole base model
    layer: int  # the largest
    header: int  # input embedding and output head; 0 if they are not tried
    arriving: int = 0  # the most of a candidate that is there in its own dtype, before it is cast
    activations: int = 0  # hidden states, mask and logits; about, and at their most

    @property
    def held(self) -> int:
        """The least that weights take: the candidate's layer or header, and one that is merged into.

        Where there is room, the next one is on its way meanwhile.
        """
        return self.base + 2 * max(self.layer, self.header) + self.arriving

    @property
    def searched(self) -> int:
        """What is kept for the candidate's weights: PyTorch keeps the memory into which they arrive, and that in which
        merges are made, for these, though never both are at their most at a time."""
        return self.layer + 2 * max(self.layer, self.header) + self.arriving

    @property
    def reserved(self) -> int:
        """All that PyTorch keeps for the run, which is what other programs lack."""
        return self.base + self.searched + self.activations


def sizes_of(module: PreTrainedModel) -> Sizes:
    """A model in numbers; it may be without weights."""
    layers, text = find_layers(module)[1], module.config.get_text_config()
    weights = [weight for layer in layers for weight in layer.parameters()]
    chosen = max(_counts(text, "num_experts_per_tok"), default=None)
    hidden = max(_counts(text, "hidden_size"), default=module.get_input_embeddings().weight.shape[1])
    heads = max(_counts(text, "num_attention_heads"), default=0)

    return Sizes(
        layers=len(layers),
        hidden=hidden,
        widest=max(max(weight.shape[-2:], default=1) for weight in weights),
        heads=heads,
        head_size=max(_counts(text, "head_dim"), default=hidden // max(1, heads)),
        vocabulary=module.get_input_embeddings().weight.shape[0],
        layer_weights=sum(weight.numel() for weight in weights) / len(layers),
        active_weights=sum(weight.numel() * _share_met(weight, chosen) for weight in weights) / len(layers),
        header_weights=sum(weight.numel() for weight in header_weights(module)),
        keeps_attention=getattr(text, "_attn_implementation", None) == "eager",
    )


def _share_met(weight: Tensor, chosen: int | None) -> float:
    """How much of a weight one token is multiplied with: of stacked experts, (experts, ..., ...), a few."""
    return min(1.0, chosen / weight.shape[0]) if chosen and weight.dim() == 3 else 1.0


def _counts(config: PreTrainedConfig, key: str) -> list[int]:
    """A setting of the layers that have it."""
    return [value for value in layer_settings(config, key) if isinstance(value, int) and value]


def header_weights(module: PreTrainedModel) -> list[Tensor]:
    """The weights of input embedding and output head; where they are tied there is one."""
    parts = [part for part in (module.get_input_embeddings(), module.get_output_embeddings()) if part is not None]
    return list({id(weight): weight for part in parts for weight in part.parameters()}.values())


def weights_of(module: PreTrainedModel, dtype: torch.dtype, with_header: bool, arriving: int = 0) -> Memory:
    """The weights that are held while layers and, if it is tried, the header are searched in this dtype."""
    return Memory(
        base=_bytes(module.parameters(), dtype) + sum(buffer.nbytes for buffer in module.buffers()),
        layer=max(_bytes(layer.parameters(), dtype) for layer in find_layers(module)[1]),
        header=_bytes(header_weights(module), dtype) if with_header else 0,
        arriving=arriving,
    )


def _bytes(weights: Iterable[Tensor], dtype: torch.dtype) -> int:
    return sum(weight.numel() for weight in weights) * dtype.itemsize


def placement_of(
    device: str, module: PreTrainedModel, dtype: torch.dtype, memory: Memory, least: int = 0
) -> list[torch.device] | None:
    """Where a model's layers go if `device`, as it is configured, leaves the choice and they don't fit on one GPU.

    None if they fit, or it leaves no choice. Arguments: see `spread`.
    """
    free = free_on_accelerators()
    return spread(module, dtype, memory, least, free) if leaves_choice(device) and free else None


def spread(
    module: PreTrainedModel, dtype: torch.dtype, memory: Memory, least: int, free: Mapping[torch.device, int]
) -> list[torch.device] | None:
    """Where each layer goes on devices with so many bytes free; None if all fit on the first.

    module: may be without weights; least: bytes of activations with which a search can do, though it is slower: it is
    far slower yet if layers are copied for every forward.
    """
    layers = [_bytes(layer.parameters(), dtype) for layer in find_layers(module)[1]]
    others, held = memory.base - sum(layers), memory.held - memory.base
    if place_layers(layers, others, held + least, free) is None:
        return None
    places = place_layers(layers, others, held + memory.activations, free)
    if places and torch.device("cpu") in places:  # to be copied to their device, one at a time
        places = place_layers(layers, others, held + memory.activations + memory.layer, free)
    return places


def place_layers(
    layers: Sequence[int], others: int, reserve: int, free: Mapping[torch.device, int]
) -> list[torch.device] | None:
    """Where each layer goes if they don't all fit on the first device: the devices are filled in order, what is left
    over stays in the CPU's memory. None if all fit.

    layers: bytes of each; others: bytes of everything else, which is on the first device; reserve: bytes to be kept
    free on each; free: bytes that are free on each.
    """
    places: list[torch.device] = []
    first, *_ = free
    rooms = {device: room - reserve - (others if device == first else 0) for device, room in free.items()}
    for size in layers:
        # In order: once a device is full it stays so, and hidden states move from device to device only once.
        while rooms and next(iter(rooms.values())) < size:
            del rooms[next(iter(rooms))]
        places.append(next(iter(rooms), torch.device("cpu")))
        if rooms:
            rooms[places[-1]] -= size
    return None if all(place == first for place in places) else places


def free_on_accelerators() -> dict[torch.device, int]:
    """Bytes that are free on each device beside the CPU that can be asked."""
    asked = {device: free_memory(device) for device in accelerators()}
    return {device: free for device, free in asked.items() if free is not None}

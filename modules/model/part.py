"""A part of the resident model: named tensors that are tried, installed and taken back, all alike.

Knows: the tensors and their places in the module. Refuses to know: how candidates are mixed, scores.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from modules.checkpoints.conversion import Tensors
from modules.checkpoints.readers import dtype_name
from modules.model.devices import wider
from modules.runtime.errors import BrokenWeights, CheckpointError, TooNarrow

BLOCKS = 8  # in which a tensor is cast
ROWS = 64 << 20  # bytes of a range of rows, in float32


@dataclass(frozen=True)
class Part:
    """The mergeable tensors of one layer, or of the header, by their full names in the model."""

    tensors: Tensors  # the model's own parameters and buffers, live
    dtypes: Mapping[str, torch.dtype]  # what each is computed in; a live one may be in another type for a moment
    saved_dtypes: Mapping[str, torch.dtype]  # what each is stored as when the model is saved
    input_axes: Mapping[str, int]  # which axis holds the input features, see methods.merge

    def still(self) -> "Part":
        """The same for a thread that reads beside those who make the model hold other tensors for a moment."""
        return replace(self, tensors={name: tensor.data for name, tensor in self.tensors.items()})

    @property
    def devices(self) -> set[torch.device]:
        """Where its tensors are; mostly it is one device."""
        return {tensor.device for tensor in self.tensors.values()}

    @property
    def size(self) -> int:
        """How many weights it has."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def space(self) -> Tensors:
        """Tensors of the same shapes to merge into."""
        return {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}

    def fitting(self, space: Tensors) -> Tensors:
        """Another part's space under this part's names, if it serves; else nothing."""
        fits = _forms(space) == _forms(self.tensors)
        return dict(zip(self.tensors, space.values(), strict=True)) if fits else {}

    def adopt(self, theirs: Iterable[tuple[str, Tensor]], source: str) -> Tensors:
        """A candidate's tensors, which may just be arriving, on the model's device in its dtype, all of them there.

        Raises BrokenWeights if one holds NaN or infinity, TooNarrow if a value does not fit the type that is computed
        in, CheckpointError if it does not fit the one that is saved.
        """
        adopted = {}
        bounds = {}
        for name, tensor in theirs:
            # On its way to the device while the next one is read.
            adopted[name], bounds[name] = self._adopted(name, tensor)
        self._check(bounds, source)
        return {name: adopted[name] for name in self.tensors}

    def _adopted(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """A candidate's tensor on its device in the model's dtype, and its least and greatest value, (2,)."""
        own = self.tensors[name]
        dtype = self.dtypes[name]
        if tensor.dtype == dtype or tensor.dim() == 0:
            arrived = tensor.to(own.device, non_blocking=True)
            return arrived.to(dtype), torch.stack(arrived.aminmax())
        # A part at a time is there in its own dtype, which may be twice as wide.
        adopted = torch.empty(tensor.shape, dtype=dtype, device=own.device)
        bounds = []
        rows = -(-len(tensor) // BLOCKS)
        for block, place in zip(tensor.split(rows), adopted.split(rows), strict=True):
            arrived = block.to(own.device, non_blocking=True)
            bounds.append(torch.stack(arrived.aminmax()))
            place.copy_(arrived)
        low, high = torch.stack(bounds).T
        return adopted, torch.stack((low.amin(), high.amax()))

    def _check(self, bounds: Tensors, source: str) -> None:
        """Least and greatest values of a candidate's tensors, (2,) each. Raises as `adopt`."""
        found = _on_the_host(bounds)
        for name in self.tensors:
            low, high = found[name]
            if not (-torch.inf < low and high < torch.inf):
                raise BrokenWeights(f"{source}: {name} holds NaN or infinite values")
            largest = max(-low, high)
            computed = self.dtypes[name]
            saved = self.saved_dtypes[name]
            what = f"{source}: {name} reaches {largest:.4g}, too large for"
            if largest > torch.finfo(computed).max:
                raise TooNarrow(f"{what} {dtype_name(computed)}", wider(computed))
            if largest > torch.finfo(saved).max:
                raise CheckpointError(f"{what} {dtype_name(saved)}; {wider(saved, 'dtype')}")

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[None]:
        """The model works with other tensors in this part for a moment; they are not copied."""
        own = {name: tensor.data for name, tensor in self.tensors.items()}
        try:
            for name, tensor in self.tensors.items():
                tensor.data = tensors[name]
            yield
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = own[name]

    def install(self, tensors: Tensors) -> None:
        """Take tensors over for good."""
        for name, tensor in tensors.items():
            self.tensors[name].data.copy_(tensor)

    def changes_in(self, tensors: Tensors) -> Tensor:
        """Which tensors are not equal to the model's own, in their order: (tensors,), boolean, on the device. Nobody
        waits for it. An element that is equal becomes the model's own: a zero may have another sign."""
        flags = []
        for name, tensor in tensors.items():
            differs = tensor != self.tensors[name]
            torch.where(differs, tensor, self.tensors[name], out=tensor)
            flags.append(differs.any())
        return torch.stack([flag.to(flags[0].device) for flag in flags])


def row_ranges(tensor: Tensor, room: int | None = None) -> Iterator[tuple[int, int]]:
    """First and end of ranges of a tensor's rows that fit into so many bytes (ROWS): what is done by them takes
    little memory, however large the tensor is."""
    room = room or ROWS
    rows, size = (len(tensor), max(1, room // (4 * max(1, tensor[:1].numel())))) if tensor.dim() else (1, 1)
    return ((first, min(first + size, rows)) for first in range(0, rows, size))


def _on_the_host(tensors: Tensors) -> dict[str, list[float]]:
    """Small tensors of one shape, fetched all together: one wait for each device that they are on."""
    found: dict[str, list[float]] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        there = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        widest = reduce(torch.promote_types, (tensor.dtype for tensor in there.values()))
        rows = torch.stack([tensor.to(widest) for tensor in there.values()]).tolist()
        found.update(zip(there, rows, strict=True))
    return found


def _forms(tensors: Tensors) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors.values()]

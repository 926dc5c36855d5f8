"""A part of the resident model: named tensors that are tried, installed and restored.

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

BLOCKS = 8  # number of blocks that a tensor is cast in
ROWS = 64 << 20  # bytes of a range of rows, in float32


@dataclass(frozen=True)
class Part:
    """The mergeable tensors of one layer, or of the header, by their full names in the model."""

    tensors: Tensors  # the model's own parameters and buffers, live
    dtypes: Mapping[str, torch.dtype]  # each tensor's compute type; a live one may have another type for a moment
    saved_dtypes: Mapping[str, torch.dtype]  # the type that each has in the saved model
    input_axes: Mapping[str, int]  # the axis of the input features, see methods.merge

    def still(self) -> "Part":
        """A copy of this part with the present data, for a reading thread: `holding` elsewhere does not affect it."""
        return replace(self, tensors={name: tensor.data for name, tensor in self.tensors.items()})

    @property
    def devices(self) -> set[torch.device]:
        """The devices of its tensors, mostly one."""
        return {tensor.device for tensor in self.tensors.values()}

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def space(self) -> Tensors:
        """Tensors of the same shapes to merge into."""
        return {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}

    def fitting(self, space: Tensors) -> Tensors:
        """Another part's space under this part's names, if shapes, types and devices agree; else an empty dict."""
        fits = _layouts(space) == _layouts(self.tensors)
        return dict(zip(self.tensors, space.values(), strict=True)) if fits else {}

    def adopt(self, candidate_tensors: Iterable[tuple[str, Tensor]], source: str) -> Tensors:
        """A candidate's tensors, one for each of the part's, on the model's devices in its dtypes.

        candidate_tensors: may be read while they are iterated over. source: the candidate's name. Raises BrokenWeights
        if one holds NaN or infinity, TooNarrow if a value does not fit the compute type, CheckpointError if it does not
        fit the saved type.
        """
        adopted = {}
        bounds = {}
        for name, tensor in candidate_tensors:
            # The copy to the device goes on while the next tensor is read.
            adopted[name], bounds[name] = self._adopted_tensor(name, tensor)
        self._check(bounds, source)
        return {name: adopted[name] for name in self.tensors}

    def _adopted_tensor(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """A candidate's tensor on the device in the model's dtype, and its least and greatest value, (2,)."""
        base_tensor = self.tensors[name]
        dtype = self.dtypes[name]
        if tensor.dtype == dtype or tensor.dim() == 0:
            arrived = tensor.to(base_tensor.device, non_blocking=True)
            return arrived.to(dtype), torch.stack(arrived.aminmax())
        # Only a block at a time is on the device in its own dtype, which may be twice as wide.
        adopted = torch.empty(tensor.shape, dtype=dtype, device=base_tensor.device)
        bounds = []
        rows = -(-len(tensor) // BLOCKS)
        for source_block, target_block in zip(tensor.split(rows), adopted.split(rows), strict=True):
            arrived = source_block.to(base_tensor.device, non_blocking=True)
            bounds.append(torch.stack(arrived.aminmax()))
            target_block.copy_(arrived)
        low, high = torch.stack(bounds).T
        return adopted, torch.stack((low.amin(), high.amax()))

    def _check(self, bounds: Tensors, source: str) -> None:
        """Check a candidate's values. bounds: least and greatest of each tensor, (2,) each. Raises as `adopt`."""
        extremes = _fetched(bounds)
        for name in self.tensors:
            low, high = extremes[name]
            if not (-torch.inf < low and high < torch.inf):
                raise BrokenWeights(f"{source}: {name} holds NaN or infinite values")
            largest = max(-low, high)
            compute_dtype = self.dtypes[name]
            saved_dtype = self.saved_dtypes[name]
            reason = f"{source}: {name} reaches {largest:.4g}, too large for"
            if largest > torch.finfo(compute_dtype).max:
                raise TooNarrow(f"{reason} {dtype_name(compute_dtype)}", wider(compute_dtype))
            if largest > torch.finfo(saved_dtype).max:
                raise CheckpointError(f"{reason} {dtype_name(saved_dtype)}; {wider(saved_dtype, 'dtype')}")

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[None]:
        """Within it, the model has other tensors in this part; they are not copied."""
        originals = {name: tensor.data for name, tensor in self.tensors.items()}
        try:
            for name, tensor in self.tensors.items():
                tensor.data = tensors[name]
            yield
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = originals[name]

    def install(self, tensors: Tensors) -> None:
        """Copy tensors into the model for good."""
        for name, tensor in tensors.items():
            self.tensors[name].data.copy_(tensor)

    def changes_in(self, tensors: Tensors) -> Tensor:
        """Which tensors differ from the model's own, in their order: (tensors,), boolean, on the device, not waited
        for. Equal elements are overwritten with the model's own, as a zero may have another sign."""
        flags = []
        for name, tensor in tensors.items():
            differs = tensor != self.tensors[name]
            torch.where(differs, tensor, self.tensors[name], out=tensor)
            flags.append(differs.any())
        return torch.stack([flag.to(flags[0].device) for flag in flags])


def row_ranges(tensor: Tensor, room: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, end) of ranges of a tensor's rows, each of at most `room` bytes in float32 (default ROWS) or one row:
    work done by ranges takes little memory, however large the tensor is."""
    room = room or ROWS
    rows, size = (len(tensor), max(1, room // (4 * max(1, tensor[:1].numel())))) if tensor.dim() else (1, 1)
    return ((first, min(first + size, rows)) for first in range(0, rows, size))


def _fetched(tensors: Tensors) -> dict[str, list[float]]:
    """The values of small tensors of one shape, (n,), by name; one wait for each device that they are on."""
    values: dict[str, list[float]] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        device_tensors = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        widest = reduce(torch.promote_types, (tensor.dtype for tensor in device_tensors.values()))
        rows = torch.stack([tensor.to(widest) for tensor in device_tensors.values()]).tolist()
        values.update(zip(device_tensors, rows, strict=True))
    return values


def _layouts(tensors: Tensors) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors.values()]

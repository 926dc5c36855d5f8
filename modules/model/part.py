"""A part of the resident model: named tensors that are tried, installed and taken back, all alike.

Knows: the tensors and their places in the module. Refuses to know: how candidates are mixed, scores.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.checkpoints import Tensors, dtype_name
from modules.model.devices import wider
from modules.runtime import BrokenWeights, CheckpointError


@dataclass(frozen=True)
class Part:
    """The mergeable tensors of one layer, or of the header, by their full names in the model."""

    tensors: Tensors  # the model's own parameters and buffers, live
    saved_dtypes: Mapping[str, torch.dtype]  # what each is stored as when the model is saved
    input_axes: Mapping[str, int]  # which axis holds the input features, see methods.merge
    touched: set[str]  # of the whole model, live: the tensors that are no longer the base's

    @property
    def devices(self) -> set[torch.device]:
        """Where its tensors are; mostly it is one device."""
        return {tensor.device for tensor in self.tensors.values()}

    def space(self, used: Tensors | None = None) -> Tensors:
        """Tensors of the same shapes to merge into; those of another part serve again if they fit."""
        if used is not None and _forms(used) == _forms(self.tensors):
            return dict(zip(self.tensors, used.values(), strict=True))
        return {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}

    def adopt(self, theirs: Iterable[tuple[str, Tensor]], source: str) -> Tensors:
        """A candidate's tensors, which may just be arriving, on the model's device in its dtype.

        Raises BrokenWeights if one holds NaN or infinity, CheckpointError if a value does not fit the dtype.
        """
        # On their way to the device while the next one is read; looked at when all are there.
        arrived = {name: tensor.to(self.tensors[name].device, non_blocking=True) for name, tensor in theirs}
        return {name: self._checked(name, arrived.pop(name), source) for name in self.tensors}

    def _checked(self, name: str, tensor: Tensor, source: str) -> Tensor:
        """A candidate's tensor in the model's dtype. Raises as `adopt`."""
        low, high = (float(bound) for bound in tensor.aminmax())
        if not (-torch.inf < low and high < torch.inf):
            raise BrokenWeights(f"{source}: {name} holds NaN or infinite values")
        for dtype in (self.tensors[name].dtype, self.saved_dtypes[name]):
            if max(-low, high) > torch.finfo(dtype).max:
                raise CheckpointError(
                    f"{source}: {name} reaches {max(-low, high):.4g}, too large for {dtype_name(dtype)}; {wider(dtype)}"
                )
        return tensor.to(self.tensors[name].dtype)

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
        """Copy tensors, all of the part's or some, into the model for good."""
        for name, tensor in tensors.items():
            self.tensors[name].data.copy_(tensor)
            self.touched.add(name)


def _forms(tensors: Tensors) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors.values()]

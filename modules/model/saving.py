"""A model's files, written as its tensors come: in the base's own shards and names, with all that lies beside them.

Knows: stored names and types, which tensors can be copied. Refuses to know: where merged tensors come from, devices.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from modules.checkpoints import Checkpoint, Conversion, NewWeights, Tensors, copy_companions, written_name
from modules.runtime import CheckpointError


class Saving:
    """A folder into which a model is written. All methods raise CheckpointError if a file can't be written or read."""

    def __init__(self, base: Checkpoint, conversion: Conversion, saved_dtype: torch.dtype | None, folder: Path) -> None:
        """Begin with everything but the weights. saved_dtype: of all of them; None keeps what is stored."""
        self._base, self._conversion = base, conversion
        copy_companions(base, folder, saved_dtype)
        self._tensors = {
            name: replace(
                info,
                file=written_name(info.file),
                dtype=saved_dtype if saved_dtype and info.dtype.is_floating_point else info.dtype,
            )
            for name, info in base.tensors.items()
        }
        self._weights = NewWeights(folder, self._tensors)

    def copied(self, stored: Iterable[str], names: Collection[str]) -> list[str]:
        """Of stored tensors that make these of the model together, those that are copied while nothing is merged into
        them: what is saved as it is stored, and what the model has no use for."""
        return [name for name in stored if not names or self._tensors[name].dtype == self._base.tensors[name].dtype]

    def copy(self, stored: Iterable[str]) -> None:
        """Write tensors as the base's files have them."""
        for name, tensor in self._base.stream(stored):
            self._write(name, tensor, 0)

    def write(self, stored: Collection[str], tensors: Tensors, first: int = 0) -> None:
        """Write stored tensors. tensors: all of the model's that they make together, or rows of a single one from the
        first on."""
        made = self._conversion.store(tensors, tensors) if stored else {}
        for name in stored:
            self._write(name, made.pop(name), first)

    def finish(self) -> None:
        """All has been written."""
        self._weights.finish()

    def _write(self, name: str, tensor: Tensor, first: int) -> None:
        tensor = tensor.to("cpu", self._tensors[name].dtype)
        if self._conversion.module_names(name) and not is_finite(tensor):
            raise CheckpointError(f"{name} has come to hold NaN or infinite values; nothing was put in place")
        self._weights.write(name, tensor, first)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())

"""Weights in .bin files: read as plain tensors, or refused.

Knows: pickles and the archives they come in. Refuses to know: safetensors, indexes, what a tensor is for.
Nothing in a file is executed: a .bin file is a pickle, and one that would need more than tensors is refused.
"""

import os
import zipfile
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.runtime import CheckpointError, reading

# Tensor name -> dtype, torch's or the name that safetensors gives it, and shape.
Forms = Mapping[str, tuple[Any, tuple[int, ...]]]

# The last file that had to be loaded whole, if there was one, and its tensors.
Held = dict[Path, dict[str, Tensor]]

_LARGEST_LISTING = 100_000_000  # bytes of what is said of the tensors in a file; a hundred or two for each


def is_whole(path: Path) -> bool:
    """Whether a .bin file is of the kind from before PyTorch 1.6. Since then it is an archive, which can be mapped."""
    with reading(path), path.open("rb") as file:
        return file.read(4) != b"PK\x03\x04"


def is_pickled(file: str) -> bool:
    """Whether a weight file of this name is a pickle: its shapes can't be seen without the whole file."""
    return file.endswith(".bin")


def pickled_forms(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Of every tensor its dtype and shape. Raises CheckpointError if the file holds something else, or is damaged."""
    whole = is_whole(path)
    with reading(path):
        if not whole:
            _check_archive(path)
    # A file that can't be mapped is read, but on the meta device nothing of it stays in memory.
    tensors = _unpickled(path, "meta" if whole else "cpu")
    with reading(path):
        for name, tensor in tensors.items():
            if tensor.numel() * tensor.element_size() > path.stat().st_size:  # one number in many places, say
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which is more than the file holds")
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _check_archive(path: Path) -> None:
    """Raise ValueError if an archive can't be mapped, or says that it holds more than it can."""
    size = path.stat().st_size
    with _ShortReads(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is cut short: its end is missing; fetch it again")
        entries = zipfile.ZipFile(file).infolist()
    for entry in entries:
        if entry.compress_type:
            # PyTorch would map the packed bytes as if they were the weights.
            raise ValueError("another program has compressed it; load it in PyTorch and save it again")
        if entry.file_size > (_LARGEST_LISTING if entry.filename.endswith(".pkl") else size):
            raise ValueError(f"{entry.filename} is to have {entry.file_size:,} bytes, which is too many")


class _ShortReads(FileIO):
    """A file of which only little is read at a time: an archive says itself how long the list of its contents is."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises ValueError if that is too much."""
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > _LARGEST_LISTING:
            raise ValueError(f"the list of what is in it is to have {wanted:,} bytes; no model has so many tensors")
        return super().read(wanted)


def unpickled_once(path: Path, held: Held) -> dict[str, Tensor]:
    """A .bin file's tensors; those of a file that has to be loaded whole are held until there is another one."""
    if path in held:
        return held[path]
    if not is_whole(path):
        return _unpickled(path)
    held.clear()  # first, so that there are never two
    held[path] = _unpickled(path)
    return held[path]


def _unpickled(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """A .bin file's tensors, in a memory map if it can be mapped; on the meta device they have no data."""
    mapped = not is_whole(path)
    with reading(path):
        tensors = torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    if not isinstance(tensors, dict) or not all(
        # Neither sparse, nor without data where there should be some.
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == device
        for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{path}: holds something else than named tensors; convert it to safetensors")
    return dict(tensors)

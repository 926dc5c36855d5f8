"""Weights in .bin files: read as plain tensors, or refused.

Knows: pickles and the archives they come in. Refuses to know: indexes of shards, what a tensor is for.
No code in a file is executed: a .bin file is a pickle, and one that holds more than tensors is refused.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from modules.checkpoints.readers import Buffer, FilesReader, Forms
from modules.runtime.errors import CheckpointError, reading

_LARGEST_LISTING = 100_000_000  # bytes of a file's list of tensors, which has one or two hundred for each


class BinReader(FilesReader):
    """See `Reader`. Files from before PyTorch 1.6, which can't be mapped into memory, are refused."""

    def forms(self, path: Path) -> Forms:
        """Dtypes and shapes of one file's tensors, by name."""
        with reading(path):
            _check_archive(path)
        tensors = _load(path)
        with reading(path):
            for name, tensor in tensors.items():
                if tensor.numel() * tensor.element_size() > path.stat().st_size:  # strides of 0, say
                    raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is larger than the file")
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read_file(self, path: Path, names: Iterable[str], buffer: Buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of one file."""
        tensors = _load(path)
        # Copied: a tensor in a memory map changes with its file. Detached: it may be a module's parameter.
        for name in names:
            yield name, tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """See `Reader`."""
        return _load(self.folder / self.tensors[name].file)[name].detach()[rows]


def _check_archive(path: Path) -> None:
    """Raise ValueError if an archive can't be mapped, or claims more bytes than the file has."""
    size = path.stat().st_size
    with _ShortReads(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("truncated, or saved before PyTorch 1.6; download it again, or save it as safetensors")
        entries = zipfile.ZipFile(file).infolist()
    for entry in entries:
        if entry.compress_type:
            # PyTorch would map the packed bytes as if they were the weights.
            raise ValueError("the archive is compressed; load it in PyTorch and save it again")
        if entry.file_size > (_LARGEST_LISTING if entry.filename.endswith(".pkl") else size):
            raise ValueError(f"{entry.filename} claims {entry.file_size:,} bytes, which is too large")


class _ShortReads(FileIO):
    """A file with a limit on each read: the length of an archive's table of contents comes from the file itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        """See FileIO. Raises ValueError if the read exceeds the limit."""
        byte_count = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if byte_count > _LARGEST_LISTING:
            raise ValueError(f"its table of contents claims {byte_count:,} bytes, which is too large")
        return super().read(byte_count)


def _load(path: Path) -> dict[str, Tensor]:
    """A file's tensors, in a memory map."""
    with reading(path):
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    is_named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_named or not all(_is_plain(tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: contains more than named tensors; convert it to safetensors")
    return dict(tensors)


def _is_plain(tensor: object) -> bool:
    """Whether something is a tensor, neither sparse nor without data."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"

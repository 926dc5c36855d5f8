"""Weights in .bin files: read as plain tensors, or refused.

Knows: pickles and the archives they come in. Refuses to know: indexes of shards, what a tensor is for.
Nothing in a file is executed: a .bin file is a pickle, and one that would need more than tensors is refused.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from modules.checkpoints.readers import Buffer, FilesReader, Forms
from modules.runtime.errors import CheckpointError, reading

_LARGEST_LISTING = 100_000_000  # bytes of what is said of the tensors in a file; a hundred or two for each


class BinReader(FilesReader):
    """See `Reader`. Files from before PyTorch 1.6 can only be loaded whole; the last such file is kept."""

    def __init__(self, folder: Path, files: Sequence[str], known: Mapping[str, Forms]) -> None:
        super().__init__(folder, files, known)
        self._kept: dict[Path, dict[str, Tensor]] = {}  # no more than one file

    def forms(self, path: Path) -> Forms:
        """What one file holds."""
        is_archive = _is_archive(path)
        if is_archive:
            with reading(path):
                _check_archive(path)
        # A file that can't be mapped is read, but on the meta device nothing of it stays in memory.
        tensors = _load(path, "cpu" if is_archive else "meta")
        with reading(path):
            for name, tensor in tensors.items():
                if tensor.numel() * tensor.element_size() > path.stat().st_size:  # one number in many places, say
                    raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is larger than the file")
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read_file(self, path: Path, names: Iterable[str], buffer: Buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of one file."""
        tensors = self._tensors_of(path)
        # Copied: a tensor in a memory map changes with its file. Detached: it may be a module's parameter.
        for name in names:
            yield name, tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """See `Reader`."""
        return self._tensors_of(self.folder / self.tensors[name].file)[name].detach()[rows]

    def release(self) -> None:
        """See `Reader`."""
        self._kept.clear()

    def _tensors_of(self, path: Path) -> dict[str, Tensor]:
        if path in self._kept:
            return self._kept[path]
        if _is_archive(path):
            return _load(path)
        self._kept.clear()  # first, so that there are never two
        self._kept[path] = _load(path)
        return self._kept[path]


def _is_archive(path: Path) -> bool:
    """Whether a file is an archive, as since PyTorch 1.6, which can be mapped into memory."""
    with reading(path), path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """Raise ValueError if an archive can't be mapped, or says that it holds more than it can."""
    size = path.stat().st_size
    with _ShortReads(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("truncated: its end is missing; download it again")
        entries = zipfile.ZipFile(file).infolist()
    for entry in entries:
        if entry.compress_type:
            # PyTorch would map the packed bytes as if they were the weights.
            raise ValueError("the archive is compressed; load it in PyTorch and save it again")
        if entry.file_size > (_LARGEST_LISTING if entry.filename.endswith(".pkl") else size):
            raise ValueError(f"{entry.filename} claims {entry.file_size:,} bytes, which is too large")


class _ShortReads(FileIO):
    """A file of which only little is read at a time: an archive says itself how long the list of its contents is."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises ValueError if that is too much."""
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > _LARGEST_LISTING:
            raise ValueError(f"its table of contents claims {wanted:,} bytes, which is too large")
        return super().read(wanted)


def _load(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """A file's tensors, in a memory map if it can be mapped; on the meta device they have no data."""
    is_archive = _is_archive(path)
    with reading(path):
        tensors = torch.load(path, map_location=device, mmap=is_archive, weights_only=True)
    is_named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_named or not all(_is_plain(tensor, device) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: contains more than named tensors; convert it to safetensors")
    return dict(tensors)


def _is_plain(tensor: object, device: str) -> bool:
    """Whether something is a tensor, neither sparse, nor without data where there should be some."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == device

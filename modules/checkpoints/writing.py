"""New weight files: each tensor is written to its offset as soon as it arrives, and is read back.

Knows: the layout of safetensors, indexes of shards. Refuses to know: where tensors come from, the output folder's name.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from modules.checkpoints.readers import DTYPES, TensorInfo
from modules.runtime.errors import CheckpointError, first_line

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_AT_ONCE = 1 << 20  # bytes that are read back and compared at a time
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")  # of a file's tensors, in safetensors


def written_name(file: str) -> str:
    """The name of the file to which a weight file's tensors are written: .bin files become safetensors."""
    return file.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors") + ".safetensors"


class NewWeights:
    """New weight files in a folder. Tensors are announced, then written in any order, whole or some rows at a time.

    Every file is, byte for byte, the one that safetensors would write. All methods raise CheckpointError if a file
    can't be written, or if its content differs when it is read back.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        """Create the files, and their index if there is more than one. tensors: all that will be written."""
        self._folder = folder
        self._tensors = tensors
        self._offsets: dict[str, int] = {}  # of each tensor in its file, in bytes
        self._bytes_missing = {name: _size(info) for name, info in tensors.items()}  # not yet written, by tensor
        files = dict.fromkeys(info.file for info in tensors.values())
        for file in files:
            self._begin(file)
        if set(files) != {_SINGLE_FILE}:
            weight_map = {name: info.file for name, info in sorted(tensors.items())}
            index = {"metadata": {"total_size": sum(self._bytes_missing.values())}, "weight_map": weight_map}
            self._put(_INDEX_FILE, json.dumps(index, indent=2).encode() + b"\n")

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Write a tensor, or its rows from number `first` on, to its file; read it back and compare."""
        info = self._tensors[name]
        content = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert tensor.dtype == info.dtype and tensor.shape[1:] == info.shape[1:], f"{name} is not what was announced"
        path = self._folder / info.file
        row_size = math.prod(info.shape[1:]) * info.dtype.itemsize
        offset = self._offsets[name] + first * row_size
        try:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(content.numpy())
                file.seek(offset)
                matches = all(_reads(file, block) for block in content.split(_AT_ONCE))
        except OSError as error:
            raise self._refusal(info.file, error) from None
        if not matches:
            raise CheckpointError(f"{path}: {name} reads back differently from what was written; check the disk")
        self._bytes_missing[name] -= len(content)

    def finish(self) -> None:
        """Check that all tensors were written."""
        assert all(count <= 0 for count in self._bytes_missing.values()), "not all that was announced has been written"

    def _begin(self, file: str) -> None:
        """Write a file's header."""
        entries = {"__metadata__": {"format": "pt"}}
        end = 0
        infos = {name: info for name, info in self._tensors.items() if info.file == file}
        for name in sorted(infos, key=lambda name: (_ORDER.index(_NAMES[infos[name].dtype]), name)):
            info = infos[name]
            start = end
            end += _size(info)
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": (start, end)}
            self._offsets[name] = start
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._put(file, len(header).to_bytes(8, "little") + header)
        for name in infos:
            self._offsets[name] += 8 + len(header)

    def _put(self, file: str, content: bytes) -> None:
        try:
            (self._folder / file).write_bytes(content)
        except OSError as error:
            raise self._refusal(file, error) from None

    def _refusal(self, file: str, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._folder / file}: can't be written ({first_line(error)})")


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _reads(file: BinaryIO, expected: Tensor) -> bool:
    """Whether the next bytes of a file are the expected ones. expected: (bytes,), uint8."""
    stored = torch.empty_like(expected)
    if file.readinto(stored.numpy()) < len(expected):
        return False
    eights = len(expected) // 8 * 8  # compared as numbers of eight bytes, which goes several times faster
    are_equal = torch.equal(stored[:eights].view(torch.int64), expected[:eights].view(torch.int64))
    return are_equal and torch.equal(stored[eights:], expected[eights:])

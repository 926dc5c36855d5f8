"""Weights in safetensors files.

Knows: their header, which gives each tensor's offsets. Refuses to know: indexes of shards, what a tensor is for.

Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

from modules.checkpoints.readers import DTYPES, Buffer, FilesReader, Forms, new_buffer
from modules.runtime.errors import reading

LONGEST_HEADER = 100_000_000  # bytes, as for safetensors itself


class SafetensorsReader(FilesReader):
    """See `Reader`."""

    def forms(self, path: Path) -> Forms:
        """Dtypes and shapes of one file's tensors, by name; the header is checked against the file."""
        with reading(path):
            size = path.stat().st_size
            with path.open("rb") as file:
                entries = dict(_entries(_read_header(file, size)))
                start = file.tell()
            entries.pop("__metadata__", None)
            end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            if size < end:
                raise ValueError(_cut_short(size, end))
            with safe_open(path, "pt", backend="pread"):
                pass  # it checks dtypes, shapes and that all bytes are used once
            in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
            return {name: (entry["dtype"], entry["shape"]) for name, entry in in_order}

    def read_file(self, path: Path, names: Iterable[str], buffer: Buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of one file.

        Without a memory map, a file that shrinks or a mount that vanishes is an error, not a crash. Reading into memory
        that is used again is several times faster than into new memory.
        """
        with reading(path), path.open("rb") as file:
            entries = _entries(_read_header(file, path.stat().st_size))
            start = file.tell()
            for name in names:
                begin, end = entries[name]["data_offsets"]
                memory = buffer(end - begin)
                file.seek(start + begin)
                if file.readinto(memory.numpy()) < end - begin:
                    raise ValueError("the file ends too early")
                yield name, memory.view(DTYPES[entries[name]["dtype"]]).view(entries[name]["shape"])

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """See `Reader`. Only these rows are read; neighbouring ones together."""
        path = self.folder / self.tensors[name].file
        with reading(path), path.open("rb", buffering=0) as file:
            entry = _entries(_read_header(file, path.stat().st_size))[name]
            begin, end = entry["data_offsets"]
            begin += file.tell()
            end += file.tell()
            row_size = (end - begin) // max(1, entry["shape"][0])  # in bytes
            memory = new_buffer(row_size * len(rows))
            gaps = (rows.diff() != 1).nonzero().flatten() + 1
            starts = [0, *gaps.tolist()] if len(rows) else []
            for start, stop in zip(starts, [*starts[1:], len(rows)], strict=False):
                file.seek(begin + row_size * int(rows[start]))
                _fill(file, memory.numpy()[row_size * start : row_size * stop])
            return memory.view(DTYPES[entry["dtype"]]).view(len(rows), *entry["shape"][1:])


def _read_header(file: BinaryIO | RawIOBase, size: int) -> bytes:
    """The header of a file that is open at its beginning. size: of the file, in bytes."""
    length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header claims {length:,} bytes, more than the limit of {LONGEST_HEADER:,}")
    if size < 8 + length:
        raise ValueError(_cut_short(size, 8 + length))
    return file.read(length)


@lru_cache(maxsize=16)
def _entries(header: bytes) -> Mapping[str, Any]:
    """A header's entries by tensor name. Cached, since parsing takes as long as reading a tensor."""
    return json.loads(header)


def _cut_short(size: int, announced: int) -> str:
    return f"truncated: {size:,} of {announced:,} bytes; download it again"


def _fill(file: RawIOBase, memory: Any) -> None:
    """Read until memory is full: the system reads no more than 2 GiB at a time."""
    while len(memory):
        count = file.readinto(memory)
        if not count:
            raise ValueError("the file ends too early")
        memory = memory[count:]

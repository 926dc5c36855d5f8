"""The header of a GGUF file: its keys, and where its tensors lie.

Knows: the format; that every length in it may be wrong. Refuses to know: what a key means, models.

A length is held against what the file still has, and a count against a limit that no real file comes near, before
anything is read by it. The libraries that read the file afterwards trust both.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from modules.checkpoints.causes import disguise
from modules.runtime import ConfigError, first_line, reading

_VERSIONS = (2, 3)
_MOST_KEYS = 2**16
_MOST_TENSORS = 2**18
_MOST_ENTRIES = 2**21  # of all arrays: the largest vocabularies have 1.3 million with their merges
_MOST_KEPT = 2**12  # entries of an array of numbers that is kept: settings have one for each layer
_MOST_DIMENSIONS = 4  # as many as ggml has
_MOST_ALIGNMENT = 2**16
_TEXT, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """How a tensor is stored. start, size: in bytes, from the file's beginning."""

    kind: str  # F16, Q4_1, ...
    shape: tuple[int, ...]  # in torch's order
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the numbers. Long arrays, a tokenizer's, are None among the keys."""

    file: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.keys.get("general.architecture", ""))

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of an architecture's key, named without the architecture."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    @property
    def kind(self) -> str:
        """How most numbers are stored."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.kind] += prod(tensor.shape)
        return count.most_common(1)[0][0]

    @property
    def numbers(self) -> int:
        """How many numbers all tensors have."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def read_header(file: Path) -> GgufHeader:
    """Read and check a file's header; none of its numbers.

    Raises ConfigError if it is no GGUF file, or damaged, CheckpointError if it can't be opened.
    """
    with reading(file):
        size = file.stat().st_size
        opened = file.open("rb", buffering=2**20)
    try:
        with opened:
            cursor = _Cursor(opened, size)
            keys, tensors = _read(cursor)
    except Exception as error:  # whatever a damaged file leads to
        what = disguise(file) or f"can't be read as GGUF ({first_line(error)}); fetch it again"
        raise ConfigError(f"{file}: {what}") from None
    if not tensors:
        raise ConfigError(f"{file}: holds no tensors")
    return GgufHeader(file, keys, tensors)


@dataclass
class _Cursor:
    """A place in a file, and how many entries its arrays may still have."""

    file: BinaryIO
    size: int
    position: int = 0
    entries: int = field(default=_MOST_ENTRIES)

    def advance(self, count: int) -> None:
        if count > self.size - self.position:
            raise ValueError(f"at byte {self.position} it announces {count} more bytes than follow")
        self.position += count

    def take(self, form: str) -> tuple[Any, ...]:
        """Numbers, by their form in the struct module."""
        length = struct.calcsize(f"<{form}")
        self.advance(length)
        return struct.unpack(f"<{form}", self.file.read(length))

    def text(self) -> str:
        (length,) = self.take("Q")
        self.advance(length)
        return self.file.read(length).decode("utf-8")

    def skip_text(self) -> None:
        (length,) = self.take("Q")
        self.advance(length)
        self.file.seek(length, 1)


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    magic, version, tensor_count, key_count = cursor.take("4sIQQ")
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, not 2 or 3")
    if key_count > _MOST_KEYS or tensor_count > _MOST_TENSORS:
        raise ValueError(f"it announces {key_count} keys and {tensor_count} tensors")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.text()
        if name in keys:
            raise ValueError(f"the key {name} stands twice in it")
        (kind,) = cursor.take("I")
        keys[name] = _value(cursor, name, kind)
    infos = dict(_tensor_info(cursor) for _ in range(tensor_count))
    if len(infos) < tensor_count:
        raise ValueError("the name of a tensor stands twice in it")
    return keys, _placed(cursor, infos, keys.get("general.alignment", 32))


def _value(cursor: _Cursor, name: str, kind: int) -> Any:
    if kind in _NUMBERS:
        return cursor.take(_NUMBERS[kind])[0]
    if kind == _TEXT:
        return cursor.text()
    if kind != _ARRAY:
        raise ValueError(f"the key {name} is of the unknown type {kind}")
    kind, count = cursor.take("IQ")
    cursor.entries -= count
    if cursor.entries < 0:
        raise ValueError(f"the array {name} announces {count} entries")
    if kind in _NUMBERS:
        values = cursor.take(f"{count}{_NUMBERS[kind]}")
        return list(values) if count <= _MOST_KEPT else None
    if kind != _TEXT:
        raise ValueError(f"the array {name} is of the unknown type {kind}")
    for _ in range(count):
        cursor.skip_text()
    return None


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[str, tuple[int, ...], int, int]]:
    """A tensor's name; its kind, its shape, where it begins among the numbers, its size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text()
    (count,) = cursor.take("I")
    if not 1 <= count <= _MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {count} dimensions")
    dimensions = cursor.take(f"{count}Q")
    number, offset = cursor.take("IQ")
    kind = GGMLQuantizationType(number)
    block, block_size = GGML_QUANT_SIZES[kind]
    if not all(dimensions) or dimensions[0] % block:
        raise ValueError(f"the tensor {name} of {kind.name} has the shape {dimensions}")
    return name, (kind.name, dimensions[::-1], offset, prod(dimensions) // block * block_size)


def _placed(
    cursor: _Cursor, infos: dict[str, tuple[str, tuple[int, ...], int, int]], alignment: Any
) -> dict[str, GgufTensor]:
    """The tensors, all of which must lie within the file and none on another."""
    if alignment not in [2**power for power in range(_MOST_ALIGNMENT.bit_length())]:
        raise ValueError(f"its alignment is {alignment}")
    begin = -(-cursor.position // alignment) * alignment
    end = begin
    for name, (_, _, offset, size) in sorted(infos.items(), key=lambda item: item[1][2]):
        if begin + offset < end:
            raise ValueError(f"the tensor {name} lies on another")
        end = begin + offset + size
        if end > cursor.size:
            raise ValueError(f"the tensor {name} ends at byte {end}, the file at {cursor.size}")
    return {name: GgufTensor(kind, shape, begin + offset, size) for name, (kind, shape, offset, size) in infos.items()}

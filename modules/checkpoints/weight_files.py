"""Weight files: what is in them, tensors out of them, new ones.

Knows: safetensors headers, .bin files, indexes of shards. Refuses to know: what a tensor is for, models, devices.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from modules.checkpoints.bin_files import Forms, Held, is_pickled, pickled_forms, unpickled_once
from modules.checkpoints.causes import disguise, found_instead
from modules.runtime import CheckpointError, ConfigError, open_input, reading

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# In this order: where a folder holds both formats, safetensors win.
_FORMATS = ((SINGLE_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json"))

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Room = Callable[[int], Tensor]  # so many bytes of the CPU's memory, as a tensor of uint8

Fingerprint = dict[str, int | str]  # "size" in bytes, "sha256"
_BLOCKS, _BLOCK = 64, 1 << 16  # of a large file, how many blocks of how many bytes a fingerprint looks at

LARGEST_TEXT = 100_000_000  # bytes of a file that describes a model; tokenizers have some ten million
LARGEST_SETTINGS = 10_000_000  # of config.json and adapter_config.json, which mostly have a few thousand
_LONGEST_HEADER = 100_000_000  # bytes, as for safetensors itself


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it looks like, from the file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """float16 and so on, as settings and messages have it."""
    return str(dtype).removeprefix("torch.")


def local_files(folder: Path) -> list[str]:
    """The names of the files in a folder, sub-folders left out. Raises CheckpointError if it can't be read."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise _unread(folder, error) from None
    return sorted(path.name for path in paths if is_there(path))


def is_there(path: Path, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether there is a file or, by another `kind`, a folder of this name. Raises CheckpointError if the system can't
    tell: what can't be read is not missing."""
    try:
        return kind(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise _unread(path, error) from None


def _unread(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: can't be read ({error.strerror or error})")


def read_file(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """All of a small file. Raises ConfigError if it has more bytes than `largest`, CheckpointError if it can't be
    read."""
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                raise ConfigError(f"{path}: is {size:,} bytes long, no more than {largest:,} are read; fetch it again")
            return file.read()
    except OSError as error:
        raise _unread(path, error) from None


def holds_weights(names: Collection[str]) -> bool:
    """Whether a model folder with files of these names has a model's weights."""
    return any(name in names for form in _FORMATS for name in form)


def index_file(names: Collection[str]) -> str | None:
    """Of files of these names, the index of a model's weights; None if they are no shards."""
    for single, index in _FORMATS:
        if single in names or index in names:
            return None if single in names else index
    return None


def weight_files(folder: Path, names: Collection[str]) -> list[str]:
    """The names of a model's weight files, of one format.

    names: of all the model's files; an index among them must be in the folder, shards need not. Raises ConfigError if
    there are no weights, or an index names files that are not among the names; CheckpointError if it can't be read.
    """
    for single, index in _FORMATS:
        if single in names:
            return [single]
        if index in names:
            return _indexed(folder, index, names, Path(single).suffix)
    looked_for = [name for form in _FORMATS for name in form]
    instead = found_instead(folder, names, looked_for)
    raise ConfigError(f"{folder}: no weights here; looked for {', '.join(looked_for)}{instead}")


def _indexed(folder: Path, index: str, names: Collection[str], suffix: str) -> list[str]:
    """The shards that an index names. suffix: of every one of them; under any other, a shard could take the
    place of another file when the model is written again."""
    try:
        weight_map = json.loads(read_file(folder / index).decode("utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = disguise(folder / index) or "not a valid index of shards"
        raise ConfigError(f"{folder / index}: {what}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{folder / index}: '{file}' is not a plain file name")
        if not file.endswith(suffix):
            raise ConfigError(f"{folder / index}: '{file}' is no {suffix} file")
        if file not in names:
            raise ConfigError(f"{folder}: the shard {file} is missing")
    return files


def read_header(path: Path, known: Forms | None = None) -> dict[str, TensorInfo]:
    """Every tensor of a weight file, by name and in file order; no weights are read.

    known: what is in the file, if it is not there yet. Raises ConfigError for a dtype that can't be merged, and for
    weights that are no floating-point numbers: what quantised models are made of, whatever their config.json says.
    Raises CheckpointError if the file can't be read.
    """
    tensors = {}
    for name, (stored, shape) in (known or _forms(path)).items():
        dtype = stored if stored in DTYPES.values() else DTYPES.get(stored)
        if dtype is None or (not dtype.is_floating_point and "weight" in name.rpartition(".")[2]):
            raise ConfigError(
                f"{path}: {name} is stored as {dtype or stored}, which can't be merged; "
                "if this model is quantised, merge the original weights instead"
            )
        tensors[name] = TensorInfo(path.name, tuple(shape), dtype)
    return tensors


def place_in_index(folder: Path, name: str) -> str | None:
    """The shard in which a tensor is by the index that a folder has; None if it has none, or that does not know it."""
    index = index_file(local_files(folder))
    try:
        return json.loads(read_file(folder / index))["weight_map"].get(name) if index else None
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # what is said of a tensor does without


def _forms(path: Path) -> Forms:
    problem = disguise(path)
    if problem:
        raise CheckpointError(f"{path}: can't be read (it {problem})")
    if is_pickled(path.name):
        return pickled_forms(path)
    with reading(path):
        _check_length(path)
        with safe_open(path, "pt", backend="pread") as shard:
            views = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - a shard is no mapping
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def _check_length(path: Path) -> None:
    """Raise ValueError if a safetensors file ends before what its header announces."""
    size = path.stat().st_size
    with path.open("rb") as file:
        entries = json.loads(_read_header(file, size))
        announced = file.tell()
    announced += max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    if size < announced:
        raise ValueError(_cut_short(size, announced))


def _read_header(file: BinaryIO, size: int) -> bytes:
    """The header of a safetensors file of so many bytes, which is open at its beginning. Raises ValueError if it can't
    be as long as the file says."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header is to have {length:,} bytes, no header has more than {_LONGEST_HEADER:,}")
    if size < 8 + length:
        raise ValueError(_cut_short(size, 8 + length))
    return file.read(length)


def _cut_short(size: int, announced: int) -> str:
    return f"it is cut short: {size:,} bytes of {announced:,}; fetch it again"


@lru_cache(maxsize=16)
def _entries(header: bytes) -> Mapping[str, Any]:
    """What a header says. To parse it takes as long as to read a tensor."""
    return json.loads(header)


def fresh(size: int) -> Tensor:
    """Memory that nobody else has."""
    return torch.empty(size, dtype=torch.uint8)


def stream_tensors(
    path: Path, names: Iterable[str], held: Held | None = None, room: Room = fresh
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, on the CPU, in their stored dtype, each with its name as soon as it is read.

    held: kept by the caller for its next call, which may want more of a file that had to be loaded whole. room: where
    tensors are read into. Raises CheckpointError if the file can't be read.
    """
    if is_pickled(path.name):
        everything = unpickled_once(path, {} if held is None else held)
        # Copied: a tensor in a memory map changes with its file. Detached: it may be a module's parameter.
        for name in names:
            yield name, everything[name].detach().clone(memory_format=torch.contiguous_format)
        return
    # No memory map: a file that shrinks or a mount that vanishes is then an error, not a crash. And read by ourselves,
    # since into memory that is used again and again it goes several times faster than into new memory.
    with reading(path), path.open("rb") as file:
        entries = _entries(_read_header(file, path.stat().st_size))
        start = file.tell()
        for name in names:
            first, end = entries[name]["data_offsets"]
            memory = room(end - first)
            file.seek(start + first)
            if file.readinto(memory.numpy()) < end - first:
                raise ValueError("it ends too early")
            yield name, memory.view(DTYPES[entries[name]["dtype"]]).view(entries[name]["shape"])


def read_rows(path: Path, name: str, rows: Tensor, held: Held | None = None) -> Tensor:
    """Some rows of one tensor of a file, in the order of their numbers: (rows, ...), on the CPU, in its stored dtype.

    rows: (rows,), int64, on the CPU. Rows that stand side by side are read at once, and no others. held: see
    `stream_tensors`. Raises CheckpointError if the file can't be read.
    """
    if is_pickled(path.name):
        return unpickled_once(path, {} if held is None else held)[name].detach()[rows]
    with reading(path), path.open("rb", buffering=0) as file:
        entry = _entries(_read_header(file, path.stat().st_size))[name]
        start = file.tell()
        first, end = entry["data_offsets"]
        size = (end - first) // max(1, entry["shape"][0])  # of a row, in bytes
        memory = fresh(size * len(rows))
        bytes_of, breaks = memory.numpy(), (rows.diff() != 1).nonzero().flatten() + 1
        ends = [*breaks.tolist(), len(rows)] if len(rows) else []
        for place, stop in zip([0, *ends], ends, strict=False):
            file.seek(start + first + size * int(rows[place]))
            _fill(file, bytes_of[size * place : size * stop])
        return memory.view(DTYPES[entry["dtype"]]).view(len(rows), *entry["shape"][1:])


def _fill(file: RawIOBase, memory: Any) -> None:
    """Read until memory is full: the system reads no more than 2 GiB at a time."""
    while len(memory):
        count = file.readinto(memory)
        if not count:
            raise ValueError("it ends too early")
        memory = memory[count:]


def fingerprint(path: Path) -> Fingerprint:
    """By which a file is known again without being read through: its size, and a hash of its header and of blocks from
    all over it, since the headers of two fine-tunes are the same. Small files are hashed whole.

    Raises CheckpointError if it can't be read.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK:
                digest.update(file.read())
            else:
                header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
                digest.update(file.read(min(header, size, _LONGEST_HEADER)))
                for number in range(_BLOCKS):
                    file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK))
    except OSError as error:
        raise _unread(path, error) from None
    return {"size": size, "sha256": digest.hexdigest()}

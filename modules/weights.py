"""Weight files: what is in them, tensors out of them, new ones.

Knows: safetensors headers, .bin files, indexes of shards. Refuses to know: what a tensor is for, models, devices.

Nothing is loaded whole: `read_tensors` opens a file, takes the tensors asked for and closes it again. Nothing in a
file is executed: a .bin file is a pickle, and one that would need more than tensors is refused.
"""

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modules.config import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# In this order: where a folder holds both formats, safetensors win.
_FORMATS = ((SINGLE_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json"))

_DTYPES = {
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


class CheckpointError(Exception):
    """A checkpoint can't be read or written; the message is for the user."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it looks like, from the file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_files(folder: Path) -> list[str]:
    """The names of a model folder's weight files, of one format. Raises ConfigError if there are none, or an index
    names files that are not there."""
    for single, index in _FORMATS:
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return _indexed(folder, index)
    looked_for = ", ".join(name for names in _FORMATS for name in names)
    raise ConfigError(f"{folder}: no weights here; looked for {looked_for}")


def _indexed(folder: Path, index: str) -> list[str]:
    try:
        weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder / index}: not a valid index of shards") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{folder / index}: '{file}' is not a plain file name")
        if not (folder / file).is_file():
            raise ConfigError(f"{folder}: the shard {file} is missing")
    return files


def read_headers(folder: Path, files: Iterable[str]) -> dict[str, TensorInfo]:
    """Every tensor of some weight files, by name and in file order; no weights are read.

    Raises ConfigError for a type that can't be merged, CheckpointError if a file can't be read.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        forms = _pickled_forms(folder / file) if _is_pickled(file) else _safetensors_forms(folder / file)
        tensors.update(tensor_infos(f"{folder / file}", file, forms))
    return tensors


def tensor_infos(where: str, file: str, forms: Mapping[str, tuple[Any, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Dtype (torch's, or the name that safetensors gives it) and shape by tensor name, as TensorInfo.

    Raises ConfigError, beginning with `where`, for a dtype that can't be merged.
    """
    tensors = {}
    for name, (stored, shape) in forms.items():
        dtype = stored if stored in _DTYPES.values() else _DTYPES.get(stored)
        if dtype is None:
            raise ConfigError(f"{where}: {name} is stored as {stored}, which can't be merged")
        tensors[name] = TensorInfo(file, tuple(shape), dtype)
    return tensors


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of one file, on the CPU, in their stored dtype. Raises CheckpointError if it can't be read."""
    if _is_pickled(path.name):
        everything = _unpickled(path)
        # Copied: a tensor in a memory map would die with the file.
        return {name: everything[name].clone(memory_format=torch.contiguous_format) for name in names}
    # pread, not a memory map: a file that shrinks or a mount that vanishes is then an error, not a crash.
    with _reading(path), safe_open(path, "pt", backend="pread") as shard:
        return {name: shard.get_tensor(name) for name in names}


def loads_whole(folder: Path, files: Iterable[str]) -> bool:
    """Whether reading one tensor takes a whole file into memory: .bin files written before PyTorch 1.6."""
    return any(_is_pickled(file) and not zipfile.is_zipfile(folder / file) for file in files)


def _is_pickled(file: str) -> bool:
    return file.endswith(".bin")


def _safetensors_forms(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with _reading(path), safe_open(path, "pt", backend="pread") as shard:
        views = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - a shard is no mapping
        return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def _pickled_forms(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _unpickled(path).items()}


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A .bin file's tensors, in a memory map unless the file is of the old kind."""
    with _reading(path):
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: holds something else than named tensors; convert it to safetensors")
    return dict(tensors)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: is damaged, or opening it would run code that it brings along, which is refused; "
            "convert it to safetensors where you trust it"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file}: can't be read ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """An error of a library on one line, with its kind where the words alone would say little."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and len(lines[0].split()) > 1 else f"{type(error).__name__}: {' '.join(lines)}"


def written_name(file: str) -> str:
    """What a weight file is called when its tensors are written again: .bin files become safetensors."""
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors" if _is_pickled(file) else file


def write_shards(folder: Path, shards: Mapping[str, Iterable[tuple[str, Tensor]]]) -> None:
    """Write weight files and, for more than one, their index. Each shard's tensors are asked for in turn, one shard in
    memory at a time. Raises CheckpointError if a file can't be written."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, named_tensors in shards.items():
        tensors = dict(named_tensors)
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / file}: can't be written ({first_line(error)})") from None
        weight_map.update((name, file) for name in tensors)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if set(shards) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

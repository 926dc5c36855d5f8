"""The interface of all formats of weight files: tensors by name, read whole or by rows.

Knows: names, shapes, dtypes, which file holds what. Refuses to know: how a format stores them, models, devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from modules.checkpoints.sniff_format import sniff_format
from modules.runtime.errors import CheckpointError, ConfigError

# By the names that safetensors gives them.
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

Forms = Mapping[str, tuple[Any, Sequence[int]]]  # tensor name -> dtype, as torch or safetensors call it, and shape
Buffer = Callable[[int], Tensor]  # number of bytes -> CPU memory, (bytes,), uint8


def new_buffer(size: int) -> Tensor:
    """New memory, (size,), uint8."""
    return torch.empty(size, dtype=torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in settings and messages, such as float16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, shape and dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader(Protocol):
    """The tensors of a model or an adapter. All methods raise CheckpointError if a file can't be read."""

    tensors: Mapping[str, TensorInfo]  # in file order

    def read(self, names: Iterable[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, in their stored dtype, each as soon as it is read. buffer: gives the memory."""

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a tensor: (rows, ...), on the CPU, in its stored dtype. rows: (rows,), int64, on the CPU."""


class FilesReader(ABC):
    """A `Reader` of files of one format in one folder."""

    def __init__(self, folder: Path, files: Sequence[str], known_forms: Mapping[str, Forms]) -> None:
        """Read the files' headers, no weights. known_forms: the tensors of files that are not downloaded yet.

        Raises ConfigError for a dtype that can't be merged, and for weights that are no floating-point numbers, as in
        quantised models. Raises CheckpointError if a file can't be read.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            problem = None if file in known_forms else sniff_format(folder / file)
            if problem:
                raise CheckpointError(f"{folder / file}: can't be read (it {problem})")
            forms = known_forms[file] if file in known_forms else self.forms(folder / file)
            for name, (stored, shape) in forms.items():  # if two shards hold a tensor, the last counts
                self.tensors[name] = TensorInfo(file, tuple(shape), _dtype(folder / file, name, stored))

    def read(self, names: Iterable[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """See `Reader`. The files are read one after another."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, file_tensors in by_file.items():
            yield from self.read_file(self.folder / file, file_tensors, buffer)

    @abstractmethod
    def forms(self, path: Path) -> Forms:
        """Dtypes and shapes of one file's tensors, by name."""

    @abstractmethod
    def read_file(self, path: Path, names: Iterable[str], buffer: Buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of one file."""


def _dtype(path: Path, name: str, stored: Any) -> torch.dtype:
    dtype = stored if isinstance(stored, torch.dtype) else DTYPES.get(stored)
    is_weight = "weight" in name.rpartition(".")[2]
    if dtype not in DTYPES.values() or (is_weight and not dtype.is_floating_point):
        raise ConfigError(
            f"{path}: {name} is stored as {dtype or stored}, which can't be merged; "
            "if this model is quantized, merge the original weights instead"
        )
    return dtype

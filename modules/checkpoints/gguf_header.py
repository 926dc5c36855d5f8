"""The keys and tensors of a GGUF file, read by gguf's and transformers' readers after checks.

Knows: that every number in a file may be wrong, and what these readers do not check. Refuses to know: what a key means,
models.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from transformers.integrations.gguf import read_gguf_metadata

from modules.checkpoints.sniff_format import sniff_format
from modules.runtime.errors import ConfigError, first_line, reading

TOKENS = "tokenizer.ggml.tokens"
MERGES = "tokenizer.ggml.merges"
_MOST_KEYS = 2**16  # far more than in any real file
_MOST_TENSORS = 2**18


@dataclass(frozen=True)
class GgufTensor:
    """How a tensor is stored."""

    kind: str  # F16, Q4_1, ...
    shape: tuple[int, ...]  # in torch's order
    data: np.ndarray  # in a memory map


@dataclass(frozen=True)
class GgufHeader:
    """A file's keys and tensors."""

    file: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.keys.get("general.architecture", ""))

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of an architecture's key, named without the architecture."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    @property
    def kind(self) -> str:
        """The storage type of most weights."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.kind] += prod(tensor.shape)
        return count.most_common(1)[0][0]

    def refusal(self, problem: str) -> ConfigError:
        """An error about something in the file that transformers can't represent."""
        return ConfigError(f"{self.file}: {problem}; merge the original model instead")


def read_header(file: Path) -> GgufHeader:
    """Read and check a file's keys and the layout of its tensors; no weights.

    Raises ConfigError if it is no GGUF file or damaged, CheckpointError if it can't be opened.
    """
    with reading(file), file.open("rb") as opened:
        start = opened.read(24)
    try:
        keys = _keys(file, start)
        tensors = _tensors(file)
    except Exception as error:  # of any kind, for a damaged file
        problem = sniff_format(file) or f"can't be read as GGUF ({first_line(error)}); download it again"
        raise ConfigError(f"{file}: {problem}") from None
    return GgufHeader(file, keys, tensors)


def _keys(file: Path, start: bytes) -> dict[str, Any]:
    """The file's keys. transformers' reader fails if a length exceeds the file; counts and repeated keys are checked
    here."""
    magic, _, tensor_count, key_count = struct.unpack("<4sIQQ", start)
    if magic == b"GGUF" and (key_count > _MOST_KEYS or tensor_count > _MOST_TENSORS):
        raise ValueError(f"it claims {key_count} keys and {tensor_count} tensors")
    keys, _ = read_gguf_metadata(str(file), (TOKENS, MERGES))
    if len(keys) < key_count:
        raise ValueError("a key is listed twice")
    return keys


def _tensors(file: Path) -> dict[str, GgufTensor]:
    """The file's tensors. gguf's reader checks kinds, shapes and the file's end; overlaps are checked here. It reads a
    whole array without checking the file's end, so `_keys` must have succeeded before."""
    end = 0
    tensors = {}
    for tensor in sorted(GGUFReader(file).tensors, key=lambda tensor: tensor.data_offset):
        shape = tuple(reversed(tensor.shape.tolist()))
        if not all(shape) or tensor.data_offset < end:
            raise ValueError(f"tensor {tensor.name} of shape {shape} is empty or overlaps another")
        end = tensor.data_offset + tensor.n_bytes
        tensors[tensor.name] = GgufTensor(tensor.tensor_type.name, shape, tensor.data)
    if not tensors:
        raise ValueError("it contains no tensors")
    return tensors

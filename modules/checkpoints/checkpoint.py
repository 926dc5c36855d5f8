"""Model folders: checks their headers, reads their tensors, copies the files beside their weights.

Knows: config.json, tokenizers, which files a model needs. Refuses to know: modules, devices, scores.
"""

import errno
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from modules.checkpoints.companions import Companions, belongs, find_companions, small_files
from modules.checkpoints.config_file import check_implementations, check_stated, quantised_by
from modules.checkpoints.downloads import Job
from modules.checkpoints.hub import Repository, local
from modules.checkpoints.readers import Buffer, Reader, TensorInfo, dtype_name, new_buffer
from modules.checkpoints.sniff_format import check_pointers, found_instead, sniff_format
from modules.checkpoints.weight_files import (
    LARGEST_SETTINGS,
    LARGEST_TEXT,
    Fingerprint,
    fingerprint,
    open_reader,
    read_file,
    weight_files,
)
from modules.config.locations import Location
from modules.runtime.errors import CheckpointError, ConfigError, first_line, naming, without_panics

_DECISIVE = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration and its tensors."""

    repository: Repository  # its files, in a folder or on the hub
    name: str  # what reports call it
    config: PreTrainedConfig
    reader: Reader
    companions: Companions  # the files beside its weights when it was opened

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.repository.folder

    @property
    def text(self) -> str:
        """Its name in messages: that of the configuration."""
        return self.repository.text

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """File, shape and dtype of its tensors, by name, in file order."""
        return self.reader.tensors

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its weight files."""
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def job(self) -> Job:
        """The download of the files that it is read from."""
        return Job(self.name, self.repository, self.files)

    @property
    def tokenizer_files(self) -> tuple[Path, Companions]:
        """The folder of its tokenizer, if it has any, and the files that are read there."""
        return self.path, self.companions

    def fingerprint(self) -> dict[str, Fingerprint]:
        """Size and hash of every file that changes a merge's result, by name. A later run knows the model by them."""
        described = [file for file in _DECISIVE if file in self.companions.sizes]
        return {file: fingerprint(self.path / file) for file in (*described, *self.files)}

    def stream(self, names: Iterable[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, on the CPU, in their stored dtype, each as soon as it is read. buffer: gives the memory
        for each. Raises CheckpointError if a file can't be read."""
        return self.reader.read(names, buffer)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The same tensors as a dictionary."""
        return dict(self.stream(names))

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a tensor; see `Reader`."""
        return self.reader.rows(name, rows)

    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that holds most of the weights."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] += math.prod(info.shape)
        return sizes.most_common(1)[0][0]


def open_checkpoint(where: Path | Repository, name: str, trusted: bool = False) -> Checkpoint:
    """Read a model's configuration and the headers of its weight files; no weights. name: what reports call it.

    trusted: whether the model's own code may run. Raises ConfigError if the model can't be used, CheckpointError if a
    file that describes it can't be read.
    """
    repository = where if isinstance(where, Repository) else local(Location(str(where), where), where)
    path = repository.folder
    check_pointers(path, small_files(dict.fromkeys(repository.sizes, 0)))
    config = read_configuration(repository, trusted)
    files = weight_files(path, repository.sizes)
    headers = repository.headers(repository.absent(files))
    try:
        reader = open_reader(path, files, headers)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not any(info.dtype.is_floating_point for info in reader.tensors.values()):
        raise ConfigError(f"{repository.text}: its weight files contain no floating-point weights")
    return Checkpoint(repository, name, config, reader, find_companions(path, trusted))


def read_configuration(repository: Repository, trusted: bool) -> PreTrainedConfig:
    """A model's configuration. Raises ConfigError if it can't be used, CheckpointError if it can't be read."""
    path = repository.folder
    if "config.json" not in repository.sizes:
        instead = found_instead(repository.sizes)
        raise ConfigError(f"{repository.text}: not a model folder: config.json is missing{instead}")
    try:
        settings = json.loads(read_file(path / "config.json", LARGEST_SETTINGS).decode("utf-8"))
        check_stated(settings, trusted)
        quantised = quantised_by(settings)
        if quantised is not None:
            raise ConfigError(
                f"{path}: this model is quantized ({quantised} in config.json); merge the original weights, or remove "
                "that key if the weights were converted back"
            )
        companion_sizes = find_companions(path, trusted).sizes
        with _copied_files(
            path, [name for name in companion_sizes if name == "config.json" or name.endswith(".py")]
        ) as copies:
            config = AutoConfig.from_pretrained(copies, trust_remote_code=trusted, local_files_only=True)
        if not trusted:
            check_implementations(config)
        config.name_or_path = str(path)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # whatever a configuration class makes of a wrong value
        _raise_if_unread(path, "its configuration", error)
        problem = sniff_format(path / "config.json") or f"can't be used: {first_line(error)}"
        raise ConfigError(f"{repository.text}: config.json {problem}") from None
    return config


def load_tokenizer(path: Path, companions: Companions | None = None) -> Any:
    """A model folder's tokenizer. companions: the folder's, if they are known; all of these files must exist.

    Raises ConfigError if it has none that can be used, CheckpointError if a file can't be read.
    """
    companions = companions or find_companions(path, trusted=False)
    with _copied_files(path, companions.sizes) as copies:
        try:
            with without_panics():
                tokenizer = AutoTokenizer.from_pretrained(
                    copies, trust_remote_code=companions.trusted, local_files_only=True
                )
                tokenizer("a")  # some wrong settings only show when it is used
        except Exception as error:  # the tokenizer library raises bare Exception for a broken tokenizer.json
            _raise_if_unread(path, "its tokenizer", error)
            trouble = first_line(error).replace(str(copies), str(path))
        else:
            if len(tokenizer.get_vocab()) > len(tokenizer.all_special_ids):
                return tokenizer
            # What transformers makes, for many architectures, of a folder without tokenizer files.
            trouble = "tokenizer files are missing"
    raise ConfigError(f"{path}: no usable tokenizer ({_plain_cause(path, companions) or trouble})")


@contextmanager
def _copied_files(path: Path, names: Iterable[str]) -> Iterator[Path]:
    """A temporary folder with copies of these files of a model. Raises CheckpointError if one can't be read.

    transformers skips a file that it can't read, and makes another model or tokenizer of the others.
    """
    with TemporaryDirectory(prefix="merge-monster-", ignore_cleanup_errors=True) as temporary:
        copies = Path(temporary) / (path.resolve().name or "model")  # code is kept under its folder's name
        copies.mkdir()
        for name in names:
            _copy(path / name, copies / name)
        yield copies


def _plain_cause(path: Path, companions: Companions) -> str | None:
    """Why a tokenizer can't be read, if its files show it; the error of transformers names another cause."""
    for name in companions.sizes:
        problem = sniff_format(path / name)
        if problem:
            return f"{name} {problem}"
    for name in filter(belongs, companions.others):
        return f"{name} is {(path / name).stat().st_size:,} bytes long, more than the limit of {LARGEST_TEXT:,}"
    return None


def _raise_if_unread(path: Path, subject: str, error: BaseException) -> None:
    """Raise CheckpointError if a library's error was caused by the operating system or by a lack of memory: such an
    error says nothing about what is in the files. subject: what the library was reading."""
    cause: BaseException | None = error
    while cause is not None:
        of_the_system = isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
        # As the tokenizer library, which is written in Rust, words it.
        in_words = re.search(rf"\(os error (?!{errno.ENOENT}\))", str(cause))
        if of_the_system or in_words or isinstance(cause, MemoryError):
            raise CheckpointError(f"{path}: {subject} can't be read ({first_line(cause)})") from None
        cause = cause.__cause__ or cause.__context__


def copy_companions(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy a model's files other than weights; config.json is changed only in its dtype, and only if given.

    Raises CheckpointError if one can't be read.
    """
    for name in checkpoint.companions.published:
        _copy(checkpoint.path / name, folder / name)
    if dtype is not None:
        file = folder / "config.json"
        config: dict[str, Any] = json.loads(read_file(file))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(dtype)
        with naming(file):
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + os.linesep, encoding="utf-8")


def _copy(file: Path, to: Path) -> None:
    content = read_file(file)
    to.parent.mkdir(parents=True, exist_ok=True)
    with naming(to):
        to.write_bytes(content)

"""Model folders: checked from their headers, read, and what lies beside their weights copied.

Knows: folders, config.json, tokenizers, which files a model needs. Refuses to know: modules, devices, scores.
"""

import errno
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

from modules.checkpoints.bin_files import Held, is_pickled, is_whole
from modules.checkpoints.causes import disguise, found_instead, pointers
from modules.checkpoints.companions import Companions, belongs, find_companions, is_licence, is_small
from modules.checkpoints.config_file import check_implementations, check_stated, has_quantised, quantised_by
from modules.checkpoints.hub import Job, Repository
from modules.checkpoints.weight_files import (
    LARGEST_SETTINGS,
    LARGEST_TEXT,
    Fingerprint,
    Room,
    TensorInfo,
    dtype_name,
    fingerprint,
    fresh,
    index_file,
    local_files,
    read_file,
    read_header,
    read_rows,
    stream_tensors,
    weight_files,
)
from modules.runtime import CheckpointError, ConfigError, first_line, naming, without_panics

_DECISIVE = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
ADAPTER_SETTINGS = "adapter_config.json"  # what makes a folder an adapter


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration and what its shards hold."""

    path: Path
    name: str
    config: PreTrainedConfig
    tensors: Mapping[str, TensorInfo]  # by name, in file order
    companions: Companions  # as they were when it was opened
    repository: Repository | None = None  # where files come from that are not in the folder yet
    twice: tuple[str, ...] = ()  # tensors that several files hold; the last one counts, as for transformers
    _held: Held = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its weight files."""
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def job(self) -> Job:
        """The files that must be there before it can be read."""
        return Job(self.name, self.repository, self.files)

    @property
    def tokenizer_files(self) -> tuple[Path, Companions]:
        """The folder that has its tokenizer, if it has any, and the files that are read there."""
        return self.path, self.companions

    @property
    def notes(self) -> list[str]:
        """Lines for the person at the terminal about what it takes to read it. Its files must be there."""
        notes = []
        if self.twice:
            name = self.twice[0]
            more = f" ({len(self.twice)} such tensors)" if len(self.twice) > 1 else ""
            notes.append(f"{self.name}: {name} is stored twice; that in {self.tensors[name].file} counts{more}")
        whole = [file for file in map(self.path.joinpath, self.files) if is_pickled(file.name) and is_whole(file)]
        if whole:
            largest = max(whole, key=lambda file: file.stat().st_size)
            notes.append(
                f"{self.name}: {largest.name} is stored as before PyTorch 1.6 and can only be loaded whole, which "
                f"takes {largest.stat().st_size / 1e9:.2f} GB of CPU memory; convert it to safetensors to avoid that"
            )
        return notes

    def fingerprint(self) -> dict[str, Fingerprint]:
        """By which it is known again: of every file that decides what a merge makes of it, its size and a hash."""
        described = [file for file in _DECISIVE if file in self.companions.sizes]
        return {file: fingerprint(self.path / file) for file in (*described, *self.files)}

    def stream(self, names: Iterable[str], room: Room = fresh) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, on the CPU, in their stored dtype, each as soon as it is read, one file after another.

        A file that can only be loaded whole stays in memory until the next one is, or until `release`. room: where
        tensors are read into, if they need not be made. Raises CheckpointError if a file can't be read.
        """
        for file, wanted in self.by_file(names).items():
            yield from stream_tensors(self.path / file, wanted, self._held, room)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The same, all together."""
        return dict(self.stream(names))

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a tensor; see `read_rows`."""
        return read_rows(self.path / self.tensors[name].file, name, rows, self._held)

    def release(self) -> None:
        """Let go of what `stream` keeps in memory: nothing, or one file."""
        self._held.clear()

    def by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names, grouped by the shard that holds them."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.tensors[name].file, []).append(name)
        return groups

    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that holds most of the weights."""
        sizes: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] += math.prod(info.shape)
        return sizes.most_common(1)[0][0]


def read_configuration(path: Path, names: Collection[str], trusted: bool = False) -> PreTrainedConfig:
    """A model folder's configuration. names: of all its files.

    Raises ConfigError if it is that of no usable model, CheckpointError if it can't be read.
    """
    if "config.json" not in names:
        if ADAPTER_SETTINGS in names:
            raise ConfigError(f"{path}: this is an adapter, not a model")
        instead = found_instead(path, names, ["config.json"])
        raise ConfigError(f"{path}: no model here (config.json is missing){instead}")
    try:
        stated = json.loads(read_file(path / "config.json", LARGEST_SETTINGS).decode("utf-8"))
        check_stated(stated, trusted)
        beside = find_companions(path, trusted).sizes
        with _copied(path, [name for name in beside if name == "config.json" or name.endswith(".py")]) as copies:
            config = AutoConfig.from_pretrained(copies, trust_remote_code=trusted, local_files_only=True)
        if not trusted:
            check_implementations(config)
        config.name_or_path = str(path)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # whatever a configuration class makes of a wrong value
        _raise_if_unread(path, "its configuration", error)
        what = disguise(path / "config.json") or f"can't be used: {first_line(error)}"
        raise ConfigError(f"{path}: config.json {what}") from None
    return config


def check_quantisation(path: Path, names: Collection[str] | None = None) -> None:
    """Raise ConfigError if config.json says that a model is quantised. names: of its tensors, if they are known."""
    key = quantised_by(json.loads(read_file(path / "config.json")))
    if key is None:
        return
    problem = f"{path}: by {key} in config.json this model is quantised; merge the original weights instead"
    if names is not None and not has_quantised(names):
        problem += f" (its weights are plain numbers, though: if they were converted back, remove {key} there)"
    raise ConfigError(problem)


def open_checkpoint(path: Path, name: str, trusted: bool = False, repository: Repository | None = None) -> Checkpoint:
    """Read a model folder's configuration and shard headers; no weights. `name` is what reports call it.

    trusted: whether code that it brings along may be run. repository: of the hub, which is asked for the headers of
    files that are not in the folder yet. Raises ConfigError if it is no usable model, CheckpointError if a file that
    describes it can't be read.
    """
    names = file_names(path, repository)
    problem = pointers(path, small_files(dict.fromkeys(names, 0)))
    if problem:
        raise ConfigError(problem)
    config = read_configuration(path, names, trusted)
    files = weight_files(path, names)
    known = repository.headers(repository.absent(files)) if repository else {}
    try:
        by_file = [read_header(path / file, known.get(file)) for file in files]
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except ConfigError:
        check_quantisation(path)  # which says it more plainly
        raise
    tensors = {name: info for found in by_file for name, info in found.items()}
    if not any(info.dtype.is_floating_point for info in tensors.values()):
        raise ConfigError(f"{path}: no weights found in its weight files")
    check_quantisation(path, tensors)
    count = Counter(name for found in by_file for name in found)
    twice = tuple(name for name in count if count[name] > 1)
    return Checkpoint(path, name, config, tensors, find_companions(path, trusted), repository, twice)


def load_tokenizer(path: Path, companions: Companions | None = None) -> Any:
    """A model folder's tokenizer. companions: the folder's, if they are known; each of them must then be there.

    Raises ConfigError if it has none that can be used, CheckpointError if a file can't be read.
    """
    companions = companions or find_companions(path, trusted=False)
    with _copied(path, companions.sizes) as copies:
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
            trouble = "its files are missing"
    raise ConfigError(f"{path}: no usable tokenizer ({_plain_cause(path, companions) or trouble})")


@contextmanager
def _copied(path: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder with copies of some of a model's files, for transformers: it goes on without a file that it can't read,
    and makes something else of the rest. Raises CheckpointError if one can't be read."""
    with TemporaryDirectory(prefix="merge-monster-", ignore_cleanup_errors=True) as place:
        copies = Path(place) / (path.resolve().name or "model")  # code is kept under its folder's name
        copies.mkdir()
        for name in names:
            _copy(path / name, copies / name)
        yield copies


def _plain_cause(path: Path, companions: Companions) -> str | None:
    """What keeps a tokenizer from being read, where transformers tells of something else."""
    disguised = [f"{name} {what}" for name in companions.sizes if (what := disguise(path / name))]
    if disguised:
        return "; ".join(disguised)
    for name in filter(belongs, companions.others):
        size = (path / name).stat().st_size
        if size > LARGEST_TEXT:
            return f"{name} is {size:,} bytes long, no more than {LARGEST_TEXT:,} are read"
    for name in companions.sizes:
        beginning = read_file(path / name)[:200]
        if "tokenizer.json" in companions.sizes or not name.endswith((".model", ".spm")):
            continue
        if re.match(rb"[\w+/=]+ \d+\n", beginning):
            return None if is_tiktoken_available() else f"to read {name}, run: pip install tiktoken"
        if not beginning.startswith(b"\n"):
            return f"{name} is no model of SentencePiece"
        if not is_sentencepiece_available() or not is_protobuf_available():
            return f"to read {name}, run: pip install sentencepiece protobuf"
    return None


def _raise_if_unread(path: Path, what: str, error: BaseException) -> None:
    """Raise CheckpointError if an error of a library began as one of the operating system, or a lack of memory: that
    says nothing about what is in the files."""
    cause: BaseException | None = error
    while cause is not None:
        of_the_system = isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
        # As the tokenizer library, which is written in Rust, words it.
        in_words = re.search(rf"\(os error (?!{errno.ENOENT}\))", str(cause))
        if of_the_system or in_words or isinstance(cause, MemoryError):
            raise CheckpointError(f"{path}: {what} can't be read ({first_line(cause)})") from None
        cause = cause.__cause__ or cause.__context__


def file_names(path: Path, repository: Repository | None = None) -> Collection[str]:
    """The names of a model's files, those included that its repository still has to send."""
    return local_files(path) if repository is None else repository.sizes


# ---------------------------------------------------------------------------------------------------------------------
# Files other than weights
# ---------------------------------------------------------------------------------------------------------------------


def small_files(sizes: Mapping[str, int]) -> list[str]:
    """Of all files of a model, those that are needed before its weights: what describes and opens it.

    sizes: in bytes, by name. What calls itself text or JSON but is large is somebody's data.
    """
    needed = {"config.json", ADAPTER_SETTINGS, index_file(sizes)}
    return [name for name, size in sizes.items() if (name in needed or is_small(name)) and size <= LARGEST_TEXT]


def licence_files(sizes: Mapping[str, int]) -> list[str]:
    """Of all files of a model, those that go with it wherever it goes, and that no program needs."""
    return [name for name, size in sizes.items() if is_licence(name) and size <= LARGEST_TEXT]


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

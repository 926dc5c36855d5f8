"""Model folders: find them, check them from their headers, write new ones.

Knows: folders, config.json, tokenizers, which files a model needs. Refuses to know: modules, devices, scores.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from modules.causes import disguise, found_instead, pointers
from modules.config import Config, ConfigError
from modules.hub import Job, Repository, find
from modules.outputs import partial_folder
from modules.sources import Location, Source, parse_source
from modules.weights import (
    CheckpointError,
    Fingerprint,
    Held,
    Room,
    TensorInfo,
    dtype_name,
    fingerprint,
    first_line,
    fresh,
    index_file,
    local_files,
    read_headers,
    stream_tensors,
    weight_files,
    whole_files,
)

_DECISIVE = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_TOKENIZER_FILES = (*_DECISIVE[1:], "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MOST_LAYERS = 2000  # more than any model has; each one takes time and memory before its weights are looked for
_LARGEST = 100_000_000  # bytes of a file that describes or opens a model; tokenizers have some ten million
_QUANTISED = ("quantization_config", "compression_config")  # keys of config.json

# The last parts of the names of tensors beside quantised weights (GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors).
_OF_QUANTISATION = (
    *("qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map", "nested_absmax", "SCB", "weight_format"),
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point", "input_scale"),
)
ADAPTER_SETTINGS = "adapter_config.json"  # what makes a folder an adapter


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration and what its shards hold."""

    path: Path
    name: str
    config: PreTrainedConfig
    tensors: Mapping[str, TensorInfo]  # by name, in file order
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
    def tokenizer_path(self) -> Path:
        """The folder that has its tokenizer, if it has any."""
        return self.path

    @property
    def notes(self) -> list[str]:
        """Lines for the person at the terminal about what it takes to read it. Its files must be there."""
        notes = []
        if self.twice:
            name = self.twice[0]
            more = f" ({len(self.twice)} such tensors)" if len(self.twice) > 1 else ""
            notes.append(f"{self.name}: {name} is stored twice; that in {self.tensors[name].file} counts{more}")
        sizes = {file: (self.path / file).stat().st_size for file in whole_files(self.path, self.files)}
        if not sizes:
            return notes
        largest = max(sizes, key=lambda file: sizes[file])
        return [
            *notes,
            f"{self.name}: {largest} is stored as before PyTorch 1.6 and can only be loaded whole, which takes "
            f"{sizes[largest] / 1e9:.2f} GB of CPU memory; convert it to safetensors to avoid that",
        ]

    def fingerprint(self) -> dict[str, Fingerprint]:
        """By which it is known again: of every file that decides what a merge makes of it, its size and a hash."""
        described = [file for file in _DECISIVE if (self.path / file).is_file()]
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
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])


def read_configuration(path: Path, names: Collection[str], trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model folder's configuration. names: of all its files. Raises ConfigError if it is that of no usable model."""
    if "config.json" not in names:
        is_adapter = ADAPTER_SETTINGS in names
        instead = found_instead(path, names, ["config.json"])
        what = "this is an adapter, not a model" if is_adapter else f"no model here (config.json is missing){instead}"
        raise ConfigError(f"{path}: {what}")
    try:
        stated = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if isinstance(stated, Mapping) and "peft_type" in stated:
            raise ValueError(f"it holds an adapter's settings; if this is an adapter, call it {ADAPTER_SETTINGS}")
        if _layers(stated) > _MOST_LAYERS:
            raise ValueError(f"it has {_layers(stated):.4g} layers")
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a configuration class makes of a wrong value
        what = disguise(path / "config.json") or f"can't be used: {first_line(error)}"
        raise ConfigError(f"{path}: config.json {what}") from None
    return config


def check_quantisation(path: Path, names: Collection[str] | None = None) -> None:
    """Raise ConfigError if config.json says that a model is quantised. names: of its tensors, if they are known."""
    key = _quantisation(json.loads((path / "config.json").read_text(encoding="utf-8")))
    if key is None:
        return
    problem = f"{path}: by {key} in config.json this model is quantised; merge the original weights instead"
    if names is not None and not any(name.rpartition(".")[2] in _OF_QUANTISATION for name in names):
        problem += f" (its weights are plain numbers, though: if they were converted back, remove {key} there)"
    raise ConfigError(problem)


def _quantisation(settings: Any) -> str | None:
    """The key that says how a model is quantised, with those above it; None if none does."""
    if not isinstance(settings, Mapping):
        return None
    for key, value in settings.items():
        inner = key if key in _QUANTISED and value else _quantisation(value)
        if inner:
            return inner if inner == key else f"{key}.{inner}"
    return None


def _layers(settings: Any) -> float:
    """The largest number of layers that a configuration states (num_hidden_layers, n_layer, ...), in any part."""
    if not isinstance(settings, Mapping):
        return 0
    return max(
        (
            value if isinstance(value, int | float) and key.endswith(("layers", "n_layer")) else _layers(value)
            for key, value in settings.items()
        ),
        default=0,
    )


def open_checkpoint(
    path: Path, name: str, trust_remote_code: bool = False, repository: Repository | None = None
) -> Checkpoint:
    """Read a model folder's configuration and shard headers; no weights. `name` is what reports call it.

    repository: of the hub, which is asked for the headers of files that are not in the folder yet. Raises ConfigError
    if it is no usable model.
    """
    names = file_names(path, repository)
    problem = pointers(path, small_files(dict.fromkeys(names, 0)))
    if problem:
        raise ConfigError(problem)
    config = read_configuration(path, names, trust_remote_code)
    files = weight_files(path, names)
    known = repository.headers(repository.absent(files)) if repository else {}
    try:
        by_file = [read_headers(path, [file], known) for file in files]
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
    return Checkpoint(path, name, config, tensors, repository, tuple(name for name in count if count[name] > 1))


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """A model folder's tokenizer. Raises ConfigError if it has none that can be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        tokenizer("a")  # some wrong settings only show when it is used
    except Exception as error:  # the tokenizer library raises bare Exception for a broken tokenizer.json
        disguised = [f"{file} {what}" for file in _TOKENIZER_FILES if (what := disguise(path / file))]
        raise ConfigError(f"{path}: no usable tokenizer ({'; '.join(disguised) or first_line(error)})") from None
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        # What transformers makes, for many architectures, of a folder without tokenizer files.
        raise ConfigError(f"{path}: no usable tokenizer (its files are missing)")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Which models a run merges
# ---------------------------------------------------------------------------------------------------------------------


def candidate_sources(config: Config) -> tuple[list[Source], list[str]]:
    """The candidates in merge order, and a line about each folder that is left out.

    models_to_merge overrides model_directory, whose visible sub-folders are taken alphabetically; the output directory
    is left out by resolved path.
    """
    if config.models_to_merge:
        return [source for source in map(parse_source, config.models_to_merge) if source], []
    entries = Path(config.directories.model_directory or ".").iterdir()
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    output = Path(config.directories.output_directory).resolve()
    sources, notes = [], []
    for path in sorted(folders, key=lambda entry: (entry.name.casefold(), entry.name)):
        if path.resolve() in (output, partial_folder(output)):
            notes.append(f"{path} is the output directory: skipped")
        elif not {"config.json", ADAPTER_SETTINGS}.intersection(local_files(path)):
            instead = found_instead(path, local_files(path), ["config.json"])
            notes.append(f"{path} holds no model (no config.json{instead}): skipped")
        elif any("\ud800" <= character <= "\udfff" for character in path.name):
            notes.append(f"{path.name!r} in {path.parent} is no text in UTF-8, so no report could name it: skipped")
        else:
            sources.append(Source(str(path), Location(str(path), path)))
    return sources, notes


def find_repository(location: Location) -> Repository | None:
    """The hub's repository of a location, its small files fetched; None for a folder. Raises ConfigError."""
    return find(location, small_files) if location.folder is None else None


def file_names(path: Path, repository: Repository | None = None) -> Collection[str]:
    """The names of a model's files, those included that its repository still has to send."""
    return local_files(path) if repository is None else repository.sizes


# ---------------------------------------------------------------------------------------------------------------------
# Files other than weights
# ---------------------------------------------------------------------------------------------------------------------

# Everything of the base that another program needs to open the output: configuration, tokenizer, templates, code.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_TEMPLATES = "additional_chat_templates"  # a folder
_NOT_COPIED = ("model.", "pytorch_model", "merge_monster", "license", "readme", "adapter_", "trainer_")


def small_files(sizes: Mapping[str, int]) -> list[str]:
    """Of all files of a model, those that are needed before its weights: what describes and opens it.

    sizes: in bytes, by name. What calls itself text or JSON but is large is somebody's data.
    """
    needed = {"config.json", ADAPTER_SETTINGS, index_file(sizes)}
    return [name for name, size in sizes.items() if name in needed or (_is_companion(name) and size <= _LARGEST)]


def _is_companion(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    fits = any(fnmatch(file, pattern) for pattern in _COMPANIONS) and not file.lower().startswith(_NOT_COPIED)
    return fits and folder in ("", _TEMPLATES)


def copy_companions(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy a model folder's files other than weights; config.json is changed only in its dtype, and only if given."""
    for file in source.iterdir():
        if file.is_file() and _is_companion(file.name):
            shutil.copyfile(file, folder / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)
    if dtype is not None:
        _set_dtype(folder / "config.json", dtype)


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(dtype)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + os.linesep, encoding="utf-8")

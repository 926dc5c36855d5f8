"""Model folders on disk: find them, check them from their headers, stream tensors out of them, write new ones.

Knows: file names, safetensors headers, config.json. Refuses to know: modules, devices, scores.

A checkpoint is never loaded whole: `read` opens a shard, takes the tensors asked for and closes it again.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from modules.config import Config, ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SETTINGS_FILE = "merge_monster.yaml"  # in every output: the configuration that made it

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
    """Where a tensor lies and what it looks like, from the shard's header."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration and what its shards hold."""

    path: Path
    name: str
    config: PreTrainedConfig
    tensors: Mapping[str, TensorInfo]  # by name, in file order

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU, in their stored dtype. Raises CheckpointError if a file can't be read."""
        tensors = {}
        for file, wanted in self.by_file(names).items():
            # pread, not a memory map: a file that shrinks or a mount that vanishes is then an error, not a crash.
            with _reading(self.path / file), safe_open(self.path / file, "pt", backend="pread") as shard:
                tensors.update((name, shard.get_tensor(name)) for name in wanted)
        return tensors

    def by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names, grouped by the shard that holds them."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.tensors[name].file, []).append(name)
        return groups

    def stored_name(self, name: str) -> str | None:
        """The stored name of a module's tensor, or None if the checkpoint has no such tensor.

        Checkpoints saved without their head lack the first part of the name ("model."), or have one that ours lacks.
        """
        for candidate in (name, name.partition(".")[2], self._without_first_part.get(name)):
            if candidate in self.tensors:
                return candidate
        return None

    @cached_property
    def _without_first_part(self) -> dict[str, str]:
        return {name.partition(".")[2]: name for name in self.tensors}

    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that holds most of the weights."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])


def open_checkpoint(path: Path, name: str, trust_remote_code: bool = False) -> Checkpoint:
    """Read a model folder's configuration and shard headers; no weights. `name` is what reports call it.

    Raises ConfigError if it is no usable model.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: no model here (config.json is missing)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a configuration class makes of a wrong value
        raise ConfigError(f"{path}: config.json can't be used: {first_line(error)}") from None
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{path}: this model is quantised; merge the original weights instead")
    try:
        tensors = _headers(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not any(info.dtype.is_floating_point for info in tensors.values()):
        raise ConfigError(f"{path}: no weights found in its safetensors files")
    return Checkpoint(path, name, config, tensors)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """A model folder's tokenizer. Raises ConfigError if it has none that can be used."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizer library raises bare Exception for a broken tokenizer.json
        raise ConfigError(f"{path}: no usable tokenizer ({first_line(error)})") from None


def _headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's shards, from their headers."""
    tensors = {}
    for file in _shards(path):
        with _reading(path / file), safe_open(path / file, "pt", backend="pread") as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is no mapping
                view = shard.get_slice(name)
                stored = view.get_dtype()
                if stored not in _DTYPES:
                    raise ConfigError(f"{path / file}: {name} is stored as {stored}, which can't be merged")
                tensors[name] = TensorInfo(file, tuple(view.get_shape()), _DTYPES[stored])
    return tensors


def _shards(path: Path) -> list[str]:
    """The names of a folder's weight files. Raises ConfigError if there are none or the index names others."""
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if not (path / INDEX_FILE).is_file():
        raise ConfigError(f"{path}: no weights here ({SINGLE_FILE} or {INDEX_FILE} is missing)")
    try:
        weight_map = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path / INDEX_FILE}: not a valid index of shards") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{path / INDEX_FILE}: '{file}' is not a plain file name")
        if not (path / file).is_file():
            raise ConfigError(f"{path}: the shard {file} is missing")
    return files


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """An error of a library on one line, with its kind where the words alone would say little."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and len(lines[0].split()) > 1 else f"{type(error).__name__}: {' '.join(lines)}"


# ---------------------------------------------------------------------------------------------------------------------
# Which models a run merges
# ---------------------------------------------------------------------------------------------------------------------


def candidate_paths(config: Config) -> tuple[list[Path], list[str]]:
    """The candidates' folders in merge order, and a line about each one that is left out.

    models_to_merge overrides model_directory, whose visible sub-folders are taken alphabetically. The base and the
    output are left out by resolved path. Raises ConfigError if none is left.
    """
    if config.models_to_merge:
        found = [Path(path) for path in config.models_to_merge]
    else:
        entries = Path(config.directories.model_directory or ".").iterdir()
        folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        found = sorted(folders, key=lambda entry: (entry.name.casefold(), entry.name))
    base, output = (Path(p).resolve() for p in (config.directories.model_path1, config.directories.output_directory))
    paths, notes = [], []
    for path in found:
        if path.resolve() == base:
            notes.append(f"{path} is the base model itself: skipped")
        elif not config.models_to_merge and path.resolve() in (output, partial_folder(output)):
            notes.append(f"{path} is the output directory: skipped")
        elif not config.models_to_merge and not (path / "config.json").is_file():
            notes.append(f"{path} holds no model (no config.json): skipped")
        else:
            paths.append(path)
    if not paths:
        raise ConfigError("no candidates to merge: " + ("; ".join(notes) or "the model directory has no sub-folders"))
    return paths, notes


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raise ConfigError if writing `output` would destroy an input, or anything else that is already there."""
    resolved = output.resolve()
    for path in inputs:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            what = "is" if resolved == path.resolve() else "contains"
            raise ConfigError(f"the output directory {output} {what} the input model {path}; choose another one")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output directory {output} is a file")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"the output directory {output} is not empty; move it, name another, or add --overwrite")
    if not (output / SETTINGS_FILE).is_file():
        raise ConfigError(
            f"{output} was not written by Merge Monster (no {SETTINGS_FILE}); --overwrite won't delete it"
        )
    if resolved == Path.cwd().resolve() or resolved in Path.cwd().resolve().parents:
        raise ConfigError(f"the output directory {output} is, or contains, the folder you are in; choose another one")


def differences(base: Checkpoint, candidate: Checkpoint) -> list[str]:
    """What makes a candidate unfit for the base, from configurations and shard headers alone; names both values."""
    ours, theirs = base.config.get_text_config(), candidate.config.get_text_config()
    found = [
        f"{words} is {getattr(theirs, key, None)}, the base's is {getattr(ours, key, None)}"
        for key, words in _MUST_AGREE.items()
        if getattr(theirs, key, None) != getattr(ours, key, None)
    ]
    return found or _tensor_differences(base, candidate)


_MUST_AGREE = {
    "model_type": "architecture",
    "num_hidden_layers": "number of layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "number of attention heads",
    "num_key_value_heads": "number of key and value heads",
}


def _tensor_differences(base: Checkpoint, candidate: Checkpoint) -> list[str]:
    """Tensors of layers that one side lacks or that differ in shape."""
    found = []
    for name, info in _layer_tensors(base):
        stored = candidate.stored_name(name)
        if stored is None:
            found.append(f"the tensor {name} is missing")
        elif not candidate.tensors[stored].dtype.is_floating_point:
            found.append(f"{name} is stored as {candidate.tensors[stored].dtype}, not as a floating-point type")
        elif candidate.tensors[stored].shape != info.shape:
            found.append(f"{name} has shape {candidate.tensors[stored].shape}, the base's has {info.shape}")
    found += [f"the base has no {name}" for name, _ in _layer_tensors(candidate) if base.stored_name(name) is None]
    return found


def _layer_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Weights of layers: a layer's number stands in their names. Old checkpoints also store masks and rotary
    frequencies there, which no present model reads."""
    for name, info in checkpoint.tensors.items():
        numbered = any(part.isdecimal() for part in name.split("."))
        mask = name.endswith("masked_bias") or (name.endswith(".bias") and len(info.shape) > 1)
        if numbered and info.dtype.is_floating_point and not mask and not name.endswith("inv_freq"):
            yield name, info


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def partial_folder(output: Path) -> Path:
    """Where an output is written until it is complete: beside its final place, on the same file system."""
    return output.with_name(output.name + ".partial")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `output` when the block ends well, and vanishes when it does not.

    Raises ConfigError if it can't be made. A complete folder that stands at `output` goes only after the new one
    stands.
    """
    output = output.resolve()
    partial = partial_folder(output)
    if partial.exists():
        raise ConfigError(
            f"{partial} is left from a run that did not finish, or another run is writing it; delete it to go on"
        )
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"the output directory {output} can't be written ({error.strerror})") from None
    try:
        yield partial
        _replace_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what stood there goes afterwards, or comes back if the renaming fails."""
    if not target.exists():
        new.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        target.rename(aside / target.name)
        try:
            new.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    except OSError as error:
        aside.rmdir()
        raise CheckpointError(f"{target} can't be replaced ({error.strerror})") from None
    shutil.rmtree(aside)


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


# Everything of the base that another program needs to open the output: configuration, tokenizer, templates, code.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_NOT_COPIED = ("model.", "pytorch_model", "merge_monster", "license", "readme", "adapter_", "trainer_")


def copy_companions(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy a model folder's files other than weights; config.json is changed only in its dtype, and only if given."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.lower().startswith(_NOT_COPIED):
                shutil.copyfile(file, folder / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    if dtype is not None:
        _set_dtype(folder / "config.json", dtype)


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + os.linesep, encoding="utf-8")

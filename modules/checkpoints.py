"""Model folders on disk: find them, check them from their headers, write new ones.

Knows: folders, config.json, tokenizers. Refuses to know: modules, devices, scores.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from modules.config import Config, ConfigError
from modules.weights import CheckpointError, TensorInfo, first_line, read_headers, read_tensors, weight_files

SETTINGS_FILE = "merge_monster.yaml"  # in every output: the configuration that made it


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its configuration and what its shards hold."""

    path: Path
    name: str
    config: PreTrainedConfig
    tensors: Mapping[str, TensorInfo]  # by name, in file order

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU, in their stored dtype. Raises CheckpointError if a file can't be read."""
        return {
            name: tensor
            for file, wanted in self.by_file(names).items()
            for name, tensor in read_tensors(self.path / file, wanted).items()
        }

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
        tensors = read_headers(path, weight_files(path))
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not any(info.dtype.is_floating_point for info in tensors.values()):
        raise ConfigError(f"{path}: no weights found in its weight files")
    return Checkpoint(path, name, config, tensors)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """A model folder's tokenizer. Raises ConfigError if it has none that can be used."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizer library raises bare Exception for a broken tokenizer.json
        raise ConfigError(f"{path}: no usable tokenizer ({first_line(error)})") from None


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

"""GGUF files, as llama.cpp reads them: each is converted once to an ordinary model folder in the cache.

Knows: where such a file's folder lies, how it is made. Refuses to know: architectures and quantised formats, which
transformers reads; what the model is for.

The folder's name is that of the file and a hash of the file and of the folder from which the tokenizer was taken. The
folder has another name until it is complete.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig

from modules.checkpoints.checkpoint import load_tokenizer
from modules.checkpoints.companions import find_companions
from modules.checkpoints.downloads import check_room
from modules.checkpoints.gguf_header import GgufHeader, read_header
from modules.checkpoints.gguf_rope import FACTORS
from modules.checkpoints.gguf_settings import check_sizes, settle
from modules.checkpoints.gguf_tensors import check_rotary_width, placed, refuse
from modules.checkpoints.gguf_tokenizer import check_rebuilt, rebuild_tokenizer
from modules.checkpoints.hub import Repository, local
from modules.checkpoints.readers import dtype_name
from modules.checkpoints.weight_files import fingerprint, read_file
from modules.config.locations import Location
from modules.runtime.errors import ConfigError, first_line, reading, without_panics
from modules.runtime.text import on_disk, one_line

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED_DTYPE = torch.bfloat16
_LONGEST = 80  # characters of the file's name in the folder's
_BEGINNING = 2**25  # bytes of a file that are hashed: they hold its keys, with the tokenizer, but few weights
_NOTES = "merge_monster_gguf.json"  # in the folder: how the file stores most of its weights, warnings
_MAKING = 3  # version of the conversion: folders of an earlier one are not used

Tell = Callable[[Sequence[str]], None]


def open_gguf(location: Location, tokenizer: str | None, tell: Tell) -> Repository:
    """The files of the model folder made from a GGUF file. Arguments, errors: see `as_folder`."""
    folder, is_new = as_folder(location.folder, tokenizer, tell)
    notes = read_notes(folder)
    kind = notes["kind"]
    rounding = "" if kind in _PLAIN else " (quantization loss is permanent)"
    rebuilt = "rebuilt from the file (set tokenizer to use another)"
    chosen = f"taken from {tokenizer}" if tokenizer else rebuilt
    description = f"a GGUF file in {kind}{rounding}, read as {dtype_name(_dtype_of(kind))}; its tokenizer is {chosen}"
    warnings = [f"{location.text}: {line}" for line in notes["warnings"]]
    return local(location, folder, is_new=is_new, notes=[f"{location.text} is {description}"], warnings=warnings)


def as_folder(file: Path, tokenizer: str | None = None, tell: Tell = lambda lines: None) -> tuple[Path, bool]:
    """The model folder made from a GGUF file, and whether this call has made it.

    tokenizer: a folder from which the tokenizer is taken; else it is rebuilt from the file. tell: prints a line before
    the folder is made. Raises ConfigError if it can't be made, CheckpointError if the file can't be read.
    """
    name = f"{file.stem[:_LONGEST]}-{_hash_of(file, tokenizer)}"
    folder = Path(constants.HF_ASSETS_CACHE).expanduser().resolve() / "merge-monster" / "gguf" / name
    if folder.is_dir():
        return folder, False
    header = read_header(file)
    check_sizes(header)
    try:
        numbers = sum(prod(tensor.shape) for tensor in header.tensors.values())
        size = numbers * _dtype_of(header.kind).itemsize
        check_room(size, folder.parent, f"{file}: the dequantized weights need")
        tell([f"Dequantizing {file} once ({header.kind}; {on_disk(size)}) to {folder}"])
        _make(header, folder, tokenizer)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: can't write the converted model to {folder} ({first_line(error)})") from None
    return folder, True


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes in a converted folder. kind: how the file stores most weights. warnings: what of its meaning may be
    lost. Raises CheckpointError if they can't be read."""
    return json.loads(read_file(folder / _NOTES))


def _dtype_of(kind: str) -> torch.dtype:
    """The dtype of the converted weights."""
    return _PLAIN.get(kind, _QUANTISED_DTYPE)


def _hash_of(file: Path, tokenizer: str | None) -> str:
    """A hash of all that the folder depends on, 16 hex digits. Raises ConfigError if the tokenizer's folder does not
    exist, CheckpointError if a file can't be read."""
    with reading(file), file.open("rb") as opened:
        beginning = hashlib.sha256(opened.read(_BEGINNING)).hexdigest()
    dependencies: list[Any] = [_MAKING, fingerprint(file), beginning]
    if tokenizer is not None:
        folder = Path(tokenizer)
        if not folder.is_dir():
            raise ConfigError(f"tokenizer: {tokenizer}: no such folder")
        dependencies.append({name: fingerprint(folder / name) for name in find_companions(folder, trusted=False).sizes})
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:16]


def _make(header: GgufHeader, folder: Path, tokenizer: str | None) -> None:
    """Write the folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        unfinished = Path(temporary) / "model"
        unfinished.mkdir()
        warnings = _write(header, unfinished, tokenizer)
        notes = {"kind": header.kind, "warnings": [one_line(warning) for warning in warnings]}
        (unfinished / _NOTES).write_text(json.dumps(notes), encoding="utf-8")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # nor has another run made it
                raise


def _write(header: GgufHeader, folder: Path, tokenizer: str | None) -> list[str]:
    """Write model and tokenizer into an empty folder. Returns warnings about what may be lost.

    Raises ConfigError if transformers can't read the file, or would build another model from it.
    """
    file = header.file
    rebuilt = rebuild_tokenizer(file) if tokenizer is None else None
    chosen = load_tokenizer(Path(tokenizer)) if rebuilt is None else rebuilt.tokenizer
    source = {"gguf_file": str(file.resolve()), "local_files_only": True}  # no file beside it is read
    try:
        # transformers shows a progress bar that no setting turns off.
        with open(os.devnull, "w") as devnull, redirect_stderr(devnull), without_panics():
            config, zeros, warnings = _settled_config(AutoConfig.from_pretrained(folder, **source), header)
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=_dtype_of(header.kind),
                output_loading_info=True,
                **source,
            )
    except ConfigError:
        raise
    except Exception as error:  # of transformers, for an unknown type or architecture
        raise ConfigError(f"{file}: transformers can't dequantize it ({first_line(error)})") from None
    missing = sorted(loading_info["missing_keys"] - zeros)
    if missing:
        hint = "if the file was split, join its parts with llama-gguf-split"
        raise ConfigError(f"{file}: {len(missing)} of the model's tensors are missing, such as {missing[0]}; {hint}")
    refuse(header, config, sorted(loading_info["unexpected_keys"]))
    for name in zeros:
        model.get_parameter(name).data.zero_()
    if rebuilt is not None:
        chosen.model_max_length = getattr(model.config, "max_position_embeddings", chosen.model_max_length)
    model.save_pretrained(folder)
    chosen.save_pretrained(folder)
    if rebuilt is None:
        return warnings
    check_rebuilt(file, load_tokenizer(folder), rebuilt.lists)
    return [*warnings, *rebuilt.doubts]


def _settled_config(config: PreTrainedConfig, header: GgufHeader) -> tuple[PreTrainedConfig, frozenset[str], list[str]]:
    """The configuration with all that the file says; the names of biases to fill with zeros; warnings.

    Raises ConfigError, naming the key or tensor, if no configuration can say it.
    """
    factors = {}
    for name in FACTORS:
        if name in header.tensors:
            tensor = header.tensors[name]
            factors[name] = gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.kind]).flatten().tolist()
    settled, warnings = settle(config, header, factors)
    config, zeros = placed(settled, header)
    check_rotary_width(config, header)
    return config, zeros, warnings

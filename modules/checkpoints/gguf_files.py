"""GGUF files, as llama.cpp reads them: each becomes, once, an ordinary model folder in the cache.

Knows: what such a file says of itself, where its folder lies. Refuses to know: architectures and the numbers' packing,
which are transformers'; what the model is for.

The folder's name is that of the file and a hash of it, and of the folder from which the tokenizer was taken. It is made
under another name, which it keeps until it is complete.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GgufConfig

from modules.checkpoints.causes import disguise
from modules.checkpoints.checkpoint import load_tokenizer
from modules.checkpoints.companions import find_companions
from modules.checkpoints.gguf_tokenizer import check_rebuilt, rebuild_tokenizer
from modules.checkpoints.hub import there_already
from modules.checkpoints.weight_files import dtype_name, fingerprint
from modules.runtime import ConfigError, first_line, reading, without_panics

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OF_QUANTISED = torch.bfloat16
_LONGEST = 80  # characters of the file's name in the folder's
_BEGINNING = 2**25  # bytes of a file, in which is what stands before its numbers, the tokenizer too
_KIND = "merge_monster_gguf.txt"  # in the folder: how the file stores most of its numbers
_DOUBTS = "merge_monster_gguf_tokenizer.txt"  # in the folder: what the file leaves open of its tokenizer
_REBUILDING = 2  # counts the ways in which tokenizers were rebuilt: a folder with one of an earlier way is not used


def as_folder(
    file: Path, tokenizer: str | None = None, tell: Callable[[Sequence[str]], None] = lambda lines: None
) -> tuple[Path, str]:
    """The model folder that a GGUF file becomes, and how the file stores most of its numbers: Q4_1, F16, ...

    tokenizer: a folder from which the tokenizer is taken; else it is rebuilt from the file. tell: is given a line if
    the folder has still to be made. Raises ConfigError if it can't be, CheckpointError if the file can't be read.
    """
    name = f"{file.stem[:_LONGEST]}-{_hash_of(file, tokenizer)}"
    folder = Path(constants.HF_ASSETS_CACHE).expanduser().resolve() / "merge-monster" / "gguf" / name
    try:
        if not folder.is_dir():
            kind, numbers = describe(file)
            size, free = numbers * _dtype_of(kind).itemsize, shutil.disk_usage(there_already(folder)).free
            if size > free:
                room = f"{folder.parent} has room for {free / 1e9:.1f}"
                hint = "make room, or set HF_HOME to a folder on a larger disk"
                raise ConfigError(f"{file}: its plain numbers take {size / 1e9:.1f} GB, {room}: {hint}")
            tell([f"Dequantising {file} once ({kind}; {size / 1e9:.2f} GB) to {folder}"])
            _make(file, folder, kind, tokenizer)
        return folder, (folder / _KIND).read_text(encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: can't be kept as {folder} ({first_line(error)})") from None


def about(text: str, kind: str, tokenizer: str | None) -> str:
    """A line about what comes along with a GGUF file. text: its name; tokenizer: where that was taken from."""
    rounding = "" if kind in _PLAIN else " (a quantised model brings its rounding along)"
    rebuilt = "rebuilt from the file (tokenizer: FOLDER in the YAML file takes another)"
    taken = f"that of {tokenizer}" if tokenizer else rebuilt
    return f"{text} is a GGUF file of {kind}{rounding}, read as {dtype_name(_dtype_of(kind))}; its tokenizer is {taken}"


def tokenizer_doubts(folder: Path) -> list[str]:
    """What the file of which a folder was made leaves open of its tokenizer, a line for each; in all other folders
    nothing. Raises CheckpointError if that can't be read."""
    file = folder / _DOUBTS
    with reading(file):
        return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def describe(file: Path) -> tuple[str, int]:
    """How a GGUF file stores most of its numbers, and how many they are; none of them is read.

    Raises ConfigError if it is no such file, or damaged.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file}: to read GGUF files, run: pip install gguf")
    from gguf import GGUFReader

    count: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(file).tensors:
            count[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # whatever a damaged file makes of its reader
        what = disguise(file) or f"can't be read as GGUF ({first_line(error)}); fetch it again"
        raise ConfigError(f"{file}: {what}") from None
    if not count:
        raise ConfigError(f"{file}: holds no tensors")
    return count.most_common(1)[0][0], count.total()


def _dtype_of(kind: str) -> torch.dtype:
    """What numbers are stored in once they are plain ones."""
    return _PLAIN.get(kind, _OF_QUANTISED)


def _hash_of(file: Path, tokenizer: str | None) -> str:
    """What the folder depends on, in a few letters. Raises ConfigError if the tokenizer's folder is not there,
    CheckpointError if a file can't be read."""
    with reading(file), file.open("rb") as opened:
        beginning = hashlib.sha256(opened.read(_BEGINNING)).hexdigest()
    known: list[Any] = [fingerprint(file), beginning]
    if tokenizer is None:
        known.append(_REBUILDING)
    else:
        folder = Path(tokenizer)
        if not folder.is_dir():
            raise ConfigError(f"tokenizer: {tokenizer}: no such folder")
        known.append({name: fingerprint(folder / name) for name in find_companions(folder, trusted=False).sizes})
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _make(file: Path, folder: Path, kind: str, tokenizer: str | None) -> None:
    """Write the folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder.parent, ignore_cleanup_errors=True) as place:
        unfinished = Path(place) / "model"
        unfinished.mkdir()
        _write(file, unfinished, _dtype_of(kind), tokenizer)
        (unfinished / _KIND).write_text(kind, encoding="utf-8")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # nor has another run made it
                raise


def _write(file: Path, folder: Path, dtype: torch.dtype, tokenizer: str | None) -> None:
    """Write model and tokenizer into an empty folder. Raises ConfigError if transformers can't read the file."""
    rebuilt = rebuild_tokenizer(file) if tokenizer is None else None
    chosen = load_tokenizer(Path(tokenizer)) if rebuilt is None else rebuilt.tokenizer
    place = {"gguf_file": str(file.resolve())}  # by its path: nothing that lies beside it is read
    try:
        # A bar is shown that no setting keeps away.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), without_panics():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                **place,
            )
    except MemoryError:
        raise ConfigError(f"{file}: there is too little memory to dequantise it") from None
    except Exception as error:  # whatever transformers makes of a type or an architecture that it doesn't know
        raise ConfigError(f"{file}: transformers can't dequantise it ({first_line(error)})") from None
    missing = sorted(found["missing_keys"])
    if missing:
        hint = "of a file that was split, join the parts with llama.cpp's llama-gguf-split first"
        raise ConfigError(f"{file}: lacks {len(missing)} of the model's tensors, such as {missing[0]}; {hint}")
    if rebuilt is not None:
        chosen.model_max_length = getattr(model.config, "max_position_embeddings", chosen.model_max_length)
    model.save_pretrained(folder)
    chosen.save_pretrained(folder)
    if rebuilt is not None:
        check_rebuilt(file, load_tokenizer(folder), rebuilt.lists)
        (folder / _DOUBTS).write_text("\n".join(rebuilt.doubts), encoding="utf-8")

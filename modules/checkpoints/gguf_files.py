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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from modules.checkpoints.causes import disguise
from modules.checkpoints.checkpoint import load_tokenizer
from modules.checkpoints.companions import find_companions
from modules.checkpoints.hub import there_already
from modules.checkpoints.weight_files import dtype_name, fingerprint
from modules.runtime import ConfigError, first_line

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OF_QUANTISED = torch.bfloat16
_LONGEST = 80  # characters of the file's name in the folder's


@dataclass(frozen=True)
class Described:
    """What a GGUF file says of itself."""

    kind: str  # how most of its numbers are stored: Q4_1, F16, ...
    numbers: int
    header: str  # a hash of all that stands before them

    @property
    def dtype(self) -> torch.dtype:
        """What the numbers are stored in once they are plain ones."""
        return _PLAIN.get(self.kind, _OF_QUANTISED)

    def note(self, text: str, tokenizer: str | None) -> str:
        """A line about what comes along with such a file. text: its name; tokenizer: where that was taken from."""
        rounding = "" if self.kind in _PLAIN else " (a quantised model brings its rounding along)"
        stored = f"{self.kind}{rounding}, read as {dtype_name(self.dtype)}"
        rebuilt = "rebuilt from the file (tokenizer: FOLDER in the YAML file takes another)"
        return f"{text} is a GGUF file of {stored}; its tokenizer is {f'that of {tokenizer}' if tokenizer else rebuilt}"


def as_folder(
    file: Path, tokenizer: str | None = None, tell: Callable[[Sequence[str]], None] = lambda lines: None
) -> tuple[Path, Described]:
    """The model folder that a GGUF file becomes, and what the file says of itself.

    tokenizer: a folder from which the tokenizer is taken; else it is rebuilt from the file. tell: is given a line if
    the folder has still to be made. Raises ConfigError if it can't be.
    """
    described = describe(file)
    name = f"{file.stem[:_LONGEST]}-{_hash_of(file, described, tokenizer)}"
    folder = Path(constants.HF_ASSETS_CACHE).expanduser().resolve() / "merge-monster" / "gguf" / name
    if not folder.is_dir():
        size, free = described.numbers * described.dtype.itemsize, shutil.disk_usage(there_already(folder)).free
        if size > free:
            room = (
                f"{folder.parent} has room for {free / 1e9:.1f}: make room, or set HF_HOME to a folder on a larger disk"
            )
            raise ConfigError(f"{file}: its plain numbers take {size / 1e9:.1f} GB, {room}")
        tell([f"Dequantising {file} once ({described.kind}; {size / 1e9:.2f} GB) to {folder}"])
        try:
            _make(file, folder, described.dtype, tokenizer)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: {folder} can't be written ({first_line(error)})") from None
    return folder, described


def describe(file: Path) -> Described:
    """What a GGUF file says of itself; its numbers are not read. Raises ConfigError if it is none, or damaged."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file}: to read GGUF files, run: pip install gguf")
    from gguf import GGUFReader

    count: Counter[str] = Counter()
    try:
        reader = GGUFReader(file)
        for tensor in reader.tensors:
            count[tensor.tensor_type.name] += int(tensor.n_elements)
        with file.open("rb") as opened:
            header = hashlib.sha256(opened.read(reader.data_offset)).hexdigest()
    except Exception as error:  # whatever a damaged file makes of its reader
        what = disguise(file) or f"can't be read as GGUF ({first_line(error)}); fetch it again"
        raise ConfigError(f"{file}: {what}") from None
    if not count:
        raise ConfigError(f"{file}: holds no tensors")
    return Described(count.most_common(1)[0][0], count.total(), header)


def _hash_of(file: Path, described: Described, tokenizer: str | None) -> str:
    """What the folder depends on, in a few letters. Raises ConfigError if the tokenizer's folder is not there."""
    known = [fingerprint(file), described.header]
    if tokenizer is not None:
        folder = Path(tokenizer)
        if not folder.is_dir():
            raise ConfigError(f"tokenizer: {tokenizer}: no such folder")
        known.append({name: fingerprint(folder / name) for name in sorted(find_companions(folder, False).sizes)})
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _make(file: Path, folder: Path, dtype: torch.dtype, tokenizer: str | None) -> None:
    """Write the folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder.parent, ignore_cleanup_errors=True) as place:
        unfinished = Path(place) / "model"
        unfinished.mkdir()
        _write(file, unfinished, dtype, tokenizer)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # nor has another run made it
                raise


def _write(file: Path, folder: Path, dtype: torch.dtype, tokenizer: str | None) -> None:
    """Write model and tokenizer into an empty folder. Raises ConfigError if transformers can't read the file."""
    chosen = load_tokenizer(Path(tokenizer)) if tokenizer is not None else None
    place = {"gguf_file": str(file.resolve())}  # by its path: nothing that lies beside it is read
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # a bar that no setting keeps away
            if chosen is None:
                chosen = AutoTokenizer.from_pretrained(folder, **place)
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
    if tokenizer is None:
        chosen.model_max_length = getattr(model.config, "max_position_embeddings", chosen.model_max_length)
    model.save_pretrained(folder)
    chosen.save_pretrained(folder)

"""Files of a model folder: reads small ones, finds those with weights, and opens the reader of their format.

Knows: names of weight files, indexes of shards, limits. Refuses to know: how a format stores tensors, models, devices.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from modules.checkpoints.bin_files import BinReader
from modules.checkpoints.readers import FilesReader, Forms
from modules.checkpoints.safetensors_files import LONGEST_HEADER, SafetensorsReader
from modules.checkpoints.sniff_format import found_instead, sniff_format
from modules.runtime.errors import CheckpointError, ConfigError
from modules.runtime.input_files import open_input

# The formats of weight files, one a line. If a folder holds several, the first one counts.
READERS: dict[str, type[FilesReader]] = {
    "model.safetensors": SafetensorsReader,
    "pytorch_model.bin": BinReader,
}
LOOKED_FOR = tuple(name for single in READERS for name in (single, f"{single}.index.json"))

Fingerprint = dict[str, int | str]  # "size" in bytes, "sha256"
# number and size in bytes of the blocks of a large file that a fingerprint hashes
_BLOCKS = 64
_BLOCK = 1 << 16

LARGEST_TEXT = 100_000_000  # bytes of a file that describes a model; tokenizers have some ten million
LARGEST_SETTINGS = 10_000_000  # of config.json and adapter_config.json, which mostly have a few thousand


def local_files(folder: Path) -> list[str]:
    """The names of the files in a folder, sub-folders left out. Raises CheckpointError if it can't be read."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise _unread(folder, error) from None
    return sorted(path.name for path in paths if is_there(path))


def is_there(path: Path, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether a file exists, or a folder if `kind` is S_ISDIR. Raises CheckpointError if the system can't tell: a path
    that can't be read is not missing."""
    try:
        return kind(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise _unread(path, error) from None


def _unread(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: can't be read ({error.strerror or error})")


def read_file(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """A small file's content. Raises ConfigError if it has more bytes than `largest`, CheckpointError if it can't be
    read."""
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                raise ConfigError(f"{path}: {size:,} bytes long, more than the limit of {largest:,}; download it again")
            return file.read()
    except OSError as error:
        raise _unread(path, error) from None


def holds_weights(names: Collection[str]) -> bool:
    """Whether a model folder with files of these names has a model's weights."""
    return any(name in names for name in LOOKED_FOR)


def index_file(names: Collection[str]) -> str | None:
    """Of files of these names, the index of a model's shards; None if there are no shards."""
    main_file = next((name for name in LOOKED_FOR if name in names), None)
    return None if main_file in READERS else main_file


def weight_files(folder: Path, names: Collection[str]) -> list[str]:
    """The names of a model's weight files, of one format.

    names: of all the model's files; an index must be in the folder, shards may still be on the hub. Raises ConfigError
    if there are no weights, or an index names files that are not among the names; CheckpointError if it can't be read.
    """
    for single in READERS:
        if single in names:
            return [single]
        if f"{single}.index.json" in names:
            return _indexed(folder, f"{single}.index.json", names, Path(single).suffix)
    raise ConfigError(f"{folder}: no model weights; looked for {', '.join(LOOKED_FOR)}{found_instead(names)}")


def _indexed(folder: Path, index: str, names: Collection[str], suffix: str) -> list[str]:
    """The shards that an index names. suffix: that of each shard; with another one, a shard could overwrite another
    file when the model is written again."""
    try:
        weight_map = json.loads(read_file(folder / index).decode("utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = sniff_format(folder / index) or "not a valid shard index"
        raise ConfigError(f"{folder / index}: {problem}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{folder / index}: '{file}' is not a plain file name")
        if not file.endswith(suffix):
            raise ConfigError(f"{folder / index}: '{file}' is not a {suffix} file")
        if file not in names:
            raise ConfigError(f"{folder}: the shard {file} is missing")
    return files


def open_reader(folder: Path, files: Sequence[str], known_forms: Mapping[str, Forms] | None = None) -> FilesReader:
    """The reader of weight files of one format, by the end of their names. known_forms, errors: see `FilesReader`."""
    by_suffix = {Path(single).suffix: reader for single, reader in READERS.items()}
    return by_suffix[Path(files[0]).suffix](folder, files, known_forms or {})


def fingerprint(path: Path) -> Fingerprint:
    """Identifies a file without reading all of it: its size, and a hash of its header and of blocks from all over it,
    since the headers of two fine-tunes are the same. Small files are hashed whole.

    Raises CheckpointError if it can't be read.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK:
                digest.update(file.read())
            else:
                header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
                digest.update(file.read(min(header, size, LONGEST_HEADER)))
                for number in range(_BLOCKS):
                    file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK))
    except OSError as error:
        raise _unread(path, error) from None
    return {"size": size, "sha256": digest.hexdigest()}

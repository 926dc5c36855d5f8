"""New weight files: written in shards, and read back.

Knows: safetensors, indexes of shards. Refuses to know: where tensors come from, the output folder's name.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modules.checkpoints.bin_files import is_pickled
from modules.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from modules.runtime import CheckpointError, first_line, reading


def written_name(file: str) -> str:
    """What a weight file is called when its tensors are written again: .bin files become safetensors."""
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors" if is_pickled(file) else file


def write_shards(folder: Path, shards: Mapping[str, Iterable[tuple[str, Tensor]]]) -> None:
    """Write weight files and, for more than one, their index. Each shard's tensors are asked for in turn, one shard in
    memory at a time, and compared with what is then in the file. Raises CheckpointError if a file can't be written."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, named_tensors in shards.items():
        tensors = dict(named_tensors)
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            with suppress(OSError):  # not every file system has rights
                (folder / file).chmod(_usual_mode())  # safetensors lets nobody but the owner read it
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / file}: can't be written ({first_line(error)})") from None
        _verify(folder / file, tensors)
        weight_map.update((name, file) for name in tensors)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if set(shards) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        try:
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder / INDEX_FILE}: can't be written ({error.strerror})") from None


def _usual_mode() -> int:
    """The rights of a new file, as the umask has them."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def _verify(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a file does not hold these very tensors, bit for bit."""
    with reading(path), safe_open(path, "pt", backend="pread") as shard:
        written = set(shard.keys())
        wrong = written ^ tensors.keys() or [
            name for name, tensor in tensors.items() if not _same(shard.get_tensor(name), tensor)
        ]
    if wrong:
        raise CheckpointError(f"{path}: {min(wrong)} reads otherwise than it was written; check the disk")


def _same(found: Tensor, written: Tensor) -> bool:
    same_form = found.dtype == written.dtype and found.shape == written.shape
    return same_form and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (found, written)))

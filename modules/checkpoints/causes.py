"""Why a file or folder is not the model that it was named as: what is there instead.

Knows: how files begin, what other formats call theirs. Refuses to know: configurations, tensors, what a model needs.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from modules.runtime.input_files import open_input

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
# Names of weights that no run reads, in this order, and what they are.
_OTHER_FORMATS = (
    ("*.gguf", "GGUF; name the file itself"),
    ("consolidated*", "Meta's or Mistral's own format, to be converted"),
    ("adapter_model*", "an adapter, whose adapter_config.json is missing"),
    ("*-of-*.safetensors", "a shard, whose model.safetensors.index.json is missing"),
    ("*-of-*.bin", "a shard, whose pytorch_model.bin.index.json is missing"),
    ("*.safetensors", "under another name than model.safetensors"),
)


def disguise(path: Path) -> str | None:
    """What a file is, judging by its beginning, if a download has left something else under its name; with advice."""
    start = _beginning(path)
    if start is None:
        return None
    if not any(start):
        return "is empty, or begins with nothing but zeros; fetch it again"
    if start.startswith(_POINTER):
        return "is a git-LFS pointer, not the file itself; run 'git lfs pull' in its folder"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "is a web page (HTML or XML), as a download that failed leaves it; fetch it again"
    return None


def _beginning(path: Path) -> bytes | None:
    try:
        with open_input(path) as file:
            return file.read(512)
    except OSError:
        return None  # for its reader to complain about


def pointers(folder: Path, names: Iterable[str]) -> str | None:
    """A line if files of these names are git-LFS pointers; those that are not there are none."""
    found = [name for name in names if (_beginning(folder / name) or b"").startswith(_POINTER)]
    if not found:
        return None
    more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
    return f"{folder / found[0]}: is a git-LFS pointer, not the file itself{more}; run 'git lfs pull' in {folder}"


def found_instead(folder: Path, names: Collection[str], missing: Collection[str]) -> str:
    """What a folder holds in place of a model, to be put behind a message; empty if that is nothing known.

    names: of all its files. missing: names of files any of which would have been right.
    """
    for pattern, what in _OTHER_FORMATS:
        found = sorted(name for name in names if fnmatch(name, pattern))
        if found:
            return f"; found {found[0]} ({what})"
    below = [path.parent for name in missing for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{name}")]
    return f"; there is one in a folder below: name {min(below)}" if below else ""

"""Why a file or folder is not the model that the user named: what it is instead.

Knows: how files begin, file names of other formats. Refuses to know: configurations, tensors, what a model needs.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from modules.runtime.errors import ConfigError
from modules.runtime.input_files import open_input

_POINTER = b"version https://git-lfs.github.com/spec/"
_IS_POINTER = "is a git-LFS pointer, not the file itself; run 'git lfs pull' in its folder"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_OTHER_WEIGHTS = ("*.gguf", "consolidated*", "adapter_model*", "*.safetensors", "*-of-*.bin")  # that no run reads


def sniff_format(path: Path) -> str | None:
    """What a file is, with advice, if its beginning shows that a download has left something else under its name."""
    start = _beginning(path)
    if start is None:
        return None
    if not any(start):
        return "is empty or begins with zeros only; download it again"
    if start.startswith(_POINTER):
        return _IS_POINTER
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "is a web page (HTML or XML) that a failed download left; download it again"
    return None


def _beginning(path: Path) -> bytes | None:
    try:
        with open_input(path) as file:
            return file.read(512)
    except OSError:
        return None  # its reader will raise


def check_pointers(folder: Path, names: Iterable[str]) -> None:
    """Raise ConfigError if one of a folder's files is a git-LFS pointer."""
    for name in names:
        if (_beginning(folder / name) or b"").startswith(_POINTER):
            raise ConfigError(f"{folder / name}: {_IS_POINTER}")


def found_instead(names: Collection[str]) -> str:
    """The end of a message: the first of these files that may be weights in another format; empty if none is."""
    for pattern in _OTHER_WEIGHTS:
        matches = sorted(name for name in names if fnmatch(name, pattern))
        if matches:
            return f"; found {matches[0]}"
    return ""

"""Text files that somebody asked for by name: refused where something stands, and written whole or not at all.

Knows: paths. Refuses to know: what is in them.
"""

import os
from pathlib import Path

from modules.config import unusable
from modules.output.journal import naming
from modules.runtime import ConfigError


def check_file(option: str, path: Path, overwrite: bool) -> None:
    """Raise ConfigError, naming the option, if a file can't be written, or another one stands there."""
    trouble = unusable(path) or unusable(_unfinished(path))
    if trouble:
        raise ConfigError(f"{option} {path}: not a usable path ({trouble})")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ConfigError(f"{option} {path}: {'a folder' if path.is_dir() else 'its folder does not exist'}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{option} {path}: this file exists; name another one, or add --overwrite")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise ConfigError(f"{option} {path}: can't be written")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole or, if writing fails, as it was before."""
    partial = _unfinished(path)
    try:
        with naming(path), partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """Where a file is written until it is complete: under a name that nobody else has."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial") if path.name else path

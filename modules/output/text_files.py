"""Text files that somebody asked for by name: refused where something else stands, and written whole or not at all.

Knows: paths, links. Refuses to know: what is in the files.
"""

import os
from pathlib import Path

from modules.config.fields import unusable
from modules.config.inputs import real_path
from modules.output.filesystem import is_mount_point, sync
from modules.runtime.errors import ConfigError
from modules.runtime.input_files import check_is_file, no_file


def check_file(option: str, path: Path, overwrite: bool) -> None:
    """Raise ConfigError, naming the option, if a file can't be written, or something stands there that may not be
    replaced. Of a link, what it leads to is the file."""
    trouble = unusable(path) or unusable(_partial(path)) or _trouble(real_path(path), overwrite)
    if trouble:
        raise ConfigError(f"{option} {path}: can't be written ({trouble})")


def _trouble(file: Path, overwrite: bool) -> str | None:
    """Why a file can't be written, if it can't."""
    kind = no_file(file)
    if kind or file.is_dir():
        return f"it is {kind or 'a folder'}"
    if not file.parent.is_dir():
        return "its folder does not exist"
    if is_mount_point(file):
        return "it is a mount point, which can't be replaced; mount its folder instead"
    if file.exists() and not overwrite:
        return "this file exists; choose another one or add --overwrite"
    for path in (file.parent, file):
        if path.exists() and not os.access(path, os.W_OK):
            return "permission denied"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file, or what a link leads to. It is there, and on the disk, as a whole or, if writing fails, as it was
    before. Raises OSError, naming the path, if it can't be written."""
    file = real_path(path)
    partial = _partial(file)
    try:
        check_is_file(file)  # it may have become something else since it was checked
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(partial)
        partial.replace(file)
        sync(file.parent)
    except OSError as error:  # by the name that the person knows
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where a file is written until it is complete. What a killed run leaves there is written over."""
    return path.with_name(f".{path.name}.partial-merge-monster") if path.name else path

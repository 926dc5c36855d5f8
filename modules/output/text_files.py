"""Text files that the user names: refused if they would replace something, and written completely or not at all.

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
    """Raise ConfigError, naming the option, if a file can't be written, or would replace something without
    permission. Links are followed."""
    problem = unusable(path) or unusable(_partial(path)) or _problem(real_path(path), overwrite)
    if problem:
        raise ConfigError(f"{option} {path}: can't be written ({problem})")


def _problem(file: Path, overwrite: bool) -> str | None:
    """Why a file can't be written; None if it can."""
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
    """Write a file; links are followed. When this returns, the file is complete and on the disk. If writing fails, the
    old file is unchanged. Raises OSError, naming the path, if it can't be written."""
    file = real_path(path)
    partial = _partial(file)
    try:
        check_is_file(file)  # it may have been replaced by something else since the check
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(partial)
        partial.replace(file)
        sync(file.parent)
    except OSError as error:  # with the path that the user gave
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """The path of a file until it is complete. What a killed run left there is overwritten."""
    return path.with_name(f".{path.name}.partial-merge-monster") if path.name else path

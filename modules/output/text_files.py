"""Text files that somebody asked for by name: refused where something else stands, and written whole or not at all.

Knows: paths, links. Refuses to know: what is in the files.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.config.fields import unusable
from modules.config.inputs import real_path
from modules.output.filesystem import is_mount_point, stamp_of, sync
from modules.runtime.errors import ConfigError
from modules.runtime.input_files import check_is_file, no_file


def check_file(option: str, path: Path, overwrite: bool) -> None:
    """Raise ConfigError, naming the option, if a file can't be written, or something stands there that may not be
    replaced. Of a link, what it leads to is the file."""
    reason = unusable(path) or unusable(_partial(path))
    if reason:
        raise ConfigError(f"{option} {path}: not a usable path ({reason})")
    file = real_path(path)
    kind = no_file(file)
    if kind:
        raise ConfigError(f"{option} {path}: this is {kind}; name a file")
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"{option} {path}: {'a folder' if file.is_dir() else 'its folder does not exist'}")
    if is_mount_point(file):
        raise ConfigError(f"{option} {path}: is mounted by itself, so no file can take its place; mount its folder")
    if file.exists() and not overwrite:
        raise ConfigError(f"{option} {path}: this file exists; name another one, or add --overwrite")
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ConfigError(f"{option} {path}: can't be written")


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


def files_left(paths: Sequence[Path]) -> Callable[[], str]:
    """A function that says of files, after a run has broken off, whether they were written; called before the run."""
    earlier = {path: stamp_of(path) for path in paths}

    def tell() -> str:
        lines = []
        for path, stamp in earlier.items():
            if stamp_of(path) is None:
                lines.append(f"{path} was not written.")
            elif stamp_of(path) == stamp:
                lines.append(f"{path} was not changed.")
            else:
                lines.append(f"{path} is written, and whole.")
        return " ".join(lines)

    return tell


def _partial(path: Path) -> Path:
    """Where a file is written until it is complete. What a killed run leaves there is written over."""
    return path.with_name(f".{path.name}.partial-merge-monster") if path.name else path

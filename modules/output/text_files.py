"""Text files that somebody asked for by name: refused where something else stands, and written whole or not at all.

Knows: paths, links, what a killed run has left. Refuses to know: what is in the files.
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from modules.config import real_path, unusable
from modules.output.filesystem import Stamp, stamp_of, sync
from modules.runtime import ConfigError, check_is_file, no_file


def check_file(option: str, path: Path, overwrite: bool) -> None:
    """Raise ConfigError, naming the option, if a file can't be written, or something stands there that may not be
    replaced. What a run has left that was killed while it wrote this file is removed.

    A link stays a link: what it leads to is the file.
    """
    trouble = unusable(path) or unusable(_unfinished(path))
    if trouble:
        raise ConfigError(f"{option} {path}: not a usable path ({trouble})")
    file = real_path(path)
    kind = no_file(file)
    if kind:
        raise ConfigError(f"{option} {path}: this is {kind}; name a file")
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"{option} {path}: {'a folder' if file.is_dir() else 'its folder does not exist'}")
    if _is_open(file):
        raise ConfigError(f"{option} {path}: this program's own output goes there; name another file")
    if _is_mounted(file):
        raise ConfigError(
            f"{option} {path}: this file is mounted by itself, so none can take its place; mount its folder"
        )
    if file.exists() and not overwrite:
        raise ConfigError(f"{option} {path}: this file exists; name another one, or add --overwrite")
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ConfigError(f"{option} {path}: can't be written")
    _remove_left(file)


def write_text(path: Path, text: str) -> None:
    """Write a file, or what a link leads to. It is there, and on the disk, as a whole or, if writing fails, as it was
    before. Raises OSError, naming the path, if it can't be written."""
    file = real_path(path)
    partial = _unfinished(file)
    try:
        check_is_file(file)  # it may have become something else since it was checked
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(text)
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
    return lambda: " ".join(_state_of(path, stamp) for path, stamp in earlier.items())


def _state_of(path: Path, earlier: Stamp) -> str:
    now = stamp_of(path)
    if now is None:
        return f"{path} was not written."
    return f"{path} was not changed." if now == earlier else f"{path} is written, and whole."


def _unfinished(path: Path) -> Path:
    """Where a file is written until it is complete: under a name that nobody else has."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial") if path.name else path


def _remove_left(file: Path) -> None:
    """Remove what processes that have ended have left of a file."""
    pattern = re.compile(rf"\.{re.escape(file.name)}\.(\d+)\.partial")
    with suppress(OSError):  # the folder can't be listed
        for path in file.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match and not _is_being_written(path, int(match[1])):
                path.unlink()


def _is_being_written(partial: Path, process: int) -> bool:
    """Whether a process that was there before the file still is: a later one may have the same number."""
    try:
        return psutil.Process(process).create_time() <= partial.stat().st_mtime
    except psutil.NoSuchProcess:
        return False


def _is_mounted(file: Path) -> bool:
    """Whether a file is a mount point, as a single file that a container was given."""
    with suppress(OSError):  # the system does not tell
        return any(mount.mountpoint == str(file) for mount in psutil.disk_partitions(all=True))
    return False


def _is_open(file: Path) -> bool:
    """Whether standard output or error goes to a file: to replace it would lose what is shown from then on."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed, or the file is not there
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return True
    return False

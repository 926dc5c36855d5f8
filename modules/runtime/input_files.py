"""Files that a run reads: opened only if they are files.

Knows: what else can stand under a file's name, on which a program would wait for ever. Refuses to know: what is in
them, who reads them.
"""

import errno
import stat
from pathlib import Path
from typing import IO

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def no_file(path: Path) -> str | None:
    """What stands at a path, its links followed, that is neither a file nor a folder; None if nothing such does.

    Raises OSError if that can't be looked up.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_is_file(path: Path) -> None:
    """Raise OSError, which names the path, if to open what stands there may take for ever."""
    kind = no_file(path)
    if kind:
        raise OSError(errno.EINVAL, f"this is {kind}, not a file; copy its content to a file", str(path))


def open_input(path: Path, encoding: str | None = None) -> IO:
    """Open a file to be read: its bytes or, with an encoding, its text. Raises OSError if it is none, or can't be
    opened."""
    check_is_file(path)
    return path.open("rb") if encoding is None else path.open(encoding=encoding)

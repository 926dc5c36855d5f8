"""Input files: opened only if they are regular files.

Knows: what else a path can be (reading it might block for ever). Refuses to know: what is in the files, who reads them.
"""

import errno
import stat
from pathlib import Path
from typing import IO

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def no_file(path: Path) -> str | None:
    """The kind of thing at a path if it is neither a file nor a folder; None if it is or does not exist. Links are
    followed. Raises OSError if the path can't be examined.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_is_file(path: Path) -> None:
    """Raise OSError, naming the path, if opening it might block for ever."""
    kind = no_file(path)
    if kind:
        raise OSError(errno.EINVAL, f"this is {kind}, not a file; copy its content to a file", str(path))


def open_input(path: Path, encoding: str | None = None) -> IO:
    """Open a file for reading: its bytes or, with an encoding, its text. Raises OSError if it is no file, or can't be
    opened."""
    check_is_file(path)
    return path.open("rb") if encoding is None else path.open(encoding=encoding)

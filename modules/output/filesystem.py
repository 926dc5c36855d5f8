"""What file systems can and can't do: locks, mounts, making sure of what is written.

Knows: files, folders, what a system says of them. Refuses to know: what any of them is for.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from modules.runtime.errors import naming

# What a system says of something that a file system does not have, rather than of something that failed.
_NOT_SUPPORTED = (
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY),
    *(errno.EPERM, errno.EACCES, errno.EISDIR, errno.EBADF),
)
_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)

Stamp = tuple[int, int, int] | None  # by which a file is known from another one; None if there is none


def stamp_of(file: Path) -> Stamp:
    """What tells the file that stands here from any other one."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of files, on the disk, where the file system has such a thing.

    Raises OSError, which names it, if that fails.
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing for folders
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def is_mount_point(path: Path) -> bool:
    """Whether nothing else can take a path's place: a volume, or a single file or folder that a container was given."""
    if os.path.ismount(path):
        return True
    with suppress(OSError):  # the system does not tell
        return any(mount.mountpoint == str(path) for mount in psutil.disk_partitions(all=True))
    return False


class Lock:
    """A locked file that is there as long as the lock is held; a process that ends, however it ends, lets go of it."""

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError if another process has the lock, OSError if the file can't be made."""
        self._path = path
        while True:
            self._file = path.open("a+b")
            try:
                self.works = _lock(self._file)  # False where the file system has no locks
            except OSError:
                self._file.close()
                raise
            if os.name == "nt" or _is_open_file(path, self._file):
                return
            self._file.close()  # whoever had it locked has removed it meanwhile

    def release(self) -> None:
        """Let go, and remove the file."""
        if os.name == "nt":  # where an open file can't be removed
            self._file.close()
        with suppress(OSError):
            self._path.unlink()
        self._file.close()


def _is_open_file(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed; False where the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _LOCKED:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has locked it", file.name) from None
        if error.errno not in _NOT_SUPPORTED:
            raise OSError(error.errno, error.strerror, file.name) from None
        return False
    return True

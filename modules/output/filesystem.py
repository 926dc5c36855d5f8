"""Functions of file systems: locks, mount points, syncing.

Knows: files, folders, the system's error codes. Refuses to know: the purpose of any file.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from modules.runtime.errors import naming

# Error codes that mean "this file system does not have that", not "that failed".
_NOT_SUPPORTED = (
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY),
    *(errno.EPERM, errno.EACCES, errno.EISDIR, errno.EBADF),
)
_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)

Stamp = tuple[int, int, int] | None  # identifies a file: device, inode, time of change; None if there is no file


def stamp_of(file: Path) -> Stamp:
    """The stamp of the file at a path; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def sync(path: Path) -> None:
    """Write a file's content, or a folder's list of files, to the disk, if the file system can do that.

    Raises OSError, naming the path, if that fails.
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
    """Whether a path can't be replaced: a volume, or a single file or folder that is mounted into a container."""
    if os.path.ismount(path):
        return True
    with suppress(OSError):  # the system does not list its mounts
        return any(mount.mountpoint == str(path) for mount in psutil.disk_partitions(all=True))
    return False


class Lock:
    """A locked file that exists as long as the lock is held. The end of the process, even a kill, releases the lock."""

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
            self._file.close()  # the earlier holder of the lock has removed the file meanwhile

    def release(self) -> None:
        """Release the lock, and remove the file."""
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

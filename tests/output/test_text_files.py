"""Files that somebody asked for: what is no plain file stays what it is, and a plain one is whole or as it was."""

import errno
import os
import signal
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from modules.output import filesystem, text_files
from modules.output.text_files import check_file, write_text
from modules.runtime.errors import ConfigError


def write(path, text, overwrite=False):
    """As a program does it."""
    check_file("--json", path, overwrite)
    write_text(path, text)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


NO_FILES = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("real")), path.symlink_to("real")),
    "a link to a device": lambda path: path.symlink_to("/dev/null"),
    "a folder": Path.mkdir,
    "a link to a folder": lambda path: path.symlink_to("."),
    "a link round in a circle": lambda path: path.symlink_to(path.name),
    "a link into no folder": lambda path: path.symlink_to("absent/file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_plain_file_is_refused_and_stays(place, kind):
    path = place / "it"
    NO_FILES[kind](path)
    before, names = os.lstat(path), sorted(os.listdir())
    with pytest.raises(ConfigError, match=r"^--json .*it: "):
        check_file("--json", path, overwrite=True)
    if kind != "a link into no folder":  # it may have come to be meanwhile
        with pytest.raises(OSError) as caught:
            write_text(path, "new")
        assert caught.value.filename == str(path)
    after = os.lstat(path)
    assert (after.st_ino, stat.S_IFMT(after.st_mode)) == (before.st_ino, stat.S_IFMT(before.st_mode))
    assert sorted(os.listdir()) == names


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("links", [["real/file"], ["other", "real/file"]])
def test_a_link_stays_and_what_it_leads_to_is_written(place, links, old):
    (place / "real").mkdir()
    if old:
        (place / "real/file").write_text(old)
        with pytest.raises(ConfigError, match="this file exists"):
            check_file("--json", place / "real/file", overwrite=False)
    for name, target in zip(["it", *links], links, strict=False):
        (place / name).symlink_to(target)
    write(place / "it", "new", overwrite=bool(old))
    assert (place / "it").is_symlink() and not (place / "real/file").is_symlink()
    assert (place / "real/file").read_text() == (place / "it").read_text() == "new"
    assert os.listdir("real") == ["file"]


def in_a_child(work):
    """The exit code of a child process that does some work; negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except ConfigError:
        os._exit(2)
    finally:
        os._exit(1)


def test_a_file_that_is_mounted_by_itself_is_refused_before_the_work(place, monkeypatch):
    (place / "it").write_text("old")
    mounts = [SimpleNamespace(mountpoint="/"), SimpleNamespace(mountpoint=str(place / "it"))]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    with pytest.raises(ConfigError, match="a mount point"):
        check_file("--json", place / "it", overwrite=True)
    check_file("--json", place / "other", overwrite=True)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(place, monkeypatch):
    (place / "it").write_text("old")
    calls, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.readlink(f"/proc/self/fd/{number}")))

    def replaced(self, target):
        calls.append(("replace", self.read_text(), target.read_text()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    write(place / "it", "new", overwrite=True)
    partial, renaming, folder = calls
    assert Path(partial).name.startswith(".it.partial") and renaming == ("replace", "new", "old")
    assert folder == str(place)


@pytest.mark.parametrize("how", ["write", "fsync", "replace", "folder"])
def test_an_error_names_the_file_and_leaves_it_as_it_was(place, monkeypatch, how):
    (place / "it").write_text("old")

    def fail(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    if how == "write":
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda self, *_, **__: opened(Path("/dev/full"), "w"))
    elif how == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        calls = []
        monkeypatch.setattr(os, "fsync", lambda _: calls.append(1) if how == "folder" and not calls else fail())
    with pytest.raises(OSError) as caught:
        write_text(place / "it", "new")
    monkeypatch.undo()
    assert caught.value.filename == str(place / "it") and caught.value.errno in (errno.EIO, errno.ENOSPC)
    assert (place / "it").read_text() == ("new" if how == "folder" else "old") and os.listdir(place) == ["it"]


def test_a_run_that_is_killed_while_it_writes(place):
    (place / "it").write_text("old")

    def work():
        text_files.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        write_text(Path("it"), "new")

    assert in_a_child(work) == -signal.SIGKILL
    assert (place / "it").read_text() == "old" and len(os.listdir()) == 2
    write(place / "it", "new", overwrite=True)
    assert (place / "it").read_text() == "new" and os.listdir() == ["it"]


def test_a_lock_that_the_system_can_not_give_is_an_error_and_a_lack_of_locks_is_none(place, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def answer(number):
        def flock(*_arguments):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    answer(errno.EIO)
    with pytest.raises(OSError) as caught:
        filesystem.Lock(place / "lock")
    assert caught.value.filename == str(place / "lock")
    answer(errno.EWOULDBLOCK)
    with pytest.raises(BlockingIOError) as caught:
        filesystem.Lock(place / "lock")
    assert caught.value.filename == str(place / "lock")
    answer(errno.ENOLCK)
    assert not filesystem.Lock(place / "lock").works

"""The place of an output: where it is written, who may write there, and how it takes its place.

Knows: folders, renames, locks, what a file system can do. Refuses to know: models, what is in an output's files.

What is being written has an UNFINISHED file. It takes its place in a few renames, and what stood there before goes
last. The names that are there tell every state in which a run may have been killed; `recover` goes on from it:

    Beside                            then there is              recover
      1  output -> before             before, partial            before -> output
      2  partial -> output            before, output             removes UNFINISHED
      3  UNFINISHED removed           before, output             nothing
      4  before removed               output                     nothing

    Inside                            then there is              recover
      1  each old file -> before      before, partial            each file of before -> output
      2  partial -> new               before, new                goes on with 3
      3  each file of new -> output   before, new                goes on with 3
      4  new removed                  before                     nothing
      5  before removed                                          nothing
"""

import errno
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modules.config import partial_of, real_path
from modules.output.filesystem import Lock, has_locks, has_rights, sync
from modules.runtime import ConfigError, naming

SETTINGS_FILE = "merge_monster.yaml"  # in every output: the configuration that made it
UNFINISHED = "merge_monster_unfinished.txt"  # in a folder that is no output yet
_ABOUT_IT = (
    "Merge Monster has not finished this output. The command that began it goes on with --resume and begins again\n"
    "with --restart.\n"
)
_OWN = "-merge-monster"  # at the end of every hidden name
_OF_THE_DISK = "lost+found"  # what a fresh volume has


class Place(ABC):
    """An output's folder and the names that a run uses beside it or in it."""

    partial: Path  # where the output is written until it is complete
    before: Path  # what stood there, while the new output takes its place
    parts: list[Path]  # that hold, or held, the old output or the new one while it takes its place

    def __init__(self, output: Path, folder: Path, prefix: str) -> None:
        """output: a resolved path. folder: of the hidden names. prefix: with which each of these begins."""
        self.output, self.folder, self._prefix = output, folder, prefix
        self.before = self.hidden("before")

    def hidden(self, what: str) -> Path:
        """A name for something of ours."""
        return self.folder / f"{self._prefix}{what}{_OWN}"

    @abstractmethod
    def take(self) -> None:
        """Make what is in `partial` the output. What stood there is in `before` then. Raises OSError."""

    @abstractmethod
    def recover(self) -> None:
        """Finish, or take back, a `take` that did not come to its end, if there is one. Nothing is deleted but what is
        empty.

        Raises ConfigError, naming what lies where, if something else has come to be in the output's place; OSError.
        """

    def contents(self) -> list[Path]:
        """What is in the output's folder, but for what is ours and what belongs to the disk."""
        if not self.output.is_dir():
            return []
        return sorted({*self.output.iterdir()} - {*self.output.glob(f".*{_OWN}"), self.output / _OF_THE_DISK})

    def mark(self) -> None:
        """Mark the folder in which the output is written as such. Raises OSError."""
        file = self.partial / UNFINISHED
        with naming(file):
            file.write_text(_ABOUT_IT, encoding="utf-8")

    def discard(self) -> list[str]:
        """Delete what stood there before, as far as that can be done; a line for each folder that is left of it.

        Under another name first: from then on it is nobody's output.
        """
        lines, old = [], [self.before] if self.before.is_dir() else []
        pattern = rf"{re.escape(self._prefix)}(old-\d+|try-\w+){_OWN}"
        with suppress(OSError):  # if they can't be listed now, the next run removes them
            old += sorted(path for path in self.folder.iterdir() if re.fullmatch(pattern, path.name))
        names = (name for number in range(1, 10_000) if not (name := self.hidden(f"old-{number}")).exists())
        for folder in old:
            try:
                folder = folder.rename(next(names)) if folder == self.before else folder
                shutil.rmtree(folder)
            except OSError as error:
                reason = error.strerror or error
                lines.append(
                    f"{folder} is left of an earlier output and can't be removed ({reason}); delete it by hand"
                )
        return lines

    def lacks(self) -> list[str]:
        """What the file system can't do and a run can do without, a line each; found by trying it on a small folder.

        Raises OSError for what a run can't do without.
        """
        trial = self.trial(self.nearest)
        try:
            (trial / "old").mkdir()
            file = trial / "old" / "file"
            file.write_bytes(b"x")
            tries = (
                (sync(file) and sync(trial), "can't make sure of what is written: a power cut may lose it"),
                (has_rights(file), "has no rights of files: who may read the output is up to it"),
                (has_locks(file), "has no locks: see to it that no two runs write to this output at a time"),
            )
            (trial / "old").rename(trial / "new")
            return [f"the file system of {self.folder} {what}" for can, what in tries if not can]
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def trial(self, folder: Path) -> Path:
        """Make a folder of ours in another one, to try something. `discard` removes those that were left."""
        return Path(tempfile.mkdtemp(prefix=f"{self._prefix}try-", suffix=_OWN, dir=folder))

    @property
    def nearest(self) -> Path:
        """The folder of our names or, as long as it is not there, the nearest one above it that is."""
        return next(path for path in (self.folder, *self.folder.parents) if path.exists())

    @contextmanager
    def locked(self, needed: bool = True) -> Iterator[bool]:
        """Nobody else writes to this output within the block; yields whether that is so.

        needed: raise ConfigError if another run writes there, or nothing can be written there.
        """
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        lock = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.hidden("lock"))
        except OSError as error:
            if needed:
                taken = f"{self.output}: another run is writing here; wait for it, or name another output"
                raise ConfigError(taken if isinstance(error, BlockingIOError) else self.refusal(error)) from None
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()
            for folder in missing:
                with suppress(OSError):  # there is something in it now
                    folder.rmdir()

    def settle(self, delete: bool = True) -> list[str]:
        """Put right what a run has left that was killed while its output took its place; lines about what is left.

        delete: remove what stood there before. Only while `locked`. Raises ConfigError if it can't be put right.
        """
        try:
            self.recover()
            return self.discard() if delete and self.folder.is_dir() else []
        except OSError as error:
            parts = ", ".join(str(path) for path in self.parts if path.exists())
            raise ConfigError(
                f"a run was killed while its output took its place at {self.output}, and that can't be finished "
                f"({error.filename}: {error.strerror}); there is {parts}. Once that is mended, this command finishes it"
            ) from None

    def refusal(self, error: OSError) -> str:
        """Why nothing can be written here, and what to do."""
        return (
            f"the output directory {self.output} can't be written: nothing can be made in {self.nearest} "
            f"({error.strerror or error}); name another one with --output"
        )


class Beside(Place):
    """The usual case: the output is a folder that can be renamed."""

    def __init__(self, output: Path) -> None:
        super().__init__(output, output.parent, f".{output.name}.")
        self.partial = partial_of(output)
        self.parts = [output, self.before, self.partial]

    def take(self) -> None:
        """See Place."""
        if self.output.exists():
            self.output.rename(self.before)
        self.partial.rename(self.output)
        sync(self.folder)
        self._end()

    def recover(self) -> None:
        """See Place."""
        if self.before.is_dir():
            if self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()  # made since by somebody who missed it
            if not self.output.exists():
                self.before.rename(self.output)
                sync(self.folder)
            elif not holds_output(self.output):
                raise ConfigError(
                    f"{self.before} is the output that stood at {self.output} when a run was killed, and {self.output} "
                    "has come to hold something else: move that away, and this command puts the output back"
                )
        self._end()

    def _end(self) -> None:
        with suppress(OSError):  # it does no harm in an output
            (self.output / UNFINISHED).unlink()


class Inside(Place):
    """The output is a folder that can't be renamed: a mount point, or one whose parent can't be written."""

    def __init__(self, output: Path) -> None:
        super().__init__(output, output, ".")
        self.partial, self.new = self.hidden("partial"), self.hidden("new")
        self.parts = [output, self.before, self.new, self.partial]

    def take(self) -> None:
        """See Place."""
        old = self.contents()
        if old:
            self.before.mkdir()
            _move(old, self.before)
        self.partial.rename(self.new)
        self._move_in()

    def recover(self) -> None:
        """See Place."""
        if self.new.is_dir():
            self._move_in()
        elif self.before.is_dir() and self.partial.is_dir():
            _move(self.before.iterdir(), self.output)
            self.before.rmdir()
            sync(self.output)

    def _move_in(self) -> None:
        _move((path for path in self.new.iterdir() if path.name != UNFINISHED), self.output)
        sync(self.output)
        with suppress(OSError):  # it does no harm
            (self.new / UNFINISHED).unlink()
            self.new.rmdir()


def place_of(output: Path) -> Place:
    """The place of an output, by what its file system allows and where an earlier run has left something."""
    output = output.resolve()
    beside, inside = Beside(output), Inside(output)
    if any(path.is_dir() for path in inside.parts[1:]) or os.path.ismount(output):
        return inside
    if beside.before.is_dir() or not output.is_dir() or (inside.contents() and not holds_output(output)):
        return beside
    return beside if _can_leave(beside, inside) else inside


def _can_leave(beside: Beside, inside: Inside) -> bool:
    """Whether what is in the output can be moved beside it: not out of a mount point, nor where nothing can be made."""
    trial = None
    try:
        trial = inside.trial(inside.output)
        trial = trial.rename(beside.hidden(trial.name[1:].removesuffix(_OWN)))
    except OSError:
        return trial is None  # nothing can be made within: then beside is no worse
    finally:
        if trial is not None:
            trial.rmdir()
    return True


def written_paths(output: Path) -> list[Path]:
    """What a run may make, replace or delete for an output."""
    beside = Beside(real_path(output))
    return [output, beside.partial, beside.before, beside.hidden("lock")]


def holds_output(folder: Path) -> bool:
    """Whether a folder is an output of ours."""
    return (folder / SETTINGS_FILE).is_file()


def _move(paths: Iterable[Path], folder: Path) -> None:
    """Move files and folders into another folder. Raises FileExistsError before it would replace anything."""
    for path in sorted(paths):
        target = folder / path.name
        if target.exists() or target.is_symlink():
            raise FileExistsError(errno.EEXIST, "is in the way", str(target))
        path.rename(target)

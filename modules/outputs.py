"""The output directory: written beside its place, kept if the run breaks off, in place only when it is complete.

Knows: folders, renames, what may be deleted. Refuses to know: what is in the files.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modules.config import ConfigError
from modules.journal import JOURNAL_FILE, Journal
from modules.weights import CheckpointError

SETTINGS_FILE = "merge_monster.yaml"  # in every output: the configuration that made it

# An old output stands here while the new one takes its place.
_ASIDE = ".{name}.before-merge-monster"


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raise ConfigError if writing `output` would destroy an input, or anything else that is already there."""
    _put_back(output)
    resolved = output.resolve()
    for path in inputs:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            what = "is" if resolved == path.resolve() else "contains"
            raise ConfigError(f"the output directory {output} {what} the input model {path}; choose another one")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output directory {output} is a file")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"the output directory {output} is not empty; move it, name another, or add --overwrite")
    if not (output / SETTINGS_FILE).is_file():
        raise ConfigError(
            f"{output} was not written by Merge Monster (no {SETTINGS_FILE}); --overwrite won't delete it"
        )
    if resolved == Path.cwd().resolve() or resolved in Path.cwd().resolve().parents:
        raise ConfigError(f"the output directory {output} is, or contains, the folder you are in; choose another one")


_PARTIAL = ".partial"  # behind an output's name until it is complete


def partial_folder(output: Path) -> Path:
    """Where an output is written until it is complete: beside its final place, on the same file system."""
    return output.with_name(output.name + _PARTIAL)


def final_name(folder: Path) -> str:
    """What an output will be called that is being written in a partial folder."""
    return folder.name.removesuffix(_PARTIAL)


def kept_progress(output: Path) -> str:
    """What there is to say, after a run has broken off, about the output and how to go on."""
    nothing = f"Nothing was written to {output}."
    if not (partial_folder(output) / JOURNAL_FILE).is_file():
        return nothing
    kept = f"What was decided so far is kept in {partial_folder(output)}"
    return f"{nothing} {kept}: the same command with --resume goes on from there, with --restart begins again."


class Unfinished:
    """An output that is being written, and the run's journal beside what is written."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self.journal = folder, journal

    def clear(self) -> None:
        """Remove what an earlier attempt at saving has left; the journal stays."""
        for path in self.folder.iterdir():
            if path.name != JOURNAL_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def take_place(self, output: Path, overwrite: bool) -> None:
        """Make this the output, all at once; an older one goes only after this one stands.

        Raises CheckpointError if it can't be done; the journal then stays.
        """
        try:
            for path in [*self.folder.rglob("*"), self.folder]:
                _sync(path)
            self.journal.close()
            if not self.journal.records:
                self.journal.path.unlink()
            if output.is_dir() and any(output.iterdir()) and not overwrite:
                raise CheckpointError(f"{output} has come to be meanwhile; move it away and go on with --resume")
            _replace_folder(self.folder, output.resolve())
            _sync(output.resolve().parent)
        except OSError as error:
            raise CheckpointError(f"{output} can't be put into its place ({error.strerror})") from None


@contextmanager
def unfinished_output(output: Path, resume: bool, restart: bool) -> Iterator[Unfinished]:
    """The folder in which an output is written, with its journal.

    What an earlier run has decided is there, if `resume`, or has been removed, if `restart`. If the block ends with an
    error, the folder stays as soon as it has a decision; without one it is removed. Raises ConfigError if another run
    is writing here, an earlier one did not finish and neither option was given, or the folder can't be made.
    """
    folder = partial_folder(output.resolve())
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL_FILE).is_file():
        raise ConfigError(f"{folder} was not written by Merge Monster and is in its way; move it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the output directory {output} can't be written ({error.strerror})") from None
    with Journal(folder / JOURNAL_FILE) as journal:
        if journal.of_kind("decision") and not resume and not restart:
            count = len(journal.of_kind("decision"))
            raise ConfigError(
                f"{folder} has {count} decisions of a run that did not finish: add --resume to go on from there, or "
                "--restart to begin again"
            )
        if restart or not journal.of_kind("decision"):
            journal.clear()
        unfinished = Unfinished(folder, journal)
        unfinished.clear()
        try:
            yield unfinished
        except BaseException:
            if not journal.of_kind("decision"):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what stood there goes afterwards, or comes back if the renaming fails."""
    if not target.exists():
        new.rename(target)
        return
    aside = target.with_name(_ASIDE.format(name=target.name))
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _put_back(output: Path) -> None:
    """Mend what a run has left that was killed while one output took the place of another."""
    target = output.resolve()
    aside = target.with_name(_ASIDE.format(name=target.name))
    if aside.is_dir() and target.exists():
        shutil.rmtree(aside)
    elif aside.is_dir():
        aside.rename(target)


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's list of files, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing for folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

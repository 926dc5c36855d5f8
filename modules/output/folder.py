"""The output folder: written aside, put into its place by renames, made whole again after a kill at any time.

Knows: when an output may be written or replaced, the names beside it, what to say of it. Refuses to know: models, what
is in its files.

What is being written lies in OUT.partial, which has an UNFINISHED file. It takes its place by two renames, and what
stood there before goes last. The names that are there tell in which state a run was killed; `recover` goes on from it:

    commit                            then there is              recover
      1  output -> before             before, partial            before -> output
      2  partial -> output            before, output             removes UNFINISHED
      3  UNFINISHED removed           before, output             nothing
      4  before removed               output                     nothing
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modules.config.inputs import real_path
from modules.config.locations import partial_of
from modules.output.filesystem import Lock, Stamp, is_mount_point, stamp_of, sync
from modules.output.journal import JOURNAL_FILE, Journal, open_journal, read_journal
from modules.runtime.console import Console
from modules.runtime.errors import CheckpointError, ConfigError, naming
from modules.runtime.text import pluralize

SETTINGS_FILE = "merge_monster.yaml"  # in every output: the configuration that made it
STATE_FILE = "merge_monster_state.safetensors"  # in one that is learned
UNFINISHED = "merge_monster_unfinished.txt"  # in a folder that is no output yet
_ABOUT_UNFINISHED = (
    "Merge Monster has not finished this output. Run the same command with --resume to continue, or with --restart to\n"
    "start over.\n"
)
_SUFFIX = "-merge-monster"  # of every hidden name


class OutputFolder:
    """An output's folder, and the names that a run uses beside it."""

    def __init__(self, output: Path) -> None:
        self.output = real_path(output)
        self.parent = self.output.parent
        self.partial = partial_of(self.output)  # where the output is written until it is complete
        self.before = self._hidden("before")  # what stood there, while the new output takes its place
        self.lock_file = self._hidden("lock")

    def _hidden(self, name: str) -> Path:
        return self.parent / f".{self.output.name}.{name}{_SUFFIX}"

    def _scratch(self) -> Path:
        """Make a folder that `cleanup` removes."""
        return Path(tempfile.mkdtemp(prefix=f".{self.output.name}.old-", suffix=_SUFFIX, dir=self.parent))

    @contextmanager
    def locked(self) -> Iterator[Lock]:
        """Nobody else writes to this output within the block. Raises ConfigError if another run does, or nothing can be
        written here."""
        missing = [folder for folder in (self.parent, *self.parent.parents) if not folder.exists()]
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.lock_file)
        except BlockingIOError:
            raise ConfigError(
                f"{self.output}: another run is writing here; wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise self._not_writable(error) from None
        try:
            yield lock
        finally:
            lock.release()
            for folder in missing:
                with suppress(OSError):  # there is something in it now
                    folder.rmdir()

    def recover(self) -> None:
        """Finish, or take back, a commit that was broken off. Nothing is deleted but what is empty.

        Raises ConfigError if something else has come to be in the output's place; OSError.
        """
        if self.before.is_dir():
            if self.output.is_dir() and not _has_content(self.output):
                self.output.rmdir()  # made since by somebody who missed it
            if not self.output.exists():
                self.before.rename(self.output)
                sync(self.parent)
            elif not holds_output(self.output):
                raise ConfigError(
                    f"{self.before} holds the earlier output, but {self.output} now contains something else; move that "
                    "away and run this command again to restore the output"
                )
        with suppress(OSError):  # it does no harm in an output
            (self.output / UNFINISHED).unlink()

    def check_renames(self) -> None:
        """Raise ConfigError if no folder can be made and renamed beside the output."""
        try:
            scratch = self._scratch()
            try:
                scratch = scratch.rename(self._hidden("old-renamed"))
            finally:
                scratch.rmdir()
        except OSError as error:
            raise self._not_writable(error) from None

    def mark(self) -> None:
        """Mark the folder in which the output is written as such. Raises OSError."""
        file = self.partial / UNFINISHED
        with naming(file):
            file.write_text(_ABOUT_UNFINISHED, encoding="utf-8")

    def commit(self) -> None:
        """Make what is in `partial` the output. What stood there is in `before` then.

        Raises OSError; everything is then as it was, or `what_stands` tells where it is.
        """
        try:
            if self.output.exists():
                self.output.rename(self.before)
            self.partial.rename(self.output)
            sync(self.parent)
        finally:
            self.recover()

    def cleanup(self) -> list[str]:
        """Delete what stood there before, and what killed runs have left of that; a line for what can't be deleted."""
        old = [self.before]
        pattern = re.compile(re.escape(f".{self.output.name}.old-") + r"\w+" + _SUFFIX)
        try:
            if self.before.is_dir():
                # Under another name first: half deleted, it must never be put back as an output.
                self.before.rename(self._scratch() / "output")
            old = sorted(path for path in self.parent.iterdir() if pattern.fullmatch(path.name))
            for folder in old:
                shutil.rmtree(folder)
        except OSError as error:
            names = ", ".join(str(folder) for folder in old if folder.exists())
            return [f"can't remove an earlier output ({error.strerror}): {names}"]
        return []

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"can't write the output directory {self.output}: no folder can be made in {self.parent} "
            f"({error.strerror or error}); choose another one with --output"
        )


def written_paths(output: Path) -> list[Path]:
    """What a run may make, replace or delete for an output."""
    target = OutputFolder(output)
    return [output, target.partial, target.before, target.lock_file]


def holds_output(folder: Path) -> bool:
    """Whether a folder is an output of ours."""
    return (folder / SETTINGS_FILE).is_file()


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def locked_output(output: Path, console: Console, dry_run: bool = False) -> Iterator[OutputFolder]:
    """The folder of an output, locked, and made whole where an earlier run was killed in its commit.

    dry_run: nothing is deleted. Raises ConfigError if the output can't be written, or another run writes there.
    """
    target = OutputFolder(output)
    if is_mount_point(target.output):
        raise ConfigError(
            f"the output directory {output} is a mount point, which can't be replaced; use a folder in it"
        )
    with target.locked() as lock:
        if not lock.works:
            console.warning(f"the file system of {target.parent} has no locks; make sure that no two runs write here")
        target.recover()
        if not dry_run:
            console.warnings(target.cleanup())
        target.check_renames()
        yield target


def check_output(target: OutputFolder, overwrite: bool) -> None:
    """Raise ConfigError if writing the output would destroy anything that is already there."""
    output = target.output
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output directory {output} is a file")
    if not _has_content(output):
        return
    if not overwrite:
        raise ConfigError(f"the output directory {output} is not empty; move it, choose another, or add --overwrite")
    if not holds_output(output):
        raise ConfigError(
            f"{output} was not written by Merge Monster (no {SETTINGS_FILE}); --overwrite won't delete it"
        )
    working = Path.cwd()
    if output in (working, *working.parents):
        raise ConfigError(f"the output directory {output} is or contains the current folder; choose another one")


@dataclass(frozen=True)
class Unfinished:
    """An output that is being written, and the run's journal beside what is written."""

    target: OutputFolder
    journal: Journal

    @property
    def folder(self) -> Path:
        """In which it is written."""
        return self.target.partial

    def commit(self, overwrite: bool) -> list[str]:
        """Make this the output; an older one goes only after this one stands. Lines about what could not be removed.

        Raises CheckpointError or OSError.
        """
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        self.journal.close()
        if not self.journal.records:
            self.journal.path.unlink()
        output = self.target.output
        if _has_content(output) and not overwrite:
            raise CheckpointError(f"{output} was created during the run; move it away and continue with --resume")
        self.target.commit()
        return self.target.cleanup()


@contextmanager
def unfinished_output(
    target: OutputFolder, resume: bool = False, restart: bool = False, searching: bool = True
) -> Iterator[Unfinished]:
    """The folder in which an output is written, with its journal; the place is locked.

    What an earlier run has decided is there, if `resume`, or has been removed, if `restart`. searching: whether these
    options can be given. If the block, or what precedes it, ends with an error, the folder stays as soon as it has a
    decision; without one it is removed. Raises ConfigError if an earlier run did not finish and neither option was
    given, or the folder can't be made.
    """
    folder = target.partial
    if folder.exists() and not _is_unfinished(folder):
        kind = "is a finished output" if holds_output(folder) else "was not written by Merge Monster"
        raise ConfigError(f"{folder} {kind}, but is in the way of the new one; move it away")
    folder.mkdir(exist_ok=True)
    with closing(open_journal(folder / JOURNAL_FILE, afresh=restart)) as journal:
        if journal.decisions and not resume:
            steps = sum(record["kind"] in ("step", "learned") for record in journal.records)
            progress = pluralize(steps, "step") if steps else pluralize(journal.decisions, "decision")
            advice = "add --resume to continue it, or --restart to start over"
            advice = advice if searching else "finish that search, delete this folder, or choose another --output"
            raise ConfigError(f"{folder} contains an unfinished run ({progress}); {advice}")
        try:
            if not journal.decisions:
                journal.clear()
            target.mark()
            kept = (JOURNAL_FILE, UNFINISHED, *([STATE_FILE] if journal.decisions else []))
            for path in folder.iterdir():
                if path.name not in kept:  # left of an earlier attempt at saving
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield Unfinished(target, journal)
        except BaseException:
            if not journal.decisions:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder with a partial output's name is one; a finished output may be called so too."""
    if not folder.is_dir():
        return False
    unmarked = (folder / JOURNAL_FILE).is_file() and not holds_output(folder)  # killed before it was marked
    return unmarked or (folder / UNFINISHED).is_file() or not _has_content(folder)


def stamp(output: Path) -> Stamp:
    """What tells the output that stands here, or is aside for the moment, from any other one."""
    target = OutputFolder(output)
    return stamp_of(target.output / SETTINGS_FILE) or stamp_of(target.before / SETTINGS_FILE)


def what_stands(output: Path, earlier: Stamp, searching: bool = True) -> str:
    """What there is of an output after a run has broken off, and how to go on. It is looked up.

    earlier: the output's stamp before the run. searching: whether the run could go on with what was decided.
    """
    target = OutputFolder(output)
    if target.before.is_dir() and not holds_output(output):
        text = f"The output is in {target.before}; the next command for {output} moves it back."
    elif holds_output(output) and stamp(output) != earlier:
        text = f"The new output in {output} is complete."
    else:
        text = f"{output} was not changed." if earlier else f"Nothing was written to {output}."
    if searching and read_journal(target.partial / JOURNAL_FILE):
        text += f" The progress is saved in {target.partial}; run the same command with --resume to continue, or with "
        text += "--restart to start over."
    return text

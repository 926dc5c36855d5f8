"""The output folder: written under another name, moved into place by renames, recovered after a kill at any time.

Knows: when an output may be written or replaced, the names beside it, messages about its state. Refuses to know:
models, the contents of its files.

An output is written in OUT.partial, which has an UNFINISHED file. Two renames move it into place; the earlier output is
deleted last. The names that exist show in which state a run was killed; `recover` goes on from it:

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
STATE_FILE = "merge_monster_state.safetensors"  # in the folder of a learning run that is unfinished
UNFINISHED = "merge_monster_unfinished.txt"  # in a folder that is not an output yet
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
        self.before = self._hidden("before")  # the earlier output, while the new one is moved into place
        self.lock_file = self._hidden("lock")

    def _hidden(self, name: str) -> Path:
        return self.parent / f".{self.output.name}.{name}{_SUFFIX}"

    def _scratch(self) -> Path:
        """Make a folder that `cleanup` removes."""
        return Path(tempfile.mkdtemp(prefix=f".{self.output.name}.old-", suffix=_SUFFIX, dir=self.parent))

    @contextmanager
    def locked(self) -> Iterator[Lock]:
        """Lock the output: no other run writes to it within the block. Raises ConfigError if another run has the lock,
        or nothing can be written here."""
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
                with suppress(OSError):  # it is not empty now
                    folder.rmdir()

    def recover(self) -> None:
        """Finish or undo an interrupted commit. Deletes only empty folders and the UNFINISHED file.

        Raises ConfigError if the output's path now contains something else; OSError.
        """
        if self.before.is_dir():
            if self.output.is_dir() and not _has_content(self.output):
                self.output.rmdir()  # somebody has made it since
            if not self.output.exists():
                self.before.rename(self.output)
                sync(self.parent)
            elif not holds_output(self.output):
                raise ConfigError(
                    f"{self.before} holds the earlier output, but {self.output} now contains something else; move that "
                    "away and run this command again to restore the output"
                )
        with suppress(OSError):  # the file is harmless in an output
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
        """Mark the partial folder as unfinished. Raises OSError."""
        file = self.partial / UNFINISHED
        with naming(file):
            file.write_text(_ABOUT_UNFINISHED, encoding="utf-8")

    def commit(self) -> None:
        """Move `partial` to the output, and the earlier output to `before`.

        Raises OSError; then either nothing has changed, or `what_stands` says where the output is.
        """
        try:
            if self.output.exists():
                self.output.rename(self.before)
            self.partial.rename(self.output)
            sync(self.parent)
        finally:
            self.recover()

    def cleanup(self) -> list[str]:
        """Delete the earlier output and those that killed runs left. Returns a warning if some can't be deleted."""
        old = [self.before]
        pattern = re.compile(re.escape(f".{self.output.name}.old-") + r"\w+" + _SUFFIX)
        try:
            if self.before.is_dir():
                # Renamed first: `recover` must never restore a half-deleted output.
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
    """The paths that a run may make, replace or delete for an output."""
    target = OutputFolder(output)
    return [output, target.partial, target.before, target.lock_file]


def holds_output(folder: Path) -> bool:
    """Whether a folder is an output of this program."""
    return (folder / SETTINGS_FILE).is_file()


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def locked_output(output: Path, console: Console, dry_run: bool = False) -> Iterator[OutputFolder]:
    """Lock an output's folder, and recover it if an earlier run was killed in its commit.

    dry_run: delete nothing. Raises ConfigError if the output can't be written, or another run writes there.
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
    """Raise ConfigError if writing the output would destroy existing files without permission."""
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
    """An output that is being written, and the run's journal in the same folder."""

    target: OutputFolder
    journal: Journal

    @property
    def folder(self) -> Path:
        """The folder in which the output is written."""
        return self.target.partial

    def commit(self, overwrite: bool) -> list[str]:
        """Move this to the output; an earlier one is deleted only afterwards. Returns warnings about what could not be
        deleted. Raises CheckpointError or OSError.
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
    """Open the folder in which an output is written, and its journal. The output is locked.

    resume: keep the decisions of an earlier run. restart: remove them. searching: whether the command has these
    options. If the block, or what precedes it, ends with an error, the folder is kept if it has a decision, else
    removed. Raises ConfigError if an earlier run did not finish and neither option was given, or the folder can't be
    made.
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
            kept_names = (JOURNAL_FILE, UNFINISHED, *([STATE_FILE] if journal.decisions else []))
            for path in folder.iterdir():
                if path.name not in kept_names:  # left by an earlier attempt to save
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield Unfinished(target, journal)
        except BaseException:
            if not journal.decisions:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder with a partial output's name is one; a finished output may have such a name, too."""
    if not folder.is_dir():
        return False
    unmarked = (folder / JOURNAL_FILE).is_file() and not holds_output(folder)  # killed before it was marked
    return unmarked or (folder / UNFINISHED).is_file() or not _has_content(folder)


def stamp(output: Path) -> Stamp:
    """The stamp that distinguishes the output here, or in `before`, from any other one."""
    target = OutputFolder(output)
    return stamp_of(target.output / SETTINGS_FILE) or stamp_of(target.before / SETTINGS_FILE)


def what_stands(output: Path, earlier: Stamp, searching: bool = True) -> str:
    """Sentences on the state of an output after an interrupted run, and how to continue. It looks at the files.

    earlier: the output's stamp before the run. searching: whether a run could continue from the decisions.
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

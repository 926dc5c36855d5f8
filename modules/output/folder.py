"""The output of a run: refused where it would destroy something, kept if the run breaks off, looked up when it ends.

Knows: when an output may be written or replaced, what to say of it. Refuses to know: how it takes its place, what is in
its files.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from modules.output.filesystem import Stamp, stamp_of, sync
from modules.output.journal import JOURNAL_FILE, Journal, open_journal, read_journal
from modules.output.places import SETTINGS_FILE, UNFINISHED, Beside, Inside, Place, holds_output, place_of
from modules.runtime import CheckpointError, ConfigError, Console, counted


def check_output(place: Place, overwrite: bool) -> None:
    """Raise ConfigError if writing the output would destroy anything that is already there."""
    output = place.output
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output directory {output} is a file")
    if not place.contents():
        return
    if not overwrite:
        raise ConfigError(f"the output directory {output} is not empty; move it, name another, or add --overwrite")
    if not holds_output(output):
        raise ConfigError(
            f"{output} was not written by Merge Monster (no {SETTINGS_FILE}); --overwrite won't delete it"
        )
    here = Path.cwd()
    if output in (here, *here.parents):
        raise ConfigError(f"the output directory {output} is, or contains, the folder you are in; choose another one")


@contextmanager
def held_place(output: Path, console: Console, dry_run: bool = False) -> Iterator[Place]:
    """The place of an output, locked, and put right where an earlier run was killed while its output took it.

    dry_run: nothing is deleted, and a place where another run writes is left to it. Raises ConfigError if the output
    can't be written, another run writes there, or it can't be put right.
    """
    place = place_of(output)
    with place.locked(needed=not dry_run) as held:
        if held:
            console.warnings(place.settle(delete=not dry_run))
        yield place


class Unfinished:
    """An output that is being written, and the run's journal beside what is written."""

    def __init__(self, place: Place, journal: Journal) -> None:
        self.folder, self.journal, self._place = place.partial, journal, place

    def clear(self) -> None:
        """Remove what an earlier attempt at saving has left; the journal stays."""
        for path in self.folder.iterdir():
            if path.name not in (JOURNAL_FILE, UNFINISHED):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def take_place(self, overwrite: bool) -> list[str]:
        """Make this the output; an older one goes only after this one stands. Lines about what could not be removed.

        Raises CheckpointError if it can't be done: everything is then as it was, or the message names where it is.
        """
        place = self._place
        try:
            for path in [*self.folder.rglob("*"), self.folder]:
                sync(path)
            self.journal.close()
            if not self.journal.records:
                self.journal.path.unlink()
            if place.contents() and not overwrite:
                raise CheckpointError(f"{place.output} has come to be meanwhile; move it away and go on with --resume")
            place.take()
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            try:
                place.settle(delete=False)
            except ConfigError as worse:
                raise CheckpointError(str(worse)) from None
            if self.folder.exists():
                raise CheckpointError(f"{place.output} can't be put into its place ({what})") from None
            return [f"the new output stands, but it is not sure that the disk has it ({what})"]
        return place.discard()


@contextmanager
def unfinished_output(
    place: Place, resume: bool = False, restart: bool = False, searching: bool = True
) -> Iterator[Unfinished]:
    """The folder in which an output is written, with its journal. The place is locked, and settled.

    What an earlier run has decided is there, if `resume`, or has been removed, if `restart`. searching: whether these
    options can be given. If the block, or what precedes it, ends with an error, the folder stays as soon as it has a
    decision; without one it is removed. Raises ConfigError if an earlier run did not finish and neither option was
    given, or the folder can't be made.
    """
    folder = place.partial
    if folder.exists() and not _is_unfinished(folder):
        what = "is a finished output" if holds_output(folder) else "was not written by Merge Monster"
        raise ConfigError(f"{folder} {what} and is in its way; move it")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(place.refusal(error)) from None
    with closing(open_journal(folder / JOURNAL_FILE, afresh=restart)) as journal:
        if journal.decisions and not resume:
            advice = "add --resume to go on from there, or --restart to begin again"
            advice = advice if searching else "finish that search, delete this folder, or name another --output"
            raise ConfigError(f"{folder} holds an unfinished run ({_progress(journal)}): {advice}")
        try:
            if not journal.decisions:
                journal.clear()
            place.mark()
            unfinished = Unfinished(place, journal)
            unfinished.clear()
            yield unfinished
        except BaseException:
            if not journal.decisions:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _progress(journal: Journal) -> str:
    """How far a run has come: a joint search has made steps, of which it is known how many there will be."""
    made = sum(record["kind"] == "step" for record in journal.records)
    if not made:
        return counted(journal.decisions, "decision")
    wanted = None
    with suppress(KeyError, TypeError):  # of a beginning that is damaged
        wanted = journal.records[0]["settings"]["joint"]["steps"]
    return f"{made} of {wanted} steps" if isinstance(wanted, int) else counted(made, "step")


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder with a partial output's name is one: marked as such or, as before there were marks, with a
    journal and nothing of a finished output. A finished output may be called so too."""
    if not folder.is_dir():
        return False
    marked = (folder / UNFINISHED).is_file()
    return marked or not any(folder.iterdir()) or ((folder / JOURNAL_FILE).is_file() and not holds_output(folder))


def stamp(output: Path) -> Stamp:
    """What tells the output that stands here, or is aside for the moment, from any other one."""
    folders = (output, *(place.before for place in _places(output)))
    return next((found for folder in folders if (found := stamp_of(folder / SETTINGS_FILE))), None)


def what_stands(output: Path, earlier: Stamp, searching: bool = True) -> str:
    """What there is, after a run has broken off, at the output's place, and how to go on. It is looked up.

    earlier: the output's stamp before the run. searching: whether the run could go on with what was decided.
    """
    places = _places(output)
    half = [path for place in places for path in place.parts if path.is_dir() and path.name.startswith(".")]
    kept = [place.partial for place in places if searching and read_journal(place.partial / JOURNAL_FILE)]
    if half and (len(half) > 1 or not holds_output(output)):
        text = f"The output is in {' and '.join(map(str, half))}: the next command for {output} puts it into its place."
    elif holds_output(output) and stamp(output) != earlier:
        text = f"A whole new output stands in {output}."
    else:
        text = f"Nothing was written to {output}" + (": what stood there still does." if earlier else ".")
    if kept:
        text += f" What was decided so far is kept in {kept[0]}: the same command with --resume goes on from there, "
        text += "with --restart begins again."
    return text


def _places(output: Path) -> tuple[Place, Place]:
    """Both places that an output may have."""
    output = output.resolve()
    return Beside(output), Inside(output)

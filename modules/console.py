"""What the person at the terminal sees, and the log file that keeps it.

Knows: lines, the log, colours, one progress bar, what a quiet run shows. Refuses to know: what the lines mean.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from modules.config import ConfigError, shortened

LOGS = Path("logs")  # in the folder in which the program is started

BANNER = r"""
        ,-.         ,-.
       ( o )=======( o )     M E R G E
        `-'  _____  `-'      M O N S T E R
         \  |V V V|  /
          \ |     | /        it eats fine-tunes,
           \|A_A_A|/         one layer at a time
"""


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # what `coloured` puts around a text
_RED_TO_GREEN = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82, 46)  # of the 256 colours that terminals share


def coloured(text: str, share: float) -> str:
    """Text that a terminal shows in red (share 0) to green (share 1); the log has it plain."""
    colour = _RED_TO_GREEN[round(min(max(share, 0.0), 1.0) * (len(_RED_TO_GREEN) - 1))]
    return f"\x1b[38;5;{colour}m{text}\x1b[0m"


def show_any_character() -> None:
    """A terminal without Unicode shows "?" for what it can't show, rather than ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class Progress:
    """How far a run is, and about how long the rest will take: as long as its steps take at the speed so far."""

    def __init__(self, bar: tqdm) -> None:
        """bar: shows it. Its steps are in any unit that is proportional to time."""
        self._bar = bar

    def update(self, steps: float = 1) -> None:
        """So many steps more are done."""
        self._bar.update(steps)

    def skip(self, steps: float) -> None:
        """Before any others: so many steps that say nothing of the speed to come. The clock begins after them."""
        self._bar.initial = self._bar.n = self._bar.n + steps
        self._bar.unpause()
        self._bar.refresh()

    def left(self, steps: float) -> None:
        """So many steps are left, whatever was expected."""
        self._bar.total = self._bar.n + steps
        self._bar.refresh()

    def tell(self, state: str) -> None:
        """What is shown beside the bar from now on."""
        self._bar.set_postfix_str(state)


class Console:
    """Prints lines above the progress bar and appends each to the log at once, so that a crash loses nothing."""

    def __init__(self, name: str, folder: Path = LOGS, quiet: bool = False) -> None:
        """Open logs/<name>-YYYYmmdd_HHMMSS.txt. Raises ConfigError if it can't be written.

        quiet: only warnings, errors and the last line are seen; the log has everything all the same.
        """
        self._quiet = quiet
        # https://no-color.org: any value but an empty one
        self._in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        stamp = f"{datetime.now():%Y%m%d_%H%M%S}"
        try:
            folder.mkdir(exist_ok=True)
            self.log_path = _unused(folder, f"{name}-{stamp}")
            self._log = self.log_path.open("x", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"the log can't be written to {folder.resolve()} ({error.strerror})") from None

    def line(self, text: str = "") -> None:
        """Print to standard output and to the log; in colour on a terminal, unless NO_COLOR is set."""
        if not self._quiet:
            self._show(text)
        self._record(text)

    def lines(self, texts: Sequence[str], logged: Sequence[str] | None = None) -> None:
        """Print several lines. logged: what the log gets in their place."""
        for text in texts if not self._quiet else ():
            self._show(text)
        for text in texts if logged is None else logged:
            self._record(text)

    def warning(self, text: str) -> None:
        """A line that is seen in a quiet run too."""
        self._show(f"WARNING: {text}")
        self._record(f"WARNING: {text}")

    def warnings(self, texts: Iterable[str]) -> None:
        """Several of them."""
        for text in texts:
            self.warning(text)

    def error(self, text: str) -> None:
        """Print to standard error and to the log."""
        tqdm.write(text, file=sys.stderr)
        self._record(text)

    def timed(self, text: str) -> None:
        """A line with the time of day before it."""
        self.line(_timed(text))

    def final(self, text: str) -> None:
        """The last line, with the time of day before it; it is seen in a quiet run too."""
        timed = _timed(text)
        self._show(timed)
        self._record(timed)

    @contextmanager
    def progress(self, steps: float) -> Iterator[Progress]:
        """One bar for the whole run, on a terminal only; `steps` are in any unit that is proportional to time."""
        layout = "{percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} to go{postfix}"
        # smoothing: the speed is that of all steps. Of the last ones alone it would jump with every candidate.
        with tqdm(
            total=steps, bar_format=layout, dynamic_ncols=True, disable=self._no_bars, smoothing=0, miniters=0
        ) as bar:
            yield Progress(bar)

    def download(self, name: str, size: int) -> tqdm:
        """A bar for what comes from the hub meanwhile, `size` bytes; on a terminal only."""
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}, {remaining} to go]"
        return tqdm(
            total=size,
            desc=f"Downloading {shortened(name)}",
            bar_format=layout,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=self._no_bars,
            leave=False,
        )

    def ending(self, text: str) -> None:
        """Why a run ends that is not at fault itself: it was told to, or another process has ended."""
        self.error(text)

    def heard(self) -> None:
        """Answer the first Ctrl-C. It may come in the middle of a line: this goes past everything that is buffered."""
        os.write(2, b"\nEnding after this decision; once more to end at once.\n")

    @property
    def _no_bars(self) -> bool | None:
        return True if self._quiet else None  # None leaves it to tqdm: none but on a terminal

    def _show(self, text: str) -> None:
        tqdm.write(text if self._in_colour else _COLOURS.sub("", text), file=sys.stdout)
        sys.stdout.flush()

    def _record(self, text: str) -> None:
        self._log.write(_COLOURS.sub("", text) + "\n")
        self._log.flush()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()


class Silent(Console):
    """Of a process that does not lead: only its own errors are seen, and no log is written."""

    def __init__(self, number: int) -> None:
        """number: the process's."""
        self._quiet, self._number = True, number
        self.log_path = Path(os.devnull)

    def error(self, text: str) -> None:
        """Print to standard error, with the process's number."""
        print(f"[process {self._number}] {text}", file=sys.stderr)

    def ending(self, text: str) -> None:
        """Nothing: the process that leads says it."""

    def heard(self) -> None:
        """Nothing."""

    def _show(self, text: str) -> None:
        """Nothing."""

    def _record(self, text: str) -> None:
        """Nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is no log to be closed."""


def _timed(text: str) -> str:
    return f"{datetime.now():%H:%M:%S} - {text}"


def _unused(folder: Path, stem: str) -> Path:
    """A file that does not exist yet: two runs may start in one second."""
    names = [stem] + [f"{stem}-{number}" for number in range(2, 100)]
    return next(path for path in (folder / f"{name}.txt" for name in names) if not path.exists())

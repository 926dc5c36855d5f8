"""What the person at the terminal sees, and the log file that keeps it.

Knows: lines, the log, colours, one progress bar. Refuses to know: what the lines mean.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from modules.config import ConfigError

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


class Console:
    """Prints lines above the progress bar and appends each to the log at once, so that a crash loses nothing."""

    def __init__(self, name: str, folder: Path = Path("logs")) -> None:
        """Open logs/<name>-YYYYmmdd_HHMMSS.txt. Raises ConfigError if it can't be written."""
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
        plain = _COLOURS.sub("", text)
        tqdm.write(text if self._in_colour else plain, file=sys.stdout)
        sys.stdout.flush()
        self._record(plain)

    def lines(self, texts: Iterable[str]) -> None:
        """Print several lines."""
        for text in texts:
            self.line(text)

    def error(self, text: str) -> None:
        """Print to standard error and to the log."""
        tqdm.write(text, file=sys.stderr)
        self._record(text)

    def timed(self, text: str) -> None:
        """A line with the time of day before it."""
        self.line(f"{datetime.now():%H:%M:%S} - {text}")

    @contextmanager
    def progress(self, steps: float) -> Iterator[tqdm]:
        """One bar for the whole run, on a terminal only; `steps` are in any unit that is proportional to time."""
        layout = "{l_bar}{bar}| {elapsed} elapsed, {remaining} to go"
        with tqdm(total=steps, bar_format=layout, dynamic_ncols=True, disable=None, smoothing=0.1) as bar:
            yield bar

    def download(self, name: str, size: int) -> tqdm:
        """A bar for what comes from the hub meanwhile, `size` bytes; on a terminal only."""
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}, {remaining} to go]"
        return tqdm(
            total=size,
            desc=f"Downloading {name}",
            bar_format=layout,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,
            leave=False,
        )

    def ending(self, text: str) -> None:
        """Why a run ends that is not at fault itself: it was told to, or another process has ended."""
        self.error(text)

    def heard(self) -> None:
        """Answer the first Ctrl-C. It may come in the middle of a line: this goes past everything that is buffered."""
        os.write(2, b"\nEnding after this decision; once more to end at once.\n")

    def _record(self, text: str) -> None:
        self._log.write(text + "\n")
        self._log.flush()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()


class Quiet(Console):
    """Of a process that does not lead: only its own errors are seen, and no log is written."""

    def __init__(self, number: int) -> None:
        """number: the process's."""
        self._in_colour, self._number = False, number
        self.log_path = Path(os.devnull)

    def line(self, text: str = "") -> None:
        """Nothing."""

    def error(self, text: str) -> None:
        """Print to standard error, with the process's number."""
        print(f"[process {self._number}] {text}", file=sys.stderr)

    def ending(self, text: str) -> None:
        """Nothing: the process that leads says it."""

    @contextmanager
    def progress(self, steps: float) -> Iterator[tqdm]:
        """A bar that is not seen."""
        with tqdm(total=steps, disable=True) as bar:
            yield bar

    def download(self, name: str, size: int) -> tqdm:
        """A bar that is not seen."""
        return tqdm(total=size, disable=True)

    def heard(self) -> None:
        """Nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is no log to be closed."""


def _unused(folder: Path, stem: str) -> Path:
    """A file that does not exist yet: two runs may start in one second."""
    names = [stem] + [f"{stem}-{number}" for number in range(2, 100)]
    return next(path for path in (folder / f"{name}.txt" for name in names) if not path.exists())

"""The output on the terminal, and the log file that keeps it.

Knows: lines, the log, colours, one progress bar, what a quiet run shows. Refuses to know: what the lines mean.

Each text is one line. It may contain names that strangers chose: characters that could move the cursor, end the line or
change the reading direction are escaped.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from modules.runtime.errors import ConfigError, ReaderGone
from modules.runtime.text import shortened

LOGS = Path("logs")  # in the folder in which the program is started

BANNER = r"""
        ,-.         ,-.
       ( o )=======( o )     M E R G E
        `-'  _____  `-'      M O N S T E R
         \  |V V V|  /
          \ |     | /        it eats fine-tunes,
           \|A_A_A|/         one layer at a time
"""

_COLOUR = re.compile(r"(\x1b\[(?:38;5;\d+|0)m)")  # what `coloured` puts around a text
_RED_TO_GREEN = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82, 46)  # of the 256 colours that terminals share


def coloured(text: str, share: float) -> str:
    """Text in a colour from red (share 0) to green (share 1) on a terminal; plain in the log."""
    colour = _RED_TO_GREEN[round(min(max(share, 0.0), 1.0) * (len(_RED_TO_GREEN) - 1))]
    return f"\x1b[38;5;{colour}m{text}\x1b[0m"


# Invisible, but part of the spelling between letters of many scripts, and of emoji.
_JOINER = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")


def visible(text: str) -> str:
    """Text on one line, with control characters, line ends, invisible marks and odd spaces escaped, as in \\x1b, \\n or
    \\u202e."""
    if text.isprintable():
        return text
    joiners = {match.start() for match in _JOINER.finditer(text)}
    shown = []
    for index, character in enumerate(text):
        is_shown = character.isprintable() or index in joiners
        shown.append(character if is_shown else character.encode("unicode_escape").decode("ascii"))
    return "".join(shown)


def open_streams() -> None:
    """Make writing to the terminal safe: a closed stream (>&-) goes nowhere, and a character that a stream can't show
    becomes a "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the file that is opened now gets the free descriptor, 0 to 2
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def show(text: str | None, stream: TextIO) -> OSError | ValueError | None:
    """Print a line above the progress bar; None: only flush the stream. If that fails, the stream shows nothing more,
    and the error is returned."""
    try:
        if text is not None:
            tqdm.write(text, file=stream)
        stream.flush()
    except (OSError, ValueError) as error:  # its reader has ended, its disk is full, it is closed
        with suppress(OSError, ValueError):  # else the program's end would try to write its buffer again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        return error
    return None


def say(text: str) -> OSError | ValueError | None:
    """`show` on standard output. Raises ReaderGone if its reader has ended."""
    error = show(text, sys.stdout)
    if isinstance(error, BrokenPipeError):
        raise ReaderGone
    return error


def hint(text: str) -> None:
    """Show on a terminal what the program is doing; not part of its output."""
    if sys.stderr.isatty():
        show(text, sys.stderr)


class Progress(tqdm):
    """A progress bar with an estimate of the remaining time, at the average speed so far."""

    def skip(self, steps: float) -> None:
        """Count steps that must not affect the speed. They come before all others; the clock starts after them."""
        self.initial = self.n = self.n + steps
        self.unpause()
        self.refresh()

    def left(self, steps: float) -> None:
        """Set the number of remaining steps."""
        self.total = self.n + steps
        self.refresh()

    def tell(self, state: str) -> None:
        """Set the text beside the bar."""
        self.set_postfix_str(state)


class Console:
    """Prints lines above the progress bar and appends each to the log at once, so that a crash loses nothing."""

    def __init__(self, name: str, quiet: bool = False) -> None:
        """Open logs/<name>-YYYYmmdd_HHMMSS.txt. Raises ConfigError if it can't be written.

        quiet: show only warnings, errors and the last line; the log has everything.
        """
        self._quiet = quiet
        # https://no-color.org: any value but an empty one
        self._in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        try:
            LOGS.mkdir(exist_ok=True)
            self.log_path, self._log = _new_log(f"{name}-{datetime.now():%Y%m%d_%H%M%S}")
        except OSError as error:
            raise ConfigError(
                f"can't write the log to {LOGS}{os.sep} ({error.strerror}); start the program in a writable folder"
            ) from None

    def line(self, text: str = "") -> None:
        """Print to standard output and to the log."""
        self.lines([text])

    def lines(self, texts: Sequence[str], logged: Sequence[str] | None = None) -> None:
        """Print several lines. logged: the lines for the log, if they differ."""
        if not self._quiet:
            for text in texts:
                self._show(visible(text))
        for text in texts if logged is None else logged:
            self._record(visible(text))

    def coloured_lines(self, texts: Sequence[str]) -> None:
        """Print lines with texts from `coloured`: in colour on a terminal, unless NO_COLOR is set."""
        for text in texts:
            parts = [part if number % 2 else visible(part) for number, part in enumerate(_COLOUR.split(text))]
            if not self._quiet:
                self._show("".join(parts if self._in_colour else parts[::2]))
            self._record("".join(parts[::2]))

    def warning(self, text: str) -> None:
        """Print a warning, also in a quiet run."""
        self._always(f"WARNING: {text}")

    def warnings(self, texts: Iterable[str]) -> None:
        """Print several warnings."""
        for text in texts:
            self.warning(text)

    def error(self, *texts: str) -> None:
        """Print lines to standard error and to the log."""
        for text in map(visible, texts):
            show(text, sys.stderr)
            self._record(text)

    def bug(self, summary: str, trace: Sequence[str]) -> None:
        """Print one line to standard error; the log has the traceback too."""
        for text in trace:
            self._record(visible(f"    {text}"))
        self.error(f"{summary}; the traceback is in {self.log_path}, please report it")

    def banner(self, text: str) -> None:
        """Print the picture and the first line of a program that merges."""
        self.lines(BANNER.split("\n"))
        self.timed(text)

    def timed(self, text: str) -> None:
        """Print a line with the time of day before it."""
        self.line(_timed(text))

    def final(self, text: str) -> None:
        """Print the last line, with the time of day before it, also in a quiet run."""
        self._always(_timed(text))

    def ask(self, question: str) -> str:
        """The user's answer to a question; empty if the run is quiet, or input or output is no terminal or closed."""
        if self._quiet or not (sys.stdin.isatty() and sys.stdout.isatty()):
            return ""
        self._always(question)
        try:
            answer = input().strip()
        except (EOFError, OSError):
            answer = ""
        self._record(visible(answer))
        return answer

    def progress(self, steps: float) -> Progress:
        """The bar of the whole run, only on a terminal. steps: in any unit that is proportional to time."""
        return Progress(
            total=steps,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} to go{postfix}",
            dynamic_ncols=True,
            disable=self._no_bars,
            smoothing=0,  # the speed of all steps: that of the last ones would jump with every candidate
            miniters=0,
        )

    def download(self, name: str, size: int) -> tqdm:
        """The bar of a download of `size` bytes, only on a terminal."""
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}, {remaining} to go]"
        return tqdm(
            total=size,
            desc=f"Downloading {visible(shortened(name))}",
            bar_format=layout,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=self._no_bars,
            leave=False,
        )

    def ending(self, *texts: str) -> None:
        """Print why a run ends without an error of its own: an interrupt, or another process has ended."""
        self.error(*texts)

    def on_interrupt(self) -> None:
        """Answer the first Ctrl-C. It may come in the middle of a line, so this bypasses all buffers."""
        with suppress(OSError):  # the terminal may be gone, which may be the reason
            os.write(2, b"\nStopping after this step; press Ctrl-C again to stop now.\n")

    @property
    def _no_bars(self) -> bool | None:
        return True if self._quiet else None  # None: tqdm shows bars only on a terminal

    def _always(self, text: str) -> None:
        self._show(visible(text))
        self._record(visible(text))

    def _show(self, text: str) -> None:
        error = say(text)
        if error is not None:
            reason = getattr(error, "strerror", None) or error
            self.error(f"WARNING: can't print any more ({reason}); the run continues, see {self.log_path}")

    def _record(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as error:
            with suppress(OSError):  # closing tries to write the failed line again
                self._log.close()
            self._log = None
            self._show(f"WARNING: can't write to {self.log_path} ({error.strerror}); the log ends here")

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            with suppress(OSError):  # every line is written already
                self._log.close()


class WorkerConsole(Console):
    """The console of a process that is not the main one: it shows only its own errors, and writes no log."""

    def __init__(self, number: int) -> None:
        self._quiet = True
        self._number = number
        self._log = None
        self.log_path = Path(os.devnull)

    def error(self, *texts: str) -> None:
        """Print to standard error, with the process's number."""
        for text in texts:
            show(visible(f"[process {self._number}] {text}"), sys.stderr)

    def bug(self, summary: str, trace: Sequence[str]) -> None:
        """Print the error's origin to standard error; there is no log for the traceback."""
        self.error(f"{summary} ({trace[-2].strip()})" if len(trace) > 1 else summary)

    def ending(self, *texts: str) -> None:
        """Nothing: the main process says it."""

    def on_interrupt(self) -> None:
        """Nothing."""

    def _show(self, text: str) -> None:
        """Nothing."""


class Unlogged(Console):
    """The console before there is a log: it shows only errors. An internal error gets a log for its traceback."""

    def __init__(self, name: str) -> None:
        """name: see Console."""
        self._quiet = True
        self._name = name
        self._log = None

    def bug(self, summary: str, trace: Sequence[str]) -> None:
        """Print one line to standard error; make a log with the traceback."""
        try:
            with Console(self._name) as console:
                console.bug(summary, trace)
        except ConfigError as error:
            self.error(f"{summary}; {error}")


def _timed(text: str) -> str:
    return f"{datetime.now():%H:%M:%S} - {text}"


def _new_log(stem: str) -> tuple[Path, TextIO]:
    """Open a new file: several runs may start in one second. Raises OSError."""
    for number in count(1):
        path = LOGS / (f"{stem}.txt" if number == 1 else f"{stem}-{number}.txt")
        with suppress(FileExistsError):
            return path, path.open("x", encoding="utf-8", errors="backslashreplace")
    raise AssertionError  # there is always another number

"""How a program begins and ends: its imports, the signals that end it, every failure as one message and an exit code.

Knows: which exceptions and signals a program may end in. Refuses to know: what it was doing; torch, which takes seconds
to import.

Ctrl-C, SIGTERM and SIGHUP, which comes when a terminal is closed, all raise KeyboardInterrupt. A signal that was
ignored when the program began, as under nohup or in a script's background, stays ignored.
"""

import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from modules.runtime.console import Console, show
from modules.runtime.errors import CheckpointError, ConfigError, ProcessLost, ReaderGone, first_line
from modules.runtime.oom import is_out_of_memory

LOADING = "Loading PyTorch"  # said before it is imported

_TERMINATION = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SIGNALS = [signal.SIGINT, *_TERMINATION]


@contextmanager
def importing() -> Iterator[None]:
    """What is imported within the block stays, so nobody looks for garbage in it, now or later: that would take a sixth
    of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def exit_code(work: Callable[[], int | None], console: Console, left: Callable[[], str] = lambda: "") -> int:
    """Run `work`: its own code or 0, 1 failed, 2 it can't be done as asked, 130 interrupted by Ctrl-C or a signal, 141
    nobody reads what is shown any more.

    left: is asked, after a failure, what there is and how to go on, in one line; an empty one is not shown.
    """
    try:
        with _handling(_TERMINATION, _interrupt):
            return work() or 0
    except ConfigError as error:
        first, *more = error.args or ("",)
        console.error(f"ERROR: {first}", *map(str, more))
        return 2
    except ProcessLost as error:
        console.ending(f"ERROR: {error}", *_asked(left))
        return 1
    except KeyboardInterrupt:
        console.ending(" ".join(["Interrupted.", *_asked(left)]))
        return 130
    except ReaderGone:  # who has left hears nothing more
        console.lines([], [" ".join(["Stopped: standard output was closed.", *_asked(left)])])
        return 141  # what a shell says of a program that SIGPIPE has ended
    except (GeneratorExit, SystemExit):
        raise
    except BaseException as error:  # a library in Rust that panics raises none that is an Exception
        message = _message_of(error)
        if message is None:
            console.bug(f"ERROR: internal error: {_named(error)}", traceback.format_exc().splitlines())
            console.error(*_asked(left))
        else:
            console.error(f"ERROR: {message}", *_asked(left))
        return 1


def _asked(left: Callable[[], str]) -> list[str]:
    """What is left, if that can be told: whatever has failed before may fail here again."""
    with suppress(Exception):
        return [text for text in [left()] if text]
    return []


def _message_of(error: BaseException) -> str | None:
    """What to say of an error that has its cause outside the program; None for one that has not."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        return f"{files}: {error.strerror}" if files and error.strerror else _named(error)
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("modules"):
        return f"the package {error.name} is not installed: pip install -r requirements.txt"
    return None


def _named(error: BaseException) -> str:
    words = str(error).strip() or "no details"
    return f"{type(error).__name__}: {words.splitlines()[0]}"


def leave(code: int) -> NoReturn:
    """End the program. A reader that is gone, or a Ctrl-C that comes now, is no failure any more."""
    for number in _not_ignored(_SIGNALS):
        signal.signal(number, lambda *_: os._exit(code))
    for stream in (sys.stdout, sys.stderr):
        show(None, stream)
    if code:
        os._exit(code)  # a download that has stalled has threads for which Python would wait
    sys.exit(code)


@contextmanager
def postponed(tell: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Within the block, the first of these signals only tells that it was heard; the next one interrupts.

    Yields a function that raises KeyboardInterrupt if one was heard: it is called where it does no harm to end.
    """
    heard = False

    def hear(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            raise KeyboardInterrupt
        heard = True
        tell()

    def end_if_asked() -> None:
        if heard:
            raise KeyboardInterrupt

    with _handling(_SIGNALS, hear):
        yield end_if_asked


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(signals: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it is interrupted
        return
    before = {number: signal.signal(number, handler) for number in _not_ignored(signals)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _not_ignored(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Those that are not ignored; None stands for a handler that is not Python's, which could not be put back."""
    return [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]

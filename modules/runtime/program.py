"""The start and end of a program: its imports, the signals that end it, a message and an exit code for each failure.

Knows: the exceptions and signals that may end a program. Refuses to know: what the program does; torch, which takes
seconds to import.

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

LOADING = "Loading PyTorch"  # shown before it is imported

_TERMINATION = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SIGNALS = [signal.SIGINT, *_TERMINATION]


@contextmanager
def importing() -> Iterator[None]:
    """Exclude what is imported in the block from garbage collection, now and later: the collection would take a sixth
    of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def exit_code(work: Callable[[], int | None], console: Console, describe_state: Callable[[], str] = lambda: "") -> int:
    """Run `work` and return an exit code: its own or 0; 1: failed; 2: the request can't be fulfilled; 130: interrupted
    by Ctrl-C or a signal; 141: the reader of the output is gone.

    describe_state: after a failure, a line on the state of the output and how to continue; an empty one is not shown.
    """
    try:
        with _handling(_TERMINATION, _interrupt):
            return work() or 0
    except ConfigError as error:
        headline, *details = error.args or ("",)
        console.error(f"ERROR: {headline}", *map(str, details))
        return 2
    except ProcessLost as error:
        console.ending(f"ERROR: {error}", *_state_lines(describe_state))
        return 1
    except KeyboardInterrupt:
        console.ending(" ".join(["Interrupted.", *_state_lines(describe_state)]))
        return 130
    except ReaderGone:  # nothing can be shown any more
        console.lines([], [" ".join(["Stopped: standard output was closed.", *_state_lines(describe_state)])])
        return 141  # a shell's code for a program that SIGPIPE ended
    except (GeneratorExit, SystemExit):
        raise
    except BaseException as error:  # the panic of a Rust library is no Exception
        message = _message_of(error)
        if message is None:
            console.bug(f"ERROR: internal error: {_named(error)}", traceback.format_exc().splitlines())
            console.error(*_state_lines(describe_state))
        else:
            console.error(f"ERROR: {message}", *_state_lines(describe_state))
        return 1


def _state_lines(describe_state: Callable[[], str]) -> list[str]:
    """The description of the state, if it can be made: the cause of the failure may affect it, too."""
    with suppress(Exception):
        return [text for text in [describe_state()] if text]
    return []


def _message_of(error: BaseException) -> str | None:
    """The message for an error with a cause outside the program; None for an internal error."""
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
    """End the program. A reader that is gone, or a Ctrl-C from now on, does not count as a failure."""
    for number in _not_ignored(_SIGNALS):
        signal.signal(number, lambda *_: os._exit(code))
    for stream in (sys.stdout, sys.stderr):
        show(None, stream)
    if code:
        os._exit(code)  # Python would wait for the threads of a stalled download
    sys.exit(code)


@contextmanager
def postponed(tell: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Within the block, the first signal only calls `tell`; the next one interrupts.

    Yields a function that raises KeyboardInterrupt if a signal came: it is called where the program can end safely.
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
    earlier_handlers = {number: signal.signal(number, handler) for number in _not_ignored(signals)}
    try:
        yield
    finally:
        for number, earlier_handler in earlier_handlers.items():
            signal.signal(number, earlier_handler)


def _not_ignored(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """The signals that are not ignored and have a handler of Python's; None means another one, which Python could not
    restore."""
    return [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]

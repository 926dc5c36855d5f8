"""Every failure as one message for the person at the terminal, and an exit code.

Knows: which exceptions a program may end in. Refuses to know: what it was doing; torch, which takes seconds to import.
"""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from modules.runtime.console import Console, show
from modules.runtime.errors import CheckpointError, ConfigError, ProcessLost, ReaderGone, first_line
from modules.runtime.interrupts import end_at_once, termination_interrupts
from modules.runtime.shortage import is_out_of_memory


def exit_code(work: Callable[[], int | None], console: Console, left: Callable[[], str] = lambda: "") -> int:
    """Run `work`: its own code or 0, 1 failed, 2 it can't be done as asked, 130 interrupted by Ctrl-C or a signal, 141
    nobody reads what is shown any more.

    left: is asked, after a failure, what there is and how to go on, in one line; an empty one is not shown.
    """
    try:
        with termination_interrupts():
            return work() or 0
    except ConfigError as error:
        console.error(*_headed(*error.args))
        return 2
    except ProcessLost as error:
        console.ending(*_headed(error, *_found(left)))
        return 1
    except KeyboardInterrupt:
        console.ending(" ".join(["Interrupted.", *_found(left)]))
        return 130
    except ReaderGone:  # who has left hears nothing more, as of other programs
        console.lines([], [" ".join(["Ended: nobody reads any more what is shown.", *_found(left)])])
        return 141  # what a shell says of a program that SIGPIPE has ended
    except (GeneratorExit, SystemExit):
        raise
    except BaseException as error:  # a library in Rust that panics raises none that is an Exception
        message = _foreseen(error)
        if message is None:
            console.bug(f"ERROR: internal error: {_named(error)}", traceback.format_exc().splitlines())
        console.error(*([] if message is None else _headed(message)), *_found(left))
        return 1


def leave(code: int) -> NoReturn:
    """End the program. A reader that is gone, or a Ctrl-C that comes now, is no failure any more."""
    end_at_once(code)
    for stream in (sys.stdout, sys.stderr):
        show(None, stream)
    if code:
        os._exit(code)  # a download that has stalled has threads for which Python would wait
    sys.exit(code)


def _headed(first: object, *more: object) -> list[str]:
    return [f"ERROR: {first}", *map(str, more)]


def _found(left: Callable[[], str]) -> list[str]:
    """What is left, if that can be told: whatever has failed before may fail here again."""
    with suppress(Exception):
        return [text for text in [left()] if text]
    return []


def _foreseen(error: BaseException) -> str | None:
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
    words = str(error).strip() or "nothing more is known"
    return f"{type(error).__name__}: {words.splitlines()[0]}"

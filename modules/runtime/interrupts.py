"""Ctrl-C, SIGTERM and SIGHUP, which comes when a terminal is closed: when a run that is asked to end does so.

Knows: signals. Refuses to know: what is being done meanwhile.

A signal that was ignored when the program began, as under nohup or in a script's background, stays ignored.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_TERMINATION = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SIGNALS = [signal.SIGINT, *_TERMINATION]


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does: they raise KeyboardInterrupt."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(_TERMINATION, interrupt):
        yield


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


def end_at_once(code: int) -> None:
    """From now on, a signal ends the program with this exit code: it is over, and there is nothing to be told."""

    def end(_number: int, _frame: FrameType | None) -> None:
        os._exit(code)

    for number in _not_ignored(_SIGNALS):
        signal.signal(number, end)


@contextmanager
def _handling(signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it is interrupted
        return
    before = {number: signal.signal(number, handler) for number in _not_ignored(signals)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _not_ignored(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those that are not ignored; None stands for a handler that is not Python's, which could not be put back."""
    return [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]

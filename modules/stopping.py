"""Ctrl-C and SIGTERM: when a run that is asked to end does so.

Knows: signals. Refuses to know: what is being done meanwhile.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM: interrupt}):
        yield


@contextmanager
def postponed(tell: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Within the block, the first Ctrl-C or SIGTERM only tells that it was heard; the next one interrupts.

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

    with _handling(dict.fromkeys(_SIGNALS, hear)):
        yield end_if_asked


@contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it is interrupted
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

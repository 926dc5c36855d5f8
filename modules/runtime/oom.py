"""Out of memory: how to recognise such errors, and how to retry with less.

Knows: PyTorch's errors on each device. Refuses to know: what the memory is for, how to use less.
"""

import traceback
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Some devices, and the libraries below PyTorch, raise a plain RuntimeError with one of these in its message.
_MESSAGES = ("out of memory", "not enough memory", "ALLOC_FAILED", "DefaultCPUAllocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)


def retry_on_oom(work: Callable[[], Value], take_less: Callable[[], bool] | None = None) -> Value:
    """Do work; whenever memory runs out, release what the failed attempt held, take less and try again.

    work: can be repeated after a failure. take_less: reduces the need of memory; returns whether that was possible;
    None: it never is, the failed attempt is only released.
    Raises what `work` raises; its out-of-memory error if the need can't be reduced.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        # Not inside the handler: there, the frames of the failed attempt and their tensors are still alive.
        _release_frames(failure)
        if take_less is None or not take_less():
            try:
                raise failure
            finally:
                del (
                    failure
                )  # else this frame and the error would keep each other alive, and with them all callers' frames


def _release_frames(failure: BaseException) -> None:
    """Release the frames of an error's traceback, of any thread, and their variables: else they would keep their
    callers' variables alive until the next garbage collection."""
    error: BaseException | None = failure
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__

"""A lack of memory: how it is told from other failures, and the one way to go on after it.

Knows: what PyTorch raises on which device. Refuses to know: what the memory is for, what can be done with less.
"""

import traceback
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Some devices, and the libraries below PyTorch, say it in a RuntimeError of no kind of its own.
_MESSAGES = ("out of memory", "not enough memory", "ALLOC_FAILED", "DefaultCPUAllocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of whatever device, did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)


def retry_on_oom(work: Callable[[], Value], take_less: Callable[[], bool] | None = None) -> Value:
    """Do work; as often as memory does not suffice, let go of all that the failed try held, take less, do it again.

    work: may be done again whenever it has failed. take_less: whether there was something left to be done;
    None: there is nothing, the failed try only lets go of what it held.
    Raises what `work` raises; its lack of memory if nothing is left.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        # Not within the handler: there, the failed try's frames and their tensors are still held.
        _release_frames(failure)
        if take_less is None or not take_less():
            try:
                raise failure
            finally:
                del failure  # else this frame and the error would hold each other, and with them all callers' frames


def _release_frames(failure: BaseException) -> None:
    """Drop what the frames that an error came through held, in whatever thread they were, and the frames themselves:
    they would hold what their callers held until the garbage is collected."""
    error: BaseException | None = failure
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__

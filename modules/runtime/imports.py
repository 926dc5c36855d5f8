"""Imports of much code at once.

Knows: that it stays, and what takes its time. Refuses to know: who needs it.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

LOADING = "Loading PyTorch"  # said before it is imported


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

"""What several processes do together: the same failure in all, the sum of their scores, what the first one says.

Knows: torch.distributed. Refuses to know: what is exchanged.

All exchange is of a few kilobytes that are on the host anyway, so it goes over gloo, whatever the devices are; a
process that dies is noticed by the others at once.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from modules.runtime.errors import ProcessLost, first_line
from modules.runtime.ranks import Rank

Value = TypeVar("Value")

# How long one process may wait for another, which may be downloading a model meanwhile.
PATIENCE = timedelta(days=1)


class Group:
    """The processes of a run; it may be only one."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def on_all_ranks(self, work: Callable[[], Value]) -> Value:
        """Do this process's part of some work, and raise what it raises in any of them, in all of them.

        So all are always at the same place. Raises ProcessLost if one of them is gone.
        """
        if self.rank.world_size == 1:
            return work()
        try:
            result, failure = work(), None
        except Exception as error:
            failure = error
        flag = torch.tensor(float(failure is not None))
        with _company():
            distributed.all_reduce(flag)
        if not flag:
            return result
        failures: list[Exception | None] = [None] * self.rank.world_size
        with _company():
            distributed.all_gather_object(failures, failure and _sendable(failure))
        raise next(one for one in failures if one is not None)

    def sum(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """The element-wise sums of what all have; where all but one have zeros, exactly what that one has."""
        if self.rank.world_size == 1:
            return [list(row) for row in rows]
        values = torch.tensor(rows, dtype=torch.float64)
        with _company():
            distributed.all_reduce(values)
        return values.tolist()

    def broadcast(self, value: Value | None = None) -> Value:
        """What the first process has; the others' own is not looked at."""
        if self.rank.world_size == 1:
            return value
        values = [value]
        with _company():
            distributed.broadcast_object_list(values)
        return values[0]


ALONE = Group(Rank())


def _sendable(failure: Exception) -> Exception:
    """The same failure or, if it is of a kind that can't be sent, one with the same message."""
    try:
        return pickle.loads(pickle.dumps(failure))
    except Exception:  # whatever its class makes of it
        return RuntimeError(f"{type(failure).__name__}: {failure}")


@contextmanager
def joined(rank: Rank) -> Iterator[Group]:
    """The group of this process, left when the block ends. Raises ProcessLost if it does not come together."""
    if rank.world_size == 1:
        yield ALONE
        return
    with _company():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Group(rank)
    finally:
        distributed.destroy_process_group()


@contextmanager
def _company() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection closes
        reason = first_line(error).split("] ", 1)[-1]  # without the place in its own source
        raise ProcessLost(f"another process of this run has ended, or can't be reached any more ({reason})") from None

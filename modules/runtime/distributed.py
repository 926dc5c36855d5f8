"""The processes of a run: which one this is, and what they do together.

Knows: what torchrun sets, torch.distributed. Refuses to know: what is exchanged.

All exchange is of a few kilobytes that are on the host anyway, so it goes over gloo, whatever the devices are; a
process that dies is noticed by the others at once. torch is imported only where there are several processes: a typo
in a configuration must not wait for it.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from modules.runtime.errors import ConfigError, ProcessLost, first_line

Value = TypeVar("Value")

TIMEOUT = timedelta(days=1)  # one process may wait for another that is downloading a model
_MAIN_REPORTS = 10  # seconds that the main process may take to say why nothing can be done


@dataclass(frozen=True)
class Rank:
    """Which process this is."""

    number: int = 0
    world_size: int = 1
    local_rank: int = 0  # the same among those on this machine
    local_world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that prints, writes and saves."""
        return self.number == 0


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process's, from what torchrun sets; the only one, if it was not started by torchrun.

    Raises ConfigError if what stands there is no rank.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in environment for name in names):
        return Rank()
    texts = [environment[name] for name in names]
    if all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        rank = Rank(*map(int, texts))
        if rank.number < rank.world_size and rank.local_rank < rank.local_world_size <= rank.world_size:
            return rank
    listed = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
    raise ConfigError(f"inconsistent environment variables {listed}; unset them, or start with torchrun")


def wait_for_main_process() -> None:
    """Leave the main process time to say what is wrong: torchrun ends all processes with the first that ends."""
    with suppress(KeyboardInterrupt):
        time.sleep(_MAIN_REPORTS)


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
            result = work()
            failure = None
        except Exception as error:
            failure = error
        if not self.sum([[float(failure is not None)]])[0][0]:
            return result
        from torch import distributed

        failures: list[Exception | None] = [None] * self.rank.world_size
        with _checked_connection():
            distributed.all_gather_object(failures, failure and _sendable(failure))
        raise next(failure for failure in failures if failure is not None)

    def on_main_process(self, work: Callable[[], Value]) -> Value | None:
        """Work that only the main process does; what it raises is raised in all. None in the others."""
        return self.on_all_ranks(lambda: work() if self.rank.is_main_process else None)

    def sum(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """The element-wise sums of what all have; where all but one have zeros, exactly what that one has."""
        if self.rank.world_size == 1:
            return [list(row) for row in rows]
        import torch

        values = torch.tensor(rows, dtype=torch.float64)
        with _checked_connection():
            torch.distributed.all_reduce(values)
        return values.tolist()

    def broadcast(self, value: Value | None = None) -> Value:
        """What the main process has; the others' own is not looked at."""
        if self.rank.world_size == 1:
            return value
        from torch import distributed

        values = [value]
        with _checked_connection():
            distributed.broadcast_object_list(values)
        return values[0]


ALONE = Group(Rank())


@contextmanager
def joined(rank: Rank) -> Iterator[Group]:
    """The group of this process, left when the block ends. Raises ProcessLost if it does not come together."""
    if rank.world_size == 1:
        yield ALONE
        return
    from torch import distributed

    with _checked_connection():
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Group(rank)
    finally:
        distributed.destroy_process_group()


def _sendable(failure: Exception) -> Exception:
    """The same failure or, if it is of a kind that can't be sent, one with the same message."""
    try:
        return pickle.loads(pickle.dumps(failure))
    except Exception:  # whatever its class makes of it
        return RuntimeError(f"{type(failure).__name__}: {failure}")


@contextmanager
def _checked_connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection closes
        reason = first_line(error).split("] ", 1)[-1]  # without the place in its own source
        raise ProcessLost(f"another process of this run has ended or can't be reached ({reason})") from None

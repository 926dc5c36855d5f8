"""The processes of a run: the rank of this one, and their common operations.

Knows: torchrun's environment variables, torch.distributed. Refuses to know: what is exchanged.

The processes exchange only a few kilobytes, which are on the host anyway, so they use gloo on all devices; they notice
at once if one of them dies. torch is imported only if there are several processes: a typo in a configuration must not
wait for it.
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
_MAIN_REPORTS = 10  # seconds that the main process has to report an error


@dataclass(frozen=True)
class Rank:
    """The rank of this process."""

    number: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes on this machine
    local_world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that prints, writes and saves."""
        return self.number == 0


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process's rank, from torchrun's environment variables; that of a single process without torchrun.

    Raises ConfigError if the variables are inconsistent.
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
    """Give the main process time to report an error: torchrun ends all processes when the first one ends."""
    with suppress(KeyboardInterrupt):
        time.sleep(_MAIN_REPORTS)


class Group:
    """The processes of a run, perhaps only one."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def on_all_ranks(self, work: Callable[[], Value]) -> Value:
        """Do this process's part of some work. If it fails in one process, its error is raised in all.

        So all processes stay in step. Raises ProcessLost if one of them is gone.
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
        """Do work in the main process only; its error is raised in all. Returns None in the others."""
        return self.on_all_ranks(lambda: work() if self.rank.is_main_process else None)

    def sum(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """The element-wise sums over all processes; if all but one have zeros, exactly that one's values."""
        if self.rank.world_size == 1:
            return [list(row) for row in rows]
        import torch

        values = torch.tensor(rows, dtype=torch.float64)
        with _checked_connection():
            torch.distributed.all_reduce(values)
        return values.tolist()

    def broadcast(self, value: Value | None = None) -> Value:
        """The main process's value; the others' values are ignored."""
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
    """The group of this process, which leaves it when the block ends. Raises ProcessLost if a process is missing."""
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
    """The failure or, if it can't be pickled, one with the same message."""
    try:
        return pickle.loads(pickle.dumps(failure))
    except Exception:  # the class may raise anything
        return RuntimeError(f"{type(failure).__name__}: {failure}")


@contextmanager
def _checked_connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection closes
        reason = first_line(error).split("] ", 1)[-1]  # without the position in gloo's source
        raise ProcessLost(f"another process of this run has ended or can't be reached ({reason})") from None

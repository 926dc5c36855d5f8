"""Tensors on their way to the device: the next ones are read while the present ones are used.

Knows: one reading thread, memory that is used again, side streams. Refuses to know: what is read, what it is for.

    thread    read 1 | read 2 |      read 3      |          two layers of a candidate are in memory at most:
    main             | search 1      | search 2  | ...      the one that is searched and the one that arrives
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import Generic, TypeVar

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.conversion import Tensors
from modules.model.devices import beside, follow
from modules.model.part import Part
from modules.runtime.oom import is_out_of_memory, retry_on_oom
from modules.search.trial import read_part

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ReadAhead(Generic[Key, Value]):
    """What jobs read, one after another; while one result is used, a thread reads the next. Results are asked for by
    name, so that asking again, whatever has failed meanwhile, gives the same."""

    def __init__(
        self, jobs: Mapping[Key, Callable[[], Value]], streams: Sequence[torch.Stream] = (), ahead: bool = True
    ) -> None:
        """Begin with the first job. jobs: by name, in order; streams: on which the devices' work for them goes on
        beside theirs; ahead: if not, nothing is read before it is asked for."""
        self._jobs = jobs
        self._order = list(jobs)
        self._streams = streams
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: dict[Key, Future[Value]] = {}  # what was taken or is kept, and what comes behind it
        self._taken = -1  # place of the last job that was taken
        self._kept: set[Key] = set()
        self._begin_next()

    def take(self, name: Key, keep: bool = False) -> Value:
        """A result. The one that was taken before it must not be used any more, nor the one that was to be kept once
        there is another such.

        Raises what the job raises; what lacked memory is read anew when it is taken again.
        """
        self._taken = self._order.index(name)
        if keep:
            self._kept = {name}
        self._let_go_but(name, *self._behind)  # before more is read
        if self._lacks_memory(name):
            self._let_go_but()  # what it had to share the memory with
            self._begun.pop(name, None)  # it is read anew
        if not self._lacks_memory(name):
            self._begin_next()
        return self._begun[name].result()

    def take_next(self, keep: bool = False) -> Value:
        """The result behind the one that was taken last."""
        return self.take(self._order[self._taken + 1], keep)

    def release(self) -> None:
        """What has been taken is not used any more."""
        self._kept = set()
        self._let_go_but(*self._behind)

    def stop(self) -> None:
        """Read nothing ahead any more, and let go of what has been."""
        self._ahead = False
        self._let_go_but(*self._order[: self._taken + 1][-1:])
        self._thread.submit(int).result()  # by then the thread has ended what it was at, and dropped it

    @property
    def _behind(self) -> list[Key]:
        """What is read ahead: the next one, if any."""
        return self._order[self._taken + 1 :][: int(self._ahead)]

    def _lacks_memory(self, name: Key) -> bool:
        """Whether reading failed for lack of memory, once it has ended."""
        failure = self._begin(name).exception()
        return failure is not None and is_out_of_memory(failure)

    def _begin_next(self) -> None:
        for name in self._behind:
            self._begin(name)

    def _begin(self, name: Key) -> "Future[Value]":
        """Read, if it is not read already."""
        if name not in self._begun:
            job = partial(_made, self._jobs[name], self._streams)
            # A try that lacks memory lets go of what has arrived at once, not when it is asked for.
            self._begun[name] = self._thread.submit(retry_on_oom, job)
        return self._begun[name]

    def _let_go_but(self, *names: Key) -> None:
        """Of all but these and what is kept. Their memory is used again by what arrives next, which waits for what uses
        it now."""
        follow(self._streams)
        self._begun = {name: one for name, one in self._begun.items() if name in names or name in self._kept}

    def __enter__(self) -> "ReadAhead[Key, Value]":
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._kept = set()
        self._let_go_but()


def _made(job: Callable[[], Value], streams: Sequence[torch.Stream]) -> Value:
    """What a job makes, once it is there."""
    with torch.no_grad(), beside(streams):
        made = job()
    for stream in streams:
        stream.synchronize()
    return made


class Memory:
    """Memory of the CPU, page-locked if the device is to copy from it by itself, that is used again and again:
    reading into new memory takes several times as long."""

    def __init__(self, page_locked: bool) -> None:
        self._page_locked = page_locked
        self._blocks: list[Tensor] = []
        self._used = 0

    def read(self, candidate: Candidate, part: Part) -> Tensors:
        """`read_part`; what was read before is not needed any more."""
        self._used = 0
        return read_part(candidate, part, self._buffer)

    def _buffer(self, size: int) -> Tensor:
        """So many bytes. Parts are alike: block number n is nearly always as large as it was for the part before."""
        if self._used == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if len(self._blocks[self._used]) < size:
            self._blocks[self._used] = torch.empty(size, dtype=torch.uint8, pin_memory=self._page_locked)
        self._used += 1
        return self._blocks[self._used - 1][:size]


def two_memories(streams: Sequence[torch.Stream]) -> Iterator[Memory]:
    """Two, in turn without end: on a CPU the tensors that are used are the memory that they were read into."""
    return cycle((Memory(bool(streams)), Memory(bool(streams))))


def layer_jobs(
    candidate: Candidate, parts: Mapping[int, Part], streams: Sequence[torch.Stream]
) -> dict[int, Callable[[], Tensors]]:
    """What reads some layers of a candidate, one after another. parts: the base's layers by number."""
    memories = two_memories(streams)
    return {layer: partial(next(memories).read, candidate, part) for layer, part in parts.items()}

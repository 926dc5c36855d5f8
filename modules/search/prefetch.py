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
    """The results of reading jobs, one after another; while one is used, a thread reads the next. They are asked for by
    name, so that after any failure the same result can be asked for again."""

    def __init__(
        self, jobs: Mapping[Key, Callable[[], Value]], streams: Sequence[torch.Stream] = (), ahead: bool = True
    ) -> None:
        """Begin with the first job. jobs: by name, in order; streams: for the devices' work of the jobs, beside their
        other work; ahead: if false, nothing is read before it is asked for."""
        self._jobs = jobs
        self._order = list(jobs)
        self._streams = streams
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._futures: dict[Key, Future[Value]] = {}  # of the job that was taken, of kept ones and of the next
        self._last_taken = -1  # index of the last job that was taken
        self._kept_names: set[Key] = set()
        self._begin_next()

    def take(self, name: Key, keep: bool = False) -> Value:
        """A job's result. The result taken before must not be used any more, unless it was kept. keep: keep this
        one until another one is kept.

        Raises what the job raises; a job that lacked memory is run again when its result is taken again.
        """
        self._last_taken = self._order.index(name)
        if keep:
            self._kept_names = {name}
        self._drop_all_but(name, *self._next_names)  # before the next is read
        if self._lacks_memory(name):
            self._drop_all_but()  # frees what it shared the memory with
            self._futures.pop(name, None)  # it is read again
        if not self._lacks_memory(name):
            self._begin_next()
        return self._futures[name].result()

    def take_next(self, keep: bool = False) -> Value:
        """The result of the job after the one that was taken last."""
        return self.take(self._order[self._last_taken + 1], keep)

    def release(self) -> None:
        """Free the results that were taken or kept: they are not used any more."""
        self._kept_names = set()
        self._drop_all_but(*self._next_names)

    def stop(self) -> None:
        """Stop reading ahead, and free what was read ahead."""
        self._ahead = False
        self._drop_all_but(*self._order[: self._last_taken + 1][-1:])
        self._thread.submit(int).result()  # waits until the thread has ended and dropped its job

    @property
    def _next_names(self) -> list[Key]:
        """The name of the job that is read ahead, if any."""
        return self._order[self._last_taken + 1 :][: int(self._ahead)]

    def _lacks_memory(self, name: Key) -> bool:
        """Whether a job failed for lack of memory; waits for its end."""
        failure = self._begin(name).exception()
        return failure is not None and is_out_of_memory(failure)

    def _begin_next(self) -> None:
        for name in self._next_names:
            self._begin(name)

    def _begin(self, name: Key) -> "Future[Value]":
        """Begin a job, if it was not begun before."""
        if name not in self._futures:
            job = partial(_run_job, self._jobs[name], self._streams)
            # A job that lacks memory frees its tensors at once, not when its result is asked for.
            self._futures[name] = self._thread.submit(retry_on_oom, job)
        return self._futures[name]

    def _drop_all_but(self, *names: Key) -> None:
        """Free all results but these and the kept ones. The next job uses their memory again, once the devices' work on
        them is done."""
        follow(self._streams)
        self._futures = {
            name: future for name, future in self._futures.items() if name in names or name in self._kept_names
        }

    def __enter__(self) -> "ReadAhead[Key, Value]":
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._kept_names = set()
        self._drop_all_but()


def _run_job(job: Callable[[], Value], streams: Sequence[torch.Stream]) -> Value:
    """A job's result, once the devices have finished it."""
    with torch.no_grad(), beside(streams):
        result = job()
    for stream in streams:
        stream.synchronize()
    return result


class Memory:
    """Memory of the CPU that is used for one part after another: reading into new memory takes several times as long.
    It is page-locked if the device is to copy from it by itself."""

    def __init__(self, page_locked: bool) -> None:
        self._page_locked = page_locked
        self._blocks: list[Tensor] = []
        self._used_blocks = 0

    def read(self, candidate: Candidate, part: Part) -> Tensors:
        """`read_part` into this memory, over the part that was read before."""
        self._used_blocks = 0
        return read_part(candidate, part, self._buffer)

    def _buffer(self, size: int) -> Tensor:
        """A block of `size` bytes. Parts are alike: block n is nearly always as large as it was for the last part."""
        if self._used_blocks == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if len(self._blocks[self._used_blocks]) < size:
            self._blocks[self._used_blocks] = torch.empty(size, dtype=torch.uint8, pin_memory=self._page_locked)
        self._used_blocks += 1
        return self._blocks[self._used_blocks - 1][:size]


def two_memories(streams: Sequence[torch.Stream]) -> Iterator[Memory]:
    """Two memories in turn, without end: on a CPU, the tensors in use lie in the memory that they were read into."""
    return cycle((Memory(bool(streams)), Memory(bool(streams))))


def layer_jobs(
    candidate: Candidate, parts: Mapping[int, Part], streams: Sequence[torch.Stream]
) -> dict[int, Callable[[], Tensors]]:
    """Jobs that read some layers of a candidate, in order. parts: the base's layers by number."""
    memories = two_memories(streams)
    return {layer: partial(next(memories).read, candidate, part) for layer, part in parts.items()}

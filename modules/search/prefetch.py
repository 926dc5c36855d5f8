"""A candidate's layers on their way to the device: the next one is read while the present one is searched.

Knows: one reading thread, memory that is used again, side streams. Refuses to know: what is done with a layer, how a
header is made.

    thread    read 1 | read 2 |      read 3      |          two layers of the candidate are in memory at most:
    main             | search 1      | search 2  | ...      the one that is searched and the one that arrives
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from modules.checkpoints import Candidate, Tensors
from modules.model import Part, beside, follow
from modules.runtime import is_out_of_memory, within_memory

Arrived = tuple[Tensors, str | None]  # a layer's or the header's tensors, and what there is to say about the header
Job = Callable[[], Arrived]
Value = TypeVar("Value")


class ReadAhead:
    """A candidate's tensors for some layers of the base, and for its header; while one is used, a thread reads the one
    behind it. What is taken is named, so that asking again, whatever has failed meanwhile, gives the same."""

    def __init__(
        self,
        candidate: Candidate,
        parts: Mapping[int, Part],
        header: Job | None = None,
        streams: Sequence[torch.Stream] = (),
        ahead: bool = True,
    ) -> None:
        """Begin to read what the first layer needs. parts: the layers by number, in order; header: makes the header,
        which comes last, if it is wanted; streams: on which the devices' work for all of it goes on beside theirs;
        ahead: if not, nothing is read before it is asked for."""
        self._candidate, self._streams, self._ahead = candidate, streams, ahead
        self._jobs: dict[int | None, Job] = {
            layer: partial(self._read, turn, part) for turn, (layer, part) in enumerate(parts.items())
        }
        if header:
            self._jobs[None] = partial(_made, header, self._streams)
        # Two, in turn: on a CPU the tensors that are searched are the memory that they were read into.
        self._memories = Memory(bool(streams)), Memory(bool(streams))
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: dict[int | None, Future[Arrived]] = {}  # the one that was taken, and the one behind it
        self._taken: int | None = next(iter(self._jobs), None)
        if self._jobs:
            self._begin(self._taken)

    def take(self, layer: int) -> Tensors:
        """A layer's tensors, on its device in its dtype; those of layers before it must not be used any more.

        Raises BrokenWeights or CheckpointError as `Part.adopt` and reading do, torch.OutOfMemoryError if it does not
        fit; it is then read anew when it is taken again.
        """
        return self._take(layer)[0]

    def take_header(self) -> Arrived:
        """The header. Raises what making it raises."""
        return self._take(None)

    def stop(self) -> None:
        """Read nothing ahead any more, and let go of what has been."""
        self._ahead = False
        self._let_go(self._taken)
        self._thread.submit(int).result()  # by then the thread has ended what it was at, and dropped it

    def _take(self, place: int | None) -> Arrived:
        self._taken, order = place, list(self._jobs)
        behind = order[order.index(place) + 1 :][: int(self._ahead)]
        self._let_go(place, *behind)  # before more is read
        if self._lacks_memory(place):
            self._let_go()  # it is read anew; what it had to share the memory with is gone now
        if not self._lacks_memory(place):
            for one in behind:
                self._begin(one)
        return self._begun[place].result()

    def _lacks_memory(self, place: int | None) -> bool:
        """Whether reading failed for lack of memory, once it has ended."""
        failure = self._begin(place).exception()
        return failure is not None and is_out_of_memory(failure)

    def _begin(self, place: int | None) -> "Future[Arrived]":
        """Read, if it is not read already."""
        if place not in self._begun:
            # A try that lacks memory lets go of what has arrived at once, not when it is asked for.
            self._begun[place] = self._thread.submit(within_memory, self._jobs[place], lambda: False)
        return self._begun[place]

    def _let_go(self, *kept: int | None) -> None:
        """Of all but these. Their memory is used again by what arrives next, which waits for what uses it now."""
        follow(self._streams)
        self._begun = {place: self._begun[place] for place in kept if place in self._begun}

    def _read(self, turn: int, part: Part) -> Arrived:
        memory = self._memories[turn % 2]
        memory.free()
        with torch.no_grad(), beside(self._streams):
            return part.adopt(self._candidate.stream(part.tensors, memory.room), self._candidate.name), None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._let_go()


class InTurn(Generic[Value]):
    """What jobs make, one after another in a given order; while one result is used, a thread makes the next."""

    def __init__(self, jobs: Iterable[Callable[[], Value]], streams: Sequence[torch.Stream], ahead: bool) -> None:
        """streams, ahead: see ReadAhead."""
        self._jobs, self._streams, self._ahead = iter(jobs), streams, ahead
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun = self._begin() if ahead else None
        self._last: Value | None = None
        self._kept: Value | None = None

    def take(self, keep: bool = False) -> Value:
        """The next result. The one before it must not be used any more then, nor the last that was to be kept once
        there is another such. Raises what making it raises."""
        found = (self._begun or self._begin()).result()
        follow(self._streams)  # what uses memory now is waited for before it is used again
        self._last, self._kept = found, found if keep else self._kept
        self._begun = self._begin() if self._ahead else None
        return found

    def let_go(self) -> None:
        """Of all that has been taken: it is not used any more."""
        follow(self._streams)
        self._last = self._kept = None

    def _begin(self) -> "Future[Value]":
        """Go on to the next job; behind the last there is nothing to be taken."""
        return self._thread.submit(_made, next(self._jobs, lambda: None), self._streams)

    def __enter__(self) -> "InTurn[Value]":
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._begun = None
        self.let_go()


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

    def free(self) -> None:
        """What was handed out is not needed any more."""
        self._used = 0

    def room(self, size: int) -> Tensor:
        """So many bytes. Parts are alike: block number n is nearly always as large as it was for the part before."""
        if self._used == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if len(self._blocks[self._used]) < size:
            self._blocks[self._used] = torch.empty(size, dtype=torch.uint8, pin_memory=self._page_locked)
        self._used += 1
        return self._blocks[self._used - 1][:size]

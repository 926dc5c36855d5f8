"""A candidate's layers on their way to the device: the next one is read while the present one is searched.

Knows: one reading thread, memory that is used again, side streams. Refuses to know: what is done with a layer, how a
header is made.

    thread    read 1 | read 2 |      read 3      |          two layers of the candidate are in memory at most:
    main             | search 1      | search 2  | ...      the one that is searched and the one that arrives
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from modules.checkpoints import Candidate, Tensors
from modules.model import Part

Arrived = tuple[Tensors, str | None]  # a layer's or the header's tensors, and what there is to say about the header
Job = Callable[[], Arrived]


class ReadAhead:
    """A candidate's tensors for some layers of the base, and for its header; while one is used, a thread reads the one
    behind it. What is taken is named, so that asking again, whatever has failed meanwhile, gives the same."""

    def __init__(self, candidate: Candidate, parts: Mapping[int, Part], header: Job | None = None) -> None:
        """Begin to read what the first layer needs. parts: the layers by number, in order; header: makes the header,
        which comes last, if it is wanted."""
        self._candidate = candidate
        self._jobs: dict[int | None, Job] = {layer: partial(self._read, layer, part) for layer, part in parts.items()}
        if header:
            self._jobs[None] = partial(_made, header)
        on_cuda = any(device.type == "cuda" for part in parts.values() for device in part.devices)
        # Two, in turn: on a CPU the tensors that are searched are the memory that they were read into.
        self._memories = _Memory(on_cuda), _Memory(on_cuda)
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: dict[int | None, Future[Arrived]] = {}  # the one that was taken, and the one behind it
        for first in list(self._jobs)[:1]:
            self._begin(first)

    def take(self, layer: int) -> Tensors:
        """A layer's tensors, on its device in its dtype; those of layers before it must not be used any more.

        Raises BrokenWeights or CheckpointError as `Part.adopt` and reading do, torch.OutOfMemoryError if it does not
        fit; it is then read anew when it is taken again.
        """
        return self._take(layer)[0]

    def take_header(self) -> Arrived:
        """The header. Raises what making it raises."""
        return self._take(None)

    def _take(self, place: int | None) -> Arrived:
        order = list(self._jobs)
        behind = order[order.index(place) + 1 :][:1]
        # What was taken before goes before more is read.
        self._begun = {one: self._begun[one] for one in (place, *behind) if one in self._begun}
        arriving = self._begin(place)
        if isinstance(arriving.exception(), torch.OutOfMemoryError):
            del self._begun[place]
        else:
            for one in behind:
                self._begin(one)
        tensors, note = arriving.result()
        for tensor in tensors.values():
            if tensor.is_cuda:  # made on a side stream: its memory may be used again only when this stream is done
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors, note

    def _begin(self, place: int | None) -> "Future[Arrived]":
        """Read, if it is not read already."""
        if place not in self._begun:
            self._begun[place] = self._thread.submit(self._jobs[place])
        return self._begun[place]

    def _read(self, layer: int, part: Part) -> Arrived:
        memory = self._memories[layer % 2]
        memory.free()
        with torch.no_grad(), _beside(part.devices):
            return part.adopt(self._candidate.stream(part.tensors, memory.room), self._candidate.name), None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._begun.clear()


def _made(header: Job) -> Arrived:
    """The header, made beside what goes on on the GPUs meanwhile."""
    with torch.no_grad(), _beside(torch.device("cuda", index) for index in range(torch.cuda.device_count())):
        return header()


class _Memory:
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


@contextmanager
def _beside(devices: Iterable[torch.device]) -> Iterator[None]:
    """What is begun within the block runs beside the device's other work, and is done when the block ends."""
    streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        try:
            yield
        finally:
            for stream in streams:
                stream.synchronize()

"""A candidate's layers on their way to the device: the next one is read while the present one is searched.

Knows: one reading thread, memory that is used again, side streams. Refuses to know: what is done with a layer.

    thread    read 1 | read 2 |      read 3      |          two layers of the candidate are in memory at most:
    main             | search 1      | search 2  | ...      the one that is searched and the one that arrives
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle
from types import TracebackType

import torch
from torch import Tensor

from modules.candidates import Candidate
from modules.layouts import Tensors
from modules.models import Part


class ReadAhead:
    """A candidate's tensors for some parts of the base, one part after another, each read ahead by a thread."""

    def __init__(self, candidate: Candidate, parts: Sequence[Part]) -> None:
        """Begin to read what the first part needs."""
        self._candidate, self._parts = candidate, iter(parts)
        on_cuda = any(device.type == "cuda" for part in parts for device in part.devices)
        # Two, in turn: on a CPU the tensors that are searched are the memory that they were read into.
        self._memories = cycle([_Memory(on_cuda), _Memory(on_cuda)])
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[Part, Future[Tensors]] | None = None
        self._begin_next()

    def take(self) -> Tensors:
        """The next part's tensors, on its device in its dtype; what was taken before must not be used any more.

        Raises BrokenWeights or CheckpointError as `Part.adopt` and reading do; the part after it can then be taken.
        Raises torch.OutOfMemoryError if it does not fit; it can then be taken again.
        """
        assert self._next is not None, "there are no more parts"
        part, arriving = self._next
        try:
            tensors = arriving.result()
        except torch.OutOfMemoryError:
            self._next = part, self._thread.submit(self._read, part)
            raise
        except Exception:
            self._begin_next()
            raise
        self._begin_next()
        for tensor in tensors.values():
            if tensor.is_cuda:  # made on a side stream: its memory may be used again only when this stream is done
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors

    def _begin_next(self) -> None:
        part = next(self._parts, None)
        self._next = None if part is None else (part, self._thread.submit(self._read, part))

    def _read(self, part: Part) -> Tensors:
        memory = next(self._memories)
        memory.free()
        with torch.no_grad(), _beside(part.devices):
            return part.adopt(self._candidate.stream(part.tensors, memory.room), self._candidate.name)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)


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

"""A lack of memory: told from other failures; what a failed try held is gone before less is taken."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modules.runtime.oom import is_out_of_memory, retry_on_oom


@pytest.fixture(autouse=True)
def without_collection():
    """What only a garbage collection would free stays, as it may for long in a run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (MemoryError(), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_lack_of_memory_looks_like(error, told):
    assert is_out_of_memory(error) is told


class Held:
    """Something that takes memory."""


class Trying:
    """Work that fails so often, each time with something in its hands; `take_less` sees whether that is gone."""

    def __init__(self, failures, fail):
        self.failures, self.fail = failures, fail
        self.held, self.gone = [], []

    def work(self):
        mine = Held()
        self.held.append(weakref.ref(mine))
        if len(self.held) <= self.failures:
            self.fail()
        return "done"

    def take_less(self):
        self.gone.append(self.held[-1]() is None)
        return len(self.gone) < 5


def plainly():
    raise torch.OutOfMemoryError("none left")


def in_a_circle():
    """The error is held by a frame that it came through."""
    try:
        plainly()
    except torch.OutOfMemoryError as error:
        kept = error
        raise kept  # noqa: B904 - it is the same


def while_another_is_handled():
    try:
        raise KeyError("in the way")
    except KeyError as error:
        kept = error  # noqa: F841 - in a circle, too
        plainly()


def in_another_thread():
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(in_a_circle)
        future.result()


@pytest.mark.parametrize("fail", [plainly, in_a_circle, while_another_is_handled, in_another_thread])
def test_what_a_failed_try_held_is_gone_before_less_is_taken(fail):
    trying = Trying(3, fail)
    assert retry_on_oom(trying.work, trying.take_less) == "done"
    assert trying.gone == [True] * 3


@pytest.mark.parametrize("fail", [plainly, in_a_circle, while_another_is_handled, in_another_thread])
def test_what_callers_held_goes_with_them(fail):
    """Whether it went well in the end or not: an error holds its frames, and these their callers'."""

    def caller(failures):
        mine, trying = Held(), Trying(failures, fail)
        held.append(weakref.ref(mine))
        try:
            retry_on_oom(trying.work, trying.take_less)
        except torch.OutOfMemoryError:
            return "in vain"
        return "done"

    held = []
    assert [caller(2), caller(9)] == ["done", "in vain"]
    assert [one() for one in held] == [None, None]


def test_where_nothing_is_left_the_failure_is_raised():
    trying = Trying(9, in_a_circle)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        retry_on_oom(trying.work, trying.take_less)
    assert len(trying.gone) == 5


def test_other_failures_are_not_tried_again():
    trying = Trying(1, lambda: [][1])
    with pytest.raises(IndexError):
        retry_on_oom(trying.work, trying.take_less)
    assert len(trying.held) == 1 and trying.gone == []

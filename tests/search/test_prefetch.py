"""What is read ahead: the same as read when it is asked for, one job ahead, in memory that is used again."""

import gc
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.devices import side_streams
from modules.model.embeddings import aligned_header
from modules.model.loading import load_model
from modules.runtime.errors import BrokenWeights
from modules.search.prefetch import ReadAhead, layer_jobs

LAYERS = 5


# ---------------------------------------------------------------------------------------------------------------------
# Any jobs
# ---------------------------------------------------------------------------------------------------------------------


def test_jobs_are_done_in_turn_one_ahead():
    done, gate = [], threading.Semaphore(0)

    def job(number):
        assert gate.acquire(timeout=60)
        done.append((number, threading.current_thread(), torch.is_grad_enabled()))
        return number

    before = threading.active_count()
    with ReadAhead({number: partial(job, number) for number in range(4)}) as ahead:
        for number in range(4):
            gate.release()
            assert ahead.take_next(keep=number == 1) == number
            assert [one for one, *_ in done] == list(range(number + 1))  # the next waits for the gate
            assert list(ahead._futures) == [[0, 1], [1, 2], [1, 2, 3], [1, 3]][number]
        ahead.release()
        assert not ahead._futures
    assert threading.active_count() == before
    assert all(thread is not threading.main_thread() and not grad for _, thread, grad in done)


def noted(done, count=5):
    """Jobs that note when they are done."""

    def job(number):
        done.append(number)
        return object()

    return {number: partial(job, number) for number in range(count)}


def test_nothing_is_read_ahead_where_that_is_not_wanted():
    done = []
    with ReadAhead(noted(done)) as ahead:
        kept = ahead.take(0)
        ahead.stop()
        assert list(ahead._futures) == [0] and ahead.take(0) is kept  # what is in use stays
        ahead.take(1)
        ahead.take(2)
        assert done == [0, 1, 1, 2]
    done.clear()
    with ReadAhead(noted(done), ahead=False) as ahead:
        assert done == []
        ahead.take(0)
        assert list(ahead._futures) == done == [0]


def test_leaving_ends_the_thread():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ReadAhead(noted([])) as ahead:
        ahead.take(0)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_what_a_job_raises_is_raised_where_it_is_taken():
    def broken():
        raise BrokenWeights("no numbers")

    with ReadAhead({"a": int, "b": broken, "c": float}) as ahead:
        assert ahead.take("a") == 0
        for _ in range(2):
            with pytest.raises(BrokenWeights, match="no numbers"):
                ahead.take("b")
        assert ahead.take("c") == 0


@pytest.mark.parametrize("keep", [False, True])
def test_what_lacked_memory_is_read_anew(keep):
    """By then what was there before it is gone, but for what is kept."""
    failures, held = [torch.OutOfMemoryError("none left")], []

    def job():
        held.append(sorted(ahead._futures.keys() - {1}))
        if failures:
            raise failures.pop()
        return "read"

    with ReadAhead({0: lambda: "first", 1: job, 2: lambda: "last"}) as ahead:
        assert ahead.take(0, keep=True) == "first"
        assert ahead.take(1, keep) == "read" and held[1] == ([] if keep else [0])
        assert ahead.take(2) == "last" and list(ahead._futures) == ([1, 2] if keep else [0, 2])


# ---------------------------------------------------------------------------------------------------------------------
# A candidate's layers and header
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("streaming"), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=LAYERS), tokenizer, shard="60KB")
    return base, tiny.make_candidate(folder / "other", base, dtype=torch.half)


def opened(folders, dtype="float32", device="cpu"):
    model = load_model(open_checkpoint(folders[0], "base"), device, dtype)
    candidate = open_candidate(open_checkpoint(folders[1], "other"), model.checkpoint, model.module)
    return model, {index: model.layer(index) for index in range(LAYERS)}, candidate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_ahead_is_what_is_read(folders, dtype):
    _, parts, candidate = opened(folders, dtype)
    with ReadAhead(layer_jobs(candidate, parts, ())) as ahead:
        for layer, part in parts.items():
            expected, found = part.adopt(candidate.read(part.tensors).items(), "other"), ahead.take(layer)
            assert list(found) == list(part.tensors)
            for name, tensor in found.items():
                assert tensor.dtype == part.tensors[name].dtype and torch.equal(tensor, expected[name])


def test_memory_is_used_again(folders):
    _, parts, candidate = opened((folders[0], folders[0]))
    with ReadAhead(layer_jobs(candidate, parts, ())) as ahead:
        places = [[tensor.data_ptr() for tensor in ahead.take(layer).values()] for layer in parts]
    assert places[0] == places[2] == places[4] and places[1] == places[3]
    assert not set(places[0]) & set(places[1])


def test_what_had_arrived_is_gone_as_soon_as_memory_runs_out(folders):
    """Not when the layer is asked for, and without a garbage collection: it is what is then lacking."""
    _, parts, candidate = opened(folders)
    arrived, most = [], [3]

    def stream(names, *_room):
        for name, tensor in candidate.stream(names):
            if names is parts[1].tensors and len(arrived) == most[0]:
                raise torch.OutOfMemoryError("none left")
            copy = tensor.clone()
            if names is parts[1].tensors:
                arrived.append(weakref.ref(copy))
            yield name, copy

    gc.collect(), gc.disable()
    try:
        with ReadAhead(layer_jobs(SimpleNamespace(name="other", stream=stream), parts, ())) as ahead:
            ahead.take(0)
            ahead._futures[1].exception()
            assert len(arrived) == 3 and [one() for one in arrived] == [None] * 3
            with pytest.raises(torch.OutOfMemoryError):
                ahead.take(1)
            assert len(arrived) == 3
            most[0] = 100
            assert len(ahead.take(1)) == len(parts[1].tensors)
    finally:
        gc.enable()


def test_a_header_is_read_while_rows_of_the_head_are_held(folders):
    """By another thread, that measures drift a few rows at a time."""
    (model, _, candidate), tokenizer = opened(folders), tiny.bpe_tokenizer()
    expected, still = aligned_header(model, tokenizer, candidate)[0], model.header().still()
    with model.head_rows(3, 9):
        found = aligned_header(model, tokenizer, candidate, still)[0]
    assert len(found) == 2 and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_arrives_on_a_gpu_is_what_is_read(folders, dtype):
    """While the device is busy, in memory that is used again."""
    model, parts, candidate = opened(folders, dtype, "cuda")
    parts = {20 * index + turn: part for turn in range(20) for index, part in parts.items()}
    streams, busy = side_streams(model.devices), torch.randn(4000, 4000, device="cuda")
    with ReadAhead(layer_jobs(candidate, parts, streams), streams) as ahead:
        for number, part in parts.items():
            found = ahead.take(number)
            for _ in range(5):
                busy = busy @ busy / 60
            kept = {name: tensor.clone() for name, tensor in found.items()}
            del found
            for name, tensor in candidate.read(part.tensors).items():
                assert torch.equal(kept[name].cpu(), tensor.to(kept[name].dtype))

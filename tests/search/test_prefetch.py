"""A candidate's layers, read ahead: the same tensors as read one by one, in memory that is used again."""

import gc
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.devices import side_streams
from modules.model.embeddings import aligned_header
from modules.model.loading import load_model
from modules.runtime.errors import BrokenWeights, CheckpointError
from modules.search.prefetch import ReadAhead, layer_jobs

LAYERS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("streaming"), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=LAYERS), tokenizer, shard="60KB")
    return (
        base,
        tiny.make_candidate(folder / "other", base),
        tiny.make_candidate(folder / "half", base, dtype=torch.half),
    )


def opened(base, other, dtype="float32"):
    model = load_model(open_checkpoint(base, "base"), "cpu", dtype)
    candidate = open_candidate(open_checkpoint(other, "other"), model.checkpoint, model.module)
    return [model.layer(index) for index in range(LAYERS)], candidate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", [1, 2])
def test_what_is_read_ahead_is_what_is_read(folders, which, dtype):
    parts, candidate = opened(folders[0], folders[which], dtype)
    with reading(candidate, parts) as ahead:
        for layer, part in enumerate(parts):
            expected, found = part.adopt(candidate.read(part.tensors).items(), "other"), ahead.take(layer)
            assert list(found) == list(part.tensors)
            for name, tensor in found.items():
                assert tensor.dtype == part.tensors[name].dtype and torch.equal(tensor, expected[name])


def test_memory_is_used_again(folders):
    parts, candidate = opened(*folders[:2])
    with reading(candidate, parts) as ahead:
        places = [[tensor.data_ptr() for tensor in ahead.take(layer).values()] for layer in range(LAYERS)]
    assert places[0] == places[2] == places[4] and places[1] == places[3]
    assert not set(places[0]) & set(places[1])


def reading(candidate, parts, **more):
    return ReadAhead(layer_jobs(candidate, dict(enumerate(parts)), ()), **more)


@dataclass(frozen=True)
class Watched:
    """A candidate that lets the test know, and decide, when which part is read."""

    candidate: object
    begun: list
    gate: threading.Semaphore
    failure: dict

    @property
    def name(self):
        return "other"

    def stream(self, names, *room):
        assert self.gate.acquire(timeout=60)
        layer = int(next(iter(names)).split(".")[2])
        self.begun.append((layer, threading.current_thread()))
        if layer in self.failure:
            raise self.failure.pop(layer)
        return self.candidate.stream(names, *room)


def watched(candidate, count, **failure):
    return Watched(candidate, [], threading.Semaphore(count), {int(key[1:]): value for key, value in failure.items()})


def test_one_part_is_read_ahead_and_no_more(folders):
    parts, candidate = opened(*folders[:2])
    candidate = watched(candidate, 100)
    with reading(candidate, parts) as ahead:
        for number in range(LAYERS):
            ahead.take(number)
            ahead._begun[min(number + 1, LAYERS - 1)].result()  # until what is read ahead is there
            assert [layer for layer, _ in candidate.begun] == list(range(min(number + 2, LAYERS)))
    assert all(thread is not threading.main_thread() for _, thread in candidate.begun)


def test_reading_goes_on_while_a_part_is_searched(folders):
    """The second part arrives although the one who took the first does not ask for it."""
    parts, candidate = opened(*folders[:2])
    candidate = watched(candidate, 1)
    with reading(candidate, parts) as ahead:
        first = ahead.take(0)
        kept = {name: tensor.clone() for name, tensor in first.items()}
        candidate.gate.release()
        ahead._begun[1].result(timeout=60)
        assert len(candidate.begun) == 2
        assert all(torch.equal(tensor, kept[name]) for name, tensor in first.items())


def test_out_of_memory_is_no_end(folders):
    parts, candidate = opened(*folders[:2])
    candidate = watched(candidate, 100, _1=torch.OutOfMemoryError("none left"))
    with reading(candidate, parts) as ahead:
        ahead.take(0)
        again = ahead.take(1)  # by now what was there before it is gone
        assert next(iter(again)).startswith("model.layers.1.")
        assert torch.equal(next(iter(again.values())), candidate.candidate.read(list(again)[:1]).popitem()[1])


def test_what_had_arrived_is_gone_as_soon_as_memory_runs_out(folders):
    """Not when the layer is asked for, and without a garbage collection: it is what is then lacking."""
    parts, candidate = opened(*folders[:2])
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
        with reading(SimpleNamespace(name="other", stream=stream), parts) as ahead:
            ahead.take(0)
            ahead._begun[1].exception()
            assert len(arrived) == 3 and [one() for one in arrived] == [None] * 3
            with pytest.raises(torch.OutOfMemoryError):
                ahead.take(1)
            assert len(arrived) == 3
            most[0] = 100
            assert len(ahead.take(1)) == len(parts[1].tensors)
    finally:
        gc.enable()


def test_a_part_that_cannot_be_used_is_passed_over(folders, tmp_path):
    base, other, _ = folders
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    tiny.make_candidate(tmp_path / "broken", base)
    save_file(tensors, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    parts, candidate = opened(base, tmp_path / "broken")
    with reading(candidate, parts) as ahead:
        ahead.take(0)
        for _ in range(2):
            with pytest.raises(BrokenWeights, match=r"other: model.layers.1.mlp.up_proj.weight"):
                ahead.take(1)
        assert next(iter(ahead.take(2))).startswith("model.layers.2.")


def test_a_file_that_goes_away_is_an_error(folders, tmp_path):
    base = folders[0]
    other = tiny.make_candidate(tmp_path / "other", base)
    parts, candidate = opened(base, other)
    (other / "model.safetensors").unlink()
    with reading(candidate, parts) as ahead, pytest.raises(CheckpointError, match="can't be read"):
        ahead.take(0)


def test_a_header_is_read_while_rows_of_the_head_are_held(folders):
    """By another thread, that measures drift a few rows at a time."""
    model, tokenizer = load_model(open_checkpoint(folders[0], "base"), "cpu", "float32"), tiny.bpe_tokenizer()
    candidate = open_candidate(open_checkpoint(folders[1], "other"), model.checkpoint, model.module)
    tokenizer.add_tokens(["another"])
    expected, still = aligned_header(model, tokenizer, candidate)[0], model.header().still()
    with model.head_rows(3, 9):
        found = aligned_header(model, tokenizer, candidate, still)[0]
    assert len(found) == 2 and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_arrives_on_a_gpu_is_what_is_read(folders, dtype):
    """While the device is busy, in memory that is used again."""
    model = load_model(open_checkpoint(folders[0], "base"), "cuda", dtype)
    candidate = open_candidate(open_checkpoint(folders[1], "other"), model.checkpoint, model.module)
    streams = side_streams(model.devices)
    parts, busy = [model.layer(index) for index in range(LAYERS)], torch.randn(4000, 4000, device="cuda")
    with ReadAhead(layer_jobs(candidate, dict(enumerate(parts * 20)), streams), streams) as ahead:
        for number, part in enumerate(parts * 20):
            found = ahead.take(number)
            for _ in range(5):
                busy = busy @ busy / 60
            kept = {name: tensor.clone() for name, tensor in found.items()}
            del found
            for name, tensor in candidate.read(part.tensors).items():
                assert torch.equal(kept[name].cpu(), tensor.to(kept[name].dtype))


def test_leaving_ends_the_thread(folders):
    parts, candidate = opened(*folders[:2])
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), reading(candidate, parts) as ahead:
        ahead.take(0)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_nothing_is_read_ahead_any_more_once_that_is_asked(folders):
    parts, candidate = opened(*folders[:2])
    candidate = watched(candidate, 100)
    with reading(candidate, parts) as ahead:
        kept = ahead.take(0)
        ahead.stop()
        assert list(ahead._begun) == [0] and ahead.take(0) is kept  # what is in use stays
        for layer in (1, 2):
            ahead.take(layer)
        assert [layer for layer, _ in candidate.begun] == [0, 1, 1, 2]
    with reading(candidate, parts, ahead=False) as ahead:
        ahead.take(0)
        assert list(ahead._begun) == [0]


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
            assert list(ahead._begun) == [[0, 1], [1, 2], [1, 2, 3], [1, 3]][number]
        ahead.release()
        assert not ahead._begun
    assert threading.active_count() == before
    assert all(thread is not threading.main_thread() and not grad for _, thread, grad in done)


def test_what_is_kept_and_lacked_memory_is_read_anew():
    failures = [torch.OutOfMemoryError("none left")]

    def job():
        if failures:
            raise failures.pop()
        return "read"

    with ReadAhead({0: lambda: "kept", 1: job, 2: lambda: "last"}) as ahead:
        assert [ahead.take(0, keep=True), ahead.take(1, keep=True), ahead.take(2)] == ["kept", "read", "last"]
        assert list(ahead._begun) == [1, 2]


def test_without_reading_ahead_a_job_is_done_when_it_is_asked_for():
    done = []
    with ReadAhead({number: partial(done.append, number) for number in range(3)}, ahead=False) as ahead:
        assert done == []
        ahead.take_next()
        ahead.take_next()
        assert done == [0, 1]


def test_what_a_job_raises_is_raised_where_it_is_taken():
    def broken():
        raise CheckpointError("gone")

    with ReadAhead({0: int, 1: broken, 2: int}) as ahead:
        assert ahead.take(0) == 0
        with pytest.raises(CheckpointError, match="gone"):
            ahead.take(1)

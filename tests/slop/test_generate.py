"""Texts on the disk: what is found again, which file other settings have, what a damaged line costs, two programs."""

import errno
import json
import multiprocessing
import os
from functools import partial

import pytest

import modules.slop.generate
from modules.runtime.errors import ConfigError
from modules.slop.generate import keep_texts, read_texts, sample_file

TEXTS = ["one\ntwo", 'three " \u2028 four', ""]


def test_kept_texts_are_found_again(tmp_path):
    file = tmp_path / "samples/model.jsonl"
    assert read_texts(file, 3) == {}
    keep_texts(file, {"A?": TEXTS})
    keep_texts(file, {"B?": ["b"] * 3, "D?": ["\ud800"] * 3})
    assert read_texts(file, 3) == {"A?": TEXTS, "B?": ["b"] * 3, "D?": ["\ud800"] * 3}
    assert read_texts(file, 2) == {} and os.listdir(tmp_path / "samples") == ["model.jsonl"]


def test_a_file_is_named_by_model_and_settings(tmp_path):
    file = sample_file(tmp_path, "org/a model", {"seed": 1, "dtype": "float32"})
    assert file.name.startswith("org-a-model-")
    assert sample_file(tmp_path, "org/a model", {"dtype": "float32", "seed": 1}) == file
    assert sample_file(tmp_path, "org/a model", {"seed": 2, "dtype": "float32"}) != file


DAMAGED = {
    "no json": b"no json",
    "a list": b"[]",
    "a number for texts": b'{"B?": 3}',
    "a text for texts": b'{"B?": "abc"}',
    "numbers": b'{"B?": [1, 2, 3]}',
    "too few": b'{"B?": ["a", "b"]}',
    "half": b'{"B?": ["',
    "deep": b"[" * 200_000,
    "no UTF-8": b'{"B?": ["\xff", "b", "c"]}',
    "a huge number": b'{"B?": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_what_is_in_it(tmp_path, line):
    """Also at the end, where a killed run leaves half of a line and the next one goes on."""
    file = tmp_path / "model.jsonl"
    keep_texts(file, {"A?": TEXTS})
    file.write_bytes(line + b"\n" + file.read_bytes() + line)
    assert read_texts(file, 3) == {"A?": TEXTS}
    keep_texts(file, {"B?": TEXTS})
    assert read_texts(file, 3) == {"A?": TEXTS, "B?": TEXTS}


def test_of_two_lines_the_first_counts(tmp_path):
    file = tmp_path / "model.jsonl"
    keep_texts(file, {"A?": ["one"]})
    keep_texts(file, {"A?": ["two"], "B?": ["two"]})
    assert read_texts(file, 1) == {"A?": ["one"], "B?": ["two"]}


PROMPTS = [f"{number}?" for number in range(60)]


def adds(mark, file, go):
    go.wait()
    for prompt in PROMPTS:
        keep_texts(file, {prompt: [mark * 20_000]})


def test_two_programs_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    file, go = tmp_path / "model.jsonl", context.Event()
    processes = [context.Process(target=partial(adds, mark, file, go)) for mark in "ab"]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    assert len(lines) == 2 * len(PROMPTS) and read_texts(file, 1).keys() == set(PROMPTS)


def test_a_line_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(modules.slop.generate, "sync", synced.append)
    keep_texts(tmp_path / "model.jsonl", {"A?": TEXTS})
    assert synced == [tmp_path / "model.jsonl", tmp_path]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        keep_texts(tmp_path / "model.jsonl", {"A?": TEXTS})
    assert error.value.filename == str(tmp_path / "model.jsonl")


def test_a_file_that_can_not_be_read(tmp_path):
    (tmp_path / "samples").write_text("a file")
    (tmp_path / "model.jsonl").mkdir()
    for file in (tmp_path / "samples/model.jsonl", tmp_path / "model.jsonl"):
        with pytest.raises(ConfigError, match="can't be used"):
            read_texts(file, 1)


@pytest.mark.parametrize("line", [b"[1", b'{"A?": [1]}', b'{"A?": []}', b'{"A?": "text"}', b"[" * 200_000])
def test_a_damaged_line_is_removed(tmp_path, line):
    file = tmp_path / "model.jsonl"
    file.write_bytes(line + b'\n{"B?": ["kept"]}\n{"C?": ["torn')
    assert read_texts(file, 1) == {"B?": ["kept"]}
    assert file.read_bytes() == b'{"B?": ["kept"]}\n'

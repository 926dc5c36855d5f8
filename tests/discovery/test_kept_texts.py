"""Texts on the disk: what is found again, what another way of drawing does not find, what a broken line costs, two
programs at the same time."""

import errno
import json
import multiprocessing
import os
from functools import partial

import pytest

import modules.discovery.kept_texts
import modules.output.filesystem
from modules.discovery.kept_texts import KeptTexts
from modules.output.filesystem import Lock
from modules.runtime import ConfigError

WAY = {"seed": 1, "model": {"config.json": {"size": 3}}}
TEXTS = ("one\ntwo", 'three " \u2028 four \ud800', "")


def kept_in(folder, name="model", way=WAY):
    return KeptTexts(folder, name, way, len(TEXTS))


def others(mark):
    return [f"{mark} {number}" for number in range(len(TEXTS))]


def test_what_was_kept_is_found_again(tmp_path):
    kept = kept_in(tmp_path / "samples", "org/a model")
    assert kept.get("A?") is None
    kept.add({"A?": TEXTS})
    kept.add({"B?": others("b"), "D?": others("d")})
    again = kept_in(tmp_path / "samples", "org/a model", dict(reversed(WAY.items())))
    assert again.path == kept.path and again.path.name.startswith("org-a-model-")
    assert again.get("A?") == TEXTS and again.get("B?") == tuple(others("b")) and again.get("C?") is None
    assert os.listdir(tmp_path) == ["samples"] and os.listdir(tmp_path / "samples") == [kept.path.name]


def test_another_way_has_a_file_of_its_own(tmp_path):
    kept_in(tmp_path).add({"A?": TEXTS})
    assert kept_in(tmp_path, way={**WAY, "seed": 2}).get("A?") is None
    assert kept_in(tmp_path).get("A?") == TEXTS


@pytest.mark.parametrize("left", range(1, 30, 4))
def test_a_line_that_was_being_written_is_written_anew(tmp_path, left):
    kept = kept_in(tmp_path)
    kept.add({"A?": TEXTS})
    whole = kept.path.read_bytes()
    kept.add({"B?": TEXTS, "C?": TEXTS})
    both = kept.path.read_bytes()
    kept.path.write_bytes(both[: len(whole) + left])
    again = kept_in(tmp_path)
    assert again.get("A?") == TEXTS and again.get("B?") is again.get("C?") is None
    assert again.damaged == 0 and kept.path.read_bytes() == both[: len(whole) + left]  # somebody may be writing it now
    again.add({"B?": TEXTS, "C?": TEXTS})
    assert again.path.read_bytes() == both


DAMAGED = {
    "no json": b"no json",
    "a list": b"[]",
    "a number": b"3",
    "a number for texts": b'{"B?": 3}',
    "a text for texts": b'{"B?": "abc"}',
    "numbers": b'{"B?": [1, 2, 3]}',
    "mappings": b'{"B?": [{"a": 1}, {}, null]}',
    "too few": b'{"B?": ["a", "b"]}',
    "too many": b'{"B?": ["a", "b", "c", "d"]}',
    "none": b'{"B?": []}',
    "half": b'{"B?": ["',
    "deep": b"[" * 200_000,
    "no UTF-8": b'{"B?": ["\xff", "b", "c"]}',
    "UTF-16": '{"B?": ["a", "b", "c"]}'.encode("utf-16-be"),
    "a huge number": b'{"B?": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_line_costs_what_is_in_it(tmp_path, line, at):
    kept = kept_in(tmp_path)
    kept.add({"A?": TEXTS})
    kept.add({"C?": TEXTS})
    lines = kept.path.read_bytes().splitlines()
    lines.insert(at, line)
    kept.path.write_bytes(b"\n".join([*lines, b""]))
    again = kept_in(tmp_path)
    assert again.damaged == 1 and again.get("B?") is None and again.get("A?") == again.get("C?") == TEXTS
    again.add({"B?": others("b")})
    assert [list(json.loads(line)) for line in again.path.read_bytes().splitlines()] == [["A?"], ["C?"], ["B?"]]
    last = kept_in(tmp_path)
    assert last.damaged == 0 and [last.get(name) for name in ("A?", "B?")] == [TEXTS, tuple(others("b"))]


# ---------------------------------------------------------------------------------------------------------------------
# Two programs
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = [f"{number}?" for number in range(60)]


def adds(mark, folder, go):
    """A program that has all prompts answered, some at a time, as another one does."""
    kept = kept_in(folder)
    go.wait()
    for first in range(0, len(PROMPTS), 2):
        kept.add({prompt: others(mark * 2000) for prompt in PROMPTS[first : first + 2]})
    assert all(kept.get(prompt) for prompt in PROMPTS)


def at_once(work):
    """Do the same in two processes."""
    context = multiprocessing.get_context("fork")
    go = context.Event()
    processes = [context.Process(target=partial(work, mark), kwargs={"go": go}) for mark in "ab"]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_at_once_keep_every_prompt_once(tmp_path):
    assert at_once(partial(adds, folder=tmp_path / "samples")) == [0, 0]
    (file,) = (tmp_path / "samples").iterdir()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [prompt for line in lines for prompt in line] == PROMPTS
    again = kept_in(tmp_path / "samples")
    assert again.damaged == 0 and os.listdir(tmp_path) == ["samples"]
    assert all(set(again.get(prompt)[0]) in ({*"a 0"}, {*"b 0"}) for prompt in PROMPTS)


def test_two_at_once_where_there_are_no_locks(tmp_path, monkeypatch):
    """A line may be lost there, to be drawn again. Both programs end well, and what is kept is whole."""
    monkeypatch.setattr(modules.output.filesystem, "_lock", lambda file: False)
    assert at_once(partial(adds, folder=tmp_path / "samples")) == [0, 0]
    kept = kept_in(tmp_path / "samples")
    found = [kept.get(prompt) for prompt in PROMPTS]
    assert any(found) and all(texts is None or len(texts) == len(TEXTS) for texts in found)
    kept.add({prompt: others("c") for prompt in PROMPTS})
    assert all(map(kept_in(tmp_path / "samples").get, PROMPTS))


def test_what_another_program_has_kept_meanwhile_counts(tmp_path):
    one, other = kept_in(tmp_path), kept_in(tmp_path)
    one.add({"A?": others("one")})
    other.add({"A?": others("other"), "B?": others("other")})
    assert other.get("A?") == kept_in(tmp_path).get("A?") == tuple(others("one"))
    assert other.get("B?") == kept_in(tmp_path).get("B?") == tuple(others("other"))


def test_of_two_lines_the_first_counts(tmp_path):
    kept = kept_in(tmp_path)
    kept.add({"A?": others("one")})
    line = json.dumps({"A?": others("two"), "B?": others("two")}) + "\n"
    kept.path.write_bytes(kept.path.read_bytes() + line.encode())
    again = kept_in(tmp_path)
    assert (again.get("A?"), again.get("B?")) == (tuple(others("one")), tuple(others("two")))


def test_what_was_kept_is_known_when_its_file_has_gone(tmp_path):
    kept = kept_in(tmp_path)
    kept.add({"A?": TEXTS})
    kept.path.unlink()
    kept.add({"B?": TEXTS})
    assert kept.get("A?") == kept.get("B?") == TEXTS


def test_a_line_that_lacks_nothing_but_its_end_counts(tmp_path):
    kept = kept_in(tmp_path)
    kept.add({"A?": TEXTS})
    kept.path.write_bytes(b"damaged\n" + kept.path.read_bytes()[:-1])
    again = kept_in(tmp_path)
    assert again.damaged == 1 and again.get("A?") == TEXTS
    again.add({"B?": TEXTS})
    assert [list(json.loads(line)) for line in again.path.read_bytes().splitlines()] == [["A?"], ["B?"]]


def test_a_program_that_does_not_end_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(modules.discovery.kept_texts, "PATIENCE", 0.1)
    kept = kept_in(tmp_path / "samples")
    lock = Lock(tmp_path / ".samples.lock")
    with pytest.raises(ConfigError, match="another program is writing"):
        kept.add({"A?": TEXTS})
    lock.release()
    kept.add({"A?": TEXTS})
    assert kept_in(tmp_path / "samples").get("A?") == TEXTS


# ---------------------------------------------------------------------------------------------------------------------
# The disk
# ---------------------------------------------------------------------------------------------------------------------


def test_every_line_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(modules.discovery.kept_texts, "sync", synced.append)
    kept = kept_in(tmp_path)
    kept.add({"A?": TEXTS})
    kept.add({"B?": TEXTS})
    assert synced == [kept.path, tmp_path, kept.path]


def test_a_disk_that_is_full_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = kept_in(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        kept.add({"A?": TEXTS})
    assert error.value.filename == str(kept.path)


def test_a_folder_that_can_not_be(tmp_path):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(ConfigError, match="samples: can't be used"):
        kept_in(tmp_path / "samples")


def test_a_file_that_can_not_be_read(tmp_path):
    path = kept_in(tmp_path).path
    path.mkdir()
    with pytest.raises(ConfigError) as error:
        kept_in(tmp_path)
    assert str(path) in str(error.value)

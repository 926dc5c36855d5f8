"""What is said to be kept is there, and where nothing was decided nothing stays."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import tiny

import merge_monster
from modules.output.folder import UNFINISHED, OutputFolder, stamp, unfinished_output, what_stands
from modules.output.journal import JOURNAL_FILE, open_journal
from modules.runtime.errors import ConfigError

DECIDED = b'{"kind": "run"}\n{"kind": "decision"}\n'
JOURNALS = {
    "none": (None, False),
    "empty": (b"", False),
    "begun": (b'{"kind": "run"}\n{"kind": "source"}\n', False),
    "decided": (DECIDED, True),
    "a step": (b'{"kind": "run"}\n{"kind": "step"}\n', True),
    "torn after a decision": (DECIDED + b'{"kind": "dec', True),
    "torn in the first": (DECIDED[:-5], False),
}


def fails(error=errno.EDQUOT):
    """A function that fails as a disk does, without a name."""

    def fail(*_arguments, **_settings):
        raise OSError(error, os.strerror(error))

    return fail


@pytest.fixture
def unfinished(place):
    """Begin an output, do some work in it and see how that ends: the error, and what is said to be there."""

    def attempt(work=lambda journal: None, **how):
        try:
            with unfinished_output(OutputFolder(place / "out"), **how) as begun:
                work(begun.journal)
        except (OSError, ConfigError) as error:
            return error, what_stands(place / "out", stamp(place / "out"))
        return None, what_stands(place / "out", stamp(place / "out"))

    return attempt


@pytest.mark.parametrize("journal", JOURNALS)
@pytest.mark.parametrize("searching", [True, False])
def test_what_is_said_to_be_kept_has_a_decision(place, journal, searching):
    content, decided = JOURNALS[journal]
    (place / "out.partial").mkdir()
    if content is not None:
        (place / "out.partial" / JOURNAL_FILE).write_bytes(content)
    told = what_stands(place / "out", None, searching)
    assert ("--resume" in told) == ("out.partial" in told) == (decided and searching)


def decide(journal):
    journal.append("run")
    journal.append("decision")


STEPS = {
    "mark": (Path, "write_text"),
    "clear": (Path, "iterdir"),
    "append": (os, "fsync"),
}


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_fails_at_the_start(place, monkeypatch, unfinished, step, decided):
    """The file is named; the folder stays if something is decided, and only then."""
    if decided:
        (place / "out.partial").mkdir()
        (place / "out.partial" / JOURNAL_FILE).write_bytes(DECIDED)
        (place / "out.partial" / UNFINISHED).write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[step], fails() if step != "clear" else _only_in_place(fails()))
        error, told = unfinished(decide, resume=True)
    assert isinstance(error, OSError) and error.errno == errno.EDQUOT
    assert step == "clear" or str(place / "out.partial") in error.filename
    assert (place / "out.partial").exists() == decided == ("--resume" in told)
    error, told = unfinished(decide, resume=True)
    assert error is None and "--resume" in told


def _only_in_place(fail):
    """Whoever asks whether a folder is an unfinished output may look into it; then it fails."""
    iterdir, count = Path.iterdir, []

    def failing(self):
        count.append(self)
        return fail() if len(count) > 1 or (self / UNFINISHED).is_file() else iterdir(self)

    return failing


@pytest.mark.parametrize("when", ["close", "append"])
def test_a_full_disk_names_the_journal_however_often_it_is_tried(place, when):
    """What could not be written is tried again when the journal is closed, and has no name there."""
    journal = open_journal(place / JOURNAL_FILE)
    with journal._file, open("/dev/full", "a+b") as full:
        journal._file = full
        if when == "append":
            with pytest.raises(OSError) as caught:
                journal.append("decision")
            assert caught.value.filename == str(place / JOURNAL_FILE) and not journal.decisions
        journal.close()
        journal.close()


def test_a_search_in_the_way_of_a_replay_is_not_to_be_resumed_by_it(place, unfinished):
    (place / "out.partial").mkdir()
    (place / "out.partial" / JOURNAL_FILE).write_bytes(DECIDED)
    for searching in (True, False):
        error, _ = unfinished(searching=searching)
        assert isinstance(error, ConfigError) and ("--resume" in str(error)) == searching
    assert (place / "out.partial" / JOURNAL_FILE).read_bytes() == DECIDED


def test_a_replay_that_failed_is_repeated_as_it_was(place, models, capsys, monkeypatch):
    base, one, _ = models
    settings = {"samples": [], "neutral_texts": [], "baselines": False, "merge_ratios": [0.5]}
    path = tiny.write_config(place / "my.yaml", base, [one], "out", **settings)
    assert merge_monster.main(["--config", str(path), "--quiet"]) == 0
    replay = ["--replay", "out", "--output", "again", "--quiet", "--source", str(base.parent)]
    for broken in ("modules.checkpoints.writing._reads", "modules.output.folder.Path.write_text", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, fails())
            assert merge_monster.main(replay) == 1
        told = capsys.readouterr().err
        assert "again.partial/" in told.splitlines()[0] and "--resume" not in told
        with pytest.raises(SystemExit) as caught:
            merge_monster.main([*replay, "--resume"])
        assert caught.value.code == 2 and "can't be combined with --resume" in capsys.readouterr().err
        assert merge_monster.main(replay) == 0
        shutil.rmtree(place / "again")
    (place / "again.partial").mkdir()  # a search that did not finish is not the replay's
    (place / "again.partial" / JOURNAL_FILE).write_bytes(DECIDED)
    assert merge_monster.main(replay) == 2
    assert "--resume" not in capsys.readouterr().err
    monkeypatch.setattr("modules.run.replay.check_space", fails())
    assert merge_monster.main(replay) == 1
    assert "--resume" not in capsys.readouterr().err
    assert (place / "again.partial" / JOURNAL_FILE).read_bytes() == DECIDED

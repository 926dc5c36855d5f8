"""What libraries raise: a panic of one in Rust is an error like any other, and errors of a disk have a name."""

import json
import os
from pathlib import Path

import pytest
import tiny

import merge_monster
from modules.checkpoints.checkpoint import load_tokenizer
from modules.runtime.errors import CheckpointError, ConfigError, naming, reading, without_panics


class PanicException(BaseException):
    """What pyo3 makes of a panic, in a class of its own for each library."""


def raising(error):
    raise error


def test_a_panic_is_an_error_and_nothing_else_is_touched():
    with pytest.raises(RuntimeError, match="its library failed: index out of range"), without_panics():
        raise PanicException("index out of range\nstack backtrace")
    with pytest.raises(CheckpointError, match=r"file: can't be read .*index out of range"), reading(Path("file")):
        raise PanicException("index out of range")
    for error in (KeyboardInterrupt(), SystemExit(3), ValueError("x")):
        with pytest.raises(type(error)) as caught, without_panics():
            raise error
        assert caught.value is error


def test_a_name_is_given_where_there_is_none():
    for error, filename in ((OSError(5, "bad"), "here"), (OSError(5, "bad", "there"), "there"), (OSError("bad"), None)):
        with pytest.raises(OSError) as caught, naming(Path("here")):
            raise error
        assert caught.value.filename == filename


# Of a tokenizer.json: the first panics while it is read, the second when it is used.
DAMAGES = {
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.fixture(params=DAMAGES)
def panicking(request, place, models):
    """A base and a candidate whose tokenizer's library panics."""
    folders = []
    for name, folder in zip(("base", "one"), models, strict=False):
        (place / name).mkdir()
        for file in folder.iterdir():
            os.link(file, place / name / file.name)
        file = place / name / "tokenizer.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        file.write_text(json.dumps(settings | DAMAGES[request.param]), encoding="utf-8")
        folders.append(place / name)
    return folders


def test_a_tokenizer_that_panics_can_not_be_used(panicking):
    with pytest.raises(ConfigError, match="base: no usable tokenizer "):
        load_tokenizer(panicking[0])


def test_a_run_with_it_ends_in_one_line(place, models, panicking, capsys):
    settings = {"samples": [], "neutral_texts": [], "baselines": False, "merge_ratios": [0.5]}
    path = tiny.write_config(place / "my.yaml", panicking[0], [models[1]], "out", **settings)
    assert merge_monster.main(["--config", str(path), "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (place / "out").exists()


def test_a_panic_in_the_middle_of_a_run_ends_it_in_one_line_and_what_is_kept_is_said(
    place, models, capsys, monkeypatch
):
    from modules.output.run_record import RunRecord

    settings = {"samples": [], "neutral_texts": [], "baselines": False, "merge_ratios": [0.5]}
    path = tiny.write_config(place / "my.yaml", models[0], [models[1]], "out", **settings)
    note = RunRecord.note

    def panics(self, kind, **fields):
        return (
            raising(PanicException("index out of range\nmore")) if kind == "candidate" else note(self, kind, **fields)
        )

    monkeypatch.setattr(RunRecord, "note", panics)
    assert merge_monster.main(["--config", str(path), "--quiet"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "index out of range" in first and "--resume" in second and "Traceback" not in first

"""Runs that break off, at any moment and for any reason, and go on; models built again from their recipe."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from broken_runs import (
    JOURNAL,
    OWN,
    RECIPE,
    break_off,
    broken_after,
    differing,
    end,
    journal,
    merge,
    same,
    start,
    undisturbed,
    wait_until,
)
from runs import digest, log_of, make_models, tables
from safetensors.torch import load_file

import merge_monster
import modules.checkpoints.writing
from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.downloads import Prefetcher
from modules.config.load import load_config
from modules.config.schema import NO_PART, Config
from modules.model.arithmetic import arithmetics
from modules.output.folder import UNFINISHED
from modules.output.journal import Journal
from modules.output.run_record import RunRecord
from modules.runtime.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A sharded base and two candidates."""
    return make_models(tmp_path_factory.mktemp("models"), shard="60KB")


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"), models)


# ---------------------------------------------------------------------------------------------------------------------
# The journal
# ---------------------------------------------------------------------------------------------------------------------


def test_the_journal_tells_the_whole_run(models, whole):
    records = journal(whole)
    kinds = [record["kind"] for record in records]
    each = ["source", *["decision"] * 7, "candidate"]
    assert kinds == ["run", "source", "answers", "start", *each, *each]
    decisions = [record for record in records if record["kind"] == "decision"]
    assert [(d["candidate"], d["layer"], d["method"]) for d in decisions[:7]] == [
        *((1, layer, method) for layer in range(3) for method in ("slerp", "lerp")),
        (1, None, "lerp"),
    ]
    assert all(len(d["log_probabilities"]) == len(tiny.PAIRS) for d in decisions)
    assert any(d["ratio"] for d in decisions) and decisions[1]["before"] == decisions[0]["after"]
    for source, folder in zip((r for r in records if r["kind"] == "source"), models, strict=True):
        assert source["where"] == folder.name
        assert {name for name in source["fingerprint"] if name.endswith("safetensors")} == {
            path.name for path in folder.glob("*.safetensors")
        }


def test_a_run_goes_on_from_every_kind_of_record(place, models, whole):
    """Before the first decision, within each candidate, and at the ends of what differs in kind."""
    records, table = journal(whole), None
    kinds = [record["kind"] for record in records]
    ends = [count for count in range(6, len(kinds)) if kinds[count - 1] != kinds[count]]
    for count in (0, 6, *ends, ends[-1] - 3, len(kinds)):
        if count:
            break_off(place, whole, count)
            assert merge(place, models, "--resume") == 0
            expected = sum(record["kind"] == "decision" for record in records[:count])
            assert f"Resuming: re-applying {expected} recorded decisions" in log_of(place)
        else:
            assert merge(place, models, "--resume") == 0
            assert "Nothing to resume; starting a new run" in log_of(place)
            table = tables(log_of(place))[-1]
        assert same(place / "out", whole), count
        assert tables(log_of(place))[-1] == table
        assert [r["kind"] for r in journal(place / "out")] == kinds
        assert timeless(place / "out") == timeless(whole)
        assert sorted(path.name for path in place.iterdir()) == ["logs", "my.yaml", "out"]
        shutil.rmtree(place / "out")


def timeless(folder):
    """An output's recipe, but for how long all took."""
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    decisions = [{key: value for key, value in line.items() if key != "seconds"} for line in recipe["decisions"]]
    return recipe | {"seconds": {}, "decisions": decisions}


def test_a_torn_last_line_is_dropped(place, models, whole):
    line = (whole / JOURNAL).read_bytes().splitlines(keepends=True)[6]
    break_off(place, whole, 7, line[:-1])
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole)


def test_a_line_damaged_in_the_middle_is_refused(place, models, whole, capsys):
    break_off(place, whole, 9)
    lines = (place / "out.partial" / JOURNAL).read_bytes().splitlines(keepends=True)
    (place / "out.partial" / JOURNAL).write_bytes(b"".join([*lines[:5], b"\x00\x00\n", *lines[5:]]))
    assert merge(place, models, "--resume") == 2
    assert "line 6 is damaged; start over with --restart" in capsys.readouterr().err
    assert merge(place, models, "--restart") == 0
    assert same(place / "out", whole)


def test_an_unfinished_run_of_before_there_were_marks_goes_on(place, models, whole):
    break_off(place, whole, 9)
    (place / "out.partial" / UNFINISHED).unlink()
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole)


def test_an_unfinished_run_is_never_overwritten(place, models, whole, capsys):
    break_off(place, whole, 9)
    before = digest(place / "out.partial")
    for arguments in ([], ["--overwrite"]):
        assert merge(place, models, *arguments) == 2
        error = capsys.readouterr().err
        assert "an unfinished run (4 decisions)" in error
        assert "--resume to continue" in error and "--restart to start over" in error
    assert digest(place / "out.partial") == before
    assert merge(place, models, "--restart") == 0
    assert same(place / "out", whole) and "Resuming" not in log_of(place)


def test_a_finished_run_has_nothing_to_resume(place, models, whole):
    assert merge(place, models) == 0
    first = digest(place / "out")
    for arguments in (["--resume"], ["--resume", "--overwrite"]):
        assert merge(place, models, *arguments) == 0
        assert f"This run is already finished; its output is in {place / 'out'}" in log_of(place)
    assert digest(place / "out") == first
    assert merge(place, models, "--resume", merge_ratios=[0.5]) == 2  # another run's output is in its way


def test_another_configuration_is_refused(place, models, whole, capsys):
    break_off(place, whole, 9)
    before = digest(place / "out.partial")
    assert merge(place, models, "--resume", merge_ratios=[0.1, 0.2], pairs=tiny.PAIRS[:3]) == 2
    lists = "bad_phrases changed; good_phrases changed"
    assert f"{lists}; merge_ratios was [0.2, 0.4, 0.6, 0.8], is [0.1, 0.2]" in capsys.readouterr().err
    assert digest(place / "out.partial") == before


def harmless(place, models):
    """By name: what a run was begun with, and what it may go on with."""
    base, one, two = models
    (place / "link").symlink_to(one)
    (place / "mine").mkdir()
    for model in (one, two):
        shutil.copytree(model, place / "mine" / model.name)
    pairs = [{"phrase": "x", "contexts": ["a", {"context": "b", "weight": 2.0}]}]
    (place / "phrases.yaml").write_text(yaml.safe_dump({"bad_phrases": pairs}))
    mine = [str(place / "mine" / model.name) for model in (one, two)]
    return {
        "nothing": ({}, {}),
        "on_error": ({}, {"on_error": "skip"}),
        "keep_downloads": ({}, {"keep_downloads": False}),
        "mapper": ({}, {"mapper": {"top_k": 4}}),
        "system where no context is a chat": ({}, {"system": "Be brief."}),
        "device": ({}, {"device": "auto"}),
        "device back": ({"device": "auto"}, {"device": "cpu"}),
        "output": ({}, {"directories": {"output_directory": "elsewhere/.."}}),
        "paths spelt otherwise": (
            {},
            {
                "directories": {"model_path1": os.path.relpath(base) + "/"},
                "models_to_merge": [str(place / "link"), f"{two}//"],
            },
        ),
        "a folder of them": (
            {"models_to_merge": mine},
            {"models_to_merge": [], "directories": {"model_directory": "mine"}},
        ),
        "phrase file": ({"bad_phrases": pairs}, {"bad_phrases": [], "phrase_files": ["phrases.yaml"]}),
        "spelling": ({"strategy": "quantitive"}, {"strategy": "quantitative"}),
        "layers": ({"layers": "0-2"}, {"layers": [2, 0, 1]}),
        "scalars": ({"merge_ratios": [0.5]}, {"merge_ratios": 0.5}),
        "what auto means": ({}, {"compute_dtype": "float32"}),
        "defaults": ({}, {"merge_headers": True, "random_seed": 512, "merge_method": "lerp", "auto_weights": False}),
    }


def real(place, models):
    """The same of what it may not go on with, and the key that is named."""
    _, one, two = map(str, models)
    guarded = {"max_drift": 1.0, "neutral_texts": None}
    return {
        "directories": ({}, {"directories": {"model_path1": one}}),
        "models_to_merge": ({}, {"models_to_merge": [two, one]}),
        "merge_ratios": ({}, {"merge_ratios": [0.8, 0.6, 0.4, 0.2]}),
        "merge_method": ({}, {"merge_method": "slerp"}),
        "layers": ({"layers": [0, 1]}, {"layers": [1]}),
        "merge_headers": ({}, {"merge_headers": False}),
        "search": ({"neutral_texts": None}, {"search": "joint", "neutral_texts": None}),
        "joint": ({}, {"joint": {"steps": 3}}),
        "strategy": ({}, {"strategy": "all_phrases"}),
        "strategy_threshold": ({}, {"strategy_threshold": 0.9}),
        "auto_weights": ({}, {"auto_weights": True}),
        "bad_phrases": ({}, {"bad_phrases": [{"phrase": "x", "contexts": ["y"]}]}),
        "good_phrases": ({}, {"good_phrases": []}),
        "template": ({}, {"template": {"enable_thinking": False}}),
        "tokenizer": ({}, {"tokenizer": str(models[0])}),
        "device": ({}, {"device": "mps"}),
        "dtype": ({}, {"dtype": "bfloat16"}),
        "compute_dtype": ({}, {"compute_dtype": "bfloat16"}),
        "min_gain": ({}, {"min_gain": 0.1}),
        "drift_weight": ({}, {"drift_weight": 1.0, "neutral_texts": None}),
        "max_drift": ({}, guarded),
        "neutral_tokens": ({}, {"neutral_tokens": 9}),
        "random_seed": ({}, {"random_seed": 1}),
        "trust_remote_code": ({}, {"trust_remote_code": True}),
    }


def test_every_key_either_has_a_part_in_the_search_or_none(place, models):
    keys = {field.name for field in fields(Config)} - {"text"}
    assert set(real(place, models)) | set(NO_PART) == keys and not set(real(place, models)) & set(NO_PART)


def settings_at(place, models, changes):
    directories = {
        "model_path1": str(models[0]),
        "output_directory": str(place / "out"),
        **changes.get("directories", {}),
    }
    more = {"models_to_merge": [str(model) for model in models[1:]], **changes, "directories": directories}
    return load_config(tiny.write_config(place / "my.yaml", models[0], models[1:], place / "out", **more))


def record_of(journal, config, base):
    """A run's record, which computes in what is best for its settings."""
    computed = arithmetics(config.compute_dtype, config.dtype, base.main_dtype(), torch.device("cpu"))[0]
    return RunRecord(journal, config, computed.name)


def test_a_run_goes_on_where_only_what_has_no_part_in_it_has_changed(place, models):
    base = open_checkpoint(models[0], "base")
    for name, (before, after) in harmless(place, models).items():
        begun = Journal()
        record_of(begun, settings_at(place, models, before), base)
        assert record_of(begun, settings_at(place, models, after), base).warnings(None) == [], name


def test_a_run_does_not_go_on_where_what_is_searched_has_changed(place, models, monkeypatch):
    base = open_checkpoint(models[0], "base")
    for key, (before, after) in real(place, models).items():
        begun = Journal()
        record_of(begun, settings_at(place, models, before), base)
        if key == "device":
            monkeypatch.setattr("modules.model.devices.present_devices", lambda: ["mps", "cpu"])
        with pytest.raises(ConfigError, match=rf"has changed since .* was started: {key} (was|changed)"):
            record_of(begun, settings_at(place, models, after), base)
        monkeypatch.undo()
        os.chdir(place)


def test_another_device_than_auto_meant_before_is_told(place, models):
    base, begun = open_checkpoint(models[0], "base"), Journal()
    config = settings_at(place, models, {"device": "auto"})
    record_of(begun, config, base)
    begun.records[0]["device"] = "elsewhere"
    told = record_of(begun, config, base).warnings(None)
    assert told == ["the run started with device elsewhere, but this is cpu; the last digits may differ"]


def test_a_run_goes_on_from_another_folder_with_everything_spelt_otherwise(place, models, whole, monkeypatch):
    break_off(place, whole, 9)
    (place / "deeper").mkdir()
    monkeypatch.chdir(place / "deeper")
    changes = {
        "on_error": "skip",
        "keep_downloads": False,
        "mapper": {"top_k": 4},
        "device": "auto",
    }
    directories = {"model_path1": os.path.relpath(models[0]), "output_directory": "../out"}
    changes |= {"directories": directories, "models_to_merge": [os.path.relpath(model) for model in models[1:]]}
    assert merge(place, models, "--resume", **changes) == 0
    assert same(place / "out", whole)
    assert merge(place, models, "--resume", on_error="stop") == 0
    assert "This run is already finished" in log_of(place / "deeper")


@pytest.mark.parametrize("damage", [{}, {"models_to_merge": [3]}])
def test_settings_that_no_run_has_written_are_damaged(place, models, whole, capsys, damage):
    break_off(place, whole, 9)
    path = place / "out.partial" / JOURNAL
    first, *others = path.read_bytes().splitlines(keepends=True)
    run = json.loads(first)
    run["settings"] = {**run["settings"], **damage} if damage else {}
    path.write_bytes(json.dumps(run).encode() + b"\n" + b"".join(others))
    assert merge(place, models, "--resume") == 2
    error = capsys.readouterr().err
    assert "line 1 is damaged" in error


def test_a_journal_of_another_version_is_refused(place, models, whole, capsys):
    break_off(place, whole, 9)
    path = place / "out.partial" / JOURNAL
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(json.dumps({**json.loads(first), "program": "0.9"}).encode() + b"\n" + b"".join(others))
    assert merge(place, models, "--resume") == 2
    assert "was started by Merge Monster 0.9" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 2])
def test_a_source_that_has_changed_is_refused(place, models, whole, capsys, number):
    ours = [Path(shutil.copytree(folder, place / "models" / folder.name)) for folder in models]
    assert merge(place, ours) == 0
    records = len(journal(place / "out"))
    shutil.move(place / "out", place / "before")
    break_off(place, place / "before", records - 1)
    files = sorted(ours[number].glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes() + b"\0")
    assert merge(place, ours, "--resume") in (1, 2)
    error = capsys.readouterr().err
    assert f"{files[0].name} has changed since" in error or "can't be read" in error or "can't be loaded" in error
    assert (place / "out.partial" / JOURNAL).is_file() and not (place / "out").exists()


def test_another_library_is_a_warning(place, models, whole):
    break_off(place, whole, 9)
    path = place / "out.partial" / JOURNAL
    path.write_bytes(path.read_bytes().replace(torch.__version__.encode(), b"1.0", 1))
    assert merge(place, models, "--resume") == 0
    assert f"the run started with torch 1.0, but this is {torch.__version__}; the last digits may differ" in log_of(
        place
    )


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # at chosen moments: test_a_run_goes_on_from_every_kind_of_record
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(place, models, whole):
    """During load, search, header and save: kill -9 at random, as often as it takes until the run is done."""
    began = time.monotonic()
    assert end(start(place, models)) == 0
    length = time.monotonic() - began
    dice, kills, finished = random.Random(5), 0, 0
    phases = set()
    while kills < 36:
        shutil.rmtree(place / "out", ignore_errors=True)
        while True:
            child = start(place, models, "--resume")
            time.sleep(dice.uniform(0.02, 1.0) * length)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = end(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (place / "child.txt").read_text()[-2000:]
            kills += 1
            partial = place / "out.partial"
            kept = {path.name for path in partial.iterdir()} if partial.exists() else set()
            phases.add("save" if len(kept) > 2 else "search" if b'"decision"' in read(partial / JOURNAL) else "load")
        finished += 1
        assert same(place / "out", whole), f"after {kills} kills"
        assert sorted(path.name for path in place.iterdir()) == ["child.txt", "logs", "my.yaml", "out"]
    assert phases >= {"load", "search"} and finished >= 3, (phases, finished)


def read(path):
    return path.read_bytes() if path.exists() else b""


@pytest.mark.slow  # in one process: test_swap
def test_a_run_killed_while_it_saves(place, models, whole, monkeypatch):
    """One shard after another, and between the renames."""

    def dies_at(number):
        calls = [0]

        def counting(*_):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sync, rename = os.fsync, Path.rename

        def before():
            monkeypatch.setattr(os, "fsync", lambda *a: (saving() and counting(), sync(*a))[1])
            monkeypatch.setattr(Path, "rename", lambda *a: (counting(), rename(*a), counting())[1])

        def saving():
            return any((place / "out.partial").glob("model-*"))

        return before

    assert merge(place, models, "--overwrite", merge_ratios=[0.3]) == 0
    earlier = digest(place / "out")
    for number in range(1, 100):
        code = end(start(place, models, "--overwrite", "--resume", before=dies_at(number)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (place / "child.txt").read_text()[-2000:]
        # The old output, or the new one, or the old one aside for the blink of an eye.
        if (place / "out").exists():
            assert digest(place / "out") == earlier or same(place / "out", whole, marked=True)
        if same_or_none(place / "out", whole):
            assert merge(place, models, "--overwrite", "--resume") == 0
            assert merge(place, models, "--overwrite", merge_ratios=[0.3]) == 0
            earlier = digest(place / "out")
    assert number > 8, "it was hardly interrupted"
    assert same(place / "out", whole)
    assert sorted(path.name for path in place.iterdir()) == ["child.txt", "logs", "my.yaml", "out"]


def same_or_none(folder, whole):
    return folder.exists() and same(folder, whole, marked=True)


def test_a_full_disk(place, models, whole):
    limit = 40_000  # bytes that a file may have: more than the journal's, less than a shard's
    before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    assert end(start(place, models, before=before)) == 1
    told = (place / "child.txt").read_text()
    assert "can't be written" in told and "with --resume to continue" in told and "Traceback" not in told
    assert not (place / "out").exists()
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole)
    assert len(tables(log_of(place))) == 3


def test_a_shard_that_the_disk_spoils_is_noticed(place, models, whole, monkeypatch, capsys):
    own = modules.checkpoints.writing._reads

    def spoiled(file, expected):
        if "00002" in file.name:
            with open(file.name, "r+b") as same:
                same.seek(file.tell() + len(expected) - 3)
                same.write(b"\x55")
        return own(file, expected)

    monkeypatch.setattr(modules.checkpoints.writing, "_reads", spoiled)
    assert merge(place, models) == 1
    error = capsys.readouterr().err
    assert "model-00002-of-00004.safetensors: " in error and "reads back differently" in error
    assert not (place / "out").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole)


def test_a_disk_that_is_full_in_the_middle_of_the_search(place, models, whole):
    limit = 9_000  # the journal does not fit
    before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    assert end(start(place, models, before=before)) == 1
    assert "Traceback" not in (place / "child.txt").read_text()
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_decision(place, models, whole, number):
    child = start(place, models)
    wait_until(lambda: read(place / "out.partial" / JOURNAL).count(b'"decision"') >= 2)
    os.kill(child, number)
    assert end(child) == 130
    told = (place / "child.txt").read_text()
    assert "Stopping after this step; press Ctrl-C again" in told
    assert "Interrupted. Nothing was written to" in told and "--restart" in told
    records = journal(place / "out.partial")
    assert records[-1]["kind"] in ("decision", "candidate", "source")
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole)


def test_a_second_signal_ends_the_run_at_once(place, models):
    child = start(place, models, merge_ratios=[number / 20000 for number in range(20000)])
    wait_until(lambda: b"Candidate 1/2" in read(place / "child.txt"))
    time.sleep(0.2)
    os.kill(child, signal.SIGINT)
    wait_until(lambda: b"press Ctrl-C again" in read(place / "child.txt"))
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first one only asks"
    began = time.monotonic()
    os.kill(child, signal.SIGINT)
    assert end(child) == 130
    assert time.monotonic() - began < 5
    assert not (place / "out.partial").exists()  # it had decided nothing


def test_two_runs_into_one_output(place, models, whole, capsys):
    child = start(place, models, merge_ratios=[number / 20000 for number in range(20000)])
    wait_until((place / "out.partial" / JOURNAL).exists)
    time.sleep(0.1)
    for arguments in ([], ["--resume"], ["--restart"]):
        assert merge(place, models, *arguments) == 2
        assert "another run is writing here" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)
    end(child)
    assert merge(place, models, "--restart") == 0
    assert same(place / "out", whole)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_candidate_that_breaks_in_the_middle_stops_the_run(place, models, whole, monkeypatch, capsys, on_error):
    """Though it may be skipped: without the layers of it that were accepted the output can't be written."""
    base, one, two = models
    ours = Path(shutil.copytree(two, place / "models/two"))
    broken_after(monkeypatch, ours, 3)
    assert merge(place, (base, one, ours), on_error=on_error) == 1
    error = capsys.readouterr().err
    assert f"{ours / 'model.safetensors'}: can't be read" in error and "--resume" in error
    shutil.copy(two / "model.safetensors", ours)
    assert merge(place, (base, one, ours), "--resume") == 0
    theirs = load_file(next(whole.glob("*.safetensors")))
    found = load_file(place / "out" / next(whole.glob("*.safetensors")).name)
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


def test_a_candidate_of_which_a_layer_cannot_be_read_is_skipped_if_so_asked(place, models, monkeypatch):
    base, one, two = models
    ours, stream = Path(shutil.copytree(one, place / "models/one")), Candidate.stream

    def failing(self, names, *room):
        if self.checkpoint.path == ours and any(".layers.2." in name for name in names):
            raise CheckpointError("the layer can't be read")
        return stream(self, names, *room)

    monkeypatch.setattr(Candidate, "stream", failing)
    assert merge(place, (base, ours, two), on_error="skip") == 0
    log = log_of(place)
    assert "WARNING: Skipping the rest of one; its merges so far are kept: " in log
    assert "Candidate 2/2: two" in log and "[0." in log.split("Candidate 2/2")[1]
    recipe = json.loads((place / "out" / RECIPE).read_text())
    assert "can't be read" in recipe["failures"]["1"]
    assert len([d for d in recipe["decisions"] if d["candidate"] == 1]) == 4  # two layers, two methods
    # Two layers of it were merged: the recipe knows how, and a run that goes on from here does, too.
    records = len(journal(place / "out"))
    shutil.move(place / "out", place / "whole")
    break_off(place, place / "whole", records - 3)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert merge(place, (base, ours, two), "--resume", on_error="skip") == 0
    assert same(place / "out", place / "whole")


def test_a_candidate_that_never_comes_is_skipped_and_the_recipe_still_builds_the_model(place, models, monkeypatch):
    wait = Prefetcher.wait

    def failing(self, number):
        if number == 1:
            raise CheckpointError("one: the hub does not answer")
        wait(self, number)

    monkeypatch.setattr(Prefetcher, "wait", failing)
    assert merge(place, models, on_error="skip") == 0
    recipe = json.loads((place / "out" / RECIPE).read_text())
    assert [source["number"] for source in recipe["sources"]] == [0, 2] and list(recipe["failures"]) == ["1"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert replay(place / "out", "again", lying_in(models)) == 0
    for file in (place / "out").glob("*.safetensors"):
        assert file.read_bytes() == (place / "again" / file.name).read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(place, models, capsys):
    place.chmod(0o500)
    try:
        assert merge(place, models) == 2
        assert "can't be written" in capsys.readouterr().err
    finally:
        place.chmod(0o700)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def replay(recipe, output, *arguments):
    return merge_monster.main(["--replay", str(recipe), "--output", str(output), *arguments])


def lying_in(models):
    """The option that says where the models of a recipe are."""
    return f"--source={models[0].parent}"


def test_a_recipe_of_a_run_that_accepted_nothing_builds_the_base(place, models, monkeypatch):
    same_as_base = shutil.copytree(models[0], place / "same")
    assert merge(place, (models[0], same_as_base), merge_method="lerp") == 0
    assert "no merge was accepted" in log_of(place)
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert replay(place / "out" / RECIPE, "again", lying_in(models)) == 0
    for file in models[0].glob("*.safetensors"):
        assert file.read_bytes() == (place / "elsewhere/again" / file.name).read_bytes()


def test_a_recipe_builds_the_same_bits(place, models, whole):
    before = {folder: digest(folder) for folder in models}
    assert replay(whole / RECIPE, place / "again", lying_in(models)) == 0
    others = differing(digest(place / "again"), digest(whole))
    assert others == {JOURNAL, "README.md", "merge_monster.yaml"}  # the last two have the output's name
    assert before == {folder: digest(folder) for folder in models}
    assert sorted(path.name for path in place.iterdir()) == ["again", "logs"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", ["auto", "float32", "bfloat16"])
def test_a_recipe_in_every_dtype(place, dtype, setting):
    models = make_models(place / "models", dtype)
    assert merge(place, models, dtype=setting, merge_method=["slerp", "slice"]) == 0
    assert replay(place / "out" / RECIPE, place / "again", lying_in(models)) == 0
    assert digest(place / "again")["model.safetensors"] == digest(place / "out")["model.safetensors"]


def test_sources_that_lie_elsewhere(place, models, whole, capsys):
    recipe = json.loads((whole / RECIPE).read_text(encoding="utf-8"))
    for source in recipe["sources"]:
        source["where"] = f"nowhere-{source['number']}"
    (place / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert replay(place / "recipe.json", place / "again") == 2
    error = capsys.readouterr().err
    assert f"not found in or near {place}, {place.parent}: " in error and ": base, one, two; " in error
    assert "--source NAME=PATH" in error
    arguments = [f"--source={folder.name}={folder}" for folder in models]
    assert replay(place / "recipe.json", place / "again", *arguments) == 0
    assert [path for path in digest(place / "again") if "safetensors" in path]
    assert all(digest(place / "again")[path] == digest(whole)[path] for path in digest(whole) if "safetensors" in path)
    assert replay(place / "recipe.json", place / "other", *arguments, f"--source=one={models[2]}") == 2
    assert f"{models[2]}: model.safetensors has changed since the recipe was written" in capsys.readouterr().err
    assert not (place / "other").exists() and not (place / "other.partial").exists()
    assert replay(place / "recipe.json", place / "other", "--source=three=x") == 2
    assert "--source three: the recipe has no such model; it has base, one, two" in capsys.readouterr().err


def test_decisions_that_can_not_be_carried_out(place, models, whole, capsys):
    recipe = json.loads((whole / RECIPE).read_text())
    next(d for d in recipe["decisions"] if d["ratio"] is not None and d["layer"] is not None)["layer"] = 7
    (place / "recipe.json").write_text(json.dumps(recipe))
    assert replay(place / "recipe.json", place / "again", lying_in(models)) == 2
    error = capsys.readouterr().err
    assert "can't be repeated: the base has layers 0 to 2, and no layer 7" in error and "Traceback" not in error
    assert not (place / "again").exists() and not (place / "again.partial").exists()


def test_what_is_no_recipe(place, models, whole, capsys):
    recipe = json.loads((whole / RECIPE).read_text())
    for content, words in (
        ("{", "not a recipe"),
        ("[]", "not a recipe"),
        ("{}", "not a recipe"),
        (json.dumps({**recipe, "decisions": 1}), "not a recipe of format 1 (decisions: "),
        (json.dumps({**recipe, "format": 9}), "not a recipe of format 1 (format: "),
    ):
        (place / "recipe.json").write_text(content)
        assert replay(place / "recipe.json", place / "again") == 2
        assert words in capsys.readouterr().err
    assert replay(place / "nowhere.json", place / "again") == 2
    assert "no such file" in capsys.readouterr().err


def test_a_recipe_does_not_decide_that_code_is_run(place, models, whole, capsys):
    recipe = json.loads((whole / RECIPE).read_text())
    recipe["settings"]["trust_remote_code"] = True
    (place / "recipe.json").write_text(json.dumps(recipe))
    assert replay(place / "recipe.json", place / "again") == 2
    assert "add --trust-remote-code" in capsys.readouterr().err
    assert not (place / "again").exists()
    assert replay(place / "recipe.json", place / "again", "--trust-remote-code", lying_in(models)) == 0


def test_a_recipe_does_not_overwrite(place, models, whole, capsys):
    (place / "again").mkdir()
    (place / "again/mine.txt").write_text("mine")
    assert replay(whole / RECIPE, place / "again", lying_in(models)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (place / "again/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--replay", "x"], "--replay needs --output"),
        (["--source", "a=b"], "--source needs --replay"),
        (["--replay", "x", "--output", "y", "--resume"], "can't be combined with --resume"),
        (["--replay", "x", "--output", "y", "--dry-run"], "or --dry-run"),
        (["--trust-remote-code"], "--trust-remote-code needs --replay"),
        (["--replay", "x", "--output", "y", "--source", "a"], "expected NAME=PATH"),
        (["--resume", "--restart"], "not allowed with argument"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        merge_monster.main(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_a_shell_sees_how_to_go_on(place, models):
    """The message's own words, pasted."""
    base, one, two = models
    config = tiny.write_config(place / "my.yaml", base, [one, two], place / "out", on_error="stop")
    command = [sys.executable, str(Path(merge_monster.__file__)), "--config", str(config)]
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Nothing to resume; starting a new run" in result.stdout


def test_a_recipe_may_be_named_as_the_output_that_holds_it(place, models, whole):
    assert replay(whole, "again", lying_in(models)) == 0
    assert differing(digest(place / "again"), digest(whole)) <= OWN


REPLAYS = {
    "/": ["--output", "/"],
    "invalid path (File name too long)": ["--output", "a" * 250],
    "is not available": ["--output", "again", "--device", "\x1b[2J"],
    "no such model": ["--output", "again", "--source", "no\n=here"],
    "one (one/zzz); add --source DIR": ["--output", "again", "--source", "one=one/zzz"],
}


@pytest.mark.parametrize("words", REPLAYS)
def test_a_replay_that_cannot_be_done_as_asked_is_refused(place, models, whole, capsys, words):
    (place / "one").mkdir()
    assert merge_monster.main(["--replay", str(whole), lying_in(models), *REPLAYS[words]]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.replace("\n", "").isprintable()

"""Joint searches as whole runs: what is kept, breaks, replays, limits, processes, what is refused."""

import itertools
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import tiny
import torch
import yaml
from broken_runs import JOURNAL, RECIPE, break_off, end, start, wait_until
from runs import digest, log_of, make_models, merge, sizes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merge_monster
import modules.output.journal
from modules.checkpoints.candidate import Candidate
from modules.runtime.errors import CheckpointError
from modules.scoring.scorer import Scorer

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. "
STEPS = 4


HALF = pytest.param(torch.bfloat16, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[torch.float32, HALF], ids=["float32", "bfloat16"])
def models(request, tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), request.param, shard="60KB")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "plain.txt"
    path.write_text(TEXT * 12, encoding="utf-8")
    return str(path)


def searched(place, models, text, *arguments, **more):
    settings = {"search": "joint", "joint": {"steps": STEPS}, "neutral_texts": [text], "neutral_tokens": 100, **more}
    return merge(place, models, *arguments, **settings)


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(models, text, tmp_path_factory):
    """What a run leaves that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert searched(folder, models, text, held_out=0.3) == 0
    return folder


def test_it_finds_less_than_it_began_with_and_tells_of_every_step(whole):
    recipe, log = recipe_of(whole / "out"), log_of(whole)
    steps = recipe["joint"]["steps"]
    assert len(steps) == STEPS
    weight = sum(abs(p["weight"]) * p["before"] for p in recipe["phrases"]) / 0.05
    assert f": {weight:.5g} per nat (auto), checked on 100 tokens" in log
    objectives = [line["total"] + weight * line["trial_kl"] for line in steps]
    assert objectives[-1] < objectives[0]
    for number, (before, after) in enumerate(itertools.pairwise(steps), start=1):
        line = f"Step {number}/{STEPS} - total {before['total']:.3f} -> {after['total']:.3f} - Held out "
        assert f"{line}{after['held_out']:.3f} - KL in trials {after['trial_kl']:.4f}\n" in log
    assert f"Step {STEPS}/{STEPS} - total {steps[-1]['total']:.3f} -> " in log
    assert recipe["decisions"] == [] and recipe["metrics"]["base"]["held_out"] > 0


def test_the_output_is_the_mix_that_the_recipe_tells(models, whole):
    recipe = recipe_of(whole / "out")
    shares = recipe["joint"]["weights"]
    assert len(shares) == 4 and any(map(any, shares))
    assert all(
        share == round(share, 2) and 0 <= share <= 1 and (not share or share >= 0.01) for row in shares for share in row
    )
    files = [{k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()} for folder in models]
    merged = {k: v for f in sorted((whole / "out").glob("*.safetensors")) for k, v in load_file(f).items()}
    for name, tensor in merged.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 3
        row = shares[layer]
        base, *others = (tensors[name].double() for tensors in files)
        mixed = base + sum(share * (other - base) for share, other in zip(row, others, strict=True))
        close = 2**-7 if tensor.dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(tensor.double(), mixed, rtol=close, atol=1e-6)
    weights = sizes(models[0])
    means = [np.average([*column, column[-1]], weights=weights) for column in zip(*shares, strict=True)]
    assert recipe["composition"] == pytest.approx({"base": 1 - sum(means), "one": means[0], "two": means[1]})


def test_what_is_printed_is_what_is_saved(place, models, whole, text):
    last = [line for line in log_of(whole).splitlines() if line.startswith("|")]
    path = tiny.write_config(place / "again.yaml", whole / "out", [models[1]], place / "x", held_out=0.3)
    assert merge_monster.main(["--config", str(path)]) == 0
    again = [line for line in log_of(place).splitlines() if line.startswith("| BAD") or line.startswith("| GOOD")]
    ours = [line for line in last if line.startswith("| BAD") or line.startswith("| GOOD")]
    count = len(ours) // 2
    assert [line.split("|")[4] for line in again[:count]] == [line.split("|")[4] for line in ours[count:]]


def test_it_is_never_worse_than_the_base_or_a_candidate_whole(place, models, text):
    """Steps that lead nowhere good: far too large, and only one."""
    for steps in (1, 3):
        joint = {"steps": steps, "step_size": 1.0}
        assert searched(place, models, text, "--overwrite", joint=joint, drift_weight=0.0) == 0
        recipe = recipe_of(place / "out")
        known = [recipe["metrics"]["base"]["total"], *(alone["total"] for alone in recipe["baselines"].values())]
        assert recipe["metrics"]["merge"]["total"] <= min(known) + 1e-6
    assert searched(place, models, text, "--overwrite", joint=joint, drift_weight=1000.0) == 0
    assert set(map(tuple, recipe_of(place / "out")["joint"]["weights"])) == {(0.0, 0.0)}  # any drift is too much
    log = log_of(place)
    assert "No step beat the base; keeping the base" in log
    assert "no merge was accepted" in log


def test_the_best_candidate_whole_is_kept_where_no_step_comes_below_it(place, models, text):
    """The first step of Adam moves every share by its whole size, here from one end to the other."""
    joint = {"steps": 1, "step_size": 1.0}
    assert searched(place, models, text, joint=joint, drift_weight=0) == 0
    recipe = recipe_of(place / "out")
    assert recipe["joint"]["start"][0] == [0.0, 0.98]
    assert "No step beat two; keeping two" in log_of(place)
    assert set(map(tuple, recipe["joint"]["weights"])) == {(0.0, 1.0)} and recipe["composition"]["two"] == 1.0
    assert recipe["metrics"]["merge"]["total"] == pytest.approx(recipe["baselines"]["2"]["total"], rel=0.02)


def test_a_candidate_beyond_the_limit_is_passed_over_for_the_next_best(place, models, text, tmp_path):
    near = tiny.make_candidate(tmp_path / "near", models[0], 1, amount=0.005)
    joint = {"steps": 1, "step_size": 1.0}
    settings = {"joint": joint, "drift_weight": 0, "max_drift": 0.02}
    assert searched(place, (models[0], models[2], near), text, **settings) == 0
    recipe = recipe_of(place / "out")
    far, next_best = recipe["baselines"].values()
    assert far["trial_kl"] > 0.02 > next_best["trial_kl"]
    assert far["total"] < next_best["total"] < recipe["metrics"]["base"]["total"]
    assert set(map(tuple, recipe["joint"]["start"])) == {(0.0, 0.98)}
    assert recipe["metrics"]["merge"]["total"] <= next_best["total"] * (1 + 1e-5)


def test_in_some_layers_it_is_never_worse_than_a_candidate_in_these(place, models, text, tmp_path):
    """The best candidate whole has the base's own tensors in the one layer that is searched."""

    def with_the_base_s(model):
        base = AutoModelForCausalLM.from_pretrained(models[0], dtype="auto")
        model.model.layers[1].load_state_dict(base.model.layers[1].state_dict())

    hollow = tiny.make_candidate(tmp_path / "hollow", models[0], 2, change=with_the_base_s)
    settings = {"layers": 1, "merge_headers": False, "drift_weight": 0, "joint": {"steps": 1, "step_size": 1.0}}
    assert searched(place, (models[0], hollow, models[1]), text, **settings) == 0
    recipe = recipe_of(place / "out")
    assert recipe["baselines"]["1"]["total"] < min(
        recipe["baselines"]["2"]["total"], recipe["metrics"]["base"]["total"]
    )

    own, theirs = ({k: v for f in one.glob("*.safetensors") for k, v in load_file(f).items()} for one in models[:2])
    shutil.copytree(models[0], tmp_path / "layer")
    for file in (tmp_path / "layer").glob("*.safetensors"):
        tensors = {name: theirs[name] if ".layers.1." in name else own[name] for name in load_file(file)}
        save_file(tensors, file, metadata={"format": "pt"})
    path = tiny.write_config(place / "layer.yaml", tmp_path / "layer", [models[0]], place / "x", merge_ratios=0)
    assert merge_monster.main(["--config", str(path)]) == 0
    total = recipe_of(place / "x")["metrics"]["base"]["total"]
    assert recipe["metrics"]["merge"]["total"] <= min(total, recipe["metrics"]["base"]["total"]) * (1 + 1e-5)
    assert total < recipe["metrics"]["base"]["total"] and recipe["joint"]["start"][1] == [0.0, 0.98]


@pytest.mark.parametrize("where", range(3))
def test_a_run_that_was_broken_off_ends_with_the_same_bytes(place, models, whole, text, where):
    lines = [json.loads(line)["kind"] for line in (whole / "out" / JOURNAL).read_text().splitlines()]
    steps = [number for number, kind in enumerate(lines, start=1) if kind == "step"]
    for records in steps[where::3]:
        break_off(place, whole / "out", records)
        assert searched(place, models, text, "--resume", held_out=0.3) == 0
        done = lines[:records].count("step")
        assert f"Resuming after step {done} of {STEPS}" in log_of(place)
        ours, theirs = recipe_of(place / "out"), recipe_of(whole / "out")
        assert ours["joint"]["weights"] == theirs["joint"]["weights"]
        assert [s["total"] for s in ours["joint"]["steps"]] == [s["total"] for s in theirs["joint"]["steps"]]
        files = [name for name in digest(whole / "out") if name.endswith(".safetensors")]
        assert files and all(digest(place / "out")[name] == digest(whole / "out")[name] for name in files)
        (place / "out").rename(place / f"out-{records}")


@pytest.mark.parametrize("made", [1, 3])
def test_an_unfinished_run_is_told_by_its_steps(place, models, whole, text, capsys, made):
    lines = [json.loads(line)["kind"] for line in (whole / "out" / JOURNAL).read_text().splitlines()]
    break_off(place, whole / "out", lines.index("step") + made)
    assert searched(place, models, text, held_out=0.3) == 2
    error = capsys.readouterr().err
    assert re.search(rf"\({made} steps?\)", error) and "decision" not in error


def test_a_journal_without_a_step_begins_again(place, models, whole, text):
    lines = [json.loads(line)["kind"] for line in (whole / "out" / JOURNAL).read_text().splitlines()]
    break_off(place, whole / "out", lines.index("step"))
    assert searched(place, models, text, "--resume", held_out=0.3) == 0
    assert recipe_of(place / "out")["joint"]["weights"] == recipe_of(whole / "out")["joint"]["weights"]


def test_a_killed_run_goes_on(place, models, whole, text):
    settings = {"search": "joint", "joint": {"steps": STEPS}, "neutral_texts": [text], "neutral_tokens": 100}
    settings |= {"held_out": 0.3, "merge_method": "lerp", "auto_weights": False}

    def slow():
        append = modules.output.journal.Journal.append

        def slowly(self, kind, **fields):
            append(self, kind, **fields)
            time.sleep(0.3 * (kind == "step"))

        modules.output.journal.Journal.append = slowly

    child = start(place, models, before=slow, **settings)
    path = place / "out.partial" / JOURNAL
    wait_until(lambda: path.exists() and path.read_text().count('"kind": "step"') >= 3)
    os.kill(child, signal.SIGKILL)
    assert end(child) == -signal.SIGKILL
    assert searched(place, models, text, "--resume", held_out=0.3) == 0
    assert recipe_of(place / "out")["joint"]["weights"] == recipe_of(whole / "out")["joint"]["weights"]


def test_a_recipe_builds_the_same_bits(place, models, whole):
    replay = ["--replay", str(whole / "out"), "--output", str(place / "again"), "--source", str(models[0].parent)]
    assert merge_monster.main(replay) == 0
    files = [name for name in digest(whole / "out") if name.endswith(".safetensors")]
    assert files and all(digest(place / "again")[name] == digest(whole / "out")[name] for name in files)


def test_a_limit_scales_all_shares(place, models, text):
    assert searched(place, models, text, drift_weight=0.0) == 0
    free = recipe_of(place / "out")
    limit = free["metrics"]["merge"]["kl"] / 10
    assert searched(place, models, text, "--overwrite", drift_weight=0.0, max_drift=limit) == 0
    held = recipe_of(place / "out")
    assert 0 < held["metrics"]["merge"]["kl"] < 1.5 * limit
    assert f" to hold max_drift {limit:g}\n" in log_of(place)
    assert sum(map(sum, held["joint"]["weights"])) < sum(map(sum, free["joint"]["weights"]))


def test_without_headers_there_is_no_row_for_what_is_outside(place, models, text):
    assert searched(place, models, text, merge_headers=False) == 0
    assert len(recipe_of(place / "out")["joint"]["weights"]) == 3
    folders = models[0], place / "out"
    base, merged = ({k: v for f in one.glob("*.safetensors") for k, v in load_file(f).items()} for one in folders)
    outside = [name for name in base if ".layers." not in name]
    assert outside and all(torch.equal(base[name], merged[name]) for name in outside)


def test_a_lack_of_memory_is_met_by_smaller_packs(place, models, text, whole, monkeypatch):
    failed = []

    def packs(self):
        import traceback

        if not failed and any("descend" in line.name for line in traceback.extract_stack()):
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return vars(self)["packs_here"]

    kept = property(packs, lambda self, found: vars(self).update(packs_here=found))
    monkeypatch.setattr(Scorer, "packs_here", kept, raising=False)
    assert searched(place, models, text, held_out=0.3) == 0
    ours, theirs = recipe_of(place / "out"), recipe_of(whole / "out")
    assert ours["metrics"]["merge"]["total"] == pytest.approx(theirs["metrics"]["merge"]["total"], rel=0.2)


def test_a_candidate_that_breaks_ends_the_run_and_loses_nothing(place, models, text, whole, monkeypatch, capsys):
    stream, path = Candidate.stream, place / "out.partial" / JOURNAL

    def failing(self, names, *room):
        if self.name == "two" and path.read_text().count('"kind": "step"') == 3:
            raise CheckpointError("two: model.safetensors: Input/output error")
        return stream(self, names, *room)

    monkeypatch.setattr(Candidate, "stream", failing)
    assert searched(place, models, text, held_out=0.3, on_error="skip") == 1
    error = capsys.readouterr().err
    assert "Input/output error" in error and "--resume" in error
    monkeypatch.undo()
    os.chdir(place)
    assert searched(place, models, text, "--resume", held_out=0.3) == 0
    assert recipe_of(place / "out")["joint"]["weights"] == recipe_of(whole / "out")["joint"]["weights"]


def test_downloads_and_dry_runs_and_damaged_journals(place, models, text, whole, capsys):
    assert searched(place, models, text, "--dry-run", held_out=0.3) == 0
    assert "Dry run" in capsys.readouterr().out
    break_off(place, whole / "out", 10**6)
    path = place / "out.partial" / JOURNAL
    lines = path.read_text().splitlines()
    step = next(number for number, line in enumerate(lines) if '"kind": "step"' in line)
    broken = json.loads(lines[step])
    broken["weights"][0] = [0.5]
    path.write_text("\n".join([*lines[:step], json.dumps(broken), *lines[step + 1 :]]) + "\n")
    assert searched(place, models, text, "--resume", held_out=0.3) == 2
    assert f"line {step + 1} is damaged" in capsys.readouterr().err


def test_it_begins_where_it_is_told_to(place, models, text):
    """The weights of the last entry for a row, and none in a row without any; a break changes nothing."""
    start = [{"candidate": 2, "weight": 0.4}, {"candidate": 1, "layers": "0-1", "weight": 0.7}]
    start.append({"candidate": 2, "layers": 1, "weight": 0.0})
    joint = {"steps": 2, "start": start}
    assert searched(place, models, text, joint=joint) == 0
    recipe = recipe_of(place / "out")
    assert recipe["joint"]["start"] == [[0.7, 0.4], [0.7, 0.0], [0.0, 0.4], [0.0, 0.4]]
    whole = (place / "out").rename(place / "whole")
    lines = [json.loads(line)["kind"] for line in (whole / JOURNAL).read_text().splitlines()]
    break_off(place, whole, lines.index("step") + 1)
    assert searched(place, models, text, "--resume", joint=joint | {"start": start[:2]}) == 2
    assert searched(place, models, text, "--resume", joint=joint) == 0
    assert recipe_of(place / "out")["joint"]["weights"] == recipe["joint"]["weights"]


def test_it_never_ends_above_where_it_is_told_to_begin(place, models, text):
    """Of one far too large step nothing is kept, and any drift is too much for a candidate whole."""
    start = [{"candidate": 1, "layers": 2, "weight": 0.01}]
    joint = {"steps": 1, "step_size": 1.0, "start": start}
    assert searched(place, models, text, joint=joint, merge_headers=False, layers="1-2") == 0
    recipe = recipe_of(place / "out")
    first = recipe["joint"]["steps"][0]
    weight = sum(abs(p["weight"]) * p["before"] for p in recipe["phrases"]) / 0.05
    ours = recipe["metrics"]["merge"]
    assert recipe["joint"]["start"] == [[0.0, 0.0], [0.0, 0.0], [0.01, 0.0]]
    assert ours["total"] + weight * ours["trial_kl"] <= (first["total"] + weight * first["trial_kl"]) * (1 + 1e-5)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"candidate": 3}, "joint.start[1].candidate: 3, but this run has 2 candidates"),
        ({"layers": "1-3"}, "joint.start[1].layers: 3, but the base has layers 0 to 2"),
        ({"weight": 1.5}, "joint.start[1].weight: 1.5: "),
        ({"candidate": 0}, "joint.start[1].candidate: 0: "),
        ({"model": "one"}, "joint.start[1].model: unknown key; known keys: candidate, weight, layers"),
    ],
    ids=str,
)
def test_beginnings_that_are_not_there(place, models, text, capsys, entry, words):
    usual = {"candidate": 1, "weight": 0.5}
    assert searched(place, models, text, joint={"start": [usual, usual | entry]}) == 2
    assert words in capsys.readouterr().err and not (place / "out").exists()


def test_settings_that_do_not_fit(place, models, text, capsys):
    path = tiny.write_config(
        place / "my.yaml", models[0], models[1:], place / "out", search="joint", joint={"steps": 0}
    )
    assert merge_monster.main(["--config", str(path)]) == 2
    assert "joint.steps: 0: " in capsys.readouterr().err
    document = yaml.safe_load(path.read_text()) | {"joint": {"stepz": 3}}
    path.write_text(yaml.safe_dump(document))
    assert merge_monster.main(["--config", str(path)]) == 2
    assert "did you mean" in capsys.readouterr().err

"""Searches of some layers only, as whole runs: greedy and joint, broken off, built again, planned, refused."""

import json

import numpy as np
import pytest
import torch
from broken_runs import JOURNAL, RECIPE, break_off
from runs import digest, log_of, merge, sizes
from safetensors.torch import load_file

import merge_monster

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. "
SEARCHES = {"greedy": {"merge_ratios": [0.3, 0.7]}, "joint": {"search": "joint", "joint": {"steps": 3}}}


@pytest.fixture
def text(place):
    (place / "plain.txt").write_text(TEXT * 12, encoding="utf-8")
    return {"neutral_texts": ["plain.txt"], "neutral_tokens": 100, "baselines": True}


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def by_weights(recipe, weights):
    """The composition by the weights of three layers, of the header and of the rest, from decisions or shares."""
    parts = [[1.0, 0.0, 0.0] for _ in weights]
    for decision in (one for one in recipe["decisions"] if one["ratio"] is not None):
        place = 3 if decision["layer"] is None else decision["layer"]
        parts[place] = [share * (1 - decision["ratio"]) for share in parts[place]]
        parts[place][decision["candidate"]] += decision["ratio"]
    for place, row in enumerate(recipe.get("joint", {}).get("weights", [])):
        parts[place] = [1 - sum(row), *row]
        parts[4] = parts[3]
    shares = zip(("base", "one", "two"), np.average(parts, axis=0, weights=weights), strict=True)
    return {name: share for name, share in shares if name in recipe["composition"]}


@pytest.mark.parametrize("search, headers", [("greedy", True), ("joint", True), ("joint", False)])
def test_nothing_but_these_layers_changes(place, models, text, search, headers):
    settings = {**SEARCHES[search], **text, "layers": [0, 2], "merge_headers": headers, "drift_weight": 0}
    assert merge(place, models, **settings) == 0
    recipe, own = recipe_of(place / "out"), load_file(models[0] / "model.safetensors")
    assert recipe["settings"]["layers"] == [0, 2]
    if search == "joint":
        shares = recipe["joint"]["weights"]
        assert len(shares) == 3 + headers and shares[1] == [0.0, 0.0] and any(map(any, shares))
        for rows in (recipe["joint"]["start"], recipe["joint"]["slopes"]["total"]):
            assert rows[1] == [0.0, 0.0] and any(rows[0]) and any(rows[2])
    else:
        assert [d["layer"] for d in recipe["decisions"]] == ([0, 2] + [None] * headers) * 2
        assert any(d["ratio"] is not None for d in recipe["decisions"])
    assert recipe["metrics"]["merge"]["total"] < recipe["metrics"]["base"]["total"]
    assert recipe["composition"] == pytest.approx(by_weights(recipe, sizes(models[0])))
    merged = load_file(place / "out/model.safetensors")
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, own[name])}
    assert changed and not any(".layers.1." in name for name in changed)
    assert headers or all(".layers." in name for name in changed)
    assert "Layers searched  : 0, 2 (counted from 0)\n" in log_of(place)
    assert "\nlayers:\n- 0\n- 2\n" in (place / "out/README.md").read_text(encoding="utf-8")
    assert merge_monster.main(["--replay", "out", "--output", "again", "--source", str(models[0].parent)]) == 0
    assert digest(place / "again")["model.safetensors"] == digest(place / "out")["model.safetensors"]


@pytest.mark.parametrize("search", ["greedy", pytest.param("joint", marks=pytest.mark.slow)])
def test_all_layers_by_name_are_all(place, models, text, search):
    for layers, output in ((None, "whole"), ("0-2", "named")):
        assert merge(place, models, **SEARCHES[search], **text, layers=layers) == 0
        (place / "out").rename(place / output)
    assert digest(place / "whole")["model.safetensors"] == digest(place / "named")["model.safetensors"]


def test_a_candidate_taken_whole_is_whole(place, models, text):
    for layers, output in ((None, "all"), (1, "one")):
        assert merge(place, models, **text, merge_ratios=0.5, layers=layers) == 0
        (place / "out").rename(place / output)
    assert recipe_of(place / "all")["baselines"] == recipe_of(place / "one")["baselines"]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_run_that_broke_off_goes_on_in_these_layers_and_no_others(place, models, text, capsys, search):
    settings = {**SEARCHES[search], **text, "layers": [0, 2]}
    assert merge(place, models, **settings) == 0
    whole = (place / "out").rename(place / "whole")
    kinds = [json.loads(line)["kind"] for line in (whole / JOURNAL).read_text(encoding="utf-8").splitlines()]
    for number in [number for number, kind in enumerate(kinds, start=1) if kind in ("decision", "step")][1::3]:
        break_off(place, whole, number)
        assert merge(place, models, "--resume", **{**settings, "layers": [0, 1]}) == 2
        assert "layers was [0, 2], is [0, 1]" in capsys.readouterr().err
        assert merge(place, models, "--resume", **settings) == 0
        assert digest(place / "out")["model.safetensors"] == digest(whole)["model.safetensors"]
        (place / "out").rename(place / f"out-{number}")


def test_layers_that_are_not_there_are_refused_before_any_work(place, models, capsys):
    for arguments in ([], ["--dry-run"]):
        assert merge(place, models, *arguments, layers="1-4") == 2
        assert "layers: 3-4: the base has 3 layers, 0 to 2" in capsys.readouterr().err
        assert not (place / "out").exists()


def test_the_plan_says_which(place, models, text):
    assert merge(place, models, "--dry-run", layers=[0, 2], merge_ratios=0.5) == 0
    log = log_of(place)
    assert "Search           : layers 0, 2, embedding and LM head; lerp at 0.5\n" in log
    assert "Decisions        : 3 per candidate, 6 in total\n" in log
    assert merge(place, models, "--dry-run", layers="1-2", **SEARCHES["joint"], **text) == 0
    assert "Search           : layers 1-2, embedding and LM head; joint, all candidates at once\n" in log_of(place)

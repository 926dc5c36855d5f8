"""Held-out phrases in whole runs: scored as the others are, and without any part in what is decided."""

import json

import pytest
import tiny
from runs import log_of, make_models, merge

import merge_monster
from modules.config.phrase_lists import Pair
from modules.output.recipe import RECIPE_FILE
from modules.output.tables import overfit_lines

CONTEXTS = ("Her body quivers with ", "The air was thick with ", "Filled with ", "It was all about ")
SEARCHED = [Pair("BAD", "anticipation", context, 2.0) for context in CONTEXTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def recipe_of(place):
    return json.loads((place / "out" / RECIPE_FILE).read_text(encoding="utf-8"))


@pytest.mark.parametrize("auto_weights", [False, True])
def test_held_out_pairs_change_no_decision(place, models, auto_weights):
    settings = {"auto_weights": auto_weights, "merge_ratios": [0.3, 0.7]}
    assert merge(place, models, pairs=SEARCHED, held_out=0.5, **settings) == 0
    found = recipe_of(place)
    aside = [(p["phrase"], p["context"]) for p in found["held_out"]]
    assert len(aside) == 2 and len(found["phrases"]) == 2
    rest = [pair for pair in SEARCHED if (pair.phrase, pair.context) not in aside]
    assert merge(place, models, "--overwrite", pairs=rest, **settings) == 0
    without = recipe_of(place)
    assert without["held_out"] == [] and found["metrics"]["merge"].items() > without["metrics"]["merge"].items()
    for key in ("decisions", "phrases", "composition"):
        one, other = (
            [{k: v for k, v in d.items() if k != "seconds"} for d in recipe[key]] if key == "decisions" else recipe[key]
            for recipe in (found, without)
        )
        assert one == other


def test_held_out_pairs_are_scored_as_others_are(place, models):
    assert merge(place, models, pairs=SEARCHED, held_out=0.5) == 0
    found, metrics, log = recipe_of(place)["held_out"], recipe_of(place)["metrics"], log_of(place)
    base, merged = models[0], place / "out"
    expected = {}
    for name, folder in (("before", base), ("after", merged)):
        # The scores of a run that has these pairs in its list, before anything is merged.
        pairs = [Pair("BAD", p["phrase"], p["context"], 2.0) for p in found]
        run = place / name
        run.mkdir()
        path = tiny.write_config(run / "my.yaml", folder, [models[1]], run / "out", pairs, merge_ratios=0)
        assert merge_monster.main(["--config", str(path)]) == 0
        expected[name] = json.loads((run / "out" / RECIPE_FILE).read_text(encoding="utf-8"))["phrases"]
    for name, phrases in expected.items():
        assert [p["before"] for p in phrases] == pytest.approx([p[name] for p in found], rel=1e-5)
        totals = {"before": metrics["base"]["held_out"], "after": metrics["merge"]["held_out"]}
        assert totals[name] == pytest.approx(sum(2 * p["before"] for p in phrases), rel=1e-5)
    assert ": 2 searched (2 bad, 0 good), 2 held out\n" in log
    lines = [line for line in log.splitlines() if line.startswith("Metrics: ")]
    assert len(lines) == 2 and f"Held out {totals['before']:.3f} -> {totals['after']:.3f}" in lines[1]
    assert f"| Held out | {totals['before']:.3f} | {totals['after']:.3f} |" in (place / "out/README.md").read_text()


def test_a_phrase_that_is_better_only_where_it_was_searched_is_named():
    def gains(**changes):
        return {("BAD", phrase): change for phrase, change in changes.items()}

    lines = overfit_lines(gains(spine=-0.3, whisper=-0.2, apple=0.1), gains(spine=-0.1, whisper=0.0, apple=0.2))
    assert len(lines) == 1 and lines[0].endswith(": whisper")
    assert overfit_lines(gains(spine=-0.3), gains(spine=-0.1)) == []


def test_a_run_goes_on_with_other_phrases_held_out(place, models):
    """They are no part of the search, so that they are no other configuration."""
    assert merge(place, models, pairs=SEARCHED, on_error="stop") == 0
    first = recipe_of(place)
    assert merge(place, models, "--resume", pairs=SEARCHED, held_out_files=[]) == 0
    assert recipe_of(place) == first

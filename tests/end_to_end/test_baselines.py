"""Candidates taken whole in whole runs: their figures are those of a run that begins with them; and what is said."""

import json

import pytest
import tiny
from runs import log_of, make_models, merge

import merge_monster
from modules.metrics import evaluator
from modules.output.recipe import RECIPE_FILE
from modules.search.search import Search

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. " * 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def recipe_of(folder):
    return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))


def settings_of(place):
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    return {"baselines": True, "neutral_texts": [str(place / "plain.txt")], "merge_ratios": [0.2, 0.4]}


def test_a_candidate_taken_whole_scores_as_a_base_does(place, models):
    assert merge(place, models, **settings_of(place)) == 0
    recipe, log = recipe_of(place / "out"), log_of(place)
    assert list(recipe["baselines"]) == ["1", "2"]
    for found, candidate in zip(recipe["baselines"].values(), models[1:], strict=True):
        run = place / candidate.name
        run.mkdir()
        path = tiny.write_config(run / "my.yaml", candidate, [models[0]], run / "out", merge_ratios=0)
        assert merge_monster.main(["--config", str(path)]) == 0
        assert found["total"] == pytest.approx(recipe_of(run / "out")["metrics"]["base"]["total"], rel=1e-4)
        assert "held_out" not in found and found["kl"] > 1e-3
    rows = [line.strip("| ").split() for line in log.splitlines() if line.startswith("| ")]
    table = rows[next(place for place, cells in enumerate(rows) if cells[0] == "Model") :]
    assert [cells[0] for cells in table] == ["Model", "base", "one", "two", "the"]
    for cells, one in zip(table[2:4], recipe["baselines"].values(), strict=True):
        assert f"{one['total']:.3f}" in cells and f"{one['kl']:.4f}" in cells
    assert f"{recipe['metrics']['merge']['total']:.3f}" in table[-1]


def test_no_decision_depends_on_it(place, models):
    assert merge(place, models, **settings_of(place)) == 0
    found = recipe_of(place / "out")
    assert merge(place, models, "--overwrite", **{**settings_of(place), "baselines": False}) == 0
    without = recipe_of(place / "out")
    assert without["baselines"] == {} and "| Model " not in log_of(place)
    for recipe in (found, without):
        for decision in recipe["decisions"]:
            del decision["seconds"]
    assert found["decisions"] == without["decisions"] and found["phrases"] == without["phrases"]


def test_a_run_that_goes_on_does_not_score_them_again(place, models, monkeypatch):
    own, count = evaluator.score_whole, []

    def counted(model, tokenizer, candidate, *arguments):
        count.append(candidate.name)
        return own(model, tokenizer, candidate, *arguments)

    decide, decided = Search._decide, []

    def stopped(self, *arguments):
        decided.append(1)
        if len(decided) == 6:  # of the second candidate
            raise KeyboardInterrupt
        return decide(self, *arguments)

    monkeypatch.setattr(evaluator, "score_whole", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_decide", stopped)
        assert merge(place, models, **settings_of(place)) == 130
    assert merge(place, models, "--resume", **settings_of(place)) == 0
    assert count == ["one", "two"]
    resumed = recipe_of(place / "out")["baselines"]
    assert merge(place, models, "--overwrite", **settings_of(place)) == 0
    assert recipe_of(place / "out")["baselines"] == resumed


def test_a_candidate_that_is_damaged_has_no_row(place, models, tmp_path):
    broken = tiny.make_candidate(tmp_path / "broken", models[0], seed=4)
    tiny.edit_checkpoint(
        broken, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[:1].fill_(float("nan"))
    )
    assert merge(place, (models[0], broken, models[1]), **settings_of(place)) == 0
    assert list(recipe_of(place / "out")["baselines"]) == ["2"]
    assert "WARNING: broken can't be scored on its own: broken: model.layers.1.mlp.up_proj.weight holds NaN" in log_of(
        place
    )


def test_the_advice_keeps_to_the_limit_and_names_the_causes(place, models, tmp_path):
    near = tiny.make_candidate(tmp_path / "near", models[0], 2, amount=0.02)
    limited = {"layers": 0, "merge_ratios": [0.2], "merge_headers": False, "max_drift": 0.08, "neutral_tokens": 100}
    assert merge(place, (models[0], models[2], near), **{**settings_of(place), **limited}) == 0
    recipe, lines = recipe_of(place / "out"), log_of(place).splitlines()
    (far, allowed), ours = recipe["baselines"].values(), recipe["metrics"]["merge"]["total"]
    assert far["total"] < allowed["total"] < ours
    assert far["trial_kl"] > 0.08 > max(allowed["trial_kl"], allowed["kl"])
    start = next(number for number, line in enumerate(lines) if line.startswith("near on its own "))
    assert f"{allowed['total']:.3f} vs {ours:.3f}" in lines[start]
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["layers", "merge_headers", "merge_ratios"]
    assert not any(line.startswith("two on its own") for line in lines)

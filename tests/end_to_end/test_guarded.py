"""Runs whose trials are judged by their drift: what they take, that they can be broken off, what is refused."""

import json

import pytest
import tiny
from broken_runs import RECIPE, break_off
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import digest, log_of, make_models, merge

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "plain.txt"
    path.write_text(TEXT * 12, encoding="utf-8")
    return str(path)


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def ratios(recipe):
    return [decision["ratio"] for decision in recipe["decisions"]]


@pytest.mark.parametrize("strategy", ["cumulative", "quantitive"])
def test_a_limit_is_held_on_texts_that_took_no_part(place, models, text, strategy):
    free = {"neutral_texts": [text], "strategy": strategy, "strategy_threshold": 0.4}
    assert merge(place, models, **free) == 0
    before = recipe_of(place / "out")
    limit = before["metrics"]["merge"]["kl"] / 4
    assert merge(place, models, "--overwrite", **free, max_drift=limit, neutral_tokens=200) == 0
    after = recipe_of(place / "out")
    assert 0 < after["metrics"]["merge"]["kl"] < 1.5 * limit
    assert any(ratio is not None for ratio in ratios(after)) and ratios(after) != ratios(before)
    drifts = [decision["metrics"]["trial_kl"] for decision in after["decisions"]]
    assert max(drifts) <= limit * (1 + 1e-4) and "metrics" not in before["decisions"][0]
    assert f"CHANGED - {after['decisions'][0]['before']:.5f} > " in log_of(place)
    assert f" - KL in trials {drifts[0]:.4f}\n" in log_of(place)


def test_a_weight_that_is_tiny_decides_nothing_and_a_huge_one_everything(place, models, text):
    assert merge(place, models, neutral_texts=[text]) == 0
    free = recipe_of(place / "out")
    for weight, expected in ((1e-12, ratios(free)), (1e9, [None] * len(free["decisions"]))):
        assert merge(place, models, "--overwrite", neutral_texts=[text], drift_weight=weight) == 0
        assert ratios(recipe_of(place / "out")) == expected


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.floats(0.001, 2.0), st.floats(0.001, 2.0))
def test_a_larger_weight_never_ends_with_more_drift_in_a_search_of_one_layer(tmp_path_factory, text, weight, more):
    folder, tokenizer = tmp_path_factory.mktemp("one-layer"), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=1), tokenizer)
    one = tiny.make_candidate(folder / "one", base, 1)
    drifts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for drift_weight in (weight, weight + more):
            given = {"merge_headers": False, "neutral_texts": [text], "drift_weight": drift_weight}
            assert merge(folder, (base, one), "--overwrite", **given) == 0
            drifts.append(recipe_of(folder / "out")["decisions"][-1]["metrics"]["trial_kl"])
    assert drifts[1] <= drifts[0] + 1e-9


def test_a_guarded_run_goes_on_to_the_same_bits(place, models, text):
    guarded = {"neutral_texts": [text], "drift_weight": 0.05, "neutral_tokens": 100}
    assert merge(place, models, **guarded) == 0
    whole = place / "whole"
    (place / "out").rename(whole)
    decisions = ratios(recipe_of(whole))
    assert len(set(decisions)) > 1
    for records in (5, 7, 12):
        break_off(place, whole, records)
        assert merge(place, models, "--resume", **guarded) == 0
        again = recipe_of(place / "out")
        assert [one["metrics"] for one in again["decisions"]] == [d["metrics"] for d in recipe_of(whole)["decisions"]]
        assert digest(whole)["model.safetensors"] == digest(place / "out")["model.safetensors"]
        (place / "out").rename(place / f"out-{records}")
    break_off(place, whole, 6)
    assert merge(place, models, "--resume", **{**guarded, "drift_weight": 0.06}) == 2
    other = place / "other.txt"
    other.write_text(TEXT * 13, encoding="utf-8")
    assert merge(place, models, "--resume", **{**guarded, "neutral_texts": [str(other)]}) == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"neutral_texts": [], "drift_weight": 1}, "neutral_texts: empty, but drift_weight and max_drift need"),
        ({"neutral_texts": [], "max_drift": 0.1}, "neutral_texts: empty"),
        ({"neutral_texts": None, "max_drift": -1}, "max_drift: -1: "),
        (
            {"neutral_texts": None, "drift_weight": "much"},
            "drift_weight: 'much': expected auto or a number",
        ),
        ({"search": "joint", "neutral_texts": []}, "(search: joint sets drift_weight unless it is 0)"),
        (
            {"search": "joint", "neutral_texts": None, "merge_method": "slerp"},
            "search: joint supports only strategy: cumulative and merge_method: lerp",
        ),
        ({"min_gain": -0.1}, "min_gain: -0.1: expected auto or a number of at least 0"),
    ],
)
def test_what_is_refused_before_any_work(place, models, capsys, settings, words):
    assert merge(place, models, **settings) == 2
    assert words in capsys.readouterr().err
    assert not (place / "out").exists()


def test_too_little_text(place, models, capsys):
    (place / "short.txt").write_text("A", encoding="utf-8")
    assert merge(place, models, neutral_texts=[str(place / "short.txt")], max_drift=0.1) == 2
    assert "neutral_texts: too little text" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, told", [("float32", False), ("bfloat16", tiny.bfloat16_depends_on_shape())])
def test_rounding_is_told_and_noted_where_there_is_some(place, models, dtype, told):
    assert merge(place, models, compute_dtype=dtype) == 0
    recipe = recipe_of(place / "out")
    lines = [line for line in log_of(place).splitlines() if line.startswith("Rounding")]
    assert bool(lines) == told == ("rounding" in recipe)
    if told:
        least = recipe["rounding"]
        assert f": {least:.2g} of the total" in lines[0]
        gains = [one["before"] - one["after"] for one in recipe["decisions"] if one["ratio"] is not None]
        assert gains and min(gains) > 2 * least > 0
        assert all(phrase.get("rounding", 0) >= 0 for phrase in recipe["phrases"])


def test_the_least_gain_is_what_is_set(place, models):
    assert merge(place, models, min_gain=0.01) == 0
    recipe = recipe_of(place / "out")
    gains = [one["before"] - one["after"] for one in recipe["decisions"] if one["ratio"] is not None]
    assert gains and min(gains) > 0.01
    assert merge(place, models, "--overwrite", min_gain=100) == 0
    assert set(ratios(recipe_of(place / "out"))) == {None}

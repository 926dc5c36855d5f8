"""Models side by side: which merge is taken, what table and picture show."""

import json
import re
from types import SimpleNamespace

import pytest

from modules.output.front import Point, best_candidate, chosen, front_figure, front_table, write_front

BASE = Point("base", 10.0, (8.0, 12.0), 100.0, {"total": 3.0, "kl": 0.0, "own_kl": 0.0, "perplexity": 20.0})


def merge(name, rate, drift, words=100.0, **more):
    metrics = {"total": 1.0, "kl": drift / 2, "own_kl": drift, "perplexity": 21.0, **more}
    return Point(name, rate, (rate / 2, rate * 2), words, metrics, is_merge=True)


@pytest.mark.parametrize(
    "merges, name",
    [
        ([merge("a", 1.0, 0.021), merge("b", 2.0, 0.02), merge("c", 3.0, 0.001)], "b"),  # a drifts too far
        ([merge("a", 1.0, 0.01, words=89.0), merge("b", 2.0, 0.01, words=110.0)], "b"),  # a says too little
        ([merge("a", 1.0, 0.01, words=111.0), merge("b", 2.0, 0.01, words=90.0)], "b"),  # or too much
        ([merge("a", 0.0, 0.01), merge("b", 0.0, 0.002)], "b"),  # as few: the nearer one
        ([merge("a", 1.0, 0.5), merge("b", 2.0, 0.3)], "b"),  # none is near: the nearest
    ],
)
def test_which_merge_is_taken(merges, name):
    best, why = chosen([BASE, Point("adapter", 0.0, None, 100.0, {"own_kl": 0.0}), *merges])
    assert best.name == name and why.count("b") and ("No merge" in why) == (merges[0].drift == 0.5)


def test_drift_on_neutral_text_where_there_are_no_answers():
    near = Point("near", 1.0, None, 100.0, {"kl": 0.01}, is_merge=True)
    unknown = Point("unknown", 0.0, None, 100.0, {}, is_merge=True)
    assert near.drift == 0.01 and chosen([BASE, unknown, near])[0] is near


def test_the_table_has_a_row_for_each_and_no_metric_of_trials():
    points = [BASE, merge("one", 1.234, 0.01, trial_kl=0.5, **{"arc acc": 0.25})]
    lines = front_table(points)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert cells[0] == [
        *("Model", "Hits per 1,000 words [95% CI]", "Words per answer", "Total", "KL to base", "Perplexity"),
        *("KL on own answers", "arc acc"),
    ]
    assert cells[1:] == [
        ["base", "10.00 [8.00, 12.00]", "100.0", "3.000", "0.0000", "20.00", "0.0000", "-"],
        ["one", "1.23 [0.62, 2.47]", "100.0", "1.000", "0.0050", "21.00", "0.0100", "0.2500"],
    ]


def test_every_point_of_the_picture_has_its_name(tmp_path):
    points = [BASE, merge("one", 1.0, 0.01), merge("two", 2.0, 0.001), Point("lost", 1.0, None, 9.0, {})]
    (axes,) = front_figure(points).axes
    assert [text.get_text() for text in axes.texts] == ["base", "one", "two"]
    line = axes.lines[0].get_xydata().tolist()
    assert line == [[0.001, 2.0], [0.01, 1.0]]  # the merges, by their drift
    write_front(points, tmp_path / "front")
    written = json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))
    assert [Point(**{**one, "interval": one["interval"] and tuple(one["interval"])}) for one in written] == points
    assert re.match(rb"\x89PNG", (tmp_path / "front.png").read_bytes())


def test_the_best_candidate_is_not_the_one_that_has_stopped_talking():
    baselines = {"1": {"total": 2.0, "kl": 0.01, "own_kl": 0.01}, "2": {"total": 0.1, "kl": 0.7, "own_kl": 0.9}}
    recipe = SimpleNamespace(baselines=baselines)
    assert best_candidate(recipe, [1, 2, 3], weight=10.0) == [1]
    assert best_candidate(recipe, [1, 2], weight=0.0) == [2]
    assert best_candidate(recipe, [], weight=1.0) == []

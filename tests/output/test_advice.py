"""What is said of a candidate that beats the merge: by what they are compared, what kept the search from it."""

import re

import pytest

from modules.config.schema import Config, Directories
from modules.output.advice import advice, beyond_limit
from modules.output.tables import ResultRow, results_table
from modules.search.strategies import Limits


def standing(name, total, held_out=None, kl=None, trial_kl=None):
    values = {"total": total, "held_out": held_out, "kl": kl, "trial_kl": trial_kl}
    return ResultRow(name, {name: value for name, value in values.items() if value is not None})


def limited(kl):
    return Limits(maxima={"trial_kl": kl})


def weighted(weight):
    return Limits(weights={"trial_kl": weight})


def told(candidates, merge, limits=None, **settings):
    config = Config(Directories("base", "out"), **{"merge_ratios": (0.5, 1.0), **settings})
    return advice(candidates, merge, config, limits or Limits(), layers=4)


def better(lines):
    """The candidate that is said to be better."""
    return re.match(r"(\S+) on its own scores better", lines[0])[1] if lines else None


def causes(lines):
    """The settings that are named."""
    return [line.split()[0] for line in lines if line.split()[0].islower() and " on its own " not in line]


def test_a_better_candidate_is_named():
    good, bad = standing("good", 0.108), standing("bad", 0.3)
    lines = told([bad, good], standing("the merge", 0.121))
    assert better(lines) == "good" and "0.108 vs 0.121" in lines[0]
    assert len(lines) == 2 and "Use good itself" in lines[1] and "search: joint" in lines[1]
    assert told([good], standing("the merge", 0.09)) == told([], standing("the merge", 0.2)) == []
    assert "joint" not in told([good], standing("the merge", 0.2), search="joint")[-1]


def test_what_looks_the_same_is_not_better():
    assert told([standing("same", 0.1)], standing("the merge", 0.100004)) == []
    assert told([standing("same", 1000.0)], standing("the merge", 1000.004)) == []
    assert told([standing("same", 0.1)], standing("the merge", 0.13), Limits(min_gain=0.05)) == []


def test_what_is_compared_is_the_objective():
    near, far = standing("near", 0.3, kl=0.001, trial_kl=0.002), standing("far", 0.1, kl=0.4, trial_kl=0.5)
    merge = standing("the merge", 0.35, kl=0.01, trial_kl=0.01)
    assert better(told([near, far], merge)) == "far"
    lines = told([near, far], merge, weighted(2.0))
    assert better(lines) == "near" and "0.304 vs 0.370" in lines[0]
    assert told([far], merge, weighted(2.0)) == []
    assert told([near], standing("the merge", 0.35), weighted(2.0)) == []  # the merge's drift is not known


@pytest.mark.parametrize("drifts", [{"kl": 0.03, "trial_kl": 0.01}, {"kl": 0.01, "trial_kl": 0.03}, {"kl": 0.03}, {}])
def test_a_candidate_beyond_the_limit_is_passed_over_for_the_next_best(drifts):
    far, near = standing("far", 0.1, **drifts), standing("near", 0.2, kl=0.01, trial_kl=0.01)
    merge = standing("the merge", 0.3, kl=0.001, trial_kl=0.001)
    assert better(told([far, near], merge, limited(0.02))) == "near"
    assert told([far], merge, limited(0.02)) == []


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, []),
        ({"layers": (0, 2)}, ["layers"]),
        ({"layers": (0, 1, 2, 3)}, []),
        ({"merge_ratios": (0.2, 0.8)}, ["merge_ratios"]),
        ({"merge_headers": False}, ["merge_headers"]),
        ({"merge_method": ("cyclic", "slice")}, ["merge_method"]),
        ({"merge_method": ("cyclic", "slerp")}, []),
        ({"strategy": "all_phrases"}, ["strategy"]),
        ({"layers": (1,), "merge_ratios": (0.9,)}, ["layers", "merge_ratios"]),
        ({"layers": (1,), "merge_ratios": (0.9,), "search": "joint"}, ["layers"]),
    ],
)
def test_the_cause_is_named(settings, expected):
    assert causes(told([standing("good", 0.1)], standing("the merge", 0.2), **settings)) == expected


def test_a_limit_that_others_have_used_up_is_a_cause():
    first, good = standing("first", 0.3, trial_kl=0.015), standing("good", 0.1, trial_kl=0.012)
    full, empty = standing("the merge", 0.2, trial_kl=0.015), standing("the merge", 0.2, trial_kl=0.004)
    lines = told([first, good], full, limited(0.02))
    assert causes(lines) == ["max_drift"] and "0.015 of 0.02" in lines[1]
    assert causes(told([first, good], empty, limited(0.02))) == []


def test_a_drift_above_its_limit_is_told():
    limits = limited(0.02)
    (line,) = beyond_limit(standing("the merge", 1.0, kl=0.02004, trial_kl=0.0199), limits)
    assert "0.02004" in line and "max_drift 0.02" in line
    assert beyond_limit(standing("the merge", 1.0, kl=0.02, trial_kl=0.0199), limits) == []
    assert beyond_limit(standing("the merge", 1.0, kl=9.0), Limits()) == []
    assert beyond_limit(standing("the merge", 1.0, trial_kl=0.0199), limits) == []


def test_the_table_has_the_columns_that_are_known():
    base, bad = standing("base", 0.384, 0.437), standing("bad", 0.3, 0.4)
    merge = standing("the merge", 0.2)
    assert "KL" not in results_table([base, bad, merge])[1]
    merge = ResultRow("the merge", {"total": 0.2, "kl": 0.1, "unknown": 7})
    header, _, first, last = (line.strip("| ").split() for line in results_table([base, merge])[1:5])
    assert header == ["Model", "|", "Total", "|", "Held", "out", "|", "KL", "to", "base", "|", "unknown"]
    assert first[2:] == ["0.384", "|", "0.437", "|", "-", "|", "-"]
    assert last[3:] == ["0.200", "|", "-", "|", "0.1000", "|", "7.0000"]

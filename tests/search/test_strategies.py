"""Accept or reject, and the sums behind it."""

import math

import pytest

from modules.search.decision import composition_of, mixed_weights, weights_of
from modules.search.strategies import Limits, State, choose, probability, scores, total

NOW = [0.4, 0.3, -0.2]


def chosen(name, now, trials, threshold=0.6):
    """The number of the trial that is taken, of scores alone."""
    return choose(name, State(now), [State(trial) for trial in trials], Limits(threshold))


def test_scores_are_weighted_probabilities():
    assert scores([math.log(0.5), math.log(0.25)], [2.0, -4.0]) == pytest.approx([1.0, -1.0])
    assert total([0.1] * 10) == 1.0


def test_cumulative_takes_the_lowest_total_below_the_present_one():
    trials = [[0.5, 0.3, -0.2], [0.4, 0.25, -0.2], [0.4, 0.4, -0.5], [0.3, 0.3, -0.1]]
    assert chosen("cumulative", NOW, trials) == 2
    assert chosen("cumulative", NOW, [NOW, [0.5, 0.3, -0.2]]) is None
    assert chosen("cumulative", NOW, [[0.3, 0.3, -0.2], [0.3, 0.3, -0.2]]) == 0  # of equals the first


def test_all_phrases_lets_no_pair_get_worse():
    better_total_but_one_worse = [0.0, 0.31, -0.2]
    some_better = [0.4, 0.29, -0.2]
    all_better = [0.35, 0.25, -0.21]
    assert chosen("all_phrases", NOW, [better_total_but_one_worse, some_better, all_better]) == 2
    assert chosen("all_phrases", NOW, [better_total_but_one_worse, some_better]) == 1
    assert chosen("all_phrases", NOW, [NOW, better_total_but_one_worse]) is None


def test_quantitive_counts_pairs_before_totals():
    two_improved_but_high = [0.39, 0.29, 5.0]
    two_improved = [0.38, 0.29, 1.0]
    one_improved_a_lot = [0.0, 0.3, -0.2]
    assert chosen("quantitive", NOW, [one_improved_a_lot, two_improved_but_high, two_improved], 0.6) == 2
    assert chosen("quantitive", NOW, [one_improved_a_lot], 0.6) is None
    assert chosen("quantitive", NOW, [one_improved_a_lot], 1 / 3) == 0


@pytest.mark.parametrize("threshold, pairs, improved", [(0.55, 20, 11), (1.0, 3, 3)])
def test_quantitive_threshold_is_met_exactly(threshold, pairs, improved):
    now = [1.0] * pairs
    enough = [0.9] * improved + [1.0] * (pairs - improved)
    one_short = [0.9] * (improved - 1) + [1.0] * (pairs - improved + 1)
    assert chosen("quantitive", now, [one_short, enough], threshold) == 1
    assert chosen("quantitive", now, [one_short], threshold) is None


@pytest.mark.parametrize("strategy", ["cumulative", "all_phrases", "quantitive"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_never_win(strategy, bad):
    assert chosen(strategy, NOW, [[0.1, bad, -0.3]]) is None
    assert chosen(strategy, NOW, [[0.1, bad, -0.3], [0.3, 0.2, -0.3]]) == 1


def test_a_probability_of_nan_is_not_finite():
    assert probability(math.nan) == math.inf
    assert probability(-math.inf) == 0.0
    assert probability(0.0) == 1.0


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="unknown strategy 'best'"):
        chosen("best", NOW, [])


def test_each_merge_scales_the_earlier_ones():
    assert weights_of([(1.0, "base"), (0.5, "a"), (0.2, "b")]) == pytest.approx({"base": 0.4, "a": 0.4, "b": 0.2})
    assert weights_of([(1.0, "base"), (0.5, "a"), (0.5, "a")]) == pytest.approx({"base": 0.25, "a": 0.75})


def test_a_part_counts_in_the_composition_by_its_weights():
    parts = [(100, [(1.0, "base"), (0.6, "a")]), (100, [(1.0, "base")]), (800, [(1.0, "base"), (1.0, "b")])]
    shares = composition_of((size, weights_of(merges)) for size, merges in parts)
    assert shares == pytest.approx({"b": 0.8, "base": 0.14, "a": 0.06})
    assert list(shares) == ["b", "base", "a"]


def test_what_the_candidates_leave_is_the_base_s():
    assert mixed_weights("base", ["a", "b"], [0.9, 0.75]) == pytest.approx({"base": -0.65, "a": 0.9, "b": 0.75})
    assert mixed_weights("base", ["a", "a"], [0.25, 0.75]) == {"base": 0.0, "a": 1.0}


def test_a_total_too_large_for_a_number_never_wins():
    huge = [1.7e308, 1.7e308]
    assert total(huge) == math.inf
    for strategy in ("cumulative", "all_phrases", "quantitive"):
        assert chosen(strategy, [1.0, 1.0], [huge, [0.5, 0.5]]) == 1
    assert chosen("cumulative", [1.0, 1.0], [huge]) is None

"""What a trial must be to be accepted: a gain above rounding, a drift below its limit; the objective."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.search.strategies import Limits, State, choose, improved, total_rounding

NOW = State([0.4, 0.3, -0.2], drift=0.0)
BETTER = State([0.3, 0.3, -0.2], drift=0.005)
BEST = State([0.2, 0.3, -0.2], drift=0.04)

values = st.floats(-2, 2, allow_nan=False)
states = st.builds(State, st.lists(values, min_size=3, max_size=3), st.floats(0, 3))


def test_a_gain_must_exceed_the_least_gain():
    assert choose("cumulative", NOW, [BETTER], Limits(min_gain=0.09)) == 0
    assert choose("cumulative", NOW, [BETTER], Limits(min_gain=0.11)) is None
    assert choose("cumulative", NOW, [BETTER, BEST], Limits(min_gain=0.11)) == 1


def test_a_change_below_rounding_is_none():
    rounding = [0.1, 0.02, 0.02]
    little_better, little_worse = [0.35, 0.2, -0.2], [0.3, 0.2, -0.19]
    assert choose("all_phrases", NOW, [State([0.35, 0.29, -0.21])], Limits(rounding=rounding)) is None
    assert choose("all_phrases", NOW, [State(little_better)], Limits(rounding=rounding)) == 0
    assert choose("all_phrases", NOW, [State(little_worse)], Limits(rounding=rounding)) == 0
    assert choose("all_phrases", NOW, [State(little_worse)], Limits()) is None
    assert choose("quantitive", NOW, [State(little_better)], Limits(1 / 3, rounding=rounding)) == 0
    assert choose("quantitive", NOW, [State(little_better)], Limits(2 / 3, rounding=rounding)) is None


@pytest.mark.parametrize("strategy", ["cumulative", "all_phrases", "quantitive"])
def test_what_drifts_too_far_is_not_taken(strategy):
    limits = Limits(threshold=0.3, max_drift=0.02)
    assert choose(strategy, NOW, [BEST, BETTER], limits) == 1
    assert choose(strategy, NOW, [BEST], limits) is None
    assert choose(strategy, NOW, [State(BEST.scores, math.nan)], limits) is None


@pytest.mark.parametrize("strategy", ["cumulative", "all_phrases", "quantitive"])
def test_the_objective_ranks(strategy):
    assert choose(strategy, NOW, [BETTER, BEST], Limits(threshold=0.3)) == 1
    assert choose(strategy, NOW, [BETTER, BEST], Limits(threshold=0.3, drift_weight=2.8)) == 1
    assert choose(strategy, NOW, [BETTER, BEST], Limits(threshold=0.3, drift_weight=2.9)) == 0


def test_a_higher_total_is_worth_less_drift():
    now, back = State([0.3], drift=0.1), State([0.35], drift=0.02)
    assert choose("cumulative", now, [back], Limits(drift_weight=1.0)) == 0
    assert choose("cumulative", now, [back], Limits(drift_weight=0.5)) is None


@given(states, st.lists(states, max_size=4), st.sampled_from(["cumulative", "all_phrases", "quantitive"]))
def test_without_limits_drift_and_rounding_decide_nothing(now, trials, strategy):
    alone = [State(trial.scores) for trial in trials]
    assert choose(strategy, now, trials) == choose(strategy, State(now.scores), alone)
    zero = Limits(rounding=[0.0] * 3)
    assert choose(strategy, now, trials, zero) == choose(strategy, now, trials)


@given(states, st.lists(states, min_size=1, max_size=5), st.floats(0, 5), st.floats(0, 5))
def test_a_larger_weight_never_takes_more_drift(now, trials, weight, more):
    def end(weight):
        found = choose("cumulative", now, trials, Limits(drift_weight=weight))
        return now if found is None else trials[found]

    light, heavy = end(weight), end(weight + more)
    # Rounding may decide between objectives that are equal.
    assert heavy.drift <= light.drift or math.isclose(
        Limits(drift_weight=weight).objective(light), Limits(drift_weight=weight).objective(heavy), abs_tol=1e-9
    )


def test_the_rounding_of_a_total_is_that_of_independent_errors():
    assert total_rounding([2.0, -1.0], [0.03, 0.08]) == pytest.approx(0.1)
    assert total_rounding([2.0, -1.0], []) == 0.0
    assert improved([0.4, 0.3], [0.3, 0.3]) == 1

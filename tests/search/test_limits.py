"""What a trial must be to be accepted: a gain above rounding, metrics below their limits; the objective."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.search.strategies import Limits, State, choose, improved, total_rounding


def state(scores, kl):
    return State(scores, {"kl": kl})


def weight(number):
    """Limits with a weight on the metric."""
    return Limits(threshold=0.3, weights={"kl": number})


NOW = state([0.4, 0.3, -0.2], 0.0)
BETTER = state([0.3, 0.3, -0.2], 0.005)
BEST = state([0.2, 0.3, -0.2], 0.04)

values = st.floats(-2, 2, allow_nan=False)
states = st.builds(state, st.lists(values, min_size=3, max_size=3), st.floats(0, 3))


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
    limits = Limits(threshold=0.3, maxima={"kl": 0.02})
    assert choose(strategy, NOW, [BEST, BETTER], limits) == 1
    assert choose(strategy, NOW, [BEST], limits) is None
    assert choose(strategy, NOW, [state(BEST.scores, math.nan)], limits) is None


@pytest.mark.parametrize("strategy", ["cumulative", "all_phrases", "quantitive"])
def test_the_objective_ranks(strategy):
    assert choose(strategy, NOW, [BETTER, BEST], Limits(threshold=0.3)) == 1
    assert choose(strategy, NOW, [BETTER, BEST], weight(2.8)) == 1
    assert choose(strategy, NOW, [BETTER, BEST], weight(2.9)) == 0


def test_a_higher_total_is_worth_less_drift():
    now, back = state([0.3], 0.1), state([0.35], 0.02)
    assert choose("cumulative", now, [back], weight(1.0)) == 0
    assert choose("cumulative", now, [back], weight(0.5)) is None


@given(states, st.lists(states, max_size=4), st.sampled_from(["cumulative", "all_phrases", "quantitive"]))
def test_without_limits_metrics_and_rounding_decide_nothing(now, trials, strategy):
    alone = [State(trial.scores) for trial in trials]
    assert choose(strategy, now, trials) == choose(strategy, State(now.scores), alone)
    zero = Limits(rounding=[0.0] * 3)
    assert choose(strategy, now, trials, zero) == choose(strategy, now, trials)


@given(states, st.lists(states, min_size=1, max_size=5), st.floats(0, 5), st.floats(0, 5))
def test_a_larger_weight_never_takes_more_drift(now, trials, number, more):
    def end(number):
        found = choose("cumulative", now, trials, weight(number))
        return now if found is None else trials[found]

    light, heavy = end(number), end(number + more)
    # Rounding may decide between objectives that are equal.
    is_close = math.isclose(weight(number).objective(light), weight(number).objective(heavy), abs_tol=1e-9)
    assert heavy.metrics["kl"] <= light.metrics["kl"] or is_close


def test_several_metrics_have_weights_and_limits_of_their_own():
    now = State([1.0], {"kl": 0.0, "own": 0.0})
    first, second = State([0.5], {"kl": 0.1, "own": 0.0}), State([0.4], {"kl": 0.0, "own": 0.1})
    assert choose("cumulative", now, [first, second]) == 1
    assert choose("cumulative", now, [first, second], Limits(weights={"kl": 1.0, "own": 3.0})) == 0
    assert Limits(weights={"kl": 1.0, "own": 3.0}).objective(second) == 0.4 + 3.0 * 0.1
    assert choose("cumulative", now, [first, second], Limits(maxima={"own": 0.05, "kl": 1.0})) == 0
    assert choose("cumulative", now, [first, second], Limits(maxima={"own": 0.05, "kl": 0.05})) is None


def test_the_rounding_of_a_total_is_that_of_independent_errors():
    assert total_rounding([2.0, -1.0], [0.03, 0.08]) == pytest.approx(0.1)
    assert total_rounding([2.0, -1.0], []) == 0.0
    assert improved([0.4, 0.3], [0.3, 0.3]) == 1

"""Accept or reject: which of several trials, if any, replaces the current state.

Knows: numbers, one score per pair, and metrics by name. Refuses to know: where they come from, torch, what a pair says.

A score is exp(sum of the phrase's token log-probabilities) x weight; good phrases count negative, so lower is better
for every pair and for the total. Where metrics are weighed, the objective stands wherever totals are compared.

To add a strategy, give STRATEGIES in modules/config/choices.py its name, write its rank below and decorate it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from modules.config.choices import STRATEGIES

Scores = Sequence[float]  # one per pair


@dataclass(frozen=True)
class State:
    """The scores and metrics of a model, as it is or under a trial."""

    scores: Scores
    metrics: Mapping[str, float] = field(default_factory=dict)  # those that are weighed or limited, lower is better


@dataclass(frozen=True)
class Limits:
    """What a trial must meet to be accepted, besides being better."""

    threshold: float = 0.6  # the share of the pairs that must improve; quantitive only
    min_gain: float = 0.0  # the objective must fall by more than this; cumulative only
    rounding: Scores = ()  # a pair has changed if its score moves by more than this; empty: any change counts
    weights: Mapping[str, float] = field(default_factory=dict)  # by metric: what 1 of it adds to the total
    maxima: Mapping[str, float] = field(default_factory=dict)  # by metric: a trial with more is not taken

    def objective(self, state: State) -> float:
        """The number to be minimized: the total plus the weighted metrics."""
        return self.weighed(total(state.scores), state.metrics)

    def weighed(self, total: float, metrics: Mapping[str, float]) -> float:
        """The objective of a model with this total. Raises KeyError if a weighed metric is missing."""
        for name, weight in self.weights.items():
            total += weight * metrics[name]
        return total

    def allow(self, metrics: Mapping[str, float]) -> bool:
        """Whether every metric that has a limit is known and not above it. NaN is not allowed."""
        return all(metrics.get(name, math.inf) <= maximum for name, maximum in self.maxima.items())

    def changes(self, current: State, trial: State) -> tuple[int, int]:
        """How many pairs score better under a trial, and how many worse."""
        roundings = self.rounding or [0] * len(current.scores)
        rows = list(zip(current.scores, trial.scores, roundings, strict=True))
        return sum(new < old - noise for old, new, noise in rows), sum(new > old + noise for old, new, noise in rows)


# How good a trial is: (present state, the trial's state, limits) -> None if the trial is rejected, else a tuple; the
# smallest wins.
Rank = Callable[[State, State, Limits], tuple | None]

_RANKS: dict[str, Rank] = {}


def strategy(name: str) -> Callable[[Rank], Rank]:
    """Register a rank as the strategy of this name. Raises KeyError if no configuration can name it."""
    _ = STRATEGIES[name]

    def register(rank: Rank) -> Rank:
        _RANKS[name] = rank
        return rank

    return register


def scores(log_probabilities: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Scores of all pairs from their joint log-probabilities; `weights` carry the sign (good phrases negative)."""
    return [probability(value) * weight for value, weight in zip(log_probabilities, weights, strict=True)]


def probability(log_probability: float) -> float:
    """exp of a log-probability; infinite where it is NaN, so that it never wins."""
    return math.exp(log_probability) if log_probability < 1.0 else math.inf


def choose(name: str, current: State, trials: Sequence[State], limits: Limits = Limits()) -> int | None:
    """Index of the trial that replaces `current` under a strategy, by its name, or None to keep `current`.

    A trial with a NaN or infinite score or metric is never chosen, nor is one beyond a limit. Of equals the first wins.
    Raises ValueError for an unknown strategy.
    """
    if name not in _RANKS:
        raise ValueError(f"unknown strategy '{name}'")
    rank = _RANKS[name]
    best = None
    best_rank = None
    for index, trial in enumerate(trials):
        numbers = [*trial.scores, *trial.metrics.values()]
        if not all(map(math.isfinite, numbers)) or not limits.allow(trial.metrics):
            continue
        trial_rank = rank(current, trial, limits)
        if trial_rank is not None and (best_rank is None or trial_rank < best_rank):
            best = index
            best_rank = trial_rank
    return best


def total(values: Scores) -> float:
    """The sum of all scores, exact to the last digit whatever their order; infinite if it overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def total_rounding(weights: Scores, rounding: Scores) -> float:
    """How far rounding alone moves the total; 0 if `rounding` is empty. rounding: how far it moves each probability,
    independently of the others."""
    return math.hypot(*(weight * change for weight, change in zip(weights, rounding, strict=bool(rounding))))


def improved(current: Scores, trial: Scores) -> int:
    """How many pairs score better under a trial."""
    return Limits().changes(State(current), State(trial))[0]


@strategy("cumulative")
def cumulative(current: State, trial: State, limits: Limits) -> tuple | None:
    """The lowest objective."""
    current_objective = limits.objective(current)
    trial_objective = limits.objective(trial)
    return (trial_objective,) if current_objective - trial_objective > limits.min_gain else None


@strategy("all_phrases")
def all_phrases(current: State, trial: State, limits: Limits) -> tuple | None:
    """The lowest objective of the trials under which no pair scores worse and one scores better."""
    better, worse = limits.changes(current, trial)
    return (limits.objective(trial),) if better and not worse else None


@strategy("quantitive")
def quantitive(current: State, trial: State, limits: Limits) -> tuple | None:
    """The most pairs improved; of equals the lowest objective."""
    better, _ = limits.changes(current, trial)
    # 0.55 x 20 is 11.000000000000002 in binary: compare with a hair's breadth to spare.
    is_enough = better >= limits.threshold * len(trial.scores) - 1e-9
    return (-better, limits.objective(trial)) if is_enough else None

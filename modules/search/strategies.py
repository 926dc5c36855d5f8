"""Accept or reject: which of several trials, if any, replaces the current state.

Knows: numbers, one score per pair. Refuses to know: where they come from, torch, what a pair says.

A score is exp(sum of the phrase's token log-probabilities) x weight; good phrases count negative, so lower is better
for every pair and for the total.

To add a strategy, write its rank below and decorate it. Nothing else knows its name.
"""

import math
from collections.abc import Callable, Sequence

from modules.config import STRATEGIES

Scores = Sequence[float]  # one per pair

# How good a trial is. Of the present scores, the trial's and strategy_threshold it makes None where the trial is
# rejected, else a tuple; the smallest wins.
Rank = Callable[[Scores, Scores, float], tuple | None]

_RANKS: dict[str, Rank] = {}


def strategy(name: str, line: str) -> Callable[[Rank], Rank]:
    """Make a rank a strategy. line: what default.yaml says of it."""

    def register(rank: Rank) -> Rank:
        STRATEGIES[name], _RANKS[name] = line, rank
        return rank

    return register


def scores(log_probabilities: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Scores of all pairs from their joint log-probabilities; `weights` carry the sign (good phrases negative)."""
    return [probability(value) * weight for value, weight in zip(log_probabilities, weights, strict=True)]


def probability(log_probability: float) -> float:
    """exp of a log-probability; infinite where it is NaN, so that it never wins."""
    return math.exp(log_probability) if log_probability < 1.0 else math.inf


def choose(name: str, current: Scores, trials: Sequence[Scores], threshold: float = 0.6) -> int | None:
    """Index of the trial that replaces `current` under a strategy, by its name, or None to keep `current`.

    A trial with a NaN or infinite score is never chosen. Of equals the first wins.
    Raises ValueError for an unknown strategy.
    """
    if name not in _RANKS:
        raise ValueError(f"unknown strategy '{name}'")
    rank = _RANKS[name]
    best, best_rank = None, None
    for index, trial in enumerate(trials):
        if not all(math.isfinite(score) for score in trial):
            continue
        trial_rank = rank(current, trial, threshold)
        if trial_rank is not None and (best_rank is None or trial_rank < best_rank):
            best, best_rank = index, trial_rank
    return best


def total(values: Scores) -> float:
    """The sum of all scores, exact to the last digit whatever their order; infinite if it is too large for a number."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def improved(current: Scores, trial: Scores) -> int:
    """How many pairs score better under a trial."""
    return sum(new < old for new, old in zip(trial, current, strict=True))


@strategy("cumulative", "take the ratio with the lowest total, if it is below the present one")
def cumulative(current: Scores, trial: Scores, _threshold: float) -> tuple | None:
    """The lowest total."""
    return (total(trial),) if total(trial) < total(current) else None


@strategy("all_phrases", "only ratios that make no phrase worse and at least one better")
def all_phrases(current: Scores, trial: Scores, _threshold: float) -> tuple | None:
    """The lowest total of those that cost no pair anything."""
    none_worse = all(new <= old for new, old in zip(trial, current, strict=True))
    return (total(trial),) if none_worse and improved(current, trial) > 0 else None


@strategy(
    "quantitive", "only ratios that improve at least strategy_threshold of all phrases; of those, the most improved"
)
def quantitive(current: Scores, trial: Scores, threshold: float) -> tuple | None:
    """The most pairs improved; of equals the lowest total."""
    count = improved(current, trial)
    # 0.55 x 20 is 11.000000000000002 in binary: compare with a hair's breadth to spare.
    enough = count >= threshold * len(trial) - 1e-9
    return (-count, total(trial)) if enough else None

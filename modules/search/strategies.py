"""Accept or reject: which of several trials, if any, replaces the current state.

Knows: numbers, one score per pair. Refuses to know: where they come from, torch, what a pair says.

A score is exp(sum of the phrase's token log-probabilities) x weight; good phrases count negative, so lower is better
for every pair and for the total.
"""

import math
from collections.abc import Sequence

Scores = Sequence[float]  # one per pair


def scores(log_probabilities: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Scores of all pairs from their joint log-probabilities; `weights` carry the sign (good phrases negative)."""
    return [probability(value) * weight for value, weight in zip(log_probabilities, weights, strict=True)]


def probability(log_probability: float) -> float:
    """exp of a log-probability; infinite where it is NaN, so that it never wins."""
    return math.exp(log_probability) if log_probability < 1.0 else math.inf


def choose(strategy: str, current: Scores, trials: Sequence[Scores], threshold: float = 0.6) -> int | None:
    """Index of the trial that replaces `current` under a strategy, or None to keep `current`.

    A trial with a NaN or infinite score is never chosen. Of equals the first wins.
    Raises ValueError for an unknown strategy.
    """
    if strategy not in _RANKS:
        raise ValueError(f"unknown strategy '{strategy}'")
    rank = _RANKS[strategy]
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


# Each rank is None where a strategy rejects the trial, else a tuple: the smallest wins.


def _cumulative(current: Scores, trial: Scores, _threshold: float) -> tuple | None:
    return (total(trial),) if total(trial) < total(current) else None


def _all_phrases(current: Scores, trial: Scores, _threshold: float) -> tuple | None:
    none_worse = all(new <= old for new, old in zip(trial, current, strict=True))
    return (total(trial),) if none_worse and improved(current, trial) > 0 else None


def _quantitive(current: Scores, trial: Scores, threshold: float) -> tuple | None:
    count = improved(current, trial)
    # 0.55 x 20 is 11.000000000000002 in binary: compare with a hair's breadth to spare.
    enough = count >= threshold * len(trial) - 1e-9
    return (-count, total(trial)) if enough else None


_RANKS = {"cumulative": _cumulative, "all_phrases": _all_phrases, "quantitive": _quantitive}

"""The decision on a layer or the header, and the weights of every source in it.

Knows: decisions, weights. Refuses to know: tensors, how a decision is taken.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from modules.merging.methods import recorded_weight

Merge = tuple[float, str]  # (weight, model name); the first entry of a part is (1.0, base)
Weights = dict[str, float]  # model name -> weight; they sum to 1


def weights_of(merges: Sequence[Merge]) -> Weights:
    """Weights within a layer or header: a merge of weight r scales the earlier ones by 1-r and adds r to its model."""
    weights: Weights = {}
    for weight, model in merges:
        weights = {name: earlier * (1.0 - weight) for name, earlier in weights.items()}
        weights[model] = weights.get(model, 0.0) + weight
    return weights


def mixed_weights(base: str, candidates: Sequence[str], row: Sequence[float]) -> Weights:
    """Weights within one part of a joint search. The base's is 1 minus the row's sum, which may be below 0."""
    weights: Weights = {base: 1.0 - math.fsum(row)}
    for model, weight in zip(candidates, row, strict=True):
        weights[model] = weights.get(model, 0.0) + weight
    return weights


def composition_of(parts: Iterable[tuple[int, Weights]]) -> Weights:
    """Weights in the whole model, largest first. parts: (number of parameters, weights) of each."""
    sums: Weights = {}
    parameters = 0
    for size, weights in parts:
        parameters += size
        for model, weight in weights.items():
            sums[model] = sums.get(model, 0.0) + size * weight
    return dict(sorted(((model, value / parameters) for model, value in sums.items()), key=lambda item: -item[1]))


Result = TypeVar("Result")


@dataclass(frozen=True)
class Decision:
    """The outcome for one layer (or the header) under one method, after all its ratios were tried."""

    model: str  # the candidate's name
    layer: int | None  # None is the header
    method: str
    ratio: float | None  # the ratio that won; None if the base's tensors were retained
    before: float  # total score before the decision
    after: float  # and after it
    log_probabilities: tuple[float, ...]  # joint, of every pair, afterwards
    metrics: Mapping[str, float] = field(default_factory=dict)  # those that are weighed or limited, afterwards
    warning: str | None = None  # why nothing could be tried
    note: str | None = None  # how the header was matched, if its rows are not simply the base's

    @property
    def weight(self) -> float:
        """What an accepted merge adds to the composition: the ratio, or the method's own fixed weight."""
        return 0.0 if self.ratio is None else recorded_weight(self.method, self.ratio)

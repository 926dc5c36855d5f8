"""What was decided of a layer or the header, and the shares of every source in it.

Knows: decisions, shares. Refuses to know: tensors, how a decision is taken.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from modules.merging.methods import recorded_share

Merge = tuple[float, str]  # (share, model name); the first entry of a part is (1.0, base)
Shares = dict[str, float]  # model name -> share; they sum to 1


def shares_of(merges: Sequence[Merge]) -> Shares:
    """Shares within one layer or header: a merge of share r scales the earlier ones by 1-r and adds r to its model."""
    shares: Shares = {}
    for share, model in merges:
        shares = {name: earlier * (1.0 - share) for name, earlier in shares.items()}
        shares[model] = shares.get(model, 0.0) + share
    return shares


def mixed_shares(base: str, candidates: Sequence[str], row: Sequence[float]) -> Shares:
    """Shares within one part of a joint search: the base has what a row leaves of 1, which may be below 0."""
    shares: Shares = {base: 1.0 - math.fsum(row)}
    for model, share in zip(candidates, row, strict=True):
        shares[model] = shares.get(model, 0.0) + share
    return shares


def composition_of(parts: Iterable[tuple[int, Shares]]) -> Shares:
    """Shares of the whole model by parameters, largest first. parts: how many weights each has, the shares in it."""
    sums: Shares = {}
    weights = 0
    for size, shares in parts:
        weights += size
        for model, share in shares.items():
            sums[model] = sums.get(model, 0.0) + size * share
    return dict(sorted(((model, value / weights) for model, value in sums.items()), key=lambda item: -item[1]))


Result = TypeVar("Result")


@dataclass(frozen=True)
class Decision:
    """What became of one layer (or the header) under one method, after all its ratios were tried."""

    model: str  # the candidate's name
    layer: int | None  # None is the header
    method: str
    ratio: float | None  # the ratio that won; None if the base's tensors were retained
    before: float  # total score
    after: float
    log_probabilities: tuple[float, ...]  # joint, of every pair, afterwards
    metrics: Mapping[str, float] = field(default_factory=dict)  # those that are weighed or limited, afterwards
    warning: str | None = None  # why nothing could be tried
    note: str | None = None  # how the header was matched, if its rows are not simply the base's

    @property
    def share(self) -> float:
        """What an accepted merge adds to the composition: the ratio, or the method's own fixed share."""
        return 0.0 if self.ratio is None else recorded_share(self.method, self.ratio)

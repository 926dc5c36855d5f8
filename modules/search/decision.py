"""What was decided of a layer or the header, and the shares of every source in it.

Knows: decisions, shares. Refuses to know: tensors, how a decision is taken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from modules.search.methods import recorded_share

Merge = tuple[float, str]  # (share, model name); the first entry of a part is (1.0, base)
Shares = dict[str, float]  # model name -> share; sums to 1


def shares_of(merges: Sequence[Merge]) -> Shares:
    """Shares within one layer or header: a merge of share r scales the earlier ones by 1-r and adds r to its model."""
    shares: Shares = {}
    for share, model in merges:
        shares = {name: earlier * (1.0 - share) for name, earlier in shares.items()}
        shares[model] = shares.get(model, 0.0) + share
    return shares


def mean_shares(parts: Iterable[Sequence[Merge]]) -> Shares:
    """Shares of the whole model: the plain mean over its layers and header, largest first."""
    parts = list(parts)
    sums: Shares = {}
    for merges in parts:
        for model, share in shares_of(merges).items():
            sums[model] = sums.get(model, 0.0) + share
    return dict(sorted(((model, value / len(parts)) for model, value in sums.items()), key=lambda item: -item[1]))


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
    drift: float | None = None  # afterwards; None if nothing guards against it
    warning: str | None = None  # why nothing could be tried
    note: str | None = None  # how the header was matched, if its rows are not simply the base's

    @property
    def share(self) -> float:
        """What an accepted merge adds to the composition: the ratio, or the method's own fixed share."""
        return 0.0 if self.ratio is None else recorded_share(self.method, self.ratio)

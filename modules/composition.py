"""Accepted merges to shares: how much of each model is in the result.

Knows: names and ratios. Refuses to know: tensors, scores.
"""

from collections.abc import Iterable, Sequence

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

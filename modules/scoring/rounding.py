"""How far scores are from themselves: the same weights, scored in ways that differ by rounding alone.

Knows: other packings, other batches. Refuses to know: what a score is good for, what is done about rounding.
"""

from collections.abc import Callable, Sequence

from modules.scoring.scorer import Scorer

WAYS = 4  # in which the same is scored


def other_ways(scorer: Scorer, copies: int) -> list[Callable[[], list[float]]]:
    """Three more ways to score the model as it stands: copies in a batch, and smaller packs or, where all pairs are
    alone already, batches of other sizes.

    copies: how many there are in a batch, at least two. With several processes each has zeros for the others' pairs.
    """
    smaller = scorer.in_smaller_packs()
    if smaller is None:
        return [lambda more=more: scorer.score_copies(copies + more) for more in range(WAYS - 1)]
    return [lambda: scorer.score_copies(copies), smaller.score, lambda: smaller.score_copies(copies)]


def spreads(ways: Sequence[Sequence[float]]) -> list[float]:
    """How far apart the values of each pair are: (ways, pairs) to one of each pair."""
    return [max(values) - min(values) for values in zip(*ways, strict=True)]

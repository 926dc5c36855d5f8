"""Phrases with variants: each is scored as if it were alone, and what is found of a pair's is put together here.

Knows: which of what is scored belong to one pair, how exclusive events add up. Refuses to know: tokenizers, models.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from modules.scoring.tokenization import Encoded

Item = TypeVar("Item")


def by_pair(items: Iterable[Item], encoded: Sequence[Encoded]) -> list[list[Item]]:
    """One item for each encoded variant, as one list for each pair."""
    found: list[list[Item]] = []
    for item, own in zip(items, encoded, strict=True):
        if own.another:
            found[-1].append(item)
        else:
            found.append([item])
    return found


def of_pairs(log_probabilities: Iterable[float], encoded: Sequence[Encoded]) -> list[float]:
    """Log-probabilities of pairs, that one of their variants follows, from those of all variants.

    A pair without variants keeps its own to the last bit.
    """
    return [
        each[0] if len(each) == 1 else float(torch.tensor(each, dtype=torch.float64).logsumexp(0))
        for each in by_pair(log_probabilities, encoded)
    ]


def of_variants(weights: Iterable[float], encoded: Sequence[Encoded]) -> list[float]:
    """The pairs' weights, each as often as its pair has variants."""
    groups = by_pair(encoded, encoded)
    return [weight for weight, each in zip(weights, groups, strict=True) for _ in each]

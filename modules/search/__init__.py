"""Methods, strategies, trials, decisions, and the loop that tries them.

Knows: what is tried and what is kept. Refuses to know: files, printing, how a forward is made.
"""

from modules.search.decision import Decision, Merge, Shares, mean_shares, shares_of
from modules.search.methods import merge, ratios_for
from modules.search.search import Search
from modules.search.strategies import improved, probability, scores, total
from modules.search.trial import Merger

__all__ = [
    "Decision",
    "Merge",
    "Merger",
    "Search",
    "Shares",
    "improved",
    "mean_shares",
    "merge",
    "probability",
    "ratios_for",
    "scores",
    "shares_of",
    "total",
]

"""Models side by side: how each does on the phrases and on neutral text.

Knows: the columns, widths. Refuses to know: how anything was measured,
where the text goes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from modules.config import Pair
from modules.runtime import CONTEXT_WIDTH, PHRASE_WIDTH, RAW_WIDTH, columns, percent, row
from modules.scoring import Drift
from modules.search import probability

_NAME_WIDTH = 24  # the widest that a column with a model's name above it gets; of a longer name the end is shown


class Standing(NamedTuple):
    """How a model does: totals of the searched pairs and of those that are held out, and on neutral text."""

    name: str
    total: float
    held_out: float | None
    drift: Drift | None
    guarded: float | None = None  # its drift as trials are judged by it, if they are


def by_other_settings(name: str) -> str:
    """What a row is called of a model that was computed by the base's settings, and has others."""
    return f"{name} (scored with the base's settings)"


def standing_table(models: Sequence[Standing], like: Standing) -> list[str]:
    """Models as one table. like: the one that has all that is shown of them."""
    rows = [_standing_cells(one) for one in models]
    wanted = [True, True, like.held_out is not None, like.drift is not None, like.drift is not None]
    shown = [[cell for cell, is_wanted in zip(cells, wanted, strict=True) if is_wanted] for cells in [_STANDING, *rows]]
    widths = [max(map(columns, cells)) for cells in zip(*shown, strict=True)]
    header, *body = [row(cells, widths) for cells in shown]
    rule = "-" * len(header)
    return [rule, header, rule, *body, rule]


_STANDING = ["Taken whole", "Total", "Held out", "Drift (KL)", "Perplexity"]


def _standing_cells(one: Standing) -> list[str]:
    drift = one.drift
    return [
        one.name,
        f"{one.total:.5f}",
        "-" if one.held_out is None else f"{one.held_out:.5f}",
        f"{drift.divergence:.4f}" if drift else "-",
        f"{drift.perplexity:.2f}" if drift else "-",
    ]


@dataclass(frozen=True)
class Scored:
    """A model and what it scored: joint log-probabilities of the searched pairs, and of those that are held out."""

    name: str
    where: str  # a commit of the hub, or a folder's name
    standing: Standing
    searched: Sequence[float]
    held_out: Sequence[float]

    @property
    def probabilities(self) -> list[float]:
        """Of all pairs, the searched ones first."""
        return [probability(value) for value in (*self.searched, *self.held_out)]


@dataclass(frozen=True)
class ScoredPairs:
    """The pairs that models are scored by."""

    searched: Sequence[Pair]
    held_out: Sequence[Pair]
    weights: Sequence[float]  # signed, of the searched pairs, then of the others
    rounding: Sequence[float] = ()  # of the searched pairs' probabilities, if it is known

    @property
    def all(self) -> list[Pair]:
        """The searched ones first."""
        return [*self.searched, *self.held_out]


def probability_table(pairs: ScoredPairs, models: Sequence[Scored]) -> list[str]:
    """Each pair's probability in each model, the searched pairs first. No digit below its rounding is shown; of a pair
    that is held out it is taken to be the largest of the others."""
    names = [one.name for one in models]
    widths = [4, PHRASE_WIDTH, CONTEXT_WIDTH, *(min(_NAME_WIDTH, max(RAW_WIDTH, columns(name))) for name in names)]
    rounding = [*(pairs.rounding or [0.0] * len(pairs.searched))]
    rounding += [max(rounding, default=0.0)] * len(pairs.held_out)
    found = zip(*(one.probabilities for one in models), strict=True)
    rows = []
    for pair, values, least in zip(pairs.all, found, rounding, strict=True):
        shown = (percent(value, RAW_WIDTH, rounding=least) for value in values)
        rows.append(row((pair.kind, pair.phrase, pair.shown, *shown), widths))
    header = row(("Type", "Phrase", "Context", *names), widths)
    rule, count = "-" * len(header), len(pairs.searched)
    held_out = ["Held out:", rule, *rows[count:], rule] if pairs.held_out else []
    others = [one.standing.name for one in models if one.standing.name == by_other_settings(one.name)]
    footnote = "; ".join(["the models' own probabilities, without weights", *others])
    return [rule, header, rule, *rows[:count], rule, *held_out, footnote]


def score_document(pairs: ScoredPairs, models: Sequence[Scored]) -> dict[str, Any]:
    """The same for JSON, with the totals: the base is the first of the models."""
    found = zip(*(one.probabilities for one in models), strict=True)
    names = [one.name for one in models]
    return {
        "models": [
            {
                "name": one.name,
                "where": one.where,
                "settings": "base" if one.standing.name == by_other_settings(one.name) else "own",
                "total": one.standing.total,
                "held_out": one.standing.held_out,
                "drift": one.standing.drift and asdict(one.standing.drift),
            }
            for one in models
        ],
        "phrases": [
            {
                **pair.written(),
                "weight": abs(weight),
                "held_out": number >= len(pairs.searched),
                "probabilities": dict(zip(names, values, strict=True)),
            }
            for number, (pair, weight, values) in enumerate(zip(pairs.all, pairs.weights, found, strict=True))
        ],
    }

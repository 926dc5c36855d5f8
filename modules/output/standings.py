"""Models side by side: how each does on the phrases and on neutral text.

Knows: the columns, widths, what is said of a merge that a candidate beats. Refuses to know: how anything was measured,
where the text goes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from modules.runtime import columns, row
from modules.scoring import Drift


class Standing(NamedTuple):
    """How a model does: totals of the searched pairs and of those that are held out, and on neutral text."""

    name: str
    total: float
    held_out: float | None
    drift: Drift | None


def standing_table(base: Standing, candidates: Sequence[Standing], merge: Standing, search: str) -> list[str]:
    """The base, the candidates taken whole and the merge as one table; and, where a candidate alone is better than the
    merge, that it is. search: how the merge was found."""
    return [*standing_rows([base, *candidates, merge], merge), *_better_alone(candidates, merge, search)]


def standing_rows(models: Sequence[Standing], like: Standing) -> list[str]:
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


# What to do where a candidate alone is better than what was found.
_INSTEAD = {
    "greedy": "begin with it: make it the base; or set search: joint",
    "joint": "lower drift_weight, which has kept the merge nearer to the base",
}


def _better_alone(candidates: Sequence[Standing], merge: Standing, search: str) -> list[str]:
    """That a candidate alone has a lower total than the merge, where it was searched or where it was not."""
    lines = []
    for what, key in (("where it was searched", "total"), ("on the phrases held out", "held_out")):
        ours = getattr(merge, key)
        known = [one for one in candidates if ours is not None and getattr(one, key) is not None]
        best = min(known, key=lambda one: getattr(one, key), default=None)
        if best is not None and getattr(best, key) < ours:
            figures = f"{getattr(best, key):.5f} against {ours:.5f}"
            lines.append(f"{best.name} taken whole is better than the merge {what}: {figures}.")
    return [*lines, f"Take it as it is, or {_INSTEAD[search]}."] if lines else []

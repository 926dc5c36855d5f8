"""What is said at the end where a candidate alone is better than the merge, or the merge is beyond a limit.

Knows: by what models are compared, which settings keep a search from reaching a candidate whole. Refuses to know: how
anything was measured, which metrics there are, where the text goes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modules.config.schema import Config
from modules.metrics.registry import columns_of
from modules.output.tables import ResultRow
from modules.search.strategies import Limits

SHOWN = 1e-5  # of a total, or of 1 where it is smaller: what differs by less looks the same


@dataclass(frozen=True)
class Searched:
    """How a run has searched."""

    config: Config
    limits: Limits
    layers: int  # that the model has


def advice(candidates: Sequence[ResultRow], merge: ResultRow, searched: Searched) -> list[str]:
    """That a candidate alone is better than the merge, what kept the search from it, and what to do; nothing if none
    is. One beyond a limit is passed over."""
    limits = searched.limits
    allowed = [row for row in candidates if _is_within(row, limits)]
    lines, better = list[str](), list[ResultRow]()
    for pairs, key in (("searched", "total"), ("held-out", "held_out")):
        ours = _objective(merge, key, limits)
        best = min(allowed, key=lambda row: _objective(row, key, limits), default=merge)
        theirs = _objective(best, key, limits)
        if theirs < ours - max(limits.min_gain, SHOWN * max(1.0, abs(ours))):
            figures = _figures(limits)
            lines.append(f"{best.name} alone scores better on the {pairs} pairs ({theirs:.5f} vs {ours:.5f}{figures}).")
            better.append(best)
    if not better:
        return []
    causes = [cause for best in better for cause in _causes(best, candidates, merge, searched)]
    way_out = "try search: joint"
    if searched.config.search == "joint":
        way_out = "give each phrase more contexts"
    return [*lines, *dict.fromkeys(causes), f"Take {better[0].name} as it is, or {way_out}."]


def beyond_limit(merge: ResultRow, limits: Limits) -> list[str]:
    """The metrics that are above a limit on texts that took no part in the search, which has held it on others."""
    lines = []
    for column in columns_of(limits.maxima):
        value, most = merge.metrics.get(column.shown_as, 0.0), limits.maxima[column.name]
        if value > most:
            lines.append(
                f"the merge's {column.shown_as} is {value:.4g} on texts that took no part in the search, above "
                f"{column.limit_key} {most:g}: lower {column.limit_key}, or raise neutral_tokens"
            )
    return lines


def _is_within(row: ResultRow, limits: Limits) -> bool:
    """Whether a model holds all limits, in trials and on the texts that took no part in them."""
    for column in columns_of(limits.maxima):
        if row.metrics.get(column.shown_as, 0.0) > limits.maxima[column.name]:
            return False
    return limits.allow(row.metrics)


def _objective(row: ResultRow, key: str, limits: Limits) -> float:
    """A total and the weighted metrics; infinite where one of them is not known."""
    if not {key, *limits.weights} <= row.metrics.keys():
        return math.inf
    return limits.weighed(row.metrics[key], row.metrics)


def _figures(limits: Limits) -> str:
    """What each weight adds to the totals that are compared."""
    weights = [f"{limits.weights[column.name]:.5g} x {column.label}" for column in columns_of(limits.weights)]
    return f", with {' and '.join(weights)}" if weights else ""


def _causes(best: ResultRow, candidates: Sequence[ResultRow], merge: ResultRow, searched: Searched) -> list[str]:
    """What kept a search from a candidate as it is, each with what to do about it."""
    config, limits = searched.config, searched.limits
    causes = []
    if config.layers is not None and len(config.layers) < searched.layers:
        causes.append(f"layers restricts the search to {len(config.layers)} of {searched.layers} layers: leave it out.")
    if not config.merge_headers:
        causes.append("merge_headers is false, so embedding and output head stay the base's: set it to true.")
    if config.search == "greedy":
        causes += _causes_of_greedy(config)
    for column in columns_of(limits.maxima):
        most, used = limits.maxima[column.name], merge.metrics.get(column.name, 0.0)
        if used and used + best.metrics.get(column.name, 0.0) > most:
            is_later = config.search == "greedy" and best.name != candidates[0].name
            first = f"put {best.name} first in models_to_merge, or " if is_later else ""
            causes.append(f"{column.limit_key} is used up ({used:.4g} of {most:g}): {first}raise it.")
    return causes


def _causes_of_greedy(config: Config) -> list[str]:
    """Those of a search that tries some ratios of a method on one layer after another."""
    causes = []
    if not {"lerp", "slerp"}.intersection(config.merge_method):
        methods = ", ".join(config.merge_method)
        causes.append(f"merge_method {methods} takes no layer whole: add lerp.")
    if max(config.merge_ratios) < 1.0:
        causes.append(f"merge_ratios ends at {max(config.merge_ratios):g}: add 1.0, which takes a layer whole.")
    if config.strategy != "cumulative":
        causes.append(f"strategy {config.strategy} judges by pairs: cumulative goes by the total.")
    return causes

"""Advice at the end of a search, if a candidate alone is better than the merge or the merge exceeds a limit.

Knows: how models are compared, which settings keep a search from taking a candidate whole. Refuses to know: how
values were measured, which metrics exist, where the text goes.
"""

import math
from collections.abc import Sequence

from modules.config.schema import Config
from modules.metrics.registry import columns_of
from modules.output.tables import ResultRow
from modules.search.strategies import Limits

SHOWN = 5e-4  # of a total, or of 1 if it is smaller: a smaller difference is not visible in the output


def advice(candidates: Sequence[ResultRow], merge: ResultRow, config: Config, limits: Limits, layers: int) -> list[str]:
    """Lines that name a candidate better than the merge and within all limits, what kept the search from it, and what
    to do; empty if there is none. layers: the number of the model's layers."""
    allowed = [row for row in candidates if limits.allow(row.metrics) and not beyond_limit(row, limits)]
    best = min(allowed, key=lambda row: _objective(row, limits), default=merge)
    merge_objective = _objective(merge, limits)
    best_objective = _objective(best, limits)
    is_better = best_objective < merge_objective - max(limits.min_gain, SHOWN * max(1.0, abs(merge_objective)))
    if not is_better:
        return []
    alternative = "give each phrase more contexts" if config.search == "joint" else "try search: joint"
    return [
        f"{best.name} on its own scores better on the searched pairs ({best_objective:.3f} vs {merge_objective:.3f}).",
        *_causes(best, merge, config, limits, layers),
        f"Use {best.name} itself, or {alternative}.",
    ]


def beyond_limit(row: ResultRow, limits: Limits) -> list[str]:
    """A line for each metric of a model that exceeds its limit on held-out texts. On its own texts the search kept the
    limit."""
    lines = []
    for column in columns_of(limits.maxima):
        value = row.metrics.get(column.shown_as, 0.0)
        limit = limits.maxima[column.name]
        if value > limit:
            (shown,) = columns_of({column.shown_as: value})
            lines.append(
                f"{row.name}: {shown.label} is {value:.4g} on held-out text, above {column.limit_key} "
                f"{limit:g}; lower {column.limit_key} or raise neutral_tokens"
            )
    return lines


def _objective(row: ResultRow, limits: Limits) -> float:
    """The objective of a search: the total and the weighted metrics; infinite if one of them is not known."""
    if not limits.weights.keys() <= row.metrics.keys():
        return math.inf
    return limits.weighed(row.metrics["total"], row.metrics)


def _causes(best: ResultRow, merge: ResultRow, config: Config, limits: Limits, layers: int) -> list[str]:
    """What kept a search from taking a candidate whole: a line for each cause, with its remedy."""
    causes = []
    if config.layers is not None and len(config.layers) < layers:
        causes.append(f"layers restricts the search to {len(config.layers)} of {layers} layers; remove the key.")
    if not config.merge_headers:
        causes.append("merge_headers is false, so embedding and LM head stay the base's; set it to true.")
    if config.search == "greedy":
        if not {"lerp", "slerp"}.intersection(config.merge_method):
            causes.append(f"merge_method {', '.join(config.merge_method)} can't replace a whole layer; add lerp.")
        if max(config.merge_ratios) < 1.0:
            causes.append(f"merge_ratios ends at {max(config.merge_ratios):g}; add 1.0, which replaces a layer.")
        if config.strategy != "cumulative":
            causes.append(f"strategy {config.strategy} counts pairs; cumulative lowers the total.")
    for column in columns_of(limits.maxima):
        limit = limits.maxima[column.name]
        drift = merge.metrics.get(column.name, 0.0)
        if drift and drift + best.metrics.get(column.name, 0.0) > limit:
            causes.append(f"{column.limit_key} is used up ({drift:.4g} of {limit:g}); raise it.")
    return causes

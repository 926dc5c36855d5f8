"""What is said at the end where a candidate alone is better than the merge, or the merge is beyond a limit.

Knows: by what models are compared, which settings keep a search from reaching a candidate whole. Refuses to know: how
anything was measured, which metrics there are, where the text goes.
"""

import math
from collections.abc import Sequence

from modules.config.schema import Config
from modules.metrics.registry import columns_of
from modules.output.tables import ResultRow
from modules.search.strategies import Limits

SHOWN = 5e-4  # of a total, or of 1 where it is smaller: what differs by less looks the same


def advice(candidates: Sequence[ResultRow], merge: ResultRow, config: Config, limits: Limits, layers: int) -> list[str]:
    """That a candidate within all limits is better than the merge, what kept the search from it, and what to do;
    nothing if none is. layers: that the model has."""
    allowed = [row for row in candidates if limits.allow(row.metrics) and not beyond_limit(row, limits)]
    best = min(allowed, key=lambda row: _objective(row, limits), default=merge)
    before = _objective(merge, limits)
    after = _objective(best, limits)
    is_better = after < before - max(limits.min_gain, SHOWN * max(1.0, abs(before)))
    if not is_better:
        return []
    way_out = "give each phrase more contexts" if config.search == "joint" else "try search: joint"
    return [
        f"{best.name} on its own scores better on the searched pairs ({after:.3f} vs {before:.3f}).",
        *_causes(best, merge, config, limits, layers),
        f"Use {best.name} itself, or {way_out}.",
    ]


def beyond_limit(row: ResultRow, limits: Limits) -> list[str]:
    """The metrics of a model that are above a limit on texts that took no part in the search, which has held it on
    others."""
    lines = []
    for column in columns_of(limits.maxima):
        value = row.metrics.get(column.shown_as, 0.0)
        most = limits.maxima[column.name]
        if value > most:
            (shown,) = columns_of({column.shown_as: value})
            lines.append(
                f"{row.name}: {shown.label} is {value:.4g} on held-out neutral text, above {column.limit_key} "
                f"{most:g}; lower {column.limit_key} or raise neutral_tokens"
            )
    return lines


def _objective(row: ResultRow, limits: Limits) -> float:
    """What a search lowers: the total and the weighted metrics; infinite where one of them is not known."""
    if not limits.weights.keys() <= row.metrics.keys():
        return math.inf
    return limits.weighed(row.metrics["total"], row.metrics)


def _causes(best: ResultRow, merge: ResultRow, config: Config, limits: Limits, layers: int) -> list[str]:
    """What kept a search from a candidate as it is, each with what to do about it."""
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
        most = limits.maxima[column.name]
        used = merge.metrics.get(column.name, 0.0)
        if used and used + best.metrics.get(column.name, 0.0) > most:
            causes.append(f"{column.limit_key} is used up ({used:.4g} of {most:g}); raise it.")
    return causes

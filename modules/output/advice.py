"""What is said at the end where a candidate alone is better than the merge, or the merge has drifted too far.

Knows: by what models are compared, which settings keep a search from reaching a candidate whole. Refuses to know: how
anything was measured, where the text goes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modules.config import Config
from modules.output.standings import Standing
from modules.search.strategies import Limits

SHOWN = 1e-5  # of a total, or of 1 where it is smaller: what differs by less looks the same


@dataclass(frozen=True)
class Searched:
    """How a run has searched."""

    config: Config
    limits: Limits
    layers: int  # that the model has


def advice(candidates: Sequence[Standing], merge: Standing, searched: Searched) -> list[str]:
    """That a candidate alone is better than the merge, what kept the search from it, and what to do; nothing if none
    is. One that drifts beyond the limit is passed over."""
    limits = searched.limits
    allowed = [one for one in candidates if _is_within(one, limits.max_drift)]
    lines, better = list[str](), list[Standing]()
    for pairs, key in (("searched", "total"), ("held-out", "held_out")):
        ours = _objective(merge, key, limits.drift_weight)
        best = min(allowed, key=lambda one: _objective(one, key, limits.drift_weight), default=merge)
        theirs = _objective(best, key, limits.drift_weight)
        if theirs < ours - max(limits.min_gain, SHOWN * max(1.0, abs(ours))):
            lines.append(
                f"{best.name} alone scores better on the {pairs} pairs ({_figures(best, merge, key, limits)})."
            )
            better.append(best)
    if not better:
        return []
    causes = [cause for best in better for cause in _causes(best, candidates, merge, searched)]
    way_out = "try search: joint"
    if searched.config.search == "joint":
        way_out = "give each phrase more contexts"
    return [*lines, *dict.fromkeys(causes), f"Take {better[0].name} as it is, or {way_out}."]


def beyond_limit(merge: Standing, limits: Limits) -> list[str]:
    """That the drift which is shown is above its limit, if it is: the search has held that on other texts."""
    if merge.drift is None or merge.drift.divergence <= limits.max_drift:
        return []
    return [
        f"the merge's drift is {merge.drift.divergence:.4g} on texts that took no part in the search, above max_drift "
        f"{limits.max_drift:g}: lower max_drift, or raise neutral_tokens, to hold it there too"
    ]


def _drift(one: Standing) -> float | None:
    """As trials are judged by it or, where that is not known, as it is shown."""
    shown = one.drift.divergence if one.drift else None
    return shown if one.guarded is None else one.guarded


def _is_within(one: Standing, most: float) -> bool:
    """Whether a model holds the limit of drift, by all that is known of it."""
    known = [drift for drift in (_drift(one), one.drift and one.drift.divergence) if drift is not None]
    return most == math.inf or (bool(known) and max(known) <= most)


def _objective(one: Standing, key: str, weight: float) -> float:
    """A total and the weighted drift; infinite where one of them is not known."""
    value, drift = getattr(one, key), _drift(one) if weight else 0.0
    return math.inf if value is None or drift is None else value + weight * drift


def _figures(best: Standing, merge: Standing, key: str, limits: Limits) -> str:
    """By what the better one is better, and how far both are from the base."""
    weight = limits.drift_weight
    values = [f"{_objective(one, key, weight):.5f}" for one in (best, merge)]
    drifts = [f"{one.drift.divergence:.4f}" for one in (best, merge) if one.drift]
    by = f"total + {weight:.5g} x drift" if weight else "total"
    return f"{by} {' vs '.join(values)}" + (f"; KL {' vs '.join(drifts)}" if len(drifts) == 2 else "")


def _causes(best: Standing, candidates: Sequence[Standing], merge: Standing, searched: Searched) -> list[str]:
    """What kept a search from a candidate as it is, each with what to do about it."""
    config, limits = searched.config, searched.limits
    causes = []
    if config.layers is not None and len(config.layers) < searched.layers:
        causes.append(f"layers restricts the search to {len(config.layers)} of {searched.layers} layers: leave it out.")
    if not config.merge_headers:
        causes.append("merge_headers is false, so embedding and output head stay the base's: set it to true.")
    if config.search == "greedy":
        causes += _causes_of_greedy(config)
    drift, used = _drift(best), _drift(merge)
    if limits.max_drift < math.inf and drift is not None and used and used + drift > limits.max_drift:
        first = f"put {best.name} first in models_to_merge, or " if best.name != candidates[0].name else ""
        first = first if config.search == "greedy" else ""
        causes.append(f"max_drift is used up ({used:.4g} of {limits.max_drift:g}): {first}raise it.")
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

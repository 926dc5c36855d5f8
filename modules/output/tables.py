"""Results as text: summary, phrase table, decision lines, composition.

Knows: widths, digits, wording. Refuses to know: how anything was measured, where the text goes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modules.config import Config, Pair
from modules.output.records import Sample
from modules.runtime import CONTEXT_WIDTH, PHRASE_WIDTH, RAW_WIDTH, USED_WIDTH, ended, percent, row, spans
from modules.scoring import Drift
from modules.search import Decision, Merge, Shares, probability, scores, total, total_rounding

WIDTHS = (4, PHRASE_WIDTH, CONTEXT_WIDTH, RAW_WIDTH, USED_WIDTH, USED_WIDTH)
CHANGED = 0.005  # percentage points of Used Prob: a pair that moved no more has not changed


def summary(
    config: Config,
    model: Mapping[str, object],
    scorer: Mapping[str, object],
    candidates: Sequence[str],
    rounding: float = 0.0,
    drift_weight: float = 0.0,
) -> list[str]:
    """The settings of a run, one line each; `model` and `scorer` add what they say of themselves. rounding: of the
    total, if it was measured. drift_weight: as it counts."""
    rows = {
        **model,
        "Random seed": config.random_seed,
        "Starting model": config.directories.model_path1,
        "Models to merge": ", ".join(candidates),
        "Output directory": config.directories.output_directory,
        "Phrases loaded": _phrases(config),
        **scorer,
        "Auto weights": config.auto_weights,
        **({"Layers searched": f"{', '.join(spans(config.layers))} (counted from 0)"} if config.layers else {}),
        **(_of_joint_search(config) if config.search == "joint" else _of_greedy_search(config)),
        **({"Drift": _guard(config, drift_weight)} if config.is_guarded else {}),
        **({"Rounding": _rounding(config, rounding)} if rounding else {}),
    }
    return [f"{name:<16} : {value}" for name, value in rows.items()]


def score_summary(
    config: Config, model: Mapping[str, object], scorer: Mapping[str, object], names: Sequence[str]
) -> list[str]:
    """The same where models are scored and not merged."""
    rows = {
        **model,
        "Base": config.directories.model_path1,
        "Models to score": ", ".join(names),
        "Phrases loaded": _phrases(config),
        **scorer,
        "Auto weights": config.auto_weights,
    }
    return [f"{name:<16} : {value}" for name, value in rows.items()]


def _phrases(config: Config) -> str:
    """How many pairs there are of each kind."""
    more = f", {len(config.held_out_pairs)} more held out" if config.held_out_pairs else ""
    return f"{len(config.pairs)} ({len(config.bad_phrases)} bad, {len(config.good_phrases)} good){more}"


def _of_greedy_search(config: Config) -> dict[str, object]:
    threshold = f" (threshold {config.strategy_threshold:g})" if config.strategy == "quantitive" else ""
    return {
        "Merge ratios": list(config.merge_ratios),
        "Merge method": ", ".join(config.merge_method),
        "Merge headers": config.merge_headers,
        "Strategy used": config.strategy + threshold,
    }


def _of_joint_search(config: Config) -> dict[str, object]:
    steps = f"joint, {config.joint.steps} steps, the first by {config.joint.step_size:g}"
    return {"Search": steps, "Merge headers": config.merge_headers}


def _guard(config: Config, drift_weight: float) -> str:
    """What is done about drift."""
    parts = [f"a nat counts as {drift_weight:.5g} of the total"] if drift_weight else []
    parts += [f"at most {config.max_drift:g}"] if config.max_drift is not None else []
    return f"{', '.join(parts)}; measured on {config.neutral_tokens} tokens meanwhile"


def _rounding(config: Config, rounding: float) -> str:
    """What the total is uncertain by, and what follows from that."""
    least = 2 * rounding if config.min_gain == "auto" else config.min_gain
    counted = f"a gain counts from {least:.5f} on" if config.strategy == "cumulative" else "smaller changes don't count"
    return f"{rounding:.5f} of the total; {counted} (compute_dtype: float32 has none)"


def decision_lines(decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool) -> list[str]:
    """The composition of a layer or header so far, and what was decided about it (without the time of day).

    merges: (share, model) of all accepted merges, the base first. name_method: add the method, where there are several.
    The layout is the original's, which counts layers from 1.
    """
    part = "Header" if decision.layer is None else f"Layer {decision.layer + 1}/{layers}"
    method = f" - {decision.method}" if name_method and decision.layer is not None else ""
    if decision.ratio is None:
        outcome = f"RETAINED - {decision.after:.5f}"
    else:
        before, after = decision.before, decision.after
        relative = relative_change(before, after)
        change = "n/a" if relative is None else f"{abs(relative) * 100:.1f}%"
        outcome = f"CHANGED - {before:.5f} > {after:.5f} - {change}"
    if decision.drift is not None:
        outcome += f" - drift {decision.drift:.4f}"
    return [str([[share, model] for share, model in merges]), f"{part} - {outcome}{method}"]


def relative_change(before: float, after: float) -> float | None:
    """The change of a total by the size of the old one; None where that says nothing: from zero on, across zero, or
    where one of them is too large for a number."""
    crosses = min(before, after) < 0 < max(before, after)
    change = (after - before) / abs(before) if before and not crosses else math.inf
    return change if math.isfinite(change) else None


def step_line(step: int, steps: int, before: float, after: float, held_out: float | None, drift: float | None) -> str:
    """What a step of a joint search has made of the totals and the drift (without the time of day)."""
    parts = [f"Step {step}/{steps}", f"{before:.5f} > {after:.5f}"]
    parts += [f"held out {held_out:.5f}"] if held_out is not None else []
    parts += [f"drift {drift:.4f}"] if drift is not None else []
    return " - ".join(parts)


def joint_standing(step: int, steps: int, objective: float) -> str:
    """How far a joint search is, for the progress bar."""
    return f"step {step}/{steps}, {objective:.5f}"


def share_lines(names: Sequence[str], shares: Sequence[Sequence[float]], layers: int) -> list[str]:
    """A joint search's shares of each layer and, if it was mixed, of what is outside of them. names: base first."""
    lines = []
    for number, own in enumerate(shares):
        part = f"Layer {number}" if number < layers else "Outside"
        told = [f"{share:.2f} {name}" for name, share in zip(names, (1 - math.fsum(own), *own), strict=True) if share]
        lines.append(f"{part:<13}: {', '.join(told)}")
    return lines


def standing(turn: str, decision: Decision, accepted: int) -> str:
    """How far a run is, for the progress bar. turn: which candidate of how many. accepted: merges so far."""
    part = "header" if decision.layer is None else f"layer {decision.layer}"
    return f"candidate {turn}, {part}, {accepted} accepted"


class _PairRow(NamedTuple):
    """How probable a pair is, and how much more than at the start."""

    pair: Pair
    weight: float  # without a sign
    raw: float
    move: float
    rounding: float  # of raw


def phrase_table(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    now: Sequence[float],
    start: Sequence[float] | None = None,
    kind: str = "full",
    rounding: Sequence[float] = (),
) -> list[str]:
    """Probabilities of the pairs, and how they changed since the start if `start` is given.

    weights: signed, good phrases negative. now, start: joint log-probabilities. kind: one of TABLES. rounding: of each
    probability, if it is known; no digit below it is shown.
    """
    rounding = rounding or [0.0] * len(pairs)
    standings = [
        _PairRow(pair, abs(weight), probability(after), probability(after) - probability(before), least)
        for pair, weight, after, before, least in zip(pairs, weights, now, start or now, rounding, strict=True)
    ]
    changed = [one for one in standings if abs(one.move * one.weight) * 100 > CHANGED]
    shown, notes = {
        "full": (standings, []),
        "changed": (changed, [_not_shown(len(standings) - len(changed), len(standings))]),
        "summary": ([], [_moved_well(standings)]),
    }[kind]
    header = row(("Type", "Phrase", "Context", "Raw Prob*", "Used Prob**", "Change"), WIDTHS)
    rule = "-" * len(header)
    body = [*(_pair_row(one, start is not None) for one in shown), rule] if shown else []
    notes = [*notes, "* the model's own probability - ** after weighting; lower totals are better"]
    return [rule, header, rule, *body, _total_row(pairs, weights, now, start, rounding), rule, *notes]


def _pair_row(one: _PairRow, with_change: bool) -> str:
    least = one.rounding * one.weight
    raw, used = percent(one.raw, RAW_WIDTH, rounding=one.rounding), percent(one.raw * one.weight, rounding=least)
    change = percent(one.move * one.weight, signed=True, rounding=least) if with_change else "N/A"
    return row((one.pair.kind, one.pair.phrase, one.pair.shown, raw, used, change), WIDTHS)


def _total_row(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    now: Sequence[float],
    start: Sequence[float] | None,
    rounding: Sequence[float],
) -> str:
    raw = sum(probability(value) * (-1 if pair.kind == "GOOD" else 1) for pair, value in zip(pairs, now, strict=True))
    used = total(scores(now, weights))
    least = total_rounding(weights, rounding)
    change = "N/A" if start is None else percent(used - total(scores(start, weights)), signed=True, rounding=least)
    told = percent(raw, RAW_WIDTH, rounding=math.hypot(*rounding)), percent(used, rounding=least)
    return row(("", "Total (bad - good)", "", *told, change), WIDTHS)


def _not_shown(count: int, pairs: int) -> str:
    return f"not shown: {count} of {pairs} pairs, whose Used Prob has changed by {CHANGED:g} percentage points or less"


def _moved_well(standings: Sequence[_PairRow]) -> str:
    """How many pairs have gone where they should."""
    bad = [one.move < 0 for one in standings if one.pair.kind == "BAD"]
    good = [one.move > 0 for one in standings if one.pair.kind == "GOOD"]
    return (
        f"since the start: {sum(bad)} of {len(bad)} bad pairs less probable, "
        f"{sum(good)} of {len(good)} good pairs more probable"
    )


def neutral_text_lines(drift: Drift | None) -> list[str]:
    """On what drift is measured, and how the base does there; nothing if it is not."""
    return [f"Neutral text: {drift.tokens:,} tokens, perplexity {drift.base_perplexity:.2f}"] if drift else []


def drift_lines(drift: Drift | None) -> list[str]:
    """How far the model has gone from the base on neutral text; nothing if that was not measured."""
    if drift is None:
        return []
    return [
        f"Drift: KL {drift.divergence:.4f} nats per token from the base on {drift.tokens:,} tokens of neutral text, "
        f"{drift.agreement:.1%} of likeliest tokens the same, perplexity {drift.base_perplexity:.2f} > "
        f"{drift.perplexity:.2f}"
    ]


@dataclass(frozen=True)
class Totals:
    """A total before and now, and how much of the change is due to each phrase."""

    before: float
    now: float
    changes: Mapping[tuple[str, str], float]  # kind and phrase -> below 0 if it is better now

    @classmethod
    def of(
        cls, pairs: Sequence[Pair], weights: Sequence[float], before: Sequence[float], now: Sequence[float]
    ) -> "Totals":
        """weights: signed; before, now: joint log-probabilities."""
        old, new = scores(before, weights), scores(now, weights)
        changes: dict[tuple[str, str], float] = {}
        for pair, one, other in zip(pairs, old, new, strict=True):
            changes[pair.kind, pair.phrase] = changes.get((pair.kind, pair.phrase), 0.0) + other - one
        return cls(total(old), total(new), changes)

    def __str__(self) -> str:
        relative = relative_change(self.before, self.now)
        change = "n/a" if relative is None else f"{relative:+.0%}"
        return f"{self.before:.5f} > {self.now:.5f} ({change})"


def held_out_lines(searched: Totals, held_out: Totals) -> list[str]:
    """Both totals, and the phrases that are better where they were searched and not where they were held out."""
    only = [
        phrase
        for (kind, phrase), change in held_out.changes.items()
        if change >= 0 > searched.changes.get((kind, phrase), 0.0)
    ]
    names = f"Better only where it was searched: {', '.join(only)}"
    return [f"Searched {searched}, held out {held_out}", *([names] if only else [])]


def sample_lines(samples: Sequence[Sample]) -> list[str]:
    """Prompts and, below each, what base and merge have answered."""
    texts = (
        text
        for one in samples
        for text in (("Prompt:", one.prompt), ("  base:", ended(one.base)), ("  merge:", ended(one.merge)))
    )
    lines = [
        f"{'' if number else name:<9}{line}"
        for name, text in texts
        for number, line in enumerate(text.strip().splitlines() or ["(nothing)"])
    ]
    return ["What base and merge answer, with the same seed:", *lines, ""] if lines else []


def composition_lines(shares: Shares) -> list[str]:
    """How much of each model is in the result."""
    return [f"{share * 100:6.2f}%  {model}" for model, share in shares.items()]

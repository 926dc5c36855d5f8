"""Results as text: summary, phrase table, decision lines, composition.

Knows: widths, digits, wording. Refuses to know: how anything was measured, where the text goes.
"""

from collections.abc import Mapping, Sequence

from modules.composition import Merge, Shares
from modules.config import Config, Pair
from modules.search import Decision
from modules.strategies import probability, scores, total

PHRASE_WIDTH, CONTEXT_WIDTH = 24, 28


def summary(
    config: Config, model: Mapping[str, object], scorer: Mapping[str, object], candidates: Sequence[str]
) -> list[str]:
    """The settings of a run, one line each; `model` and `scorer` add what they say of themselves."""
    rows = {
        **model,
        "Random seed": config.random_seed,
        "Starting model": config.directories.model_path1,
        "Models to merge": ", ".join(candidates),
        "Output directory": config.directories.output_directory,
        "Phrases loaded": f"{len(config.pairs)} ({len(config.bad_phrases)} bad, {len(config.good_phrases)} good)",
        **scorer,
        "Auto weights": config.auto_weights,
        "Merge ratios": list(config.merge_ratios),
        "Merge method": ", ".join(config.merge_method),
        "Merge headers": config.merge_headers,
        "Strategy used": config.strategy
        + (f" (threshold {config.strategy_threshold:g})" if config.strategy == "quantitive" else ""),
    }
    return [f"{name:<16} : {value}" for name, value in rows.items()]


def decision_lines(decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool) -> list[str]:
    """The composition of a layer or header so far, and what was decided about it (without the time of day).

    merges: (share, model) of all accepted merges, the base first. name_method: add the method, where there are several.
    """
    method = f" - {decision.method}" if name_method and decision.layer is not None else ""
    if decision.ratio is None:
        outcome = f"RETAINED - {decision.after:.5f}"
    else:
        change = _relative_change(decision.before, decision.after)
        outcome = f"CHANGED - {decision.before:.5f} > {decision.after:.5f} - {change}"
    return [str([[share, model] for share, model in merges]), f"{_part(decision, layers)} - {outcome}{method}"]


def standing(turn: str, decision: Decision, layers: int, accepted: int) -> str:
    """How far a run is, for the progress bar. turn: which candidate of how many. accepted: merges so far."""
    return f"candidate {turn}, {_part(decision, layers).lower()}, {accepted} accepted"


def _part(decision: Decision, layers: int) -> str:
    return "Header" if decision.layer is None else f"Layer {decision.layer + 1}/{layers}"


def _relative_change(before: float, after: float) -> str:
    """How far a total moved, as a percentage of its old magnitude."""
    return f"{abs(after - before) / abs(before) * 100:.1f}%" if before else "n/a"


def phrase_table(
    pairs: Sequence[Pair], weights: Sequence[float], now: Sequence[float], start: Sequence[float] | None = None
) -> list[str]:
    """Probabilities of all pairs, and how they changed since the start if `start` is given.

    weights: signed, good phrases negative. now, start: joint log-probabilities.
    """
    header = ("Type", "Phrase", "Context", "Raw Prob*", "Used Prob**", "Change")
    rows = []
    for index, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        raw = probability(now[index])
        before = raw if start is None else probability(start[index])
        change = "N/A" if start is None else percent((raw - before) * abs(weight), signed=True)
        rows.append((pair.kind, pair.phrase, pair.context, percent(raw), percent(raw * abs(weight)), change))
    raw_total = sum(
        probability(value) * (-1 if pair.kind == "GOOD" else 1) for pair, value in zip(pairs, now, strict=True)
    )
    used_total = total(scores(now, weights))
    change = "N/A" if start is None else percent(used_total - total(scores(start, weights)), signed=True)
    totals = ("", "Total (bad - good)", "", percent(raw_total), percent(used_total), change)
    widths = (4, PHRASE_WIDTH, CONTEXT_WIDTH, 10, 12, 12)
    body = [row(cells, widths) for cells in (header, *rows, totals)]
    rule = "-" * len(body[0])
    notes = "* the model's own probability - ** after weighting; lower totals are better"
    return [rule, body[0], rule, *body[1:-1], rule, body[-1], rule, notes]


def composition_lines(shares: Shares) -> list[str]:
    """How much of each model is in the result."""
    return [f"{share * 100:6.2f}%  {model}" for model, share in shares.items()]


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table."""
    return "| " + " | ".join(fit(cell, width) for cell, width in zip(cells, widths, strict=True)) + " |"


def fit(text: str, width: int) -> str:
    """Text on one line in exactly `width` characters; a long text keeps its end, where a context meets its phrase."""
    text = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return text.ljust(width) if len(text) <= width else "..." + text[len(text) - width + 3 :]


def percent(value: float, signed: bool = False) -> str:
    """A share as a percentage with five digits or so, whatever its size."""
    hundredths = value * 100
    digits = f"{hundredths:+.5f}" if signed else f"{hundredths:.5f}"
    if len(digits) > 10:
        digits = f"{hundredths:+.3e}" if signed else f"{hundredths:.3e}"
    return digits + "%"

"""Results as text: summary, phrase table, decision lines, models and outputs side by side, composition.

Knows: widths, digits, wording. Refuses to know: how anything was measured, which metrics there are, where text goes.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modules.config.phrase_lists import Pair
from modules.config.schema import Config
from modules.metrics.registry import columns_of
from modules.output.recipe import Recipe
from modules.output.records import Sample
from modules.runtime.text import (
    CONTEXT_WIDTH,
    PHRASE_WIDTH,
    RAW_WIDTH,
    USED_WIDTH,
    brief_percent,
    ended,
    one_line,
    percent,
    pluralize,
    ranges,
    shortened,
    table,
)
from modules.search.decision import Decision, Merge
from modules.search.strategies import improved, probability, scores, total, total_rounding

WIDTHS = (4, PHRASE_WIDTH, CONTEXT_WIDTH, RAW_WIDTH, USED_WIDTH, USED_WIDTH)
CHANGED = 0.005  # percentage points of Used Prob: a pair that moved no more has not changed
MOST_MODELS = 3  # of an output's composition, the largest weights
# columns of a name in a comparison
OUTPUT_WIDTH = 32
MODEL_WIDTH = 16
NAME_WIDTH = 24  # the widest that a column gets for the sake of the model's name above it

Values = Mapping[str, float]  # of metrics, by name


def summary(
    config: Config,
    model: Mapping[str, object],
    scorer: Mapping[str, object],
    candidates: Sequence[str],
    weighed: Mapping[str, str],
    rounding: float = 0.0,
) -> list[str]:
    """The settings of a run, one line each; `model`, `scorer` and `weighed` add what they say of themselves. rounding:
    of the total, if it was measured."""
    rows = {
        **model,
        "Random seed": config.random_seed,
        "Base model": config.directories.model_path1,
        "Models to merge": ", ".join(candidates),
        "Output directory": config.directories.output_directory,
        "Pairs": _pairs(config),
        **scorer,
        "Auto weights": _on(config.auto_weights),
    }
    if config.layers:
        rows["Layers searched"] = f"{', '.join(ranges(config.layers))} (counted from 0)"
    if config.search == "joint":
        first = config.joint.step_size
        last = config.joint.step_size / 10
        rows["Search"] = f"joint, {pluralize(config.joint.steps, 'step')}, step size {first:g} falling to {last:g}"
    else:
        rows["Merge ratios"] = list(config.merge_ratios)
        rows["Merge method"] = ", ".join(config.merge_method)
        rows["Strategy"] = config.strategy
        if config.strategy == "quantitive":
            rows["Threshold"] = f"{config.strategy_threshold:g}"
    rows["Merge headers"] = _on(config.merge_headers)
    rows |= weighed
    if rounding:
        rows["Rounding"] = f"{rounding:.2g} of the total (none with compute_dtype: float32)"
    return _aligned(rows)


def score_summary(
    config: Config, model: Mapping[str, object], scorer: Mapping[str, object], names: Sequence[str]
) -> list[str]:
    """The same where models are scored and not merged."""
    models = {"Base model": config.directories.model_path1}
    if names:
        models["Models to score"] = ", ".join(names)
    return _aligned({**model, **models, "Pairs": _pairs(config), **scorer, "Auto weights": _on(config.auto_weights)})


def learn_summary(
    config: Config, model: Mapping[str, object], scorer: Mapping[str, object], learned: Mapping[str, object]
) -> list[str]:
    """The same where an adapter is learned. learned: what there is to say of it."""
    rows = {**model, "Random seed": config.random_seed, "Base model": config.directories.model_path1}
    rows |= {"Output directory": config.directories.output_directory, "Pairs": _pairs(config), **scorer}
    return _aligned({**rows, "Auto weights": _on(config.auto_weights), **learned})


def _aligned(rows: Mapping[str, object]) -> list[str]:
    return [f"{name:<16} : {value}" for name, value in rows.items()]


def _on(value: bool) -> str:
    return "on" if value else "off"


def _pairs(config: Config) -> str:
    """How many pairs there are of each kind."""
    more = f", {len(config.held_out_pairs)} held out" if config.held_out_pairs else ""
    return f"{len(config.pairs)} searched ({len(config.bad_phrases)} bad, {len(config.good_phrases)} good){more}"


def decision_lines(decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool) -> list[str]:
    """The composition of a layer or header so far, and what was decided about it (without the time of day).

    merges: (weight, model) of all accepted merges, the base first. name_method: add the method, if there are several.
    The layout is the original's, which counts layers from 1.
    """
    part = "Header" if decision.layer is None else f"Layer {decision.layer + 1}/{layers}"
    method = f" - {decision.method}" if name_method and decision.layer is not None else ""
    if decision.ratio is None:
        outcome = f"RETAINED - {decision.after:.5f}"
    else:
        change = _relative_change(decision.before, decision.after)
        outcome = f"CHANGED - {decision.before:.5f} > {decision.after:.5f} - {change}"
    metrics = "".join(f" - {text}" for text in _labelled(decision.metrics))
    return [str(list(map(list, merges))), f"{part} - {outcome}{metrics}{method}"]


def _labelled(values: Values) -> list[str]:
    return [f"{column.label} {column.text(values[column.name])}" for column in columns_of(values)]


def _relative_change(before: float, after: float) -> str:
    """The change of a total by the size of the old one; n/a from zero on, across zero, or beyond all numbers."""
    if before == 0 or min(before, after) < 0 < max(before, after):
        return "n/a"
    change = abs((after - before) / before)
    return f"{change * 100:.1f}%" if math.isfinite(change) else "n/a"


def step_line(step: int, steps: int, before: float, metrics: Values) -> str:
    """What a step of a joint search has made of the total, which was `before`, and other metrics (without the time)."""
    others = {name: value for name, value in metrics.items() if name != "total"}
    return " - ".join([f"Step {step}/{steps}", f"{before:.3f} -> {metrics['total']:.3f}", *_labelled(others)])


def weight_lines(names: Sequence[str], weights: Sequence[Sequence[float]], layers: int) -> list[str]:
    """A joint search's weights of each layer and, if it was mixed, of what is outside of them. names: base first."""
    lines = []
    for number, row in enumerate(weights):
        part = f"Layer {number}" if number < layers else "Embedding + head"
        known = zip(names, (1 - math.fsum(row), *row), strict=True)
        lines.append(f"{part:<16} : {', '.join(f'{weight:.2f} {name}' for name, weight in known if weight)}")
    return lines


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
    roundings = rounding or [0.0] * len(pairs)
    rows = []
    raw_total = 0.0
    for pair, weight, after, before, least in zip(pairs, map(abs, weights), now, start or now, roundings, strict=True):
        raw = probability(after)
        change = (raw - probability(before)) * weight
        raw_total += -raw if pair.kind == "GOOD" else raw
        if kind == "full" or (kind == "changed" and abs(change) * 100 > CHANGED):
            raw_text = percent(raw, RAW_WIDTH, rounding=least)
            used_text = percent(raw * weight, rounding=least * weight)
            change_text = percent(change, signed=True, rounding=least * weight) if start is not None else "N/A"
            rows.append((pair.kind, pair.phrase, pair.shown, raw_text, used_text, change_text))
    used_total = total(scores(now, weights))
    least = total_rounding(weights, rounding)
    change_text = "N/A"
    if start is not None:
        change_text = percent(used_total - total(scores(start, weights)), signed=True, rounding=least)
    raw_text = percent(raw_total, RAW_WIDTH, rounding=math.hypot(*roundings))
    totals = ("", "Total (bad - good)", "", raw_text, percent(used_total, rounding=least), change_text)
    lines = table(("Type", "Phrase", "Context", "Raw Prob*", "Used Prob**", "Change"), rows, [totals], widths=WIDTHS)
    if kind == "changed":
        hidden = len(pairs) - len(rows)
        lines.append(f"not shown: {hidden} of {len(pairs)} pairs, changed by {CHANGED:g} percentage points or less")
    if kind == "summary":
        better = improved(scores(start or now, weights), scores(now, weights))
        lines.append(f"improved since the start: {better} of {pluralize(len(pairs), 'pair')}")
    return [*lines, "* probability of the phrase - ** times its weight; lower totals are better"]


class ResultRow(NamedTuple):
    """A model's row in a table of metrics."""

    name: str
    metrics: Values


def by_other_settings(name: str) -> str:
    """What a row is called of a model that was computed by the base's settings, and has others."""
    return f"{name} (scored with the base's settings)"


def results_table(rows: Sequence[ResultRow]) -> list[str]:
    """Models side by side, a column for each metric that is known of one of them."""
    shown = columns_of(*(row.metrics for row in rows))
    body = []
    for row in rows:
        body.append([row.name, *(column.text(row.metrics.get(column.name)) for column in shown)])
    return table(["Model", *(column.label for column in shown)], body)


def metrics_line(before: Values, now: Values) -> str:
    """How all metrics have changed."""
    parts = [f"{c.label} {c.text(before.get(c.name))} -> {c.text(now[c.name])}" for c in columns_of(now)]
    return f"Metrics: {', '.join(parts)}"


def gains(
    pairs: Sequence[Pair], weights: Sequence[float], before: Sequence[float], now: Sequence[float]
) -> dict[tuple[str, str], float]:
    """How much of the total's change is due to each phrase, by kind and text: below 0 if it is better now.

    weights: signed; before, now: joint log-probabilities.
    """
    changes = defaultdict[tuple[str, str], float](float)
    for pair, old, new in zip(pairs, scores(before, weights), scores(now, weights), strict=True):
        changes[pair.kind, pair.phrase] += new - old
    return changes


def overfit_lines(searched: Mapping[tuple[str, str], float], held_out: Mapping[tuple[str, str], float]) -> list[str]:
    """The phrases that are better where they were searched and not where they were held out, if there are any."""
    only = [phrase[1] for phrase, gain in held_out.items() if gain >= 0 > searched.get(phrase, 0.0)]
    return [f"Improved on searched contexts only (overfit?): {', '.join(only)}"] if only else []


def probability_table(
    searched: Sequence[Pair],
    held_out: Sequence[Pair],
    models: Mapping[str, Sequence[float]],
    rounding: Sequence[float] = (),
) -> list[str]:
    """Each pair's probability in each model. models: the probabilities of all pairs, the searched ones first, by name.
    rounding: of the searched pairs', below which no digit is shown; of the others the largest of it."""
    count = len(searched)
    roundings = [*(rounding or [0.0] * count), *[max(rounding, default=0.0)] * len(held_out)]
    rows = []
    for pair, *values, least in zip([*searched, *held_out], *models.values(), roundings, strict=True):
        shown = [brief_percent(value, least) for value in values]
        phrase = shortened(one_line(pair.phrase), PHRASE_WIDTH)
        context = shortened(one_line(pair.shown), CONTEXT_WIDTH)
        rows.append((pair.kind, phrase, context, *shown))
    header = ("Type", "Phrase", "Context", *(shortened(name, NAME_WIDTH) for name in models))
    last = f"; held out: the last {pluralize(len(held_out), 'row')}" if held_out else ""
    return [*table(header, rows[:count], rows[count:]), f"probabilities of the phrases, without weights{last}"]


def sample_lines(samples: Sequence[Sample], who: str = "merge") -> list[str]:
    """Prompts and, below each, the answers of base and merge. who: stands in the place of the merge."""
    lines = [f"Answers of base and {who}, with the same seed:"]
    width = len(f"  {who}: ")
    for sample in samples:
        answers = ("  base:", ended(sample.base)), (f"  {who}:", ended(sample.merge))
        for label, text in (("Prompt:", sample.prompt), *answers):
            first, *more = text.strip().splitlines() or ["(nothing)"]
            lines += [f"{label:<{width}}{first}", *(f"{'':<{width}}{line}" for line in more)]
    return [*lines, ""] if samples else []


def comparison(recipes: Mapping[str, Recipe]) -> list[str]:
    """A table of outputs, one row each, and which totals may be compared. recipes: by the output's name."""
    columns = columns_of(*(recipe.metrics["merge"] for recipe in recipes.values()))
    rows = []
    for name, recipe in recipes.items():
        largest = list(recipe.composition.items())[:MOST_MODELS]
        strategy = recipe.settings.strategy
        rows.append(
            (
                shortened(name, OUTPUT_WIDTH),
                *(column.text(recipe.metrics["merge"].get(column.name)) for column in columns),
                f"{recipe.improved} of {len(recipe.phrases)}",
                ", ".join(f"{weight:.1%} {shortened(model, MODEL_WIDTH)}" for model, weight in largest),
                ", ".join(recipe.settings.merge_method),
                f"joint, {pluralize(len(recipe.joint.steps), 'step')}" if recipe.joint else strategy,
                f"{recipe.seconds.get('search', 0):.1f} s",
            )
        )
    labels = [column.label for column in columns]
    header = ("Output", *labels, "Improved", "Composition", "Methods", "Strategy", "Search")
    return [*table(header, rows), *_about_totals(recipes)]


def _about_totals(recipes: Mapping[str, Recipe]) -> list[str]:
    """A line that says which outputs have the same phrases, if not all have: only their totals mean the same."""
    groups: dict[tuple, list[str]] = {}
    for name, recipe in recipes.items():
        # Automatic weights are measured, and differ by a rounding between machines.
        phrases = [(p.kind, p.phrase, p.variants, p.context, p.chat is None, f"{p.weight:.5g}") for p in recipe.phrases]
        groups.setdefault(tuple(sorted(phrases)), []).append(one_line(name))
    if len(groups) < 2:
        return []
    listed = " | ".join(", ".join(names) for names in groups.values())
    return [f"Phrases or weights differ; totals are comparable only within: {listed}"]

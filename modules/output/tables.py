"""Results as text: summary, phrase table, decision lines, models and outputs side by side, composition.

Knows: widths, digits, wording. Refuses to know: how values were measured, which metrics exist, where text goes.
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
NAME_WIDTH = 24  # the largest width of a column for the model's name in its header

Values = Mapping[str, float]  # of metrics, by name


def summary(
    config: Config,
    model: Mapping[str, object],
    scorer: Mapping[str, object],
    candidates: Sequence[str],
    weighed: Mapping[str, str],
    rounding: float = 0.0,
) -> list[str]:
    """The settings of a run, one line each. model, scorer, weighed: their own lines, by label. rounding: of the total,
    if it was measured."""
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
        first_size = config.joint.step_size
        last_size = config.joint.step_size / 10
        rows["Search"] = (
            f"joint, {pluralize(config.joint.steps, 'step')}, step size {first_size:g} falling to {last_size:g}"
        )
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
    """The settings of a run that only scores models."""
    models = {"Base model": config.directories.model_path1}
    if names:
        models["Models to score"] = ", ".join(names)
    return _aligned({**model, **models, "Pairs": _pairs(config), **scorer, "Auto weights": _on(config.auto_weights)})


def learn_summary(
    config: Config, model: Mapping[str, object], scorer: Mapping[str, object], learned: Mapping[str, object]
) -> list[str]:
    """The settings of a run that learns an adapter. learned: the lines on learning, by label."""
    rows = {**model, "Random seed": config.random_seed, "Base model": config.directories.model_path1}
    rows |= {"Output directory": config.directories.output_directory, "Pairs": _pairs(config), **scorer}
    return _aligned({**rows, "Auto weights": _on(config.auto_weights), **learned})


def _aligned(rows: Mapping[str, object]) -> list[str]:
    return [f"{name:<16} : {value}" for name, value in rows.items()]


def _on(value: bool) -> str:
    return "on" if value else "off"


def _pairs(config: Config) -> str:
    """The number of pairs of each kind."""
    held_out = f", {len(config.held_out_pairs)} held out" if config.held_out_pairs else ""
    return f"{len(config.pairs)} searched ({len(config.bad_phrases)} bad, {len(config.good_phrases)} good){held_out}"


def decision_lines(decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool) -> list[str]:
    """The composition of a layer or header so far, and the decision about it (without the time of day).

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
    """The relative change of a total; n/a if it starts at zero, crosses zero or is infinite."""
    if before == 0 or min(before, after) < 0 < max(before, after):
        return "n/a"
    change = abs((after - before) / before)
    return f"{change * 100:.1f}%" if math.isfinite(change) else "n/a"


def step_line(step: int, steps: int, total_before: float, metrics: Values) -> str:
    """The result of a step of a joint search: total and other metrics (without the time)."""
    other_metrics = {name: value for name, value in metrics.items() if name != "total"}
    return " - ".join(
        [f"Step {step}/{steps}", f"total {total_before:.3f} -> {metrics['total']:.3f}", *_labelled(other_metrics)]
    )


def weight_lines(names: Sequence[str], weights: Sequence[Sequence[float]], layers: int) -> list[str]:
    """A joint search's weights of each layer and, if it was mixed, of embedding and head. names: the base's first."""
    lines = []
    for number, row in enumerate(weights):
        part = f"Layer {number}" if number < layers else "Embedding + head"
        named_weights = zip(names, (1 - math.fsum(row), *row), strict=True)
        lines.append(f"{part:<16} : {', '.join(f'{weight:.2f} {name}' for name, weight in named_weights if weight)}")
    return lines


def phrase_table(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    current: Sequence[float],
    start: Sequence[float] | None = None,
    kind: str = "full",
    rounding: Sequence[float] = (),
) -> list[str]:
    """Probabilities of the pairs, and how they changed since the start if `start` is given.

    weights: signed, good phrases negative. current, start: joint log-probabilities. kind: one of TABLES. rounding: of
    each probability, if it is known; no digit below it is shown.
    """
    roundings = rounding or [0.0] * len(pairs)
    rows = []
    raw_total = 0.0
    for pair, weight, current_value, start_value, pair_rounding in zip(
        pairs, map(abs, weights), current, start or current, roundings, strict=True
    ):
        raw = probability(current_value)
        change = (raw - probability(start_value)) * weight
        raw_total += -raw if pair.kind == "GOOD" else raw
        if kind == "full" or (kind == "changed" and abs(change) * 100 > CHANGED):
            raw_text = percent(raw, RAW_WIDTH, rounding=pair_rounding)
            used_text = percent(raw * weight, rounding=pair_rounding * weight)
            change_text = percent(change, signed=True, rounding=pair_rounding * weight) if start is not None else "N/A"
            rows.append((pair.kind, pair.phrase, pair.shown, raw_text, used_text, change_text))
    used_total = total(scores(current, weights))
    pair_rounding = total_rounding(weights, rounding)
    change_text = "N/A"
    if start is not None:
        change_text = percent(used_total - total(scores(start, weights)), signed=True, rounding=pair_rounding)
    raw_text = percent(raw_total, RAW_WIDTH, rounding=math.hypot(*roundings))
    totals = ("", "Total (bad - good)", "", raw_text, percent(used_total, rounding=pair_rounding), change_text)
    lines = table(("Type", "Phrase", "Context", "Raw Prob*", "Used Prob**", "Change"), rows, [totals], widths=WIDTHS)
    if kind == "changed":
        hidden = len(pairs) - len(rows)
        lines.append(f"not shown: {hidden} of {len(pairs)} pairs, changed by {CHANGED:g} percentage points or less")
    if kind == "summary":
        better = improved(scores(start or current, weights), scores(current, weights))
        lines.append(f"improved since the start: {better} of {pluralize(len(pairs), 'pair')}")
    return [*lines, "* probability of the phrase - ** times its weight; lower totals are better"]


class ResultRow(NamedTuple):
    """A model's row in a table of metrics."""

    name: str
    metrics: Values


def by_other_settings(name: str) -> str:
    """The label of a model that has other settings than the base, but was computed with the base's."""
    return f"{name} (scored with the base's settings)"


def results_table(rows: Sequence[ResultRow]) -> list[str]:
    """Models side by side, with a column for each metric that at least one of them has."""
    shown = columns_of(*(row.metrics for row in rows))
    body = []
    for row in rows:
        body.append([row.name, *(column.text(row.metrics.get(column.name)) for column in shown)])
    return table(["Model", *(column.label for column in shown)], body)


def metrics_line(base: Values, current: Values) -> str:
    """A line that shows how all metrics changed."""
    parts = [f"{c.label} {c.text(base.get(c.name))} -> {c.text(current[c.name])}" for c in columns_of(current)]
    return f"Metrics: {', '.join(parts)}"


def gains(
    pairs: Sequence[Pair], weights: Sequence[float], base: Sequence[float], current: Sequence[float]
) -> dict[tuple[str, str], float]:
    """Each phrase's part in the change of the total, by kind and text; below 0 if the phrase is better now.

    weights: signed; base, current: joint log-probabilities.
    """
    changes = defaultdict[tuple[str, str], float](float)
    for pair, old, new in zip(pairs, scores(base, weights), scores(current, weights), strict=True):
        changes[pair.kind, pair.phrase] += new - old
    return changes


def overfit_lines(searched: Mapping[tuple[str, str], float], held_out: Mapping[tuple[str, str], float]) -> list[str]:
    """A line with the phrases that improved on searched contexts, but not on held-out ones, if there are any."""
    only = [phrase[1] for phrase, gain in held_out.items() if gain >= 0 > searched.get(phrase, 0.0)]
    return [f"Improved on searched contexts only (overfit?): {', '.join(only)}"] if only else []


def probability_table(
    searched: Sequence[Pair],
    held_out: Sequence[Pair],
    models: Mapping[str, Sequence[float]],
    rounding: Sequence[float] = (),
) -> list[str]:
    """Each pair's probability in each model. models: by name, the probabilities of all pairs, the searched ones first.
    rounding: of the searched pairs' probabilities; no digit below it is shown. Held-out pairs get the largest."""
    count = len(searched)
    roundings = [*(rounding or [0.0] * count), *[max(rounding, default=0.0)] * len(held_out)]
    rows = []
    for pair, *values, pair_rounding in zip([*searched, *held_out], *models.values(), roundings, strict=True):
        shown = [brief_percent(value, pair_rounding) for value in values]
        phrase = shortened(one_line(pair.phrase), PHRASE_WIDTH)
        context = shortened(one_line(pair.shown), CONTEXT_WIDTH)
        rows.append((pair.kind, phrase, context, *shown))
    header = ("Type", "Phrase", "Context", *(shortened(name, NAME_WIDTH) for name in models))
    remark = f"; held out: the last {pluralize(len(held_out), 'row')}" if held_out else ""
    return [*table(header, rows[:count], rows[count:]), f"probabilities of the phrases, without weights{remark}"]


def sample_lines(samples: Sequence[Sample], answerer: str = "merge") -> list[str]:
    """Prompts and, below each, the answers of base and merge. answerer: the name to show for the merge."""
    lines = [f"Answers of base and {answerer}, with the same seed:"]
    width = len(f"  {answerer}: ")
    for sample in samples:
        answers = ("  base:", ended(sample.base)), (f"  {answerer}:", ended(sample.merge))
        for label, text in (("Prompt:", sample.prompt), *answers):
            first_line, *further_lines = text.strip().splitlines() or ["(nothing)"]
            lines += [f"{label:<{width}}{first_line}", *(f"{'':<{width}}{line}" for line in further_lines)]
    return [*lines, ""] if samples else []


def comparison(recipes: Mapping[str, Recipe]) -> list[str]:
    """A table of outputs, one row each, and a line on which totals are comparable. recipes: by the output's name."""
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
    """A line that groups the outputs by their phrases, if these differ: only totals within a group are comparable."""
    groups: dict[tuple, list[str]] = {}
    for name, recipe in recipes.items():
        # Automatic weights are measured, and differ by a rounding between machines.
        phrases = [(p.kind, p.phrase, p.variants, p.context, p.chat is None, f"{p.weight:.5g}") for p in recipe.phrases]
        groups.setdefault(tuple(sorted(phrases)), []).append(one_line(name))
    if len(groups) < 2:
        return []
    listed = " | ".join(", ".join(names) for names in groups.values())
    return [f"Phrases or weights differ; totals are comparable only within: {listed}"]

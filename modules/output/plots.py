"""A recipe as two pictures: what every layer is made of, and what became of the phrases.

Knows: a recipe's decisions and phrases, sizes, colours, wording. Refuses to know: models, tensors, how a decision was
taken.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from modules.metrics.registry import columns_of
from modules.output.recipe import Recipe
from modules.output.records import Phrase
from modules.output.share_map import share_map_figure
from modules.output.style import (
    BASE_COLOUR,
    BETTER,
    COLOURS,
    DARK,
    DRIFT,
    LETTERS,
    SAME,
    SMALL_LETTERS,
    WORSE,
    drawing,
    percent,
    save_figure,
    short_name,
    title_of,
    with_digits,
)
from modules.runtime import columns, one_line, shortened
from modules.search import Decision, Merge, shares_of

MERGE_MAP_FILE = "merge_map.png"
PHRASE_CHART_FILE = "phrase_chart.png"

_NARROWEST, _WIDEST = 8.0, 40.0  # inches of a merge map
_COLUMN = 0.125  # inches of a layer, up to the widest
_PHRASE, _CONTEXT = 28, 36  # columns of text
_LEAST_DRIFT = 0.01  # nats at the top of the axis of drift: what is next to nothing looks like it

_MOST_PAIRS = 60  # all are shown up to here; beyond, so many of each kind:
_MOST_CHANGED = 30
_CHART_WIDTH = 11.0  # inches
_KINDS = {"BAD": "Bad phrases: lower is better", "GOOD": "Good phrases: higher is better"}

# Values that span more than this go on a logarithmic scale; what is smaller than the least is near zero there.
_LINEAR_SPAN, _LEAST = 100.0, 1e-250


def merge_map(recipe: Recipe, file: str | Path) -> None:
    """Write the merge map of a recipe as a PNG file: of a joint search its shares, else what its decisions have led to.
    Raises OSError if it can't be written."""
    save_figure(share_map_figure(recipe) if recipe.joint else merge_map_figure(recipe), file)


def phrase_chart(recipe: Recipe, file: str | Path) -> None:
    """Write the phrase chart of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(phrase_chart_figure(recipe), file)


@drawing()
def merge_map_figure(recipe: Recipe) -> Figure:
    """Above, the share of each model in every layer and in the header; below, the total score decision by decision and,
    where it was measured, the drift after each candidate."""
    decisions = [line.decision for line in recipe.decisions]
    models = names_of_sources(recipe)
    parts = parts_of(models[0], decisions)
    more = len(models) - 1 > len(COLOURS)
    palette = colormaps["turbo"].resampled(len(models) - 1).colors if more else COLOURS
    colours = dict(zip(models, [BASE_COLOUR, *palette], strict=False))
    shares = [percent(recipe.composition.get(model, 0)) for model in models]
    labels = [f"{n or 'base'}: {short_name(model)} ({shares[n]})" for n, model in enumerate(models)]
    width = min(max(2.0 + _COLUMN * len(parts), _NARROWEST), _WIDEST)
    side_by_side = max(1, int(width * SMALL_LETTERS / (5 + max(map(columns, labels)))))
    figure = Figure(figsize=(width, 6.2 + 0.2 * len(models) / side_by_side))
    figure.suptitle(title_of("Merge map", models, width))
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    _draw_shares(upper, dict(zip(labels, colours.items(), strict=True)), parts, width)
    _draw_path(lower, colours, decisions, width)
    _draw_metrics(lower, recipe)
    figure.legend(loc="outside lower center", ncols=side_by_side, frameon=False)
    return figure


@drawing()
def phrase_chart_figure(recipe: Recipe) -> Figure:
    """The probability of every pair before and after, bad and good apart, the most improved first."""
    pairs = recipe.phrases
    groups = {kind: group for kind in _KINDS if (group := shown_pairs(pairs, kind))}
    rows = sum(map(len, groups.values()))
    title = title_of("Phrases before and after", names_of_sources(recipe), _CHART_WIDTH)
    if rows < len(pairs):
        title += f"\nof {len(pairs)} pairs, the {_MOST_CHANGED} of each kind that changed the most"
    figure = Figure(figsize=(_CHART_WIDTH, 1.5 + 0.2 * rows + 0.5 * len(groups)))
    figure.suptitle(title)
    if not groups:
        return figure
    heights = [len(group) + 0.5 for group in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, group) in zip(panels, groups.items(), strict=True):
        _draw_pairs(axes, group)
        axes.set_title(_KINDS[kind])
    shown = [pair for group in groups.values() for pair in group]
    _scale_probabilities(panels[-1], [value for pair in shown for value in (pair.before, pair.after)])
    figure.supylabel("Context [phrase]")
    figure.legend(handles=_pair_handles(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def names_of_sources(recipe: Recipe) -> list[str]:
    """The base's name and those of the candidates; one that was searched twice is one."""
    return list(dict.fromkeys(source.name for source in recipe.sources))


def parts_of(base: str, decisions: Iterable[Decision]) -> list[list[Merge]]:
    """The accepted merges of every layer that something was decided on and, last, of the header; the base first."""
    decisions = list(decisions)
    layers = 1 + max((decision.layer for decision in decisions if decision.layer is not None), default=-1)
    parts: list[list[Merge]] = [[(1.0, base)] for _ in range(layers + 1)]
    for decision in decisions:
        if decision.ratio is not None:
            parts[layers if decision.layer is None else decision.layer].append((decision.share, decision.model))
    return parts


def shown_pairs(pairs: Sequence[Phrase], kind: str) -> list[Phrase]:
    """A kind's pairs that a phrase chart shows, the most improved first; of many, those that changed the most."""
    shown = [pair for pair in pairs if pair.kind == kind]
    if len(pairs) > _MOST_PAIRS:
        shown = sorted(shown, key=lambda pair: -abs(_gain(pair)))[:_MOST_CHANGED]
    return sorted(shown, key=_gain, reverse=True)


def _draw_shares(axes: Axes, models: Mapping[str, Any], parts: Sequence[Sequence[Merge]], width: float) -> None:
    """A column per layer and, apart from them, one for the header. models: name and colour by label."""
    layers = len(parts) - 1
    header = layers + 0.5
    places = [*range(layers), header]
    shares = [shares_of(merges) for merges in parts]
    floor = [0.0] * len(parts)
    for label, (model, colour) in models.items():
        heights = [of_part.get(model, 0.0) for of_part in shares]
        name = label if any(heights) else None  # the legend has what is in the merge
        axes.bar(places, heights, 0.9, floor, color=colour, edgecolor="white", linewidth=0.3, label=name)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    ticks = map(int, MaxNLocator(int(1.5 * width), integer=True).tick_values(0, layers))
    numbers = [layer for layer in ticks if 0 <= layer < min(layers, 0.94 * header)]
    axes.set_xticks([*numbers, header], [*map(str, numbers), "header"])
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set(xlim=(-0.6, header + 0.6), ylim=(0, 1), xlabel="Layer", ylabel="Share of the weights")
    axes.set_title("What each layer is made of")


def _draw_path(axes: Axes, colours: Mapping[str, Any], decisions: Sequence[Decision], width: float) -> None:
    """The total after every decision, on the candidates' colours; the accepted ones are dots."""
    totals = [decision.before for decision in decisions[:1]] + [decision.after for decision in decisions]
    axes.plot(range(len(totals)), totals, color=DARK, linewidth=0.8)
    accepted = [number for number, decision in enumerate(decisions, start=1) if decision.ratio is not None]
    axes.scatter(accepted, [totals[number] for number in accepted], s=8, color=DARK, zorder=3, clip_on=False)
    start, numbers = 0, {model: number for number, model in enumerate(colours)}
    for model, group in groupby(decisions, key=lambda decision: decision.model):
        end = start + len(list(group))
        axes.axvspan(start, end, alpha=0.15, linewidth=0, color=colours[model])
        axes.axvline(start, color=DARK, linewidth=0.6, linestyle=":")
        room = int((end - start) / len(decisions) * (width - 1.5) * LETTERS)
        label = shortened(f"{numbers[model]} {short_name(model)}", room, "both") if room > 8 else str(numbers[model])
        label = label if len(label) <= room else ""  # it would run into the next one
        axes.text((start + end) / 2, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        start = end
    axes.set_xlim(0, max(len(decisions), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("The total score after every decision; a dot is an accepted merge", pad=18)
    axes.set(xlabel="Decision", ylabel="Total score, lower is better")


def _draw_metrics(axes: Axes, recipe: Recipe) -> None:
    """The metrics that are drawn after each candidate's decisions, on an axis of their own at the right."""
    drawn = [column for column in columns_of(*recipe.metrics_after.values()) if column.is_drawn]
    for column in drawn:
        values = {number: found[column.name] for number, found in recipe.metrics_after.items() if column.name in found}
        ends = [sum(line.candidate <= int(number) for line in recipe.decisions) for number in values]
        base = recipe.metrics["base"].get(column.name, 0.0)
        right = axes.twinx()
        (line,) = right.plot([0, *ends], [base, *values.values()], linestyle="--", marker="D", markersize=4)
        line.set(color=DRIFT, linewidth=1, clip_on=False)
        right.spines["right"].set(visible=True, color=DRIFT)
        right.tick_params(axis="y", colors=DRIFT)
        right.set_ylim(0, max(_LEAST_DRIFT, 1.05 * max(values.values())))
        right.set_ylabel(f"{column.label}, dashed", color=DRIFT)


def _gain(pair: Phrase) -> float:
    """How far a pair moved in the direction it should."""
    return (pair.after - pair.before) * (1 if pair.kind == "GOOD" else -1)


def _draw_pairs(axes: Axes, pairs: Sequence[Phrase]) -> None:
    """A row for every pair: a ring before, a dot after, a line between them, both figures beside it."""
    rows, gains = range(len(pairs)), map(_gain, pairs)
    colours = [BETTER if gain > 0 else WORSE if gain < 0 else SAME for gain in gains]
    before, after = [pair.before for pair in pairs], [pair.after for pair in pairs]
    axes.hlines(rows, before, after, colours, linewidth=1.5, zorder=2)
    axes.scatter(before, rows, s=25, color="white", edgecolors=DARK, zorder=3, clip_on=False)
    axes.scatter(after, rows, s=25, color=colours, zorder=4, clip_on=False)
    for row, pair in enumerate(pairs):
        old, new = (with_digits(value, pair.rounding) for value in (pair.before, pair.after))
        figures = f"{old} → {new}"
        axes.text(1.02, row, figures, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.set_yticks(rows, map(_pair_label, pairs), fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _pair_label(pair: Phrase) -> str:
    """A pair as a reader meets it: the end of its context, then the phrase."""
    context, phrase = one_line(pair.shown), one_line(pair.phrase)
    return f"{shortened(context, _CONTEXT)} [{shortened(phrase, _PHRASE, 'both')}]".lstrip()


def _pair_handles() -> list[Line2D]:
    """The legend of a phrase chart."""
    ring = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=DARK, label="before")
    outcomes = (("after, better", BETTER), ("after, worse", WORSE), ("after, the same", SAME))
    return [ring, *(Line2D([], [], color=colour, marker="o", markersize=5, label=text) for text, colour in outcomes)]


def _scale_probabilities(axes: Axes, values: Sequence[float]) -> None:
    """Fit the axis of probabilities to the values, from zero on: linear or, beyond the smallest, logarithmic."""
    positive = [value for value in values if value >= _LEAST]
    axes.set_xlabel("Probability")
    if positive and max(positive) > _LINEAR_SPAN * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.xaxis.get_major_locator().set_params(numticks=8)
        axes.set_xlabel("Probability, logarithmic")
    axes.set_xlim(0, max(positive, default=1.0) * 1.05)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))

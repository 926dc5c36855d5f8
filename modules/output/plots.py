"""Draws a recipe as two pictures: the composition of every layer, and the change of the phrases.

Knows: a recipe's decisions, weights and phrases, sizes, colours, wording. Refuses to know: models, tensors, how a
decision was taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from modules.metrics.registry import columns_of
from modules.output.recipe import Recipe
from modules.output.records import Phrase
from modules.output.style import (
    BETTER,
    COLOURS,
    DARK,
    SAME,
    WORSE,
    drawing,
    percent,
    save_figure,
    short_name,
    title_of,
)
from modules.runtime.text import brief_percent, one_line, shortened
from modules.search.decision import weights_of

MERGE_MAP_FILE = "merge_map.png"
PHRASE_CHART_FILE = "phrase_chart.png"

_HEADER = "emb+head"  # the column of what is outside the layers

# White is zero. A base's weight may be negative; a negative slope is an improvement.
_WEIGHTS = LinearSegmentedColormap.from_list("weights", [COLOURS[5], "white", COLOURS[2]])
_SLOPES = LinearSegmentedColormap.from_list("slopes", [BETTER, "white", WORSE])
_MOST_NUMBERED = 48  # layers whose numbers are legible in the widest merge map
_MOST_NAMED = 70  # layers whose names don't overlap in it

_MOST_PAIRS = 60  # up to here all are shown; of more, this many of each kind:
_MOST_CHANGED = 30
_CHART_WIDTH = 11.0  # inches
_KINDS = {"BAD": "Bad phrases: lower is better", "GOOD": "Good phrases: higher is better"}
# Probabilities that span a larger factor get a logarithmic scale; those below _LEAST are drawn near zero there.
_LINEAR_SPAN = 100.0
_LEAST = 1e-250


@dataclass(frozen=True)
class HeatMap:
    """Numbers by layer and by model; the last row is for all that is outside the layers."""

    title: str
    rows: Sequence[Sequence[float]]  # of each layer, a number for each model
    models: Sequence[str]
    colours: Colormap
    limit: float  # the number, and minus it, that have the strongest colours


def merge_map(recipe: Recipe, file: str | Path) -> None:
    """Write the merge map of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(merge_map_figure(recipe), file)


def phrase_chart(recipe: Recipe, file: str | Path) -> None:
    """Write the phrase chart of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(phrase_chart_figure(recipe), file)


@drawing()
def merge_map_figure(recipe: Recipe) -> Figure:
    """The weight of each model in every layer. Below, for a greedy search, the total after every decision; for a joint
    one, the gradients of the total and of each weighed metric at the first weights."""
    maps = _heat_maps(recipe)
    layers = _layer_names(recipe)
    width = min(max(3.5 + 0.42 * len(layers), 8.0), 20.0)  # inches, as below
    heights = [1.0 + 0.26 * len(heat_map.models) for heat_map in maps]
    if recipe.joint is None:
        heights.append(2.2)
    figure = Figure(figsize=(width, 0.5 + sum(heights)))
    figure.suptitle(title_of("Merge map", [source.name for source in recipe.needed_sources], width))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, heat_map in zip(panels, maps, strict=False):
        _draw_heat_map(figure, axes, heat_map, layers)
    if recipe.joint is None:
        _draw_totals(panels[-1], recipe)
    return figure


def _layer_names(recipe: Recipe) -> list[str]:
    """The numbers of the layers up to the last decided one and, last, the name of what is outside them."""
    if recipe.joint is None:
        decided = [line.layer for line in recipe.decisions if line.layer is not None]
        return [*map(str, range(max(decided, default=-1) + 1)), _HEADER]
    names = list(map(str, range(len(recipe.joint.weights))))
    return [*names[:-1], _HEADER] if recipe.settings.merge_headers else names


def _heat_maps(recipe: Recipe) -> list[HeatMap]:
    """The heat maps of a merge map, from the top. They show the models that have a weight somewhere."""
    if recipe.joint is None:
        weights = _greedy_weights(recipe)
    else:
        weights = [[1.0 - math.fsum(row), *row] for row in recipe.joint.weights]
    shown = [number for number, column in enumerate(zip(*weights, strict=True)) if any(column)]
    weights = _columns(weights, shown)
    labels = []
    for number in shown:
        name = recipe.sources[number].name
        weight = brief_percent(recipe.composition.get(name, 0))
        labels.append(f"{number or 'base'}: {short_name(name)} ({weight})")
    limit = max(1.0, *(abs(weight) for row in weights for weight in row))
    maps = [HeatMap("Weight of each model in each layer", weights, labels, _WEIGHTS, limit)]
    candidates = [number for number in shown if number]
    if recipe.joint and candidates:
        for column in columns_of(recipe.joint.slopes):
            slopes = _columns(recipe.joint.slopes[column.name], [number - 1 for number in candidates])
            largest = max(abs(slope) for row in slopes for slope in row) or 1.0
            rows = []
            for row in slopes:
                rows.append([slope / largest for slope in row])
            title = (
                f"Effect of each weight on the {column.label} at the start (in units of {largest:.3g}; blue lowers it)"
            )
            maps.append(HeatMap(title, rows, labels[-len(candidates) :], _SLOPES, 1.0))
    return maps


def _columns(rows: Sequence[Sequence[float]], numbers: Sequence[int]) -> list[list[float]]:
    """The selected columns of each row. numbers: of the columns."""
    selected_rows = []
    for row in rows:
        selected_rows.append([row[number] for number in numbers])
    return selected_rows


def _greedy_weights(recipe: Recipe) -> list[list[float]]:
    """The weight of each source in every layer and, last, in the header."""
    merges: dict[str, list[tuple[float, str]]] = {name: [(1.0, "0")] for name in _layer_names(recipe)}
    for line in recipe.decisions:
        if line.ratio is not None:
            layer = _HEADER if line.layer is None else str(line.layer)
            merges[layer].append((line.decision.weight, str(line.candidate)))
    rows = []
    for weights in map(weights_of, merges.values()):
        rows.append([weights.get(str(source.number), 0.0) for source in recipe.sources])
    return rows


def _draw_heat_map(figure: Figure, axes: Axes, heat_map: HeatMap, layers: Sequence[str]) -> None:
    """Draw a row for each model and a column for each layer, with numbers if there is room for them."""
    values = np.array(heat_map.rows).T  # (models, layers)
    limit = heat_map.limit
    image = axes.imshow(values, cmap=heat_map.colours, vmin=-limit, vmax=limit, aspect="auto")
    axes.set_title(heat_map.title)
    axes.set_yticks(range(len(heat_map.models)), heat_map.models, fontsize=8)
    shown = [*range(0, len(layers) - 1, math.ceil(len(layers) / _MOST_NAMED)), len(layers) - 1]
    axes.set_xticks(shown, [layers[column] for column in shown], fontsize=7)
    axes.set_xlabel("Layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.02, ticks=[-limit, 0, limit], format="%.2f")
    if len(layers) <= _MOST_NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            number = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero
            axes.text(column, row, number, ha="center", va="center", fontsize=6.5)


def _draw_totals(axes: Axes, recipe: Recipe) -> None:
    """Draw the total after every decision. Accepted decisions are dots; dotted lines separate the candidates."""
    decisions = recipe.decisions
    totals = [line.before for line in decisions[:1]] + [line.after for line in decisions]
    axes.plot(range(len(totals)), totals, color=DARK, linewidth=0.8)
    accepted = [number for number, line in enumerate(decisions, start=1) if line.ratio is not None]
    axes.scatter(accepted, [totals[number] for number in accepted], s=8, color=DARK, zorder=3, clip_on=False)
    start = 0
    for candidate, lines in groupby(decisions, key=lambda line: line.candidate):
        axes.axvline(start, color=DARK, linewidth=0.6, linestyle=":")
        axes.text(start, 1.0, f" {candidate}", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
        start += len(list(lines))
    axes.set_xlim(0, max(len(decisions), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Total after every decision; a dot is an accepted merge")
    axes.set(xlabel="Decision", ylabel="Lower is better")


@drawing()
def phrase_chart_figure(recipe: Recipe) -> Figure:
    """The probability of every pair before and after, bad and good apart, the most improved first."""
    groups = {kind: group for kind in _KINDS if (group := _shown_pairs(recipe.phrases, kind))}
    shown = [pair for group in groups.values() for pair in group]
    title = title_of("Phrases before and after", [source.name for source in recipe.needed_sources], _CHART_WIDTH)
    if len(shown) < len(recipe.phrases):
        title += f"\nthe {_MOST_CHANGED} pairs of each kind that changed the most, of {len(recipe.phrases)}"
    figure = Figure(figsize=(_CHART_WIDTH, 1.5 + 0.2 * len(shown) + 0.5 * len(groups)))
    figure.suptitle(title)
    if not groups:
        return figure
    heights = [len(group) + 0.5 for group in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, group) in zip(panels, groups.items(), strict=True):
        _draw_pairs(axes, group)
        axes.set_title(_KINDS[kind])
    _scale_probabilities(panels[-1], [*(pair.before for pair in shown), *(pair.after for pair in shown)])
    figure.supylabel("Context [phrase]")
    ring = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=DARK, label="before")
    outcomes = {"after, better": BETTER, "after, worse": WORSE, "after, the same": SAME}
    dots = [Line2D([], [], color=colour, marker="o", markersize=5, label=text) for text, colour in outcomes.items()]
    figure.legend(handles=[ring, *dots], loc="outside lower center", ncols=4, frameon=False)
    return figure


def _shown_pairs(pairs: Sequence[Phrase], kind: str) -> list[Phrase]:
    """The pairs of a kind that a phrase chart shows, the most improved first; of many, those that changed most."""
    shown = [pair for pair in pairs if pair.kind == kind]
    if len(pairs) > _MOST_PAIRS:
        shown = sorted(shown, key=lambda pair: -abs(_gain(pair)))[:_MOST_CHANGED]
    return sorted(shown, key=_gain, reverse=True)


def _gain(pair: Phrase) -> float:
    """The improvement of a pair's probability; negative if it got worse."""
    return (pair.after - pair.before) * (1 if pair.kind == "GOOD" else -1)


def _draw_pairs(axes: Axes, pairs: Sequence[Phrase]) -> None:
    """Draw a row for every pair: a ring before, a dot after, a line between them, both figures beside it."""
    rows = range(len(pairs))
    base_probabilities = [pair.before for pair in pairs]
    merge_probabilities = [pair.after for pair in pairs]
    colours = []
    labels = []
    for row, pair in enumerate(pairs):
        gain = _gain(pair)
        colours.append(BETTER if gain > 0 else WORSE if gain < 0 else SAME)
        context = shortened(one_line(pair.shown), 36)
        phrase = shortened(one_line(pair.phrase), 28, "both")
        labels.append(f"{context} [{phrase}]".lstrip())
        figures = f"{brief_percent(pair.before)} → {brief_percent(pair.after)}"
        axes.text(1.02, row, figures, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.hlines(rows, base_probabilities, merge_probabilities, colours, linewidth=1.5, zorder=2)
    axes.scatter(base_probabilities, rows, s=25, color="white", edgecolors=DARK, zorder=3, clip_on=False)
    axes.scatter(merge_probabilities, rows, s=25, color=colours, zorder=4, clip_on=False)
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _scale_probabilities(axes: Axes, values: Sequence[float]) -> None:
    """Fit the axis of probabilities to the values. It begins at zero; it is linear or, above the smallest value,
    logarithmic."""
    positive = [value for value in values if value >= _LEAST]
    axes.set_xlabel("Probability")
    if positive and max(positive) > _LINEAR_SPAN * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.xaxis.get_major_locator().set_params(numticks=8)
        axes.set_xlabel("Probability (log scale)")
    axes.set_xlim(0, max(positive, default=1.0) * 1.05)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))

"""A recipe as two pictures: what every layer is made of, and what became of the phrases.

Knows: a recipe's decisions, shares and phrases, sizes, colours, wording. Refuses to know: models, tensors, how a
decision was taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
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
    UNKNOWN,
    WORSE,
    drawing,
    percent,
    save_figure,
    short_name,
    title_of,
    with_digits,
)
from modules.runtime.text import one_line, shortened
from modules.search.decision import shares_of

MERGE_MAP_FILE = "merge_map.png"
PHRASE_CHART_FILE = "phrase_chart.png"

# White is nothing. A base's share may be below that; a slope below it is for the better.
_SHARES = LinearSegmentedColormap.from_list("shares", [COLOURS[5], "white", COLOURS[2]])
_SLOPES = LinearSegmentedColormap.from_list("slopes", [BETTER, "white", WORSE])

_NARROWEST, _WIDEST = 8.0, 20.0  # inches of a merge map
_NAMES = 3.5  # inches for the names beside it
_COLUMN, _ROW = 0.42, 0.26  # inches of a layer, and of a model
_LEAST_COLUMN = 0.34  # inches in which a number is legible
_SMALLEST_UNIT = -300  # the power of ten that slopes are not measured below

_MOST_PAIRS = 60  # all are shown up to here; beyond, so many of each kind:
_MOST_CHANGED = 30
_CHART_WIDTH = 11.0  # inches
_KINDS = {"BAD": "Bad phrases: lower is better", "GOOD": "Good phrases: higher is better"}

# Probabilities that span more than this go on a logarithmic scale; what is smaller than the least is near zero there.
_LINEAR_SPAN, _LEAST = 100.0, 1e-250


@dataclass(frozen=True)
class HeatMap:
    """Numbers by layer, the last of all that is outside the layers, and by model."""

    title: str
    rows: Sequence[Sequence[float]]  # of each layer, a number for each model; NaN: not measured
    models: Sequence[str]
    colours: Colormap
    scale: Normalize
    digits: int


def merge_map(recipe: Recipe, file: str | Path) -> None:
    """Write the merge map of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(merge_map_figure(recipe), file)


def phrase_chart(recipe: Recipe, file: str | Path) -> None:
    """Write the phrase chart of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(phrase_chart_figure(recipe), file)


@drawing()
def merge_map_figure(recipe: Recipe) -> Figure:
    """The share of each model in every layer. Below: of a greedy search the total after every decision; of a joint one
    by how much the total and each weighed metric changed with each share where the steps began."""
    maps = heat_maps(recipe)
    layers = layer_names(recipe)
    width = min(max(_NAMES + _COLUMN * len(layers), _NARROWEST), _WIDEST)
    heights = [0.8 + _ROW * len(heat_map.models) for heat_map in maps]
    if recipe.joint is None:
        heights.append(2.2)
    figure = Figure(figsize=(width, 0.5 + sum(heights)))
    figure.suptitle(title_of("Merge map", [source.name for source in recipe.sources], width))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    has_numbers = width - _NAMES >= _LEAST_COLUMN * len(layers)
    for axes, heat_map in zip(panels, maps, strict=False):
        draw_heat_map(figure, axes, heat_map, layers, has_numbers)
    panels[len(maps) - 1].set_xlabel("Layer")
    if recipe.joint is None:
        _draw_totals(panels[-1], recipe)
    return figure


def layer_names(recipe: Recipe) -> list[str]:
    """The numbers of the layers that something was decided on and, last, what is outside them."""
    if recipe.joint is None:
        decided = [line.layer for line in recipe.decisions if line.layer is not None]
        return [*map(str, range(max(decided, default=-1) + 1)), "header"]
    if recipe.settings.merge_headers:
        return [*map(str, range(len(recipe.joint.shares) - 1)), "outside"]
    return list(map(str, range(len(recipe.joint.shares))))


def heat_maps(recipe: Recipe) -> list[HeatMap]:
    """What a merge map shows, from the top."""
    names = [source.name for source in recipe.sources]
    labels = [
        f"{number or 'base'}: {short_name(name)} ({percent(recipe.composition.get(name, 0))})"
        for number, name in enumerate(names)
    ]
    if recipe.joint is None:
        return [_share_map(_greedy_shares(recipe), labels)]
    searched = recipe.settings.layers
    shares = [(round(1.0 - math.fsum(row), 9), *row) for row in recipe.joint.shares]
    maps = [_share_map(shares, labels)]
    measured = [searched is None or not name.isdigit() or int(name) in searched for name in layer_names(recipe)]
    for column in columns_of(recipe.joint.slopes) if names[1:] else ():
        maps.append(_slope_map(column.label, recipe.joint.slopes[column.name], labels[1:], measured))
    return maps


def _greedy_shares(recipe: Recipe) -> list[list[float]]:
    """The share of each source in every layer and, last, in the header."""
    merges: dict[str, list[tuple[float, str]]] = {name: [(1.0, "0")] for name in layer_names(recipe)}
    for line in recipe.decisions:
        if line.ratio is not None:
            merges["header" if line.layer is None else str(line.layer)].append(
                (line.decision.share, str(line.candidate))
            )
    shares = map(shares_of, merges.values())
    return [[of_layer.get(str(source.number), 0.0) for source in recipe.sources] for of_layer in shares]


def _share_map(rows: Sequence[Sequence[float]], labels: Sequence[str]) -> HeatMap:
    flat = [share for row in rows for share in row]
    scale = TwoSlopeNorm(0.0, min(-1.0, *flat), max(1.0, *flat))
    return HeatMap("Share of each model in each layer", rows, labels, _SHARES, scale, digits=2)


def _slope_map(
    measure: str, slopes: Sequence[Sequence[float]], labels: Sequence[str], measured: Sequence[bool]
) -> HeatMap:
    """By how much something changes with each share, in a unit in which the largest slope has one digit."""
    largest = max(abs(slope) for row in slopes for slope in row)
    unit = 10.0 ** max(_SMALLEST_UNIT, math.floor(math.log10(largest))) if largest else 1.0
    rows = [
        [slope / unit if is_measured else math.nan for slope in row]
        for row, is_measured in zip(slopes, measured, strict=True)
    ]
    limit = largest / unit or 1.0
    title = f"Effect of each share on the {measure} at the start, in units of {unit:g}; blue lowers it"
    return HeatMap(title, rows, labels, _SLOPES, Normalize(-limit, limit), digits=1)


def draw_heat_map(figure: Figure, axes: Axes, heat_map: HeatMap, layers: Sequence[str], has_numbers: bool) -> None:
    """A row for each model and a column for each layer; has_numbers: there is room for them."""
    values = np.ma.masked_invalid(np.array(heat_map.rows).T)  # (models, layers)
    image = axes.pcolormesh(values, cmap=heat_map.colours, norm=heat_map.scale, edgecolor="white", linewidth=0.5)
    axes.set_facecolor(UNKNOWN)
    axes.invert_yaxis()
    axes.set_title(heat_map.title)
    axes.set_yticks(np.arange(len(heat_map.models)) + 0.5, heat_map.models, fontsize=8)
    every = math.ceil(len(layers) / 70)  # numbers that stay apart in the widest picture
    shown = [*range(0, len(layers) - 1, every), len(layers) - 1]
    axes.set_xticks([column + 0.5 for column in shown], [layers[column] for column in shown], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    ticks = [heat_map.scale.vmin, 0, heat_map.scale.vmax]
    digits = heat_map.digits
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.02, ticks=ticks, format=f"%.{digits}f")
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    if not has_numbers:
        return
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = heat_map.colours(heat_map.scale(value))
            colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=colour)


def _draw_totals(axes: Axes, recipe: Recipe) -> None:
    """The total after every decision; the accepted ones are dots, the candidates are set apart."""
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
    axes.set_title("Total score after every decision, candidate by candidate; a dot is an accepted merge")
    axes.set(xlabel="Decision", ylabel="Lower is better")


@drawing()
def phrase_chart_figure(recipe: Recipe) -> Figure:
    """The probability of every pair before and after, bad and good apart, the most improved first."""
    pairs = recipe.phrases
    groups = {kind: group for kind in _KINDS if (group := shown_pairs(pairs, kind))}
    shown = [pair for group in groups.values() for pair in group]
    title = title_of("Phrases before and after", [source.name for source in recipe.sources], _CHART_WIDTH)
    if len(shown) < len(pairs):
        title += f"\nof {len(pairs)} pairs, the {_MOST_CHANGED} of each kind that changed the most"
    figure = Figure(figsize=(_CHART_WIDTH, 1.5 + 0.2 * len(shown) + 0.5 * len(groups)))
    figure.suptitle(title)
    if not groups:
        return figure
    heights = [len(group) + 0.5 for group in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, group) in zip(panels, groups.items(), strict=True):
        _draw_pairs(axes, group)
        axes.set_title(_KINDS[kind])
    _scale_probabilities(panels[-1], [value for pair in shown for value in (pair.before, pair.after)])
    figure.supylabel("Context [phrase]")
    ring = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=DARK, label="before")
    outcomes = {"after, better": BETTER, "after, worse": WORSE, "after, the same": SAME}
    dots = [Line2D([], [], color=colour, marker="o", markersize=5, label=text) for text, colour in outcomes.items()]
    figure.legend(handles=[ring, *dots], loc="outside lower center", ncols=4, frameon=False)
    return figure


def shown_pairs(pairs: Sequence[Phrase], kind: str) -> list[Phrase]:
    """A kind's pairs that a phrase chart shows, the most improved first; of many, those that changed the most."""
    shown = [pair for pair in pairs if pair.kind == kind]
    if len(pairs) > _MOST_PAIRS:
        shown = sorted(shown, key=lambda pair: -abs(_gain(pair)))[:_MOST_CHANGED]
    return sorted(shown, key=_gain, reverse=True)


def _gain(pair: Phrase) -> float:
    """How far a pair moved in the direction it should."""
    return (pair.after - pair.before) * (1 if pair.kind == "GOOD" else -1)


def _draw_pairs(axes: Axes, pairs: Sequence[Phrase]) -> None:
    """A row for every pair: a ring before, a dot after, a line between them, both figures beside it."""
    rows = range(len(pairs))
    gains = [_gain(pair) for pair in pairs]
    colours = [BETTER if gain > 0 else WORSE if gain < 0 else SAME for gain in gains]
    before = [pair.before for pair in pairs]
    after = [pair.after for pair in pairs]
    axes.hlines(rows, before, after, colours, linewidth=1.5, zorder=2)
    axes.scatter(before, rows, s=25, color="white", edgecolors=DARK, zorder=3, clip_on=False)
    axes.scatter(after, rows, s=25, color=colours, zorder=4, clip_on=False)
    labels = []
    for row, pair in enumerate(pairs):
        figures = f"{with_digits(pair.before, pair.rounding)} → {with_digits(pair.after, pair.rounding)}"
        axes.text(1.02, row, figures, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
        context = shortened(one_line(pair.shown), 36)
        labels.append(f"{context} [{shortened(one_line(pair.phrase), 28, 'both')}]".lstrip())
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(color=UNKNOWN, linewidth=0.6)
    axes.set_axisbelow(True)


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

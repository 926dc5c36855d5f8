"""What a joint search has found as a picture: every model's share of each layer, and what a share changed at the start.

Knows: a recipe's shares and slopes, sizes, colours, wording. Refuses to know: models, tensors, how shares were found.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from modules.metrics.registry import columns_of
from modules.output.recipe import Recipe
from modules.output.style import (
    BETTER,
    COLOURS,
    DARK,
    LETTERS,
    SMALL_LETTERS,
    UNKNOWN,
    WORSE,
    drawing,
    percent,
    short_name,
    title_of,
)
from modules.runtime import columns

# White is nothing. A base's share may be below that; a slope below it is for the better.
_SHARES = LinearSegmentedColormap.from_list("shares", [COLOURS[5], "white", COLOURS[2]])
_SLOPES = LinearSegmentedColormap.from_list("slopes", [BETTER, "white", WORSE])

_ROW, _TALLEST = 0.17, 40.0  # inches of a layer, and of all of them
_COLUMN, _WIDEST = 0.42, 30.0  # the same of a model; its column is wider where there are few
_NARROWEST = 2.2  # inches of a panel
_LEAST_ROW, _LEAST_COLUMN = 0.13, 0.34  # in which a number is legible
_SMALLEST_UNIT = -300  # the power of ten that slopes are not measured below


@dataclass(frozen=True)
class _Panel:
    """Numbers by layer and model, as they are shown."""

    title: str
    rows: Sequence[Sequence[float]]
    heads: Sequence[str]
    colours: Colormap
    scale: Normalize
    digits: int
    unsearched: Sequence[int]  # rows that are left empty


@drawing()
def share_map_figure(recipe: Recipe) -> Figure:
    """The shares of a joint search, the base's too; beside them, where the candidates have any, by how much each
    metric changed with each share where the steps began. A row for each layer and, apart from them, for all else."""
    panels, names = _panels(recipe), [source.name for source in recipe.sources]
    wanted = [max(_NARROWEST, _COLUMN * len(panel.heads)) for panel in panels]
    widths = [width * min(1.0, _WIDEST / sum(wanted)) for width in wanted]
    row = min(_ROW, _TALLEST / len(recipe.joint.shares))
    labels = [
        f"{number or 'base'}: {short_name(name)} ({percent(recipe.composition.get(name, 0))})"
        for number, name in enumerate(names)
        if any(row[number] for row in _with_base(recipe))  # a legend has what is in the merge
    ]
    width = 1.0 + sum(widths) + 0.25 * len(panels)
    side_by_side = max(1, int(width * SMALL_LETTERS / (4 + max(map(columns, labels)))))
    height = 2.5 + row * (len(recipe.joint.shares) + 1) + 0.2 * math.ceil(len(labels) / side_by_side)
    figure = Figure(figsize=(width, height))
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(title_of("Merge map", names, width))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, panel, inches in zip(all_axes, panels, widths, strict=True):
        _draw(figure, axes, panel, bool(recipe.settings.merge_headers), (row, inches))
    all_axes[0].set_ylabel("Layer")
    handles = [Line2D([], [], linestyle="", label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=side_by_side, frameon=False, handlelength=0)
    return figure


def _panels(recipe: Recipe) -> list[_Panel]:
    """What is drawn, from the left."""
    joint, heads = recipe.joint, ["base", *(str(source.number) for source in recipe.sources[1:])]
    shares = _with_base(recipe)
    flat = [share for row in shares for share in row]
    scale = TwoSlopeNorm(0.0, min(-1.0, *flat), max(1.0, *flat))
    unsearched = _unsearched(recipe)
    panels = [_Panel("Share of each model", shares, heads, _SHARES, scale, 2, unsearched)]
    for column in columns_of(joint.slopes) if heads[1:] else ():
        panels.append(_slopes(column.label, joint.slopes[column.name], heads[1:], unsearched))
    return panels


def _with_base(recipe: Recipe) -> list[tuple[float, ...]]:
    """The shares of each row, the base's first: what the candidates leave of 1, without what rounding leaves of 0."""
    return [(round(1.0 - math.fsum(row), 9), *row) for row in recipe.joint.shares]


def _unsearched(recipe: Recipe) -> tuple[int, ...]:
    """The layers that took no part in the search: of those nothing was measured."""
    searched, layers = recipe.settings.layers, len(recipe.joint.shares) - bool(recipe.settings.merge_headers)
    return () if searched is None else tuple(layer for layer in range(layers) if layer not in searched)


def _slopes(what: str, slopes: Sequence[Sequence[float]], heads: Sequence[str], unsearched: Sequence[int]) -> _Panel:
    """By how much something changes with each share, in a unit in which the largest slope has one digit."""
    largest = max(abs(slope) for row in slopes for slope in row)
    unit = 10.0 ** max(_SMALLEST_UNIT, math.floor(math.log10(largest))) if largest else 1.0
    rows, end = [[slope / unit for slope in row] for row in slopes], largest / unit or 1.0
    title = f"Effect of each weight on {what} at the start (x {unit:g}; blue lowers it)"
    return _Panel(title, rows, heads, _SLOPES, Normalize(-end, end), 1, unsearched)


def _draw(figure: Figure, axes: Axes, panel: _Panel, outside: bool, inches: tuple[float, float]) -> None:
    """A panel. outside: the last row is of what is outside the layers. inches: of a row, and of the panel's width."""
    rows, (row, width) = list(panel.rows), inches
    layers = len(rows) - outside
    ends = [*range(layers + 1), *([layers + 0.5, layers + 1.5] if outside else [])]
    nothing = [math.nan] * len(panel.heads)
    shown = [nothing if number in panel.unsearched else rows[number] for number in range(layers)]
    shown += [nothing, rows[-1]] if outside else []
    edges = range(len(panel.heads) + 1)
    mesh = axes.pcolormesh(
        edges, ends, np.ma.masked_invalid(shown), cmap=panel.colours, norm=panel.scale, edgecolor="white", linewidth=0.3
    )
    middles = [number + 0.5 for number in range(layers)] + ([layers + 1.0] if outside else [])
    for number in panel.unsearched:
        axes.axhspan(number, number + 1, color=UNKNOWN, zorder=0)
    if row >= _LEAST_ROW and width / len(panel.heads) >= _LEAST_COLUMN:
        _number(axes, panel, middles)
    every = math.ceil(_LEAST_ROW / row)
    names = [str(number) if number % every == 0 else "" for number in range(layers)]
    axes.set_yticks(middles, names + (["outside"] if outside else []), fontsize=7)
    axes.set_ylim(ends[-1], ends[0])
    axes.set_xticks([edge + 0.5 for edge in edges[:-1]], panel.heads, fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(textwrap.fill(panel.title, int(width * 1.8 * LETTERS)))
    ticks = [panel.scale.vmin, 0.0, panel.scale.vmax]
    bar = figure.colorbar(mesh, ax=axes, location="bottom", fraction=0.05, pad=0.01, aspect=width / 0.1, ticks=ticks)
    bar.ax.set_xticklabels([_figure(tick, panel.digits) for tick in ticks], fontsize=7)
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set_horizontalalignment(side)  # not into the next panel
    bar.outline.set_visible(False)


def _number(axes: Axes, panel: _Panel, middles: Sequence[float]) -> None:
    """Write each number into its cell, and into rows that were not searched that they were not."""
    for number, (middle, row) in enumerate(zip(middles, panel.rows, strict=True)):
        if number in panel.unsearched:
            axes.text(len(row) / 2, middle, "not searched", ha="center", va="center", fontsize=6.5, color=DARK)
            continue
        for column, value in enumerate(row):
            red, green, blue, _ = panel.colours(panel.scale(value))
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            style = {"ha": "center", "va": "center", "fontsize": 6.5, "color": "white" if is_dark else "black"}
            axes.text(column + 0.5, middle, _figure(value, panel.digits), **style)


def _figure(value: float, digits: int) -> str:
    """A number without the sign that rounding may leave of nothing."""
    return f"{round(value, digits) + 0.0:.{digits}f}"

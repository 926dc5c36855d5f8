"""A recipe as two pictures: what every layer is made of, and what became of the phrases.

Knows: a recipe's decisions and phrases, sizes, colours, wording. Refuses to know: models, tensors, how a decision was
taken.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from modules.composition import Merge, mean_shares, shares_of
from modules.journal import Record
from modules.record import decision_of
from modules.search import Decision

MERGE_MAP_FILE = "merge_map.png"
PHRASE_CHART_FILE = "phrase_chart.png"

DPI = 110

# Okabe and Ito's palette, which colour-blind readers can tell apart. The base is grey; from the ninth candidate on the
# colours come again, hatched.
BASE_COLOUR = "#BBBBBB"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
HATCHES = ("", "////", "....", "xxxx")
BETTER, WORSE, SAME = "#0072B2", "#D55E00", "#888888"
DARK = "#444444"

# Scripts that matplotlib's own font lacks; of these fonts, those that the machine has stand in.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Hiragino Sans", "Arial Unicode MS")
_FONTS = ["DejaVu Sans", *(font for font in _MORE_FONTS if font in fontManager.get_font_names())]

_SIZE, _TITLE_SIZE = 9, 11  # points

# Pictures look the same whatever the user's matplotlibrc says, and a $ in a model's name is a $.
STYLE: list[str | dict[str, Any]] = [
    "default",
    {
        "font.family": _FONTS,
        "font.size": _SIZE,
        "figure.titlesize": _TITLE_SIZE,
        "axes.titlesize": _SIZE,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "hatch.linewidth": 0.6,
        "text.parse_math": False,
    },
]

_NARROWEST, _WIDEST = 8.0, 40.0  # inches of a merge map
_COLUMN = 0.125  # inches of a layer, up to the widest
_DOTS_PER_INCH = 40  # beyond, a merge map's dots are small
_MOST_NAMES = 8  # candidates that a title names
_NAME = 32  # characters of a model's name

_MOST_PAIRS = 60  # all are shown up to here; beyond, so many of each kind:
_MOST_CHANGED = 30
_CHART_WIDTH = 11.0  # inches
_PHRASE, _CONTEXT = 28, 36  # characters
_KINDS = {"BAD": "Bad phrases: lower is better", "GOOD": "Good phrases: higher is better"}

# Values that span more than this go on a logarithmic scale; what is smaller than the least counts as zero there.
_LINEAR_SPAN, _LEAST = 100.0, 1e-250


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all pictures, while one is made or written."""
    with style.context(STYLE), warnings.catch_warnings():
        # A character that no font has is drawn as a box, which says enough.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def merge_map(recipe: Record, file: str | Path) -> None:
    """Write the merge map of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(merge_map_figure(recipe), file)


def phrase_chart(recipe: Record, file: str | Path) -> None:
    """Write the phrase chart of a recipe as a PNG file. Raises OSError if it can't be written."""
    save_figure(phrase_chart_figure(recipe), file)


@drawing()
def merge_map_figure(recipe: Record) -> Figure:
    """Above, the share of each model in every layer and in the header; below, the total score decision by decision."""
    decisions = [decision_of(record) for record in recipe["decisions"]]
    models = names_of_sources(recipe)
    parts = parts_of(models[0], decisions)
    width = min(max(2.0 + _COLUMN * len(parts), _NARROWEST), _WIDEST)
    labels = _legend_labels(models, mean_shares(parts))
    figure = new_figure(width, 6.0)
    figure.suptitle(_title(figure, "Merge map", models))
    columns = max(1, int(width / (0.7 + max(inches_of(figure, label) for label in labels))))
    figure.set_figheight(5.8 + 0.2 * math.ceil(len(models) / columns) + _title_height(figure))
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    _draw_shares(upper, models, parts, width)
    _draw_path(lower, models, decisions, width)
    handles = [Patch(edgecolor="white", label=label, **_paint(number)) for number, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


@drawing()
def phrase_chart_figure(recipe: Record) -> Figure:
    """The probability of every pair before and after, bad and good apart, the most improved first."""
    pairs, models = recipe["phrases"], names_of_sources(recipe)
    groups = {kind: shown_pairs(pairs, kind) for kind in _KINDS}
    groups = {kind: shown for kind, shown in groups.items() if shown}
    rows = sum(map(len, groups.values()))
    figure = new_figure(_CHART_WIDTH, 1.0)
    title = _title(figure, "Phrases before and after", models)
    if rows < len(pairs):
        title += f"\nof {len(pairs)} pairs, the {_MOST_CHANGED} of each kind that changed the most"
    figure.suptitle(title)
    figure.set_figheight(1.1 + 0.2 * rows + 0.5 * len(groups) + _title_height(figure))
    if not groups:
        return figure
    heights = [len(shown) + 0.5 for shown in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    values = [pair[when] for shown in groups.values() for pair in shown for when in ("before", "after")]
    zero = _scale_probabilities(panels[-1], values)
    for axes, (kind, shown) in zip(panels, groups.items(), strict=True):
        _draw_pairs(axes, kind, shown, zero)
    figure.supylabel("Context [phrase]", fontsize=_SIZE)
    figure.legend(handles=_pair_handles(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a display."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@drawing()
def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure as a PNG file, the same bytes every time. Raises OSError if it can't be written."""
    figure.savefig(file, format="png", metadata={"Software": None})


def inches_of(figure: Figure, text: str, size: float = _SIZE) -> float:
    """How wide a text is in a figure."""
    drawn = figure.text(0, 0, text, fontsize=size)
    width = drawn.get_window_extent().width / figure.dpi
    drawn.remove()
    return width


def names_of_sources(recipe: Record) -> list[str]:
    """The base's name and those of the candidates; one that was searched twice is one."""
    return list(dict.fromkeys(source["name"] for source in recipe["sources"]))


def parts_of(base: str, decisions: Iterable[Decision]) -> list[list[Merge]]:
    """The accepted merges of every layer that something was decided on and, last, of the header; the base first."""
    decisions = list(decisions)
    layers = 1 + max((decision.layer for decision in decisions if decision.layer is not None), default=-1)
    parts: list[list[Merge]] = [[(1.0, base)] for _ in range(layers + 1)]
    for decision in decisions:
        if decision.ratio is not None:
            parts[layers if decision.layer is None else decision.layer].append((decision.share, decision.model))
    return parts


def shown_pairs(pairs: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """A kind's pairs that a phrase chart shows, the most improved first; of many, those that changed the most."""
    shown = [pair for pair in pairs if pair["kind"] == kind]
    if len(pairs) > _MOST_PAIRS:
        shown = sorted(shown, key=lambda pair: -abs(_change(pair)))[:_MOST_CHANGED]
    return sorted(shown, key=_gain, reverse=True)


def percent(value: float) -> str:
    """A probability or share as a percentage of three digits."""
    return f"{value * 100:.3g}%"


def shortened_name(text: str, length: int = _NAME) -> str:
    """Text on one line in at most `length` characters; a long one keeps both ends."""
    text = _printable(text)
    head = length // 2
    return text if len(text) <= length else text[:head] + "…" + text[len(text) - (length - head - 1) :]


# ---------------------------------------------------------------------------------------------------------------------
# The merge map
# ---------------------------------------------------------------------------------------------------------------------


def _paint(number: int) -> dict[str, str]:
    """Colour and hatch of a model: 0 is the base, then come the candidates."""
    if number == 0:
        return {"facecolor": BASE_COLOUR}
    again, place = divmod(number - 1, len(COLOURS))
    return {"facecolor": COLOURS[place], "hatch": HATCHES[again % len(HATCHES)]}


def _draw_shares(axes: Axes, models: Sequence[str], parts: Sequence[Sequence[Merge]], width: float) -> None:
    """A column per layer and, apart from them, one for the header."""
    layers = len(parts) - 1
    header = layers + 1.5
    places = [*range(1, layers + 1), header]
    shares = [shares_of(merges) for merges in parts]
    floor = [0.0] * len(parts)
    for number, model in enumerate(models):
        heights = [of_part.get(model, 0.0) for of_part in shares]
        axes.bar(places, heights, 0.9, floor, edgecolor="white", linewidth=0.3, label=model, **_paint(number))
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.set_xlim(0.4, header + 0.6)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    inches = (width - 1.0) / (header + 0.2)
    numbers = [layer for layer in _layer_ticks(layers, inches) if (header - layer) * inches > 0.5]
    axes.set_xticks([*numbers, header], [*map(str, numbers), "header"])
    axes.set(title="What each layer is made of", xlabel="Layer", ylabel="Share of the weights")


def _layer_ticks(layers: int, inches: float) -> list[int]:
    """The layers that have room for their number; inches: of a column."""
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * inches >= 0.3), 1000)
    return [*([1] if step >= 5 else []), *range(step, layers + 1, step)]


def _draw_path(axes: Axes, models: Sequence[str], decisions: Sequence[Decision], width: float) -> None:
    """The total after every decision, on the candidates' colours; the accepted ones are dots."""
    totals = [decision.before for decision in decisions[:1]] + [decision.after for decision in decisions]
    axes.plot(range(len(totals)), totals, color=DARK, linewidth=0.8)
    accepted = [number for number, decision in enumerate(decisions, start=1) if decision.ratio is not None]
    size, edge = (4, "white") if len(decisions) <= _DOTS_PER_INCH * width else (2.5, "none")
    heights = [totals[number] for number in accepted]
    dots = {"s": size**2, "color": DARK, "edgecolors": edge, "linewidths": 0.4}
    axes.scatter(accepted, heights, zorder=3, clip_on=False, **dots)
    start = 0
    for model, group in groupby(decisions, key=lambda decision: decision.model):
        number, end = models.index(model), start + len(list(group))
        axes.axvspan(start, end, alpha=0.15, linewidth=0, edgecolor="white", **_paint(number))
        axes.axvline(start, color=DARK, linewidth=0.6, linestyle=":")
        label = _fitted(axes.figure, number, model, (width - 1.2) * (end - start) / len(decisions))
        axes.text((start + end) / 2, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        start = end
    axes.set_xlim(0, max(len(decisions), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("The total score after every decision; a dot is an accepted merge", pad=18)
    axes.set(xlabel="Decision", ylabel="Total score, lower is better")


def _fitted(figure: Figure, number: int, model: str, room: float) -> str:
    """A candidate's number and as much of its name as fits into so many inches."""
    text = shortened_name(f"{number} {model}")
    length = int(len(text) * min(room / inches_of(figure, text), 1.0))
    return shortened_name(text, length) if length >= min(len(text), 8) else str(number)


def _legend_labels(models: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    """Every model with its share in the whole. None begins with an underscore, which legends leave out."""
    marks = ["base:", *(f"{number}:" for number in range(1, len(models)))]
    return [
        f"{mark} {shortened_name(model)} ({percent(shares.get(model, 0.0))})"
        for mark, model in zip(marks, models, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The phrase chart
# ---------------------------------------------------------------------------------------------------------------------


def _change(pair: Mapping[str, Any]) -> float:
    return pair["after"] - pair["before"]


def _gain(pair: Mapping[str, Any]) -> float:
    """How far a pair moved in the direction it should."""
    return _change(pair) if pair["kind"] == "GOOD" else -_change(pair)


def _verdict(pair: Mapping[str, Any]) -> str:
    """The colour of what became of a pair."""
    return BETTER if _gain(pair) > 0 else WORSE if _gain(pair) < 0 else SAME


def _draw_pairs(axes: Axes, kind: str, pairs: Sequence[Mapping[str, Any]], zero: float) -> None:
    """A row for every pair: a ring before, a dot after, a line between them, both figures beside it.

    zero: where probabilities of zero have their place.
    """
    rows, colours = range(len(pairs)), [_verdict(pair) for pair in pairs]
    before, after = ([max(pair[when], zero) for pair in pairs] for when in ("before", "after"))
    axes.hlines(rows, before, after, colours, linewidth=1.5, zorder=2)
    axes.scatter(before, rows, s=25, color="white", edgecolors=DARK, zorder=3, clip_on=False)
    axes.scatter(after, rows, s=25, color=colours, zorder=4, clip_on=False)
    for row, pair in enumerate(pairs):
        figures = f"{percent(pair['before'])} → {percent(pair['after'])}"
        axes.text(1.02, row, figures, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.set_yticks(rows, [_pair_label(pair) for pair in pairs], fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="both", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(_KINDS[kind])


def _pair_label(pair: Mapping[str, Any]) -> str:
    """A pair as a reader meets it: the end of its context, then the phrase."""
    context = _printable(pair["context"])
    if len(context) > _CONTEXT:
        context = "…" + context[1 - _CONTEXT :]
    return f"{context} [{shortened_name(pair['phrase'], _PHRASE)}]".lstrip()


def _pair_handles() -> list[Line2D]:
    """The legend of a phrase chart."""
    ring = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=DARK, label="before")
    outcomes = (("after, better", BETTER), ("after, worse", WORSE), ("after, the same", SAME))
    return [ring, *(Line2D([], [], color=colour, marker="o", markersize=5, label=text) for text, colour in outcomes)]


def _scale_probabilities(axes: Axes, values: Sequence[float]) -> float:
    """Fit the axis of probabilities to the values, linear or logarithmic; where on it zeros have their place."""
    positive = [value for value in values if value >= _LEAST]
    axes.set_xlabel("Probability")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    if positive and max(positive) > _LINEAR_SPAN * min(positive):
        return _scale_by_decades(axes, min(positive), max(positive), with_zero=len(positive) < len(values))
    axes.set_xlim(0, max(positive, default=1.0) * 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return 0.0


def _scale_by_decades(axes: Axes, smallest: float, largest: float, with_zero: bool) -> float:
    """A logarithmic axis; zeros, which have no logarithm, are a step to the left of its smallest tick."""
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(min(largest, 1.0)))
    step = math.ceil((high - low) / 7)
    exponents = list(range(high, low - 1, -step))
    left = 10.0 ** (low - step) if with_zero else 10.0**low
    axes.set_xscale("log")
    axes.set_xlim(left, 10.0**high)
    axes.xaxis.set_major_locator(FixedLocator([*([left] if with_zero else []), *(10.0**at for at in exponents)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "≈0" if with_zero and value <= left else percent(value))
    )
    axes.set_xlabel("Probability, logarithmic")
    return left


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _title(figure: Figure, what: str, models: Sequence[str]) -> str:
    """What a picture shows, and of which models, in as many lines as it needs."""
    base, *candidates = [shortened_name(model) for model in models]
    names = candidates[:_MOST_NAMES]
    if len(names) < len(candidates):
        names.append(f"{len(candidates) - len(names)} more")
    lines = [f"{what}: {base}" + (" +" if names else "")]
    for number, name in enumerate(names, start=1):
        piece = f"{name}," if number < len(names) else name
        if inches_of(figure, f"{lines[-1]} {piece}", _TITLE_SIZE) < figure.get_figwidth() - 0.5:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return "\n".join(lines)


def _title_height(figure: Figure) -> float:
    """Inches that a figure's title takes."""
    return 0.18 * (figure.get_suptitle().count("\n") + 1)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))

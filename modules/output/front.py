"""Compares models by their rate of cliches and their drift from the base: a table, a picture, the merge to take.

Knows: the limits within which a merge is taken, columns, the look of the picture. Refuses to know: how values were
measured, files of models.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from modules.metrics.registry import all_columns, columns_of
from modules.output.recipe import Recipe
from modules.output.style import BASE_COLOUR, COLOURS, DARK, drawing, save_figure, short_name
from modules.output.text_files import write_text
from modules.runtime.text import table

MOST_DRIFT = 0.02  # nats per token on the base's own answers
MOST_LENGTH = 0.1  # by which answers may be longer or shorter than the base's, as a part of their length
METRICS = ("total", "held_out", "kl", "own_kl", "perplexity")


@dataclass(frozen=True)
class Point:
    """A model's measurements."""

    name: str
    rate: float  # listed phrases in 1,000 words
    interval: tuple[float, float] | None  # of the rate
    words: float  # of an answer
    metrics: Mapping[str, float]  # by name; those that could be measured
    is_merge: bool = False  # whether it can be saved

    @property
    def drift(self) -> float:
        """KL to the base on the base's own answers or, if not measured, on neutral text."""
        return self.metrics.get("own_kl", self.metrics.get("kl", math.inf))


def front_table(points: Sequence[Point]) -> list[str]:
    """A row for each model."""
    common_names = {column.name for column in all_columns()}
    measured = columns_of(*(point.metrics for point in points))
    columns = [column for column in measured if column.name in METRICS or column.name not in common_names]
    rows = []
    for point in points:
        low, high = point.interval or (point.rate, point.rate)
        rate = f"{point.rate:.2f} [{low:.2f}, {high:.2f}]"
        metrics = [column.text(point.metrics.get(column.name)) for column in columns]
        rows.append((point.name, rate, f"{point.words:.1f}", *metrics))
    head = ("Model", "Hits per 1,000 words [95% CI]", "Words per answer", *(column.label for column in columns))
    return table(head, rows)


def chosen(points: Sequence[Point]) -> tuple[Point, str]:
    """Choose the merge to take. Returns it and a sentence that says why. points: the base first, at least one merge."""
    base, *rest_points = points
    merges = [point for point in rest_points if point.is_merge]
    limits = f"a KL of at most {MOST_DRIFT:g} on own answers and answers within {MOST_LENGTH:.0%} of the base's length"
    acceptable = [point for point in merges if point.drift <= MOST_DRIFT and _is_as_long(point, base)]
    if acceptable:
        best = min(acceptable, key=lambda point: (point.rate, point.drift))
        return best, f"{best.name} writes the fewest listed phrases of the merges with {limits}."
    best = min(merges, key=lambda point: point.drift)
    return best, f"No merge has {limits}; {best.name} is closest to the base."


def _is_as_long(point: Point, base: Point) -> bool:
    return abs(point.words - base.words) <= MOST_LENGTH * base.words


def best_candidate(recipe: Recipe, numbers: Sequence[int], weight: float) -> list[int]:
    """The number of the candidate that scores best alone, in a list; empty if none. weight: of a nat of drift."""

    def objective(number: int) -> float:
        metrics = recipe.baselines.get(str(number), {})
        drifts = [metrics[name] for name in ("kl", "own_kl") if name in metrics]
        return metrics.get("total", math.inf) + weight * math.fsum(drifts) / max(1, len(drifts))

    return sorted(numbers, key=objective)[:1]


def write_front(points: Sequence[Point], file: Path) -> None:
    """Write file.json, with all figures unrounded, and file.png. Raises OSError if they can't be written."""
    document = [asdict(point) for point in points]
    write_text(file.with_suffix(".json"), json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    save_figure(front_figure(points), file.with_suffix(".png"))


@drawing()
def front_figure(points: Sequence[Point]) -> Figure:
    """Rate against drift, each model a dot with its name and the rate's interval, the merges joined by a line."""
    figure = Figure(figsize=(8.0, 5.0))
    axes = figure.subplots()
    shown = [point for point in points if math.isfinite(point.drift)]
    merges = sorted((point for point in shown if point.is_merge), key=lambda point: point.drift)
    axes.plot([point.drift for point in merges], [point.rate for point in merges], color=COLOURS[0], linewidth=1)
    for point in shown:
        colour = COLOURS[0] if point.is_merge else DARK
        low, high = point.interval or (point.rate, point.rate)
        axes.vlines(point.drift, low, high, color=BASE_COLOUR, linewidth=1, zorder=1)
        axes.scatter(point.drift, point.rate, color=colour, s=25, zorder=3)
        axes.annotate(short_name(point.name), (point.drift, point.rate), (5, 5), textcoords="offset points", fontsize=8)
    axes.axvline(MOST_DRIFT, color=DARK, linewidth=0.6, linestyle=":")
    axes.set_xscale("symlog", linthresh=MOST_DRIFT)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="KL to base on its own answers, nats per token", ylabel="Listed phrases per 1,000 words")
    axes.set_title("Lower and further left is better; the dotted line is the limit of drift")
    return figure

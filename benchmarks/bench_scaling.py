"""How the time of a search grows with layers, ratios, phrases, vocabulary and size.

    python benchmarks/bench_scaling.py --picture images/scaling.png

Searches one candidate of a small random Llama, bfloat16, lerp, headers off, and changes one thing at a time; every
point is the median of three, and the points of a curve are measured in turn. Prints a table with what the cost model
of docs/results.md expects, scaled to the last point of each curve, draws the curves, and ends in a line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from bench_merge import SearchRun, search_once
from workload import Limit, Shape, even_ratios, limit_of, machine, make_models, phrase_pairs

from modules.run.steps import prepare_libraries

CPU = torch.device("cpu")
BASE = Shape(8, 256, 704, 4000, heads=4, kv_heads=4, dtype="bfloat16", positions=512)
PAIRS, RATIOS = 50, 4


@dataclass(frozen=True)
class Point:
    """One search, and what it was of."""

    value: int  # of what is changed
    run: SearchRun
    limit: Limit

    @property
    def row(self) -> dict[str, float]:
        """For people and programs."""
        return {
            "value": self.value,
            "tokens": self.run.tokens,
            "search_seconds": round(self.run.seconds, 3),
            "products_seconds": round(self.limit.products, 3),
            "reading_seconds": round(self.limit.reading, 4),
        }


@dataclass(frozen=True)
class Curve:
    """What is changed, and how the time should grow with it."""

    name: str
    values: Sequence[int]
    shape: Callable[[int], Shape] = lambda value: BASE
    pairs: Callable[[int], int] = lambda value: PAIRS
    ratios: Callable[[int], int] = lambda value: RATIOS
    cost: Callable[[Point], float] = lambda point: point.limit.flops  # up to a factor
    expectation: str = "its products"


CURVES = [
    Curve(
        "layers",
        (4, 8, 16, 24, 32),
        shape=lambda value: replace(BASE, layers=value),
        # Each layer once alone for every ratio and once to move on, and all above it for all ratios.
        cost=lambda point: point.value * (RATIOS + 1) + RATIOS * point.value * (point.value - 1) / 2,
        expectation="half the square of the layers",
    ),
    Curve("ratios", (1, 2, 4, 6, 8), ratios=lambda value: value, expectation="linear, and the merged tensors"),
    Curve(
        "pairs",
        (1, 5, 20, 50, 150, 500),
        pairs=lambda value: value,
        cost=lambda point: point.run.tokens,
        expectation="linear in packed tokens",
    ),
    Curve("vocabulary", (4000, 16000, 64000, 128000), shape=lambda value: replace(BASE, vocabulary=value)),
    Curve(
        "hidden",
        (128, 256, 512, 1024),
        shape=lambda value: replace(
            BASE, hidden=value, intermediate=value * 11 // 4, heads=value // 64, kv_heads=value // 64
        ),
    ),
]
QUICK = {"layers": (2, 4), "ratios": (1, 2), "pairs": (1, 10), "vocabulary": (4000, 8000), "hidden": (64, 128)}


def main() -> None:
    """Measure, print, draw."""
    options = parse_arguments()
    prepare_libraries(seed=0)
    curves = [replace(curve, values=QUICK[curve.name]) if options.quick else curve for curve in CURVES]
    found: list[tuple[Curve, list[Point]]] = []
    with tempfile.TemporaryDirectory() as folder:
        shapes = {curve.shape(value) for curve in curves for value in curve.values}
        models = {
            shape: [Path(folder) / str(number) / name for name in ("base", "candidate")]
            for number, shape in enumerate(shapes)
        }
        make_models(models)
        for curve in curves:
            found.append((curve, list(measure(curve, models, 1 if options.quick else 3))))
            print("\n".join(table(*found[-1])), flush=True)
    if options.picture:
        picture(found).savefig(options.picture, metadata={"Software": None})
    rows = {curve.name: [point.row for point in points] for curve, points in found}
    print(json.dumps({"machine": machine(CPU), "dtype": BASE.dtype, **rows}))


def parse_arguments() -> argparse.Namespace:
    """Where the picture goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="a PNG file of the curves")
    parser.add_argument("--quick", action="store_true", help="two small points a curve, once each")
    return parser.parse_args()


def measure(curve: Curve, models: Mapping[Shape, Sequence[Path]], repeats: int) -> Iterator[Point]:
    """All points of a curve, measured in turn. models: base and candidate of every shape."""
    searches: dict[int, list[SearchRun]] = {value: [] for value in curve.values}
    for _ in range(repeats):
        for value in curve.values:
            pairs, ratios = phrase_pairs(curve.pairs(value)), even_ratios(curve.ratios(value))
            searches[value].append(search_once(BASE.dtype, "lerp", *models[curve.shape(value)], pairs, ratios))
    for value, runs in searches.items():
        run = replace(runs[0], seconds=statistics.median(one.seconds for one in runs))
        shape, ratios = curve.shape(value), curve.ratios(value)
        candidate = models[shape][1]
        yield Point(value, run, limit_of(shape, candidate, run.tokens, run.columns, ratios, False, CPU))


def table(curve: Curve, points: Sequence[Point]) -> list[str]:
    """A curve for people."""
    lines = [f"{curve.name:>11} | tokens | search s | expected s | products s | reading s   ({curve.expectation})"]
    for point, expected in zip(points, expectations(curve, points), strict=True):
        row = point.row
        lines.append(
            f"{point.value:>11,} | {row['tokens']:>6,} | {row['search_seconds']:>8.3f} | {expected:>10.3f} | "
            f"{row['products_seconds']:>10.3f} | {row['reading_seconds']:>9.4f}"
        )
    return [*lines, ""]


def expectations(curve: Curve, points: Sequence[Point]) -> list[float]:
    """Seconds by the cost model, scaled to the last point."""
    second = points[-1].run.seconds / curve.cost(points[-1])
    return [second * curve.cost(point) for point in points]


def picture(curves: Sequence[tuple[Curve, Sequence[Point]]]) -> Figure:
    """A panel for each curve, logarithmic in both directions: the slope is the power."""
    figure = Figure(figsize=(3.1 * len(curves), 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (curve, points) in zip(figure.subplots(1, len(curves)), curves, strict=True):
        values = [point.value for point in points]
        axes.loglog(values, [point.run.seconds for point in points], "o-", color="#0072B2", label="search")
        axes.loglog(values, expectations(curve, points), "--", color="#D55E00", label=curve.expectation)
        axes.loglog(values, [point.limit.reading for point in points], ":", color="#666666", label="reading once")
        axes.set_xticks(values, [f"{value // 1000}k" if value >= 2000 else str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(curve.name)
        axes.legend(fontsize=7, frameon=False)
    figure.axes[0].set_ylabel("seconds per candidate")
    return figure


if __name__ == "__main__":
    main()

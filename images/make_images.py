"""Draw the pages' pictures: each merge method as it computes, and the demo's merge map and phrase chart.

python demo/make_models.py
python merge_monster.py --overwrite
python images/make_images.py          # writes beside itself, the same bytes every time
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from modules.merging.methods import merge, ratios_for
from modules.output.plots import MERGE_MAP_FILE, PHRASE_CHART_FILE, merge_map, phrase_chart
from modules.output.recipe import RECIPE_FILE, read_recipe
from modules.output.style import BASE_COLOUR, COLOURS, DARK, drawing, save_figure
from modules.runtime.errors import ConfigError

FOLDER = Path(__file__).parent
RECIPE = FOLDER.parent / "demo/merged" / RECIPE_FILE

RATIOS = (0.25, 0.5, 0.75)
WIDTH = 400  # columns of the tensors that are merged column by column
ANGLE = 100.0  # degrees between the vectors that are interpolated
BASE, OTHER = BASE_COLOUR, COLOURS[0]

TITLES = {
    "lerp": "lerp: straight from one to the other; in between the result is shorter",
    "slerp": "slerp: along the arc between the two, which keeps the length",
    "slice": "slice: the base's columns, a short blend, the other's columns",
    "cyclic": "cyclic: a band of the other's columns, at one of four places",
    "gradient": "gradient: the other fades in up to a peak, then out again",
}


def main() -> int:
    """Draw all; the exit code."""
    try:
        recipe = read_recipe(RECIPE)
    except ConfigError as error:
        print(f"{error}\nMake the demo's merge first: python merge_monster.py --overwrite", file=sys.stderr)
        return 2
    for method in ("lerp", "slerp"):
        save_figure(path_figure(method), FOLDER / f"{method}.png")
    for method in ("slice", "cyclic", "gradient"):
        save_figure(columns_figure(method), FOLDER / f"{method}.png")
    merge_map(recipe, FOLDER / MERGE_MAP_FILE)
    phrase_chart(recipe, FOLDER / PHRASE_CHART_FILE)
    return 0


@drawing()
def path_figure(method: str) -> Figure:
    """What becomes of two vectors of length 1: the results' way from the base to the other, three of them as arrows."""
    figure = Figure(figsize=(6.0, 3.4))
    axes = figure.subplots()
    angles = torch.deg2rad(torch.tensor([90 + ANGLE / 2, 90 - ANGLE / 2]))
    base, other = torch.stack((angles.cos(), angles.sin()), dim=1)
    path = torch.stack([interpolated(method, base, other, step / 50) for step in range(51)])
    axes.plot(path[:, 0], path[:, 1], color=DARK, linewidth=1, linestyle=":")
    draw_arrow(axes, base, "#888888", "base")
    draw_arrow(axes, other, OTHER, "other")
    for ratio in RATIOS:
        result = interpolated(method, base, other, ratio)
        draw_arrow(axes, result, COLOURS[3], f"ratio {ratio:g}\nlength {result.norm():.2f}")
    axes.set_aspect("equal")
    axes.set(xlim=(-1.15, 1.15), ylim=(0, 1.3), xlabel="first weight", ylabel="second weight")
    figure.suptitle(TITLES[method])
    return figure


def interpolated(method: str, base: Tensor, other: Tensor, ratio: float) -> Tensor:
    """Two vectors merged as a tensor of one row."""
    return merge(method, base[None], other[None], ratio)[0]


def draw_arrow(axes: Axes, vector: Tensor, colour: str, text: str) -> None:
    """A vector from the origin, and what it is at its tip."""
    x, y = vector.tolist()
    axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0})
    side = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"  # away from the arc
    axes.annotate(text, (x, y), (0, 4), textcoords="offset points", ha=side, va="bottom", color=colour, fontsize=8)


@drawing()
def columns_figure(method: str) -> Figure:
    """The share of the other model in every column, at each of the ratios that the method tries."""
    ratios = ratios_for(method, RATIOS)
    figure = Figure(figsize=(6.0, 1.0 + 0.8 * len(ratios)))
    panels = figure.subplots(len(ratios), 1, sharex=True)
    for axes, ratio in zip(panels, ratios, strict=True):
        axes.stairs([1.0] * WIDTH, fill=True, color=BASE, label="base")
        axes.stairs(column_shares(method, ratio), fill=True, color=OTHER, label="other")
        axes.set(xlim=(0, WIDTH), ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0%", "50%", "100%"))
        axes.set_title(f"ratio {ratio:g}")
    panels[-1].set_xlabel(f"Column of a weight with {WIDTH} input features")
    figure.supylabel("Share of each model", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(TITLES[method])
    return figure


def column_shares(method: str, ratio: float) -> Tensor:
    """What merging ones into zeros leaves in every column: the other's share there."""
    return merge(method, torch.zeros(1, WIDTH), torch.ones(1, WIDTH), ratio)[0]


if __name__ == "__main__":
    sys.exit(main())

"""The picture of a joint search: shares and slopes are the recipe's, legible at any size and with any name."""

import math
import random
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
from drawings import (
    ODD_NAMES,
    assert_no_labels_overlap,
    assert_nothing_is_cut_off,
    labels_of,
    legend_of,
    without_warnings,
)
from matplotlib.image import imread
from matplotlib.text import Text
from pydantic import ValidationError
from runs import make_models, sizes

import merge_monster
from modules.config import Config, Directories
from modules.output import plots
from modules.output.recipe import Recipe, read_recipe
from modules.output.share_map import share_map_figure
from modules.output.style import DPI, drawing, save_figure


@pytest.fixture(autouse=True)
def no_warnings():
    with without_warnings():
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The recipe of a real joint search, and the folder that it was run in."""
    folder = tmp_path_factory.mktemp("joint")
    base, *candidates = make_models(folder)
    (folder / "plain.txt").write_text("The bread is on the table, and half of it is left. " * 12, encoding="utf-8")
    more = {"search": "joint", "joint": {"steps": 2}, "neutral_texts": [str(folder / "plain.txt")]}
    config = tiny.write_config(folder / "my.yaml", base, candidates, folder / "out", neutral_tokens=100, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert merge_monster.main(["--config", str(config)]) == 0
    return read_recipe(folder / "out"), folder


def make_recipe(layers=4, candidates=2, headers=True, drift=True, names=None, scale=0.01, shares=None):
    """A recipe as a joint search writes it, of made-up shares and slopes."""
    rng, names = random.Random(layers), names or ["base", *(f"fine-tune-{n}" for n in range(1, candidates + 1))]

    def rows(value):
        return [[value() for _ in names[1:]] for _ in range(layers + headers)]

    shares = shares or rows(lambda: rng.choice((0.0, round(rng.random(), 2))))
    slopes = {"total": rows(lambda: rng.gauss(0, 1) * scale)}
    slopes |= {"trial_kl": rows(lambda: rng.gauss(0, 1) * scale / 10)} if drift else {}
    means = [math.fsum(column) / len(shares) for column in zip(*shares, strict=True)]
    return Recipe.model_validate(
        {
            "format": 1,
            "program": "1.0.0",
            "libraries": {},
            "settings": Config(Directories("base", ""), search="joint", merge_headers=headers),
            "device": "cpu",
            "dtype": "float32",
            "sources": [
                {"number": number, "name": name, "where": name, "fingerprint": {}} for number, name in enumerate(names)
            ],
            "decisions": [],
            "failures": {},
            "phrases": [],
            "held_out": [],
            "metrics": {"base": {"total": 1.0}, "merge": {"total": 0.5}},
            "metrics_after": {},
            "baselines": {},
            "saved_dtype": None,
            "samples": [],
            "joint": {"start": shares, "slopes": slopes, "shares": shares},
            "composition": dict(zip(names, [1 - math.fsum(means), *means], strict=True)),
            "seconds": {},
        }
    )


def panels(figure):
    """The axes that have rows of layers, without the colour bars."""
    return figure.axes[: len(figure.axes) // 2]


def cells(axes):
    """The numbers that a panel's colours stand for, without the gap above what is outside the layers."""
    rows = axes.collections[0].get_array().filled(math.nan).tolist()
    return [row for row in rows if not row or not math.isnan(row[0])]


def texts(axes):
    """The numbers that are written into a panel's cells, row by row."""
    width, found = len(axes.get_xticks()), [text.get_text() for text in axes.texts]
    return [found[start : start + width] for start in range(0, len(found), width)]


def unit_of(axes):
    return float(re.search(r"\(x\s+(\S+);", axes.get_title("left"))[1])


def with_base(rows):
    return [[1 - math.fsum(row), *row] for row in rows]


def assert_titles_stay_apart(figure):
    """No panel's title reaches into the next one's."""
    with drawing():
        boxes = [axes._left_title.get_window_extent() for axes in panels(figure)]
        bars = [label.get_window_extent() for axes in figure.axes for label in axes.get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
    assert not any(one.overlaps(other) for n, one in enumerate(bars) for other in bars[:n])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("candidates", [1, 4, 8])
@pytest.mark.parametrize("layers", [126, 80, 30])
def test_shares_and_slopes_are_the_recipe_s(place, layers, candidates):
    recipe = make_recipe(layers, candidates)
    figure, joint = share_map_figure(recipe), recipe.joint
    shares, total, drift = panels(figure)
    numbers = [str(number) for number in range(1, candidates + 1)]
    assert np.array(cells(shares)) == pytest.approx(np.array(with_base(joint.shares)))
    assert labels_of(shares.xaxis) == ["base", *numbers]
    assert texts(shares) == [[f"{share:.2f}".replace("-0.00", "0.00") for share in row] for row in cells(shares)]
    for axes, what, slopes in (
        (total, "Total", joint.slopes["total"]),
        (drift, "KL in trials", joint.slopes["trial_kl"]),
    ):
        assert f"Effect of each weight on {what} at" in axes.get_title("left").replace("\n", " ")
        unit = unit_of(axes)
        assert np.array(cells(axes)) * unit == pytest.approx(np.array(slopes))
        assert 1 <= np.abs(cells(axes)).max() < 10
        assert texts(axes) == [[f"{slope:.1f}".replace("-0.0", "0.0") for slope in row] for row in cells(axes)]
        assert labels_of(axes.xaxis) == numbers
    assert labels_of(shares.yaxis) == [*map(str, range(layers)), "outside"]
    names = [source.name for source in recipe.sources]
    assert all(name in text for name, text in zip(names, legend_of(figure), strict=True))
    assert legend_of(figure)[0] == f"base: base ({recipe.composition['base'] * 100:.3g}%)"
    assert_nothing_is_cut_off(figure)
    assert_titles_stay_apart(figure)
    save_figure(figure, place / "picture.png")
    height, width = imread(place / "picture.png").shape[:2]
    assert (width, height) == pytest.approx([inches * DPI for inches in figure.get_size_inches()], abs=1)


def test_numbers_have_room_in_their_cells():
    for recipe in (make_recipe(80, 4), make_recipe(30, 1), make_recipe(2, 20)):
        figure = share_map_figure(recipe)
        with drawing():
            figure.draw_without_rendering()
            for axes in panels(figure):
                written = axes.texts[0].get_window_extent(), axes.texts[-1].get_window_extent()
                corners = axes.transData.transform([(0, 1), (1, 2)])
                room = abs(corners[1] - corners[0])
                assert all(box.width < room[0] and box.height < room[1] * 1.05 for box in written)


@pytest.mark.slow
@pytest.mark.parametrize("layers, candidates", [(400, 2), (3, 90)])
def test_where_numbers_have_no_room_there_are_colours(place, layers, candidates):
    figure = share_map_figure(make_recipe(layers, candidates))
    assert not any(axes.texts for axes in panels(figure))
    assert figure.get_figwidth() < 35 and figure.get_figheight() < 55
    numbers = [label for label in labels_of(panels(figure)[0].yaxis) if label]
    assert numbers[-1] == "outside" and len(numbers) > layers / 4
    save_figure(figure, place / "picture.png")


def test_colours_are_honest():
    """White is nothing; a share below that has another colour than one above it; slopes are symmetric."""
    recipe = make_recipe(shares=[[0.9, 0.8], [0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [0.3, 0.1]])
    shares, total, drift = [axes.collections[0] for axes in panels(share_map_figure(recipe))]
    assert (shares.norm.vmin, shares.norm.vcenter, shares.norm.vmax) == (-1.0, 0.0, 1.0)
    assert shares.to_rgba(0.0) == pytest.approx((1, 1, 1, 1), abs=0.01)
    low, high = shares.to_rgba(-0.7), shares.to_rgba(0.7)
    assert low[0] > low[1] and high[1] > high[0]
    for mesh in (total, drift):
        assert mesh.norm.vmin == -mesh.norm.vmax == -np.abs(mesh.get_array()).max()
        assert mesh.to_rgba(0.0) == pytest.approx((1, 1, 1, 1), abs=0.01)
        better, worse = mesh.to_rgba(mesh.norm.vmin), mesh.to_rgba(mesh.norm.vmax)
        assert better[2] > better[0] and worse[0] > worse[2]
    assert total.norm.vmax != drift.norm.vmax
    far = make_recipe(candidates=4, shares=[[1.0, 1.0, 1.0, 0.9]] * 5)
    bar = share_map_figure(far).axes[3]
    assert labels_of(bar.xaxis) == ["-2.90", "0.00", "1.00"]


@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize("drift", [True, False])
def test_what_was_not_mixed_or_not_weighed_is_not_drawn(place, headers, drift):
    figure = share_map_figure(make_recipe(headers=headers, drift=drift))
    assert len(panels(figure)) == 2 + drift
    assert labels_of(panels(figure)[0].yaxis) == ["0", "1", "2", "3", *(["outside"] if headers else [])]
    assert all(len(cells(axes)) == 4 + headers for axes in panels(figure))
    assert_nothing_is_cut_off(figure)
    save_figure(figure, place / "picture.png")


def test_layers_that_were_not_searched_are_shown_as_unknown():
    shares, slopes = [[0.0, 0.0], [0.3, 0.0], [0.0, 0.0], [0.0, 0.0], [0.4, 0.0]], [[0.0, 0.0]] * 5
    recipe = make_recipe(shares=shares)
    settings = replace(recipe.settings, layers=(1, 2))
    joint = recipe.joint.model_copy(update={"slopes": {"total": slopes, "trial_kl": slopes}})
    figure = share_map_figure(recipe.model_copy(update={"settings": settings, "joint": joint}))
    for axes in panels(figure):
        rows = axes.collections[0].get_array()
        assert [bool(row.mask.all()) for row in rows] == [True, False, False, True, True, False]  # one is the gap
        assert len(axes.texts) == 2 + 3 * len(axes.get_xticks())
    assert cells(panels(figure)[0]) == [[0.7, 0.3, 0.0], [1.0, 0.0, 0.0], [0.6, 0.4, 0.0]]
    assert_no_labels_overlap(figure)


def test_the_legend_has_the_models_that_are_in_the_merge():
    labels = legend_of(share_map_figure(make_recipe(shares=[[0.3, 0.0, 0.7]] * 5, candidates=3)))
    assert [label.partition(":")[0] for label in labels] == ["1", "3"]


def test_nothing_was_merged(place):
    recipe = make_recipe(shares=[[0.0, 0.0]] * 5)
    figure = share_map_figure(recipe)
    assert texts(panels(figure)[0]) == [["1.00", "0.00", "0.00"]] * 5
    save_figure(figure, place / "picture.png")


@pytest.mark.parametrize("scale", [1e305, 1e-305, 1e-320, 0.0])
def test_slopes_of_any_size(place, scale):
    figure = share_map_figure(make_recipe(scale=scale))
    assert all(math.isfinite(value) for axes in panels(figure) for row in cells(axes) for value in row)
    save_figure(figure, place / "picture.png")


def test_no_number_is_minus_nothing():
    recipe = make_recipe(shares=[[0.7, 0.3], [0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.34, 0.66]])
    assert {row[0] for row in texts(panels(share_map_figure(recipe))[0])} == {"0.00"}


def test_names_of_any_kind(place):
    figure = share_map_figure(make_recipe(layers=32, names=ODD_NAMES))
    assert_nothing_is_cut_off(figure)
    assert_titles_stay_apart(figure)
    assert [text.partition(": ")[0] for text in legend_of(figure)] == ["base", *map(str, range(1, len(ODD_NAMES)))]
    assert "Ba$e_x^2" in figure.get_suptitle() and "Ba$e_x^2" in legend_of(figure)[0]
    assert all(text.isprintable() and len(text) < 55 for text in legend_of(figure))
    written = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(written) >= 4 and not any(text.get_parse_math() for text in written)
    save_figure(figure, place / "picture.png")


def test_a_run_s_merge_map_is_this_picture(found, place):
    found, folder = found
    plots.merge_map(found, place / "one.png")
    save_figure(share_map_figure(found), place / "two.png")
    assert (place / "one.png").read_bytes() == (place / "two.png").read_bytes()
    shares, total, drift = panels(share_map_figure(found))
    assert np.array(cells(shares)) == pytest.approx(np.array(with_base(found.joint.shares)))
    assert np.array(cells(total)) * unit_of(total) == pytest.approx(np.array(found.joint.slopes["total"]))
    assert np.array(cells(drift)) * unit_of(drift) == pytest.approx(np.array(found.joint.slopes["trial_kl"]))
    rows = cells(shares)
    means = np.average([*rows, rows[-1]], axis=0, weights=sizes(folder / "base"))
    assert found.composition == pytest.approx(dict(zip(("base", "one", "two"), means, strict=True)))


@pytest.mark.parametrize("key", ["start", "total", "trial_kl"])
@pytest.mark.parametrize("rows", [[[0.1, 0.2]], [[0.1]] * 5, [[0.1, 0.2]] * 4 + [[0.1]], []], ids=str)
def test_a_recipe_without_a_slope_for_each_share_is_refused(key, rows):
    recipe = make_recipe().written()
    (recipe["joint"] if key == "start" else recipe["joint"]["slopes"])[key] = rows
    with pytest.raises(ValidationError, match="slopes on no share"):
        Recipe.model_validate(recipe)

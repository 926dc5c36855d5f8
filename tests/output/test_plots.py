"""The pictures: what they show, and that no name or number breaks them."""

import importlib.util
import math
import random
import warnings

import matplotlib
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
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text
from project import ROOT
from pydantic import ValidationError
from runs import sizes

import merge_monster
from modules.config.schema import Config, Directories
from modules.merging.methods import cyclic_weights, gradient_weights, ratios_for, slice_weights
from modules.output import plots
from modules.output.recipe import Recipe, read_recipe
from modules.output.style import BETTER, SAME, WORSE, drawing, save_figure
from modules.runtime.text import one_line, shortened

IMAGES = ROOT / "images"


@pytest.fixture(autouse=True)
def no_warnings():
    with without_warnings():
        yield


def made_up(names, **more):
    """A recipe as a run writes it, of made-up results."""
    return Recipe.model_validate(
        {
            "format": 1,
            "program": "1.0.0",
            "libraries": {},
            "settings": Config(Directories("base", "")),
            "device": "cpu",
            "dtype": "float32",
            "saved_dtype": None,
            "sources": [
                {"number": number, "name": name, "where": name, "fingerprint": {}} for number, name in enumerate(names)
            ],
            "decisions": [],
            "failures": {},
            "phrases": [],
            "held_out": [],
            "metrics": {"base": {"total": 6.0}, "merge": {"total": 5.0}},
            "metrics_after": {},
            "baselines": {},
            "samples": [],
            "composition": {names[0]: 1.0},
            "seconds": {},
            **more,
        }
    )


def names_of(candidates):
    return ["base", *(f"fine-tune-{number}" for number in range(1, candidates + 1))]


def greedy(layers=4, candidates=2, accepted=0.5, names=None, phrases=(), scale=1.0):
    """The recipe of a greedy search."""
    rng = random.Random(layers)
    names = names or names_of(candidates)
    total, decisions = 6.0, []
    for candidate in range(1, len(names)):
        for layer in [*range(layers), None]:
            ratio = rng.choice((0.2, 0.6, 0.8)) if rng.random() < accepted else None
            after = total - 0.01 if ratio else total
            decisions.append(
                {
                    "candidate": candidate,
                    "model": names[candidate],
                    "layer": layer,
                    "method": "lerp" if layer is None else rng.choice(("lerp", "slice", "cyclic", "gradient")),
                    "ratio": ratio,
                    "before": total * scale,
                    "after": after * scale,
                    "log_probabilities": [-1.0, None],
                    "warning": None,
                    "note": None,
                    "seconds": 0.1,
                }
            )
            total = after
    return made_up(names, decisions=decisions, phrases=list(phrases))


def joint(layers=4, candidates=2, headers=True, scale=0.01):
    """The recipe of a joint search."""
    rng = random.Random(layers)
    names = names_of(candidates)

    def rows(value):
        return [[value() for _ in names[1:]] for _ in range(layers + headers)]

    shares = rows(lambda: rng.choice((0.0, round(rng.random(), 2))))
    slopes = {
        "total": rows(lambda: rng.gauss(0, 1) * scale),
        "trial_kl": rows(lambda: rng.gauss(0, 1) * scale / 10),
    }
    settings = Config(Directories("base", ""), search="joint", merge_headers=headers)
    return made_up(names, settings=settings, joint={"start": shares, "slopes": slopes, "weights": shares, "steps": []})


def make_pair(kind="BAD", phrase="a whisper", context="His voice was barely above", before=0.5, after=0.1):
    return {"kind": kind, "phrase": phrase, "context": context, "weight": 1.0, "before": before, "after": after}


def make_pairs(count, kinds=("BAD", "GOOD")):
    rng = random.Random(count)
    return [
        make_pair(kinds[number % len(kinds)], f"phrase {number}", before=rng.random(), after=rng.random())
        for number in range(count)
    ]


def written(figure, place):
    """Write a picture; it is not blank."""
    save_figure(figure, place / "picture.png")
    image = imread(place / "picture.png")
    assert len({tuple(pixel) for pixel in image[::3, ::3].reshape(-1, image.shape[2])}) > 20


def cells(axes):
    """The numbers that a heat map's colours stand for: a list for each layer, of a number for each model."""
    return np.asarray(axes.images[0].get_array()).T.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The merge map
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, candidates", [(0, 1), (20, 2), pytest.param(126, 8, marks=pytest.mark.slow)])
def test_the_merge_map_of_a_greedy_search(layers, candidates):
    recipe = greedy(layers, candidates)
    figure = plots.merge_map_figure(recipe)
    shares, totals = figure.axes[:2]
    expected = np.array([weights_by_hand(recipe, layer) for layer in [*range(layers), None]])
    shown = expected.any(axis=0)
    assert shown.all() == (layers > 0)
    assert np.array(cells(shares)) == pytest.approx(expected[:, shown])
    rows = np.array(["base", *map(str, range(1, candidates + 1))])
    assert [label.partition(":")[0] for label in labels_of(shares.yaxis)] == rows[shown].tolist()
    *numbers, header = labels_of(shares.xaxis)
    assert header == "emb+head" and len(numbers) >= min(layers, 20)
    decisions = recipe.decisions
    assert list(totals.lines[0].get_ydata()) == [6.0, *(line.after for line in decisions)]
    accepted = [(number, line.after) for number, line in enumerate(decisions, start=1) if line.ratio is not None]
    assert [tuple(dot) for dot in totals.collections[0].get_offsets()] == accepted
    assert [line.get_xdata()[0] for line in totals.lines[1:]] == [(layers + 1) * n for n in range(candidates)]
    assert [text.get_text().strip() for text in totals.texts] == [str(n) for n in range(1, candidates + 1)]
    assert_no_labels_overlap(figure)
    assert_nothing_is_cut_off(figure)


def weights_by_hand(recipe, layer):
    """The shares of all models in a layer, by the rule alone."""
    shares = [1.0] + [0.0] * (len(recipe.sources) - 1)
    for line in recipe.decisions:
        if line.layer == layer and line.ratio is not None:
            share = {"cyclic": 0.15, "gradient": 0.45}.get(line.method, line.ratio)
            shares = [earlier * (1 - share) for earlier in shares]
            shares[line.candidate] += share
    return shares


@pytest.mark.parametrize("layers, candidates, headers", [(12, 3, True), (4, 1, False)])
def test_the_merge_map_of_a_joint_search(layers, candidates, headers):
    recipe = joint(layers, candidates, headers)
    figure = plots.merge_map_figure(recipe)
    shares, total, drift = figure.axes[:3]
    expected = [[1 - math.fsum(row), *row] for row in recipe.joint.weights]
    assert np.array(cells(shares)) == pytest.approx(np.array(expected))
    numbers = [text.get_text() for text in shares.texts]
    assert numbers == [f"{round(value, 2) + 0.0:.2f}" for model in zip(*expected, strict=True) for value in model]
    assert labels_of(shares.xaxis)[-1] == ("emb+head" if headers else str(layers - 1))
    named = recipe.joint.slopes
    for axes, slopes, measure in ((total, named["total"], "Total"), (drift, named["trial_kl"], "KL")):
        title = axes.get_title("left")
        unit = float(title.partition("in units of ")[2].partition(";")[0])
        assert measure in title and np.array(cells(axes)) * unit == pytest.approx(np.array(slopes), rel=0.01)
        assert np.abs(cells(axes)).max() == 1
    assert_no_labels_overlap(figure)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("make", [greedy, joint])
def test_what_is_not_in_the_merge_is_in_no_picture(make):
    """The second of three candidates has no weight in any layer."""
    recipe = make(layers=4, candidates=3).written()
    for line in recipe["decisions"]:
        line["ratio"] = None if line["candidate"] == 2 else 0.5
    if make is joint:
        recipe["joint"]["weights"] = [[0.5, 0.0, 0.25]] * len(recipe["joint"]["weights"])
    recipe["phrases"] = [make_pair()]
    recipe = Recipe.model_validate(recipe)
    figure = plots.merge_map_figure(recipe)
    maps = [axes for axes in figure.axes if axes.images and axes.yaxis.get_ticklabels()[0].get_text()]
    numbers = [[label.partition(":")[0] for label in labels_of(axes.yaxis)] for axes in maps]
    rows = [rows for rows in numbers if {"1", "3"} <= {*rows}]
    assert rows == [["base", "1", "3"], *([["1", "3"]] * 2 if make is joint else [])]
    if make is joint:
        slopes = np.array(recipe.joint.slopes["total"])
        assert np.array(cells(maps[1])) == pytest.approx(slopes[:, [0, 2]] / np.abs(slopes[:, [0, 2]]).max())
    for picture in (figure, plots.phrase_chart_figure(recipe)):
        assert "fine-tune-1, fine-tune-3" in picture.get_suptitle() and "fine-tune-2" not in picture.get_suptitle()


def test_numbers_are_left_out_where_they_are_not_legible():
    assert not plots.merge_map_figure(joint(80)).axes[0].texts


def test_a_candidate_given_up_in_the_middle_and_nothing_accepted():
    recipe = greedy(layers=6, candidates=3)
    kept = [line for line in recipe.decisions if line.candidate == 1 or (line.candidate == 2 and line.layer == 0)]
    for some in (recipe.model_copy(update={"decisions": kept}), greedy(accepted=0), made_up(names_of(2))):
        figure = plots.merge_map_figure(some)
        rows = cells(figure.axes[0])
        assert np.array(rows).sum(axis=1) == pytest.approx(1.0)
        if not any(line.ratio for line in some.decisions):
            assert {row[0] for row in rows} == {1.0}
        assert_no_labels_overlap(figure)


@pytest.mark.parametrize("scale", [1e305, 1e-320, 0.0])
def test_numbers_of_any_size(scale):
    figure = plots.merge_map_figure(joint(scale=scale))
    assert all(math.isfinite(value) for axes in figure.axes[:3] for row in cells(axes) for value in row)
    with drawing():
        plots.merge_map_figure(greedy(scale=scale)).draw_without_rendering()
        figure.draw_without_rendering()


@pytest.mark.parametrize("key", ["start", "total", "trial_kl"])
@pytest.mark.parametrize("rows", [[[0.1, 0.2]], [[0.1]] * 5, []], ids=str)
def test_a_recipe_without_a_slope_for_each_share_is_refused(key, rows):
    recipe = joint().written()
    recipe["joint"][key] = rows
    if key != "start":
        recipe["joint"]["slopes"][key] = rows
    with pytest.raises(ValidationError, match="slopes on unknown weights"):
        Recipe.model_validate(recipe)


# ---------------------------------------------------------------------------------------------------------------------
# The phrase chart
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(axes):
    """(label, before, after) of every row of a phrase chart's panel, from the top."""
    lines, before, after = axes.collections
    assert [tuple(line[:, 0]) for line in lines.get_segments()] == list(
        zip(*map(places_of, (before, after)), strict=True)
    )
    return list(zip(labels_of(axes.yaxis), places_of(before), places_of(after), strict=True))


def colours_of(axes):
    return [to_hex(colour).upper() for colour in axes.collections[2].get_facecolors()]


def places_of(dots):
    return [x for x, _ in dots.get_offsets()]


def test_the_phrase_chart(place):
    phrases = [
        make_pair("BAD", "spine", "It sent shivers down her ", 0.9, 0.2),
        make_pair("BAD", "worse", "", 0.4, 0.5),
        make_pair("GOOD", "in the bedroom", "x" * 100 + " is\n", 0.1, 0.1),
        make_pair("BAD", "most", "The best", 0.95, 0.05),
        make_pair("GOOD", "p" * 50, "Answer:", 0.3, 0.8),
    ]
    figure = plots.phrase_chart_figure(greedy(phrases=phrases))
    bad, good = figure.axes
    assert bad.get_title("left") == "Bad phrases: lower is better"
    assert good.get_title("left") == "Good phrases: higher is better"
    assert rows_of(bad) == [
        ("The best [most]", 0.95, 0.05),
        ("It sent shivers down her [spine]", 0.9, 0.2),
        ("[worse]", 0.4, 0.5),
    ]
    assert rows_of(good) == [
        (f"Answer: [{'p' * 12}...{'p' * 13}]", 0.3, 0.8),
        (f"...{'x' * 30} is [in the bedroom]", 0.1, 0.1),
    ]
    assert colours_of(bad) == [BETTER, BETTER, WORSE]
    assert colours_of(good) == [BETTER, SAME]
    assert good.get_xlabel() == "Probability" and figure.get_supylabel() == "Context [phrase]"
    assert legend_of(figure) == ["before", "after, better", "after, worse", "after, the same"]
    assert figure.get_suptitle() == "Phrases before and after: base + fine-tune-1, fine-tune-2"
    assert [text.get_text() for text in bad.texts] == ["95.0% → 5.0%", "90.0% → 20.0%", "40.0% → 50.0%"]
    assert_nothing_is_cut_off(figure)
    written(figure, place)


def test_of_many_pairs_those_that_changed_the_most():
    phrases = make_pairs(61)
    figure = plots.phrase_chart_figure(greedy(phrases=phrases))
    assert "the 30 pairs of each kind that changed the most, of 61" in figure.get_suptitle()
    for axes, kind in zip(figure.axes, ("BAD", "GOOD"), strict=True):
        changes = sorted((abs(p["after"] - p["before"]) for p in phrases if p["kind"] == kind), reverse=True)
        shown = sorted((abs(after - before) for _, before, after in rows_of(axes)), reverse=True)
        assert shown == pytest.approx(changes[:30])
    assert_nothing_is_cut_off(figure)
    assert "61" not in plots.phrase_chart_figure(greedy(phrases=make_pairs(60))).get_suptitle()


@pytest.mark.parametrize(
    "values, scale",
    [
        ((0.9, 0.01, 0.5, 0.02), "linear"),
        ((0.0, 0.0, 0.0, 0.0), "linear"),
        ((0.9, 0.001, 0.5, 0.02), "symlog"),
        ((1.0, 0.0, 1e-320, 1e-9), "symlog"),
        ((1e-30, 2e-30, 1e-30, 1e-30), "linear"),
    ],
)
def test_the_axis_of_probabilities(values, scale):
    phrases = [make_pair(before=values[0], after=values[1]), make_pair(before=values[2], after=values[3])]
    figure = plots.phrase_chart_figure(greedy(phrases=phrases))
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_xlim()[0]) == (scale, 0)
    assert all(value <= axes.get_xlim()[1] for row in rows_of(axes) for value in row[1:])
    with drawing():
        figure.draw_without_rendering()
    ticks = labels_of(axes.xaxis)
    assert ticks[0] == "0%" and all(text.endswith("%") for text in ticks) and len(ticks) <= 16


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [plots.merge_map_figure, plots.phrase_chart_figure])
def test_names_and_phrases_of_any_kind(draw):
    phrases = [make_pair(phrase=name, context=name) for name in ODD_NAMES]
    figure = draw(greedy(layers=3, names=ODD_NAMES, phrases=phrases, accepted=1.0))
    shown = [shortened(one_line(name), 32, "both") for name in ODD_NAMES]
    assert shown[:3] == ["Ba$e_x^2", "_$\\frac{1}{2", "名前? 🙂"]
    assert all(name in figure.get_suptitle().replace("\n", " ") for name in shown)
    if draw is plots.merge_map_figure:
        assert all(name in label for name, label in zip(shown, labels_of(figure.axes[0].yaxis), strict=True))
    assert_nothing_is_cut_off(figure)
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) >= 4 and not any(text.get_parse_math() for text in texts)


def test_the_same_recipe_gives_the_same_bytes_whatever_the_users_matplotlib_settings_are(place):
    recipe = greedy(phrases=make_pairs(2))
    theirs = {"text.usetex": True, "savefig.dpi": 300, "font.size": 30, "savefig.bbox": "tight"}
    plots.phrase_chart(recipe, place / "one.png")
    with matplotlib.rc_context(theirs):
        plots.phrase_chart(recipe, place / "two.png")
        assert all(matplotlib.rcParams[key] == value for key, value in theirs.items())
    assert (place / "one.png").read_bytes() == (place / "two.png").read_bytes()
    assert b"Software" not in (place / "one.png").read_bytes()


def test_a_recipe_without_pairs_and_a_file_that_cannot_be_written(place):
    assert plots.phrase_chart_figure(greedy()).axes == []
    plots.phrase_chart(greedy(), place / "picture.png")
    with pytest.raises(OSError):
        plots.phrase_chart(greedy(), place / "absent/picture.png")


def test_the_recipe_of_a_run(place):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    one = tiny.make_candidate(place / "one", base, 1)
    config = tiny.write_config(place / "my.yaml", base, [one], place / "out", merge_method=["lerp", "cyclic"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # of the libraries of the run
        assert merge_monster.main(["--config", str(config)]) == 0
    recipe = read_recipe(place / "out")
    figure, chart = plots.merge_map_figure(recipe), plots.phrase_chart_figure(recipe)
    rows = [*cells(figure.axes[0]), [1.0, 0.0]]  # a greedy search leaves the last norm as it is
    means = np.average(rows, axis=0, weights=sizes(base))
    assert recipe.composition == pytest.approx(dict(zip(("base", "one"), means, strict=True)))
    probabilities = sorted((pair.before, pair.after) for pair in recipe.phrases)
    assert sorted(row[1:] for axes in chart.axes for row in rows_of(axes)) == probabilities
    written(figure, place)


# ---------------------------------------------------------------------------------------------------------------------
# The pages'
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_images():
    spec = importlib.util.spec_from_file_location("make_images", IMAGES / "make_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_pictures_are_there_and_small():
    sizes = {path.stem: path.stat().st_size for path in IMAGES.glob("*.png")}
    assert sizes.keys() == {"lerp", "slerp", "slice", "cyclic", "gradient", "merge_map", "phrase_chart", "scaling"}
    assert max(sizes.values()) < 120_000


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_the_picture_of_a_path(make_images, method):
    figure = make_images.path_figure(method)
    x, y = figure.axes[0].lines[0].get_data()
    middle = math.cos(math.radians(50)) if method == "lerp" else 1.0
    assert math.hypot(x[25], y[25]) == pytest.approx(middle) and math.hypot(x[0], y[0]) == pytest.approx(1.0)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize(
    "method, shares", [("slice", slice_weights), ("cyclic", cyclic_weights), ("gradient", gradient_weights)]
)
def test_the_picture_of_columns(make_images, method, shares):
    figure = make_images.columns_figure(method)
    ratios = ratios_for(method, (0.25, 0.5, 0.75))
    assert [axes.get_title("left") for axes in figure.axes] == [f"ratio {ratio:g}" for ratio in ratios]
    for axes, ratio in zip(figure.axes, ratios, strict=True):
        assert list(axes.patches[1].get_data().values) == pytest.approx(shares(400, ratio).tolist())
    assert_nothing_is_cut_off(figure)

"""The pictures: what they show, how large they are, and that no name or number breaks them."""

import importlib.util
import math
import random
import warnings
from itertools import groupby

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
from runs import sizes

import merge_monster
from modules.config import Config, Directories
from modules.merging.methods import cyclic_shares, gradient_shares, ratios_for, slice_shares
from modules.output import plots as pictures
from modules.output.recipe import Recipe, read_recipe
from modules.output.style import DPI
from modules.runtime.text import one_line, shortened
from modules.search.decision import shares_of

IMAGES = ROOT / "images"


@pytest.fixture(autouse=True)
def no_warnings():
    with without_warnings():
        yield


def make_recipe(layers=4, candidates=2, accepted=0.5, names=None, phrases=()):
    """A recipe as a run writes it, of made-up decisions."""
    rng, total, decisions = random.Random(layers), 6.0, []
    names = names or ["base", *(f"fine-tune-{number}" for number in range(1, candidates + 1))]
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
                    "before": total,
                    "after": after,
                    "log_probabilities": [-1.0, None],
                    "warning": None,
                    "note": None,
                    "seconds": 0.1,
                }
            )
            total = after
    return Recipe.model_validate(
        {
            "format": 1,
            "program": "1.0.0",
            "libraries": {},
            "settings": Config(Directories("base", "")),
            "device": "cpu",
            "dtype": "float32",
            "sources": [
                {"number": number, "name": name, "where": name, "fingerprint": {}} for number, name in enumerate(names)
            ],
            "decisions": decisions,
            "failures": {},
            "phrases": list(phrases),
            "held_out": [],
            "metrics": {"base": {"total": 6.0}, "merge": {"total": total}},
            "metrics_after": {},
            "baselines": {},
            "saved_dtype": None,
            "samples": [],
            "composition": {names[0]: 1.0},
            "seconds": {},
        }
    )


def make_pair(kind="BAD", phrase="a whisper", context="His voice was barely above", before=0.5, after=0.1):
    return {"kind": kind, "phrase": phrase, "context": context, "weight": 1.0, "before": before, "after": after}


def make_pairs(count, kinds=("BAD", "GOOD")):
    rng = random.Random(count)
    return [
        make_pair(kinds[number % len(kinds)], f"phrase {number}", before=rng.random(), after=rng.random())
        for number in range(count)
    ]


def columns(figure):
    """The heights of all bars of a merge map: a list per model, of a height per layer and the header's."""
    return [[bar.get_height() for bar in container] for container in figure.axes[0].containers]


def drawn(figure, place):
    """A picture's width and height in pixels; it is not blank."""
    pictures.save_figure(figure, place / "picture.png")
    image = imread(place / "picture.png")
    assert len({tuple(pixel) for pixel in image[::3, ::3].reshape(-1, image.shape[2])}) > 20
    return image.shape[1], image.shape[0]


# ---------------------------------------------------------------------------------------------------------------------
# The merge map
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("candidates", [1, 8])
@pytest.mark.parametrize("layers", [32, 80, 126])
def test_the_merge_map(place, layers, candidates):
    recipe = make_recipe(layers, candidates)
    figure = pictures.merge_map_figure(recipe)
    upper, lower = figure.axes
    heights = columns(figure)
    assert [len(model) for model in heights] == [layers + 1] * (candidates + 1)
    for layer, of_models in enumerate(zip(*heights, strict=True)):
        assert sum(of_models) == pytest.approx(1)
        assert list(of_models) == pytest.approx(by_hand(recipe, None if layer == layers else layer))
    assert (upper.get_xlabel(), upper.get_ylabel()) == ("Layer", "Share of the weights")
    assert (lower.get_xlabel(), lower.get_ylabel()) == ("Decision", "Total score, lower is better")
    names = [source.name for source in recipe.sources]
    assert all(name in figure.get_suptitle().replace("\n", " ") for name in names)
    assert len(legend_of(figure)) == len(names)
    assert all(name in text for name, text in zip(names, legend_of(figure), strict=True))
    assert_nothing_is_cut_off(figure)
    pixels = [inches * DPI for inches in figure.get_size_inches()]
    assert drawn(figure, place) == pytest.approx(pixels, abs=1)


def by_hand(recipe, layer):
    """The shares of all models in a layer, by the rule alone."""
    names = [source.name for source in recipe.sources]
    shares = [1.0] + [0.0] * (len(names) - 1)
    for decision in recipe.decisions:
        if decision.layer == layer and decision.ratio is not None:
            share = {"cyclic": 0.15, "gradient": 0.45}.get(decision.method, decision.ratio)
            shares = [earlier * (1 - share) for earlier in shares]
            shares[decision.candidate] += share
    return shares


def test_shares_are_those_of_the_composition():
    recipe = make_recipe(layers=7, candidates=3)
    parts = pictures.parts_of("base", [line.decision for line in recipe.decisions])
    heights = columns(pictures.merge_map_figure(recipe))
    for merges, of_models in zip(parts, zip(*heights, strict=True), strict=True):
        assert shares_of(merges) == pytest.approx(
            {name: share for name, share in zip(pictures.names_of_sources(recipe), of_models, strict=True) if share}
        )


@pytest.mark.parametrize("layers, inches", [(1, 8), (80, 12.125), (400, 40)])
def test_the_width_grows_with_the_layers_up_to_a_limit(layers, inches):
    assert pictures.merge_map_figure(make_recipe(layers, 1)).get_figwidth() == inches


@pytest.mark.parametrize("layers", [0, 1, 4, 40, 400])
def test_layers_are_numbered_and_the_header_is_named(layers):
    figure = pictures.merge_map_figure(make_recipe(layers, 1))
    *numbers, header = labels_of(figure.axes[0].xaxis)
    assert header == "header" and all(0 <= int(number) < layers for number in numbers)
    assert len(numbers) >= min(layers, 8) and len(set(numbers)) == len(numbers) and numbers[:1] in ([], ["0"])


def test_the_path_of_the_total():
    recipe = make_recipe(layers=5, candidates=3)
    lower = pictures.merge_map_figure(recipe).axes[1]
    path, dots = lower.lines[0].get_ydata(), lower.collections[0].get_offsets()
    decisions = recipe.decisions
    assert list(path) == [6.0, *(decision.after for decision in decisions)]
    accepted = [(place, one.after) for place, one in enumerate(decisions, start=1) if one.ratio is not None]
    assert [tuple(dot) for dot in dots] == accepted
    assert [line.get_xdata()[0] for line in lower.lines[1:]] == [0, 6, 12]
    assert [text.get_text() for text in lower.texts] == ["1 fine-tune-1", "2 fine-tune-2", "3 fine-tune-3"]


@pytest.mark.parametrize("drift, top", [(0.0, 0.01), (1e-9, 0.01), (0.009, 0.01), (0.4, 0.42)])
def test_next_to_no_drift_looks_like_it(drift, top):
    figure = pictures.merge_map_figure(with_drift(make_recipe(candidates=1), {1: drift}))
    assert figure.axes[2].get_ylim() == (0, pytest.approx(top))


def with_drift(recipe, divergences):
    """A recipe that tells the drift after some candidates."""
    metrics = {str(number): {"kl": value, "top1": 0.9, "perplexity": 22} for number, value in divergences.items()}
    return Recipe.model_validate({**recipe.written(), "metrics_after": metrics})


@pytest.mark.parametrize("candidates", [1, 8])
def test_the_drift_after_each_candidate(place, candidates):
    recipe = make_recipe(32, candidates)
    drifts = {number: 0.01 * (number % 3) for number in range(1, candidates + 1)}
    figure = pictures.merge_map_figure(with_drift(recipe, drifts))
    _, lower, right = figure.axes
    (curve,) = right.lines
    assert list(curve.get_xdata()) == [33 * number for number in range(candidates + 1)]
    assert list(curve.get_ydata()) == [0, *drifts.values()]
    assert (
        right.get_ylabel() == "KL to base, dashed" and right.get_ylim()[0] == 0 and right.get_xlim() == lower.get_xlim()
    )
    assert len(legend_of(figure)) == candidates + 1
    assert_nothing_is_cut_off(figure)
    drawn(figure, place)
    with pictures.drawing():
        boxes = [right.yaxis.label.get_window_extent(), *(tick.get_window_extent() for tick in right.get_yticklabels())]
    assert not any(box.overlaps(boxes[0]) for box in boxes[1:])


def test_a_candidate_whose_drift_is_not_known_or_that_has_no_decision(place):
    recipe = make_recipe(layers=6, candidates=3)
    kept = [decision for decision in recipe.decisions if decision.candidate != 2]
    recipe = recipe.model_copy(update={"decisions": kept})
    curves = [{2: 0.1, 3: 0.2}, {1: 0.1}, {1: 0.0, 2: 0.0, 3: 0.0}, {1: 1e300, 2: 0.0, 3: 1e-300}]
    places = [[0, 7, 14], [0, 7], [0, 7, 7, 14], [0, 7, 7, 14]]
    for drifts, expected in zip(curves, places, strict=True):
        figure = pictures.merge_map_figure(with_drift(recipe, drifts))
        assert list(figure.axes[2].lines[0].get_xdata()) == expected
        drawn(figure, place)


def test_long_names_of_many_candidates(place):
    names = ["base", *(f"{'w' * 150}{number}" for number in range(20))]
    figure = pictures.merge_map_figure(make_recipe(3, names=names, accepted=1))
    assert [text.get_text() for text in figure.axes[1].texts] == [str(number) for number in range(1, 21)]
    assert "12 more" in figure.get_suptitle() and len(set(legend_of(figure))) == 21
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("candidates", [8, 20])
def test_no_two_models_look_the_same(candidates):
    figure = pictures.merge_map_figure(make_recipe(candidates=candidates, accepted=1))
    assert len({patch.get_facecolor() for patch in figure.legends[0].get_patches()}) == candidates + 1


def test_a_candidate_given_up_in_the_middle(place):
    recipe = make_recipe(layers=6, candidates=3)
    kept = {1: 7, 2: 1, 3: 0}
    groups = groupby(recipe.decisions, key=lambda decision: decision.candidate)
    decisions = [decision for number, group in groups for decision in list(group)[: kept[number]]]
    figure = pictures.merge_map_figure(recipe.model_copy(update={"decisions": decisions}))
    assert [text.get_text() for text in figure.axes[1].texts] == ["1 fine-tune-1", "2"]
    taken = {one.candidate for one in decisions if one.ratio is not None}
    assert [label[0] for label in legend_of(figure)] == ["b", *map(str, sorted(taken))] and 3 not in taken
    assert_no_labels_overlap(figure)
    drawn(figure, place)


@pytest.mark.parametrize("candidates, layers", [(60, 12), (3, 400)])
def test_many_candidates_and_many_layers_have_labels_that_stay_apart(candidates, layers):
    assert_no_labels_overlap(pictures.merge_map_figure(make_recipe(layers, candidates)))


def test_candidates_given_up_at_once_have_no_label_that_runs_into_the_next():
    recipe, kept = make_recipe(layers=30, candidates=5), {1: 31, 2: 1, 3: 1, 4: 31, 5: 31}
    groups = groupby(recipe.decisions, key=lambda decision: decision.candidate)
    decisions = [decision for number, group in groups for decision in list(group)[: kept[number]]]
    figure = pictures.merge_map_figure(recipe.model_copy(update={"decisions": decisions}))
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert labels == ["1 fine-tune-1", "", "", "4 fine-tune-4", "5 fine-tune-5"]
    assert_no_labels_overlap(figure)


def test_the_legend_has_the_models_that_are_in_the_merge():
    recipe = make_recipe(layers=1, candidates=3, accepted=0)
    merged = recipe.decisions[0].model_copy(update={"method": "lerp"})
    merges = [(1, 0, 0.5), (1, None, 1.0), (2, 0, 0.4), (3, 0, 1.0)]
    decisions = [
        merged.model_copy(update={"candidate": number, "model": f"fine-tune-{number}", "layer": layer, "ratio": ratio})
        for number, layer, ratio in merges
    ]
    figure = pictures.merge_map_figure(recipe.model_copy(update={"decisions": decisions}))
    assert [label.partition(":")[0] for label in legend_of(figure)] == ["1", "3"]
    figure = pictures.merge_map_figure(recipe.model_copy(update={"decisions": decisions[:3]}))
    assert [label.partition(":")[0] for label in legend_of(figure)] == ["base", "1", "2"]


def test_nothing_was_accepted_or_even_decided(place):
    for recipe in (make_recipe(accepted=0), make_recipe().model_copy(update={"decisions": []})):
        figure = pictures.merge_map_figure(recipe)
        assert columns(figure)[0] == [1.0] * len(columns(figure)[0])
        assert legend_of(figure)[0] == "base: base (100%)"
        drawn(figure, place)


@pytest.mark.parametrize("scale", [1e305, 1e-305, -1e12])
def test_totals_of_any_size(place, scale):
    recipe = make_recipe().written()
    for decision in recipe["decisions"]:
        decision["before"], decision["after"] = decision["before"] * scale, decision["after"] * scale
    drawn(pictures.merge_map_figure(Recipe.model_validate(recipe)), place)


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
    figure = pictures.phrase_chart_figure(make_recipe(phrases=phrases))
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
    assert colours_of(bad) == [pictures.BETTER, pictures.BETTER, pictures.WORSE]
    assert colours_of(good) == [pictures.BETTER, pictures.SAME]
    assert good.get_xlabel() == "Probability" and figure.get_supylabel() == "Context [phrase]"
    assert legend_of(figure) == ["before", "after, better", "after, worse", "after, the same"]
    assert figure.get_suptitle() == "Phrases before and after: base + fine-tune-1, fine-tune-2"
    assert [text.get_text() for text in bad.texts] == ["95.0% → 5.00%", "90.0% → 20.0%", "40.0% → 50.0%"]
    assert_nothing_is_cut_off(figure)
    drawn(figure, place)


@pytest.mark.parametrize(
    "before, after, rounding, shown",
    [
        (0.447, 0.44, 0, "44.7% → 44.0%"),
        (0.447, 0.44, 0.002, "44.7% → 44.0%"),  # the digit that is uncertain is the last one
        (0.447, 0.44, 0.02, "45% → 44%"),
        (1.0, 0.0, 0, "100% → 0.00%"),
        (0.05, 3e-9, 0, "5.00% → 3.00e-07%"),
        (0.05, 3e-9, 1e-4, "5.00% → 0.00%"),
    ],
)
def test_figures_beside_a_pair_keep_their_digits(before, after, rounding, shown):
    pair = make_pair(before=before, after=after) | {"rounding": rounding}
    figure = pictures.phrase_chart_figure(make_recipe(phrases=[pair]))
    assert figure.axes[0].texts[0].get_text() == shown


@pytest.mark.slow
def test_the_height_grows_up_to_a_limit(place):
    recipes = [make_recipe(phrases=make_pairs(count)) for count in (1, 8, 60, 400)]
    sizes = [drawn(pictures.phrase_chart_figure(recipe), place) for recipe in recipes]
    assert {width for width, _ in sizes} == {1210}
    heights = [height for _, height in sizes]
    assert 150 < heights[0] < heights[1] < heights[2] <= heights[3] <= 1700


@pytest.mark.sampled(2)
@pytest.mark.parametrize("count, kinds, shown", [(60, 2, (30, 30)), (61, 2, (30, 30)), (400, 1, (30,))])
def test_of_many_pairs_those_that_changed_the_most(count, kinds, shown):
    phrases = make_pairs(count, ("BAD", "GOOD")[:kinds])
    figure = pictures.phrase_chart_figure(make_recipe(phrases=phrases))
    assert tuple(len(rows_of(axes)) for axes in figure.axes) == shown
    words = f"of {count} pairs, the 30 of each kind that changed the most"
    assert (words in figure.get_suptitle()) == (sum(shown) < count)
    for axes, kind in zip(figure.axes, ("BAD", "GOOD"), strict=False):
        changes = sorted((abs(p["after"] - p["before"]) for p in phrases if p["kind"] == kind), reverse=True)
        assert sorted((abs(after - before) for _, before, after in rows_of(axes)), reverse=True) == pytest.approx(
            changes[: len(rows_of(axes))]
        )
    assert_nothing_is_cut_off(figure)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "values, scale",
    [
        ((0.9, 0.01, 0.5, 0.02), "linear"),
        ((0.9, 0.0, 0.5, 0.02), "linear"),
        ((0.0, 0.0, 0.0, 0.0), "linear"),
        ((0.9, 0.001, 0.5, 0.02), "symlog"),
        ((0.9, 0.001, 0.0, 0.02), "symlog"),
        ((1.0, 0.0, 1e-320, 1e-9), "symlog"),
        ((1.0, 1e-249, 0.0, 1.0), "symlog"),
        ((1e-30, 2e-30, 1e-30, 1e-30), "linear"),
    ],
)
def test_the_axis_of_probabilities(place, values, scale):
    phrases = [make_pair(before=values[0], after=values[1]), make_pair(before=values[2], after=values[3])]
    figure = pictures.phrase_chart_figure(make_recipe(phrases=phrases))
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_xlim()[0]) == (scale, 0)
    assert all(value <= axes.get_xlim()[1] for row in rows_of(axes) for value in row[1:])
    with pictures.drawing():
        figure.draw_without_rendering()
    ticks = labels_of(axes.xaxis)
    assert ticks[0] == "0%" and all(text.endswith("%") for text in ticks) and len(ticks) <= 16
    assert_nothing_is_cut_off(figure)
    drawn(figure, place)


def test_no_pairs_at_all(place):
    assert pictures.phrase_chart_figure(make_recipe()).axes == []
    pictures.phrase_chart(make_recipe(), place / "picture.png")


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [pictures.merge_map_figure, pictures.phrase_chart_figure])
def test_names_and_phrases_of_any_kind(place, draw):
    phrases = [make_pair(phrase=name, context=name) for name in ODD_NAMES]
    figure = draw(make_recipe(layers=32, names=ODD_NAMES, phrases=phrases))
    shown = [shortened(one_line(name), 32, "both") for name in ODD_NAMES]
    assert shown[:3] == ["Ba$e_x^2", "_$\\frac{1}{2", "名前? 🙂"]
    assert all(len(name) <= 32 for name in shown)
    assert all(name in figure.get_suptitle().replace("\n", " ") for name in shown)
    if draw is pictures.merge_map_figure:
        assert all(name in text for name, text in zip(shown, legend_of(figure), strict=True))
    assert_nothing_is_cut_off(figure)
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) >= 4 and not any(text.get_parse_math() for text in texts)
    pictures.save_figure(figure, place / "picture.png")


def test_the_same_recipe_gives_the_same_bytes(place):
    recipe = make_recipe(phrases=make_pairs(2))
    for draw in (pictures.merge_map, pictures.phrase_chart):
        for name in ("one.png", "two.png"):
            draw(recipe, place / name)
        assert (place / "one.png").read_bytes() == (place / "two.png").read_bytes()
        assert b"Software" not in (place / "one.png").read_bytes()


def test_the_users_matplotlib_settings_change_nothing(place):
    import matplotlib

    recipe = make_recipe()
    pictures.merge_map(recipe, place / "one.png")
    theirs = {"text.usetex": True, "savefig.dpi": 300, "font.size": 30, "savefig.bbox": "tight"}
    with matplotlib.rc_context(theirs):
        pictures.merge_map(recipe, place / "two.png")
        assert all(matplotlib.rcParams[key] == value for key, value in theirs.items())
    assert (place / "one.png").read_bytes() == (place / "two.png").read_bytes()


def test_a_file_that_cannot_be_written(place):
    with pytest.raises(OSError):
        pictures.phrase_chart(make_recipe(), place / "absent/picture.png")


def test_the_recipe_of_a_run(place):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    candidates = [tiny.make_candidate(place / name, base, seed) for seed, name in enumerate(("one", "two"), start=1)]
    settings = tiny.write_config(place / "my.yaml", base, candidates, place / "out", merge_method=["lerp", "cyclic"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # of the libraries of the run
        assert merge_monster.main(["--config", str(settings)]) == 0
    recipe = read_recipe(place / "out")
    figure = pictures.merge_map_figure(recipe)
    heights = [[*model, float(number == 0)] for number, model in enumerate(columns(figure))]  # the norm is the base's
    means = (np.average(model, weights=sizes(base)) for model in heights)
    assert dict(zip(("base", "one", "two"), means, strict=True)) == pytest.approx(recipe.composition)
    assert figure.axes[1].lines[0].get_ydata()[0] == pytest.approx(recipe.metrics["base"]["total"])
    chart = pictures.phrase_chart_figure(recipe)
    probabilities = sorted((pair.before, pair.after) for pair in recipe.phrases)
    assert sorted(row[1:] for axes in chart.axes for row in rows_of(axes)) == probabilities
    drawn(figure, place)
    drawn(chart, place)


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
def test_the_picture_of_a_path(place, make_images, method):
    figure = make_images.path_figure(method)
    x, y = figure.axes[0].lines[0].get_data()
    middle = math.cos(math.radians(50)) if method == "lerp" else 1.0
    assert math.hypot(x[25], y[25]) == pytest.approx(middle) and math.hypot(x[0], y[0]) == pytest.approx(1.0)
    assert_nothing_is_cut_off(figure)
    drawn(figure, place)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "method, shares", [("slice", slice_shares), ("cyclic", cyclic_shares), ("gradient", gradient_shares)]
)
def test_the_picture_of_columns(place, make_images, method, shares):
    figure = make_images.columns_figure(method)
    ratios = ratios_for(method, (0.25, 0.5, 0.75))
    assert [axes.get_title("left") for axes in figure.axes] == [f"ratio {ratio:g}" for ratio in ratios]
    for axes, ratio in zip(figure.axes, ratios, strict=True):
        assert list(axes.patches[1].get_data().values) == pytest.approx(shares(400, ratio).tolist())
    assert_nothing_is_cut_off(figure)
    drawn(figure, place)

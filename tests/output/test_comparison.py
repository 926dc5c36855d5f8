"""Finished outputs side by side."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import tiny
from project import ROOT
from runs import make_models

import merge_monster
from modules.output.recipe import RECIPE_FILE, Recipe
from modules.output.tables import MOST_MODELS
from modules.output.tables import comparison as comparison_of
from modules.runtime.console import visible
from modules.runtime.text import columns


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder with the outputs of three runs: a plain one, one by other methods, one with other phrases."""
    folder = tmp_path_factory.mktemp("outputs")
    base, one, _ = make_models(folder)
    more = [*tiny.PAIRS[1:], replace(tiny.PAIRS[0], weight=3.0)]
    runs = {
        "plain": {},
        "others": {"merge_method": ["slerp", "slice"], "strategy": "quantitive", "strategy_threshold": 0.4},
        "reweighed": {"pairs": more},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, settings in runs.items():
            config = tiny.write_config(folder / "my.yaml", base, [one], folder / name, merge_ratios=[0.5], **settings)
            assert merge_monster.main(["--config", str(config)]) == 0
    shutil.rmtree(folder / "logs")
    return folder


@pytest.fixture
def recipe(outputs):
    """A real recipe, to be changed."""
    return json.loads((outputs / "plain" / RECIPE_FILE).read_text(encoding="utf-8"))


@pytest.fixture
def here(outputs, monkeypatch):
    """In the folder that has the outputs."""
    monkeypatch.chdir(outputs)
    return outputs


def comparison(recipes):
    """The table of recipes, which may have any composition: it is not checked."""
    typed = {name: Recipe.model_validate({**recipe, "composition": {}}) for name, recipe in recipes.items()}
    return comparison_of(
        {name: one.model_copy(update={"composition": recipes[name]["composition"]}) for name, one in typed.items()}
    )


def compare(*outputs):
    return merge_monster.main(["--compare", *map(str, outputs)])


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def rows(lines):
    """The table as one mapping for each row."""
    header, *body = [cells(line) for line in lines if line.startswith("| ")]
    return [dict(zip(header, line, strict=True)) for line in body]


def test_the_table_has_what_the_recipes_say(here, capsys):
    assert compare("plain", here / "others") == 0
    lines = capsys.readouterr().out.splitlines()
    plain, others = rows(lines)
    for found, folder in ((plain, here / "plain"), (others, here / "others")):
        said = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        assert found["Total"] == f"{said['metrics']['merge']['total']:.3f}"
        better = [p for p in said["phrases"] if p["after"] * p["weight"] < p["before"] * p["weight"]]
        assert found["Improved"] == f"{len(better)} of {len(tiny.PAIRS)}"
        shares = said["composition"].items()
        assert found["Composition"] == ", ".join(f"{share * 100:.1f}% {name}" for name, share in shares)
        assert found["Search"] == f"{said['seconds']['search']:.1f} s"
    assert (plain["Output"], plain["Methods"], plain["Strategy"]) == ("plain", "lerp", "cumulative")
    assert (others["Methods"], others["Strategy"]) == ("slerp, slice", "quantitive")
    assert str(here / "others").endswith(others["Output"].removeprefix("..."))
    assert not any("only within" in line for line in lines)
    assert sorted(path.name for path in here.iterdir() if path.name.startswith("log")) == []


def test_a_recipe_stands_for_its_output(here, capsys):
    shutil.copy(here / "plain" / RECIPE_FILE, here / "kept.json")
    assert compare(here / "plain" / RECIPE_FILE, "kept.json") == 0
    named = rows(capsys.readouterr().out.splitlines())
    assert named[0]["Output"].endswith("plain") and named[1]["Output"] == "kept.json"
    assert {**named[0], "Output": ""} == {**named[1], "Output": ""}


def test_totals_of_other_phrases_are_told_apart(here, capsys):
    assert compare("plain", "reweighed", "others") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(" only within: plain, others | reweighed")


@pytest.mark.parametrize(
    "change, apart",
    [
        (lambda phrases: phrases.reverse(), False),
        (lambda phrases: phrases[0].update(weight=phrases[0]["weight"] * (1 + 1e-9)), False),
        (lambda phrases: phrases[0].update(before=0.9, after=0.1), False),
        (lambda phrases: phrases[0].update(weight=phrases[0]["weight"] * 1.01), True),
        (lambda phrases: phrases[0].update(context=""), True),
        (lambda phrases: phrases[0].update(phrase="x"), True),
        (lambda phrases: phrases.pop(), True),
        (lambda phrases: phrases.append(dict(phrases[0])), True),
    ],
)
def test_what_makes_totals_incomparable(recipe, change, apart):
    other = copy.deepcopy(recipe)
    change(other["phrases"])
    assert any("only within" in line for line in comparison({"a": recipe, "b": other})) == apart


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "x" * 300,
        "runs/" + "deep/" * 40 + "out",
        "a | b",
        "a\nb\tc",
        "\x1b[31mred",
        "",
        " ",
        "日本語" * 30,
        "\udcff",
    ],
    ids=range(10),
)
def test_no_name_breaks_the_table(recipe, name):
    changed = copy.deepcopy(recipe)
    changed["composition"] = {name: 0.5, "other": 0.25, name + "2": 0.25}
    lines = comparison({name: changed, "plain": recipe})
    table = lines[: lines.index(lines[0], 3) + 1]
    assert len({columns(line) for line in table}) == 1 and len(table[0]) < 240
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("count", [1, MOST_MODELS + 1])
def test_of_a_composition_the_largest_shares_are_shown(recipe, count):
    recipe["composition"] = {f"a-model-with-a-long-name-{number}": 1 / count for number in range(count)}
    (row,) = rows(comparison({"out": recipe}))
    shown = row["Composition"].count("%")
    assert shown == min(count, MOST_MODELS) and row["Composition"].startswith(f"{100 / count:.1f}% ...")


@pytest.mark.parametrize("value", [0, -1e300, 1e308, 10**308], ids=str)
def test_numbers_of_any_size(recipe, value):
    metrics = {"total": value, "kl": value}
    recipe.update(metrics={"base": metrics, "merge": metrics}, composition={"a": 1.0}, seconds={"search": value})
    lines = comparison({"out": recipe})
    assert len(lines[0]) == len(lines[1]) == len(lines[3])


def test_a_joint_search_is_told_by_its_steps(recipe):
    shares, step = [[0.9], [0.8]], {"total": 1.0, "kl": 0.0, "seconds": 0.1}
    joint = copy.deepcopy(recipe) | {"decisions": [], "composition": {"one": 1.35, "base": -0.35}}
    for steps in (1, 25):
        joint["joint"] = {
            "weights": shares,
            "start": shares,
            "slopes": {"total": shares},
            "steps": [{"step": number, **step} for number in range(1, steps + 1)],
        }
        greedy, found = rows(comparison({"greedy": recipe, "joint": joint}))
        assert (found["Methods"], found["Strategy"]) == ("lerp", f"joint, {steps} step{'s' if steps > 1 else ''}")
        assert (greedy["Methods"], greedy["Strategy"]) == ("lerp", "cumulative")
        assert found["Composition"] == "135.0% one, -35.0% base"


def test_what_is_no_finished_output_is_named(here, recipe, capsys):
    (here / "empty").mkdir()
    (here / "unfinished.partial").mkdir()
    (here / "unfinished.partial/merge_monster_journal.jsonl").write_text("{}\n")
    del recipe["phrases"]
    (here / "old.json").write_text(json.dumps(recipe))
    bad = ["empty", "unfinished.partial", "unfinished", "base", "my.yaml", "old.json", "x" * 300, "null\0character"]
    for name in bad:
        assert compare("plain", name) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.splitlines()) == 1 and visible(name) in shown.err


@pytest.mark.parametrize(
    "damage",
    [
        {"phrases": [1]},
        {"phrases": [{"kind": "BAD", "phrase": "a", "context": "b", "weight": "1", "before": 0, "after": 0}]},
        {"metrics": {"base": {"total": 1.0}}},
        {"metrics": {"base": {"total": 1.0}, "merge": {"total": None}}},
        {"composition": {"a": "much"}},
        {"composition": []},
        {"seconds": {"search": None}},
        {"settings": {}},
        {"failures": None},
    ],
    ids=str,
)
def test_a_damaged_recipe_is_refused(place, recipe, damage, capsys):
    (place / "recipe.json").write_text(json.dumps({**recipe, **damage}))
    assert compare("recipe.json") == 2
    assert "recipe.json: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--config", "my.yaml"],
        ["--resume"],
        ["--replay", "x", "--output", "y"],
    ],
    ids=str,
)
def test_it_goes_with_nothing_else(here, more, capsys):
    for arguments in (["--compare", "plain", *more], [*more, "--compare", "plain"]):
        with pytest.raises(SystemExit) as caught:
            merge_monster.main(arguments)
        assert caught.value.code == 2 and "can't be combined with other options" in capsys.readouterr().err


def test_only_one_of_several_processes_prints(here, capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert compare("plain") == 0
    assert capsys.readouterr().out == ""


def test_the_page_shows_these_columns(recipe):
    page = (ROOT / "docs/output.md").read_text(encoding="utf-8")
    shown = page.split("python merge_monster.py --compare")[1].split("```text\n")[1].split("```")[0].splitlines()
    lines = comparison({"out": recipe})
    assert set(cells(lines[1])) <= set(cells(shown[1]))
    assert len({len(line) for line in shown}) == 1

"""A recipe has the keys that its page lists, of the types that it states, and no others."""

import json
import re

import pytest
import tiny
import yaml
from broken_runs import broken_after
from project import ROOT
from runs import make_models

import merge_monster
from modules.output.recipe import RECIPE_FILE

PAGE = ROOT / "docs/recipe.md"
TYPES = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "true or false": lambda value: isinstance(value, bool),
    "list": lambda value: isinstance(value, list),
    "mapping": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
    "any value": lambda value: True,
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Of a run with little in it, of one that has all that may be there, and of a joint search."""
    folder = tmp_path_factory.mktemp("recipes")
    base, one, two = make_models(folder / "models")
    bad = [pair for pair in tiny.PAIRS if pair.kind == "BAD"]
    chat = {"messages": [{"role": "user", "content": "Describe an old house."}], "continue": "The house stands as a "}
    chats = [{"phrase": ["testament", "witness"], "contexts": [chat]}]
    more = {"bad_phrases": tiny.phrase_entries(tiny.PAIRS, "BAD") + chats, "good_phrases": chats, "system": "Be brief."}
    (folder / "more.yaml").write_text(yaml.safe_dump(more), encoding="utf-8")
    rich = {"merge_method": ["lerp", "slice"], "phrase_files": [str(folder / "more.yaml")], "dtype": "float32"}
    rich |= {"compute_dtype": "bfloat16", "drift_weight": 0.1, "max_drift": 9.5}
    (folder / "plain.txt").write_text("The bread is on the table. It was baked this morning.\n", encoding="utf-8")
    other = {"bad_phrases": tiny.phrase_entries(tiny.PAIRS[:2], "BAD") + chats}
    (folder / "other.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    rich["held_out_files"] = [str(folder / "other.yaml")]
    rich["baselines"] = True
    rich["layers"] = [0, 2]
    rich["template"] = {"enable_thinking": False}
    rich["system"] = "Answer in plain words."
    rich["samples"] = ["The bread is"]
    rich["neutral_texts"] = [str(folder / "plain.txt")]
    (folder / "prompts.txt").write_text("Where is the bread?\nWho baked it?\n", encoding="utf-8")
    rich["own_texts"] = [str(folder / "prompts.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        little = run(folder / "little", base, [], bad, {"merge_headers": False, "merge_ratios": 0.5}, folder / "models")
        joint = {**rich, "search": "joint", "merge_method": "lerp", "joint": {"steps": 2}}
        searched = run(folder / "joint", base, [one, two], tiny.PAIRS, joint)
        broken_after(patch, two, 2)
        return little, run(folder / "rich", base, [one, two], tiny.PAIRS, {**rich, "on_error": "skip"}), searched


def run(output, base, candidates, pairs, settings, directory=None):
    config = tiny.write_config(output.with_suffix(".yaml"), base, candidates, output, pairs, **settings)
    if directory:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        document["directories"]["model_directory"] = str(directory)
        config.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert merge_monster.main(["--config", str(config)]) == 0
    return json.loads((output / RECIPE_FILE).read_text(encoding="utf-8"))


def documented():
    """Of every key that the page lists, as a path: its types and whether it may be absent."""
    section = PAGE.read_text(encoding="utf-8").split("## The keys\n")[1].split("\n## ")[0]
    found = {}
    for keys, kinds in re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE):
        kinds, _, optional = kinds.partition(", ")
        assert optional in ("", "optional")
        for key in re.findall("`(.*?)`", keys):
            path = tuple(key.replace("[]", ".[]").split("."))
            assert path not in found, f"{key} is listed twice"
            found[path] = (["true or false"] if kinds == "true or false" else kinds.split(" or "), bool(optional))
    return found


def parts(value, path=()):
    """Everything in a recipe with its path; all items of a list have one path."""
    if path:
        yield path, value
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = [("[]", item) for item in value]
    for key, item in items:
        yield from parts(item, (*path, key))


def is_path(path, listed):
    """Whether a path is one that is listed; a word in capitals stands for any key."""
    return len(path) == len(listed) and all(
        word.isupper() or key == word for key, word in zip(path, listed, strict=True)
    )


def test_every_key_is_listed_with_its_type(recipes):
    listed = documented()
    for recipe in recipes:
        for path, value in parts(recipe):
            kinds = [kinds for other, (kinds, _) in listed.items() if is_path(path, other)]
            assert len(kinds) == 1, f"{path} is listed {len(kinds)} times"
            assert any(TYPES[kind](value) for kind in kinds[0]), f"{path} is {value!r}, listed as {kinds[0]}"


def test_every_listed_key_is_there(recipes):
    little, *others = ([path for path, _ in parts(recipe)] for recipe in recipes)
    for listed, (_, optional) in documented().items():
        assert any(is_path(path, listed) for path in [*others[0], *others[1]]), f"{listed} is nowhere"
        assert optional or any(is_path(path, listed) for path in little), f"{listed} is not always there"


def test_what_is_optional_is_not_always_there(recipes):
    """Nobody should have to provide for what can't happen; items of entries that may be absent are absent with them."""
    little, *_ = ([path for path, _ in parts(recipe)] for recipe in recipes)
    groups = {"bad_phrases", "good_phrases"}  # one of the two must be there
    for listed, (_, optional) in documented().items():
        if optional and not groups.intersection(listed):
            assert not any(is_path(path, listed) for path in little), f"{listed} is always there"


def test_items_of_every_list_have_the_same_keys(recipes):
    for recipe in recipes:
        for key in ("sources", "decisions", "phrases"):
            # Most contexts are no chats, most phrases have no variants, some are not rounded.
            other = ("chat", "variants", "rounding")
            keys = {tuple(name for name in item if name not in other) for item in recipe[key]}
            assert len(keys) == (0 if key == "decisions" and "joint" in recipe else 1)


def test_what_the_page_says_of_the_values(recipes):
    for recipe in recipes:
        assert recipe["format"] == 1
        assert recipe["sources"][0]["number"] == 0 and [s["number"] for s in recipe["sources"]] == sorted(
            s["number"] for s in recipe["sources"]
        )
        assert all((pair["weight"] < 0) == (pair["kind"] == "GOOD") for pair in recipe["phrases"])
        for model, key in (("base", "before"), ("merge", "after")):
            total = sum(pair[key] * pair["weight"] for pair in recipe["phrases"])
            assert recipe["metrics"][model]["total"] == pytest.approx(total)
        kinds = [pair["kind"] for pair in recipe["phrases"]]
        assert kinds == sorted(kinds)  # BAD before GOOD
        shares = list(recipe["composition"].values())
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        names = {source["number"]: source["name"] for source in recipe["sources"]}
        assert all(decision["model"] == names[decision["candidate"]] for decision in recipe["decisions"])
        assert all(len(d["log_probabilities"]) == len(recipe["phrases"]) for d in recipe["decisions"])
        assert all(d["layer"] is None or d["layer"] >= 0 for d in recipe["decisions"])
        assert [d["before"] for d in recipe["decisions"][:1]] in ([], [recipe["metrics"]["base"]["total"]])

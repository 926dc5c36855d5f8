"""A recipe has the keys that its page lists, and no others."""

import json
import re

import pytest
import tiny
import yaml
from broken_runs import broken_after
from project import ROOT
from runs import make_models

import merge_monster
from modules.config.schema import CONFIG_KEYS
from modules.output.recipe import RECIPE_FILE

PAGE = ROOT / "docs/output.md"


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
    """Of each key that the page lists, what else the row names."""
    section = PAGE.read_text(encoding="utf-8").split("## The recipe\n")[1].split("\n## ")[0]
    listed = {}
    for keys, content in re.findall(r"^\| (`.*?) \| (.*?) \|$", section, re.MULTILINE):
        for key in re.findall("`(.*?)`", keys):
            assert key not in listed, f"{key} is listed twice"
            listed[key] = set(re.findall("`(.*?)`", content)) - {key}
    return listed


def keys_in(value):
    """All keys of mappings anywhere in a value."""
    if isinstance(value, list):
        return set().union(*map(keys_in, value))
    if isinstance(value, dict):
        return set(value).union(*map(keys_in, value.values()))
    return set()


def test_every_key_is_listed(recipes):
    listed = set(documented())
    assert listed == set().union(*recipes)
    assert all(listed - {"rounding", "joint"} <= set(recipe) for recipe in recipes)


def test_what_a_row_names_is_there(recipes):
    for key, names in documented().items():
        there = set().union(*(keys_in(recipe.get(key)) for recipe in recipes))
        assert names <= there | {"null"}, key


def test_settings_are_the_keys_of_a_configuration(recipes):
    for recipe in recipes:
        assert set(recipe["settings"]) == set(CONFIG_KEYS) | {"held_out_pairs"}


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

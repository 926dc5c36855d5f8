"""Phrases with variants in whole runs: one row, one weight, and the sum of what plain transformers say of each."""

import json
import math

import pytest
import reference
import tiny
import yaml
from broken_runs import OWN, RECIPE, break_off, differing, journal, same
from runs import digest, log_of, merge, tables
from transformers import AutoTokenizer

import merge_monster
import monster_mapper
from modules.config.load import load_config
from modules.config.phrase_lists import Pair

BODY = ["anticipation", "anticipation.", "determination"]  # the second is a part of the first
ROOMS = ["the bedroom", "the kitchen"]
SHOWN = "anticipation / anticipation. / determination"
CHAT = {"messages": [{"role": "user", "content": "Go on. "}], "continue": "Her eyes were filled with "}
CONTEXTS = ["Her body quivers with ", {"context": "The atmosphere is thick with ", "weight": 5}, CHAT]
HELD_OUT = {"context": "Filled with ", "held_out": True}
BAD = [
    {"phrase": BODY, "weight": 2, "contexts": [*CONTEXTS, HELD_OUT]},
    {"phrase": "unwavering", "contexts": ["Filled with an "]},
]
GOOD = [{"phrase": ROOMS, "weight": 3, "contexts": ["Answer: The apple is in "]}]
TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. " * 6
SEARCHES = {
    "greedy": {"merge_ratios": [0.3, 0.7], "auto_weights": True, "max_drift": 5.0},
    "joint": {"search": "joint", "joint": {"steps": 3}},
}


def run(place, models, *arguments, bad=BAD, good=GOOD, **more):
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    settings = {"bad_phrases": bad, "good_phrases": good, "pairs": (), "neutral_texts": ["plain.txt"], **more}
    return merge(place, models, *arguments, **{"baselines": True, **settings})


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=SEARCHES)
def whole(request, models, tmp_path_factory):
    """A search, and the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(folder, models, **SEARCHES[request.param]) == 0
    return request.param, folder


def plain_probability(folder, base, pair):
    """Of a pair as a recipe has it: the sum over its variants, by plain transformers."""
    model, tokenizer = reference.load(folder, "auto"), AutoTokenizer.from_pretrained(base)
    variants = tuple(pair.get("variants", ()))
    own = Pair(pair["kind"], pair["phrase"], pair["context"], variants=variants)
    return math.exp(reference.pair_log_probability(model, tokenizer, own))


def test_recipe_and_table_have_a_row_for_each_phrase(whole, models):
    search, folder = whole
    recipe, log = recipe_of(folder / "out"), log_of(folder)
    assert [pair["phrase"] for pair in recipe["phrases"]] == [SHOWN] * 3 + ["unwavering", "the bedroom / the kitchen"]
    assert [pair.get("variants") for pair in recipe["phrases"]] == [BODY] * 3 + [None, ROOMS]
    assert [pair["variants"] for pair in recipe["held_out"]] == [BODY]
    assert recipe["phrases"][2]["context"] == "Go on. Her eyes were filled with "
    for pair in (*recipe["phrases"], *recipe["held_out"]):
        assert pair["before"] == pytest.approx(plain_probability(models[0], models[0], pair), rel=1e-3)
        assert pair["after"] == pytest.approx(plain_probability(folder / "out", models[0], pair), rel=1e-3)
        if search == "greedy":
            assert abs(pair["weight"]) == pytest.approx(1 / pair["before"])
    assert recipe["metrics"]["merge"]["total"] < recipe["metrics"]["base"]["total"]
    rows = tables(log)[-1]
    assert [row[1] for row in rows[:3]] == ["...tion. / determination"] * 3
    assert len(rows) == 6 and ": 5 searched (4 bad, 1 good), 1 held out" in log
    start = next(line for line in journal(folder / "out") if line["kind"] == "start")
    assert len(start["log_probabilities"]) == len(start["weights"]) == 5


def test_a_replay_keeps_the_variants_and_gives_the_same_tensors(whole, models, place):
    _, folder = whole
    recipe = folder / "out" / RECIPE
    sources = [word for model in models for word in ("--source", f"{model.name}={model}")]
    assert merge_monster.main(["--replay", str(recipe), "--output", "again", *sources]) == 0
    assert differing(digest(place / "again"), digest(folder / "out")) <= OWN
    assert recipe_of(place / "again")["phrases"] == recipe_of(folder / "out")["phrases"]


def test_a_run_that_was_broken_off_ends_with_the_same_bytes(whole, models, place):
    search, folder = whole
    kinds = [line["kind"] for line in journal(folder / "out")]
    break_off(place, folder / "out", kinds.index("decision" if search == "greedy" else "step") + 2)
    assert run(place, models, "--resume", **SEARCHES[search]) == 0
    assert "Resuming" in log_of(place)
    assert same(place / "out", folder / "out")
    for key in ("phrases", "held_out", "metrics", "baselines"):
        assert recipe_of(place / "out")[key] == recipe_of(folder / "out")[key]
    assert run(place, models, "--resume", **SEARCHES[search]) == 0
    assert "This run is already finished" in log_of(place)


def test_with_other_variants_it_is_another_run(whole, models, place, capsys):
    search, folder = whole
    break_off(place, folder / "out", len(journal(folder / "out")) - 1)
    other = [{**BAD[0], "phrase": [*BODY[:2], "whisper"]}, BAD[1]]
    assert run(place, models, "--resume", bad=other, **SEARCHES[search]) == 2
    assert "the configuration has changed" in capsys.readouterr().err


def test_the_settings_phrase_lists_stand_for_the_same_pairs(whole, models, place):
    search, folder = whole
    card = (folder / "out/README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load((folder / "out/merge_monster.yaml").read_text(encoding="utf-8"))
    lists = {key: settings[key] for key in ("bad_phrases", "good_phrases")}
    assert (lists["bad_phrases"][0]["phrase"], lists["good_phrases"][0]["phrase"]) == (BODY, ROOMS)
    assert f"| bad | {SHOWN} | " in card
    if search == "joint":  # weights are those of the file
        own, again = (
            load_config(tiny.write_config(place / "x.yaml", *models[:1], models[1:], "x", **settings))
            for settings in ({"bad_phrases": BAD, "good_phrases": GOOD}, lists)
        )
        assert set(again.pairs) == set(own.pairs) and again.held_out_pairs == own.held_out_pairs


def test_one_text_in_a_list_leaves_what_the_text_leaves(models, place, tmp_path):
    found = []
    for phrase in ("anticipation", ["anticipation"]):
        entries = [{"phrase": phrase, "contexts": [*CONTEXTS, HELD_OUT]}]
        assert run(place, models, "--overwrite", bad=entries, good=[], merge_ratios=[0.5]) == 0
        recipe, lines = recipe_of(place / "out"), journal(place / "out")
        found.append([recipe | {"decisions": [], "seconds": {}}, [line | {"seconds": 0} for line in lines]])
        assert "variants" not in json.dumps(found)
    assert found[0] == found[1]


def test_scores_without_a_merge(models, place):
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    more = {"bad_phrases": BAD, "good_phrases": GOOD, "neutral_texts": ["plain.txt"], "pairs": ()}
    more["directories"] = {"model_path1": str(models[0])}
    tiny.write_config(place / "my.yaml", models[0], [], "", **more)
    arguments = ["--config", "my.yaml", "--score", *map(str, models[1:]), "--json", "scores.json"]
    assert merge_monster.main(arguments) == 0
    found = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    assert [pair.get("variants") for pair in found["phrases"]] == [BODY] * 3 + [None, ROOMS, BODY]
    assert [pair["held_out"] for pair in found["phrases"]] == [False] * 5 + [True]
    for folder in models:
        for pair in found["phrases"]:
            expected = plain_probability(folder, models[0], pair)
            assert pair["probabilities"][folder.name] == pytest.approx(expected, rel=1e-3)
    assert "...tion. / determination" in log_of(place)


def test_totals_of_texts_and_of_one_that_shows_alike_are_not_compared(models, place, capsys):
    for name, phrase in (("any", ["a", "b"]), ("one", "a / b")):
        entries = [{"phrase": phrase, "contexts": ["x "]}]
        settings = {"directories": {"model_path1": str(models[0]), "output_directory": name}, "merge_ratios": [0.5]}
        assert run(place, models[:2], bad=entries, good=[], **settings) == 0
    assert merge_monster.main(["--compare", "any", "one"]) == 0
    assert "comparable only within: any | one" in capsys.readouterr().out


def test_the_mapper_ranks_the_sum(models, place):
    phrases = {"bad_phrases": BAD, "good_phrases": GOOD, "mapper": {"prob_min": 0.0, "top_k": 3, "max_depth": 2}}
    base = {"directories": {"model_path1": str(models[0])}, "pairs": ()}
    tiny.write_config(place / "my.yaml", models[0], [], "", **base, **phrases)
    assert monster_mapper.main(["--config", "my.yaml", "--json", "tree.json", "--yaml", "more.yaml"]) == 0
    found = json.loads((place / "tree.json").read_text(encoding="utf-8"))["contexts"]
    assert len(found) == 6  # what is held out, too
    for context in found:
        (phrase,) = context["phrases"]
        pair = {**phrase, "kind": phrase["type"], "context": context["context"]}
        assert phrase["probability"] == pytest.approx(plain_probability(models[0], models[0], pair), rel=1e-3)
    log = max((place / "logs").glob("monster-mapper-*.txt")).read_text(encoding="utf-8")
    assert f'BAD  "{SHOWN}"  ' in log
    tiny.write_config(place / "again.yaml", models[0], [], "", **base, phrase_files=["more.yaml"])
    again = load_config("again.yaml", mapping=True)
    assert again.pairs and not any(pair.variants for pair in again.pairs)

"""Model cards: what the hub reads in them, and that no name and no phrase breaks them."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.utils import validate_repo_id
from runs import make_models, merge

import merge_monster
from modules.output.card_settings import settings_file
from modules.output.licence import stated_licence
from modules.output.model_card import CARD_FILE, MOST_PHRASES, model_card
from modules.output.recipe import RECIPE_FILE, Recipe
from modules.runtime.console import visible
from modules.runtime.text import brief_percent

PICTURES = ("merge_map.png", "phrase_chart.png")
COMMITS = ("0123456789abcdef" * 3)[:40], ("fedcba9876543210" * 3)[:40]
ODD = [
    "a | b || c",
    "`code` ``more`` ```",
    "first\nsecond\r\nthird\n",
    "# no: 'heading' \"at\" *all* _really_",
    "---",
    "- [link](http://x) ![picture](y) <b>bold</b> <!-- hidden",
    "\\| \\n \\(x\\) $y$ $$z$$ &amp; ~~gone~~",
    "日本語 \U0001f642 naïve",
    "key: value: [1, {2}] & *alias !tag %",
    "\x1b[31mred\x00\u202eback\t",
    "see https://example.org/a_b|www.example.org, or some@example.org.",
]


NOTHING = {"prompt": "Say nothing.", "base": "", "merge": " \n"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run's models and output. Its phrases are odd; the base brings a card and a licence."""
    folder = tmp_path_factory.mktemp("run")
    models = make_models(folder)
    (folder / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    (folder / "base/LICENSE").write_text("You may.")
    printable = [text for text in ODD if "\x00" not in text]
    pairs = [
        replace(tiny.PAIRS[0], phrase=text, context=other)
        for text, other in zip(printable, printable[::-1], strict=True)
    ]
    base, *candidates = models
    pairs = [*tiny.PAIRS, *pairs]
    config = tiny.write_config(folder / "my.yaml", base, candidates, folder / "out", pairs, merge_ratios=[0.7])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert merge_monster.main(["--config", str(config)]) == 0
    return folder


@pytest.fixture
def recipe(run):
    """A real recipe, to be changed."""
    return json.loads((run / "out" / RECIPE_FILE).read_text(encoding="utf-8"))


def card_of(recipe, name="merged"):
    return model_card(Recipe.model_validate(recipe), name, PICTURES)


def accepted(text):
    """A card that the hub's own client takes as it is; its front matter."""
    card = ModelCard(text)
    assert str(card) == text
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data and isinstance(data.get("base_model", []), list)
    assert data.get("base_model_relation", "merge") == "merge"
    for repository in data.get("base_model", []):
        validate_repo_id(repository)
    assert data["tags"] == ["merge", "mergemonster"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert ("base_model" in data) == ("base_model_relation" in data) and "license" not in data
    return data


def tables(text):
    """Every table as rows of cells, as a reader sees them."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines.splitlines()]
        found.append([[shown(cell) for cell in row] for row in rows])
    return found


def shown(cell):
    return re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", cell.strip()).replace("&#92;", "\\")


def as_shown(text):
    """What is to be seen of a text that is not too long."""
    return visible(text).strip()


def on_hub(recipe, *wheres):
    for source, where in zip(recipe["sources"], wheres, strict=False):
        source["where"] = where


def test_the_card_of_a_run(run, recipe):
    text = (run / "out" / CARD_FILE).read_bytes().decode()
    assert "base_model" not in accepted(text) and metadata_load(run / "out" / CARD_FILE)["tags"]
    assert text.split("---\n")[2].startswith("\n# out\n")
    prose = text.split("## Settings")[0]
    assert str(run) not in text
    composition, metrics, phrases = tables(prose)
    assert composition[2:] == [[name, f"{share:.1%}"] for name, share in recipe["composition"].items()]
    total = [f"{recipe['metrics'][key]['total']:.3f}" for key in ("base", "merge")]
    assert metrics[2:] == [["Total", *total]]
    assert phrases[2:] == [
        [
            pair["kind"].lower(),
            as_shown(pair["phrase"]),
            as_shown(pair["context"]),
            f"{abs(pair['weight']):g}",
            brief_percent(pair["before"]),
            brief_percent(pair["after"]),
        ]
        for pair in recipe["phrases"]
    ]
    for picture in PICTURES:
        assert f"]({picture})" in prose
    assert "licences of all source models" in prose


def test_the_command_builds_the_model_again(run, recipe, monkeypatch):
    monkeypatch.chdir(run / "out")
    command = shlex.split(card_of(recipe).split("```sh\n")[1].split("\n```")[0])
    assert command[:2] == ["python", "merge_monster.py"]
    arguments = [word.replace("PATH", str(run / word.split("=")[0])) for word in command[2:]]
    arguments[arguments.index("rebuilt")] = str(run / "rebuilt")
    (run / "elsewhere.json").write_text(json.dumps(recipe))
    arguments[arguments.index(RECIPE_FILE)] = str(run / "elsewhere.json")
    assert merge_monster.main(arguments) == 0
    assert (run / "rebuilt/model.safetensors").read_bytes() == (run / "out/model.safetensors").read_bytes()
    shutil.rmtree(run / "rebuilt")
    recipe["settings"]["trust_remote_code"] = True
    assert "--trust-remote-code" in card_of(recipe)


def test_base_models_are_ids_of_the_hub_and_nothing_else(recipe):
    base, one, two = f"org/base@{COMMITS[0]}", f"org/one_1@{COMMITS[1]}", "/home/somebody/two"
    on_hub(recipe, base, one, two)
    text = card_of(recipe)
    data = accepted(text)
    assert data["base_model"] == ["org/base", "org/one_1"] and data["base_model_relation"] == "merge"
    assert "| [org/base](https://huggingface.co/org/base) |" in text and "| two |" in text
    assert "somebody" not in text
    assert "--source two=PATH" in text and "--source base" not in text and "--source one" not in text


@pytest.mark.parametrize(
    "where, ids",
    [
        (f"org/m@{COMMITS[0]}+org/a@{COMMITS[1]}", ["org/m", "org/a"]),
        (f"/models/m+org/a@{COMMITS[1]}", ["org/a"]),
        ("/models/org/m@main", []),
        ("C:\\models\\a", []),
    ],
)
def test_adapters_and_folders_that_look_like_ids(recipe, where, ids):
    on_hub(recipe, "/models/base", where)
    text = card_of(recipe)
    assert accepted(text).get("base_model", []) == ids
    (row,) = [row for row in tables(text)[0] if row[0] == "one" or "org/m" in row[0]]
    assert row[0].count("](https://") == (2 if len(ids) == 2 else 0)  # where not all of it is on the hub, its name
    assert "/models/" not in text.split("## Settings")[0]


def test_only_what_was_accepted_is_a_base_model(recipe):
    on_hub(recipe, *(f"org/{name}@{COMMITS[0]}" for name in ("base", "one", "two")))
    for decision in recipe["decisions"]:
        decision["ratio"] = None if decision["candidate"] == 1 else 0.5
    recipe["failures"] = {"2": "/home/somebody/two: can't be read"}
    text = card_of(recipe)
    assert accepted(text)["base_model"] == ["org/base", "org/two"]
    assert "Candidates not used: [org/one](https://huggingface.co/org/one)." in text
    assert "A merge of 1 of 2 candidates into [org/base]" in text and "somebody" not in text


def test_a_run_that_merged_nothing(recipe):
    on_hub(recipe, f"org/base@{COMMITS[0]}")
    for decision in recipe["decisions"]:
        decision["ratio"] = None
    recipe["composition"] = {"base": 1.0}
    text = card_of(recipe)
    assert accepted(text)["base_model"] == ["org/base"]
    assert "A merge of 0 of 2 candidates" in text and tables(text)[0][2][1] == "100.0%"


def as_joint(recipe, shares, steps=25, **settings):
    """The recipe as a joint search writes it."""
    one, two = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    composition = {"two": two, "one": one, "base": 1 - one - two}
    steps = [{"total": 1.0, "seconds": 0.1}] * steps
    joint = {"start": shares, "slopes": {"total": shares}, "weights": shares, "steps": steps}
    settings = {**recipe["settings"], "search": "joint", **settings}
    return {**recipe, "decisions": [], "joint": joint, "composition": composition, "settings": settings}


def test_a_joint_search_is_told_as_what_it_was(recipe):
    on_hub(recipe, *(f"org/{name}@{COMMITS[0]}" for name in ("base", "one", "two")))
    greedy = card_of(recipe)
    text = card_of(as_joint(recipe, [[0.0, 1.0], [0.0, 0.5]], drift_weight=8))
    assert accepted(text)["base_model"] == ["org/base", "org/two"]
    for card, words in (
        (greedy, ("strategy: cumulative", "merge method: lerp")),
        (text, ("jointly by gradient",)),
    ):
        assert all((word in one) == (one is card) for word in words for one in (greedy, text))
    assert "Candidates not used: [org/one]" in text and "A merge of 1 of 2 candidates" in text
    assert blocks(text)["drift_weight"] == 8


def test_the_summary_has_the_figures(recipe):
    """By hand: sums of weight times probability, of each kind, searched and held out; then the drift."""
    pair = {"kind": "BAD", "phrase": "a", "context": "b", "weight": 2.0, "before": 0.5, "after": 0.25}
    recipe["phrases"] = [pair, {**pair, "weight": 4.0}, {**pair, "kind": "GOOD", "weight": -2.0, "after": 0.75}]
    recipe["held_out"] = [{**pair, "after": 0.625}, {**pair, "kind": "GOOD", "before": 0.0, "after": 0.5}]
    recipe["metrics"]["merge"] |= {"kl": 0.0123, "own_kl": 0.5}
    (line,) = [line for line in card_of(recipe).splitlines() if line.startswith("Unwanted")]
    assert line == (
        "Unwanted phrases 3.000 → 1.500 (-50%), unwanted held-out phrases 1.000 → 1.250 (+25%), wanted phrases 1.000 → "
        "1.500 (+50%), wanted held-out phrases 0.000 → 1.000, KL to base 0.0123, KL on own answers 0.5000."
    )
    assert "\n\nUnwanted" not in card_of(recipe | {"phrases": [], "held_out": []})


@pytest.mark.parametrize("weight, best", [(0, "one"), (1, "two"), ("auto", "two"), (None, "one")])
def test_the_best_candidate_stands_beside_base_and_merge(recipe, weight, best):
    """Judged as the search judges: by the total and drift_weight."""
    recipe["settings"]["drift_weight"] = weight
    recipe["baselines"] = {"1": {"total": 0.25, "kl": 0.5, "own|metric": 1.0}, "2": {"total": 0.5, "kl": 0.125}}
    recipe["metrics"] = {"base": {"total": 1.0, "kl": 0.0}, "merge": {"total": 0.125, "kl": 0.0625, "words": 9.0}}
    alone = {"one": ["0.250", "0.5000", "-"], "two": ["0.500", "0.1250", "-"]}[best]
    head, _, *rows = tables(card_of(recipe))[1]
    assert head == ["metric", "base", f"{best} alone", "this model"]
    labels = ["Total", "KL to base", "Words per answer"]
    expected = zip(labels, ["1.000", "0.0000", "-"], alone, ["0.125", "0.0625", "9.0"], strict=True)
    assert rows == [list(row) for row in expected]


def test_samples_are_whole_sentences(recipe):
    text = 'He went. "Home is far." He lo'
    sample = {"prompt": "Who?", "base": text, "merge": "A short answer"}
    recipe["samples"] = [sample, {**sample, "broken_off": ["base", "merge"]}]
    lines = fenced(card_of(recipe), "text").splitlines()
    assert lines[2:4] == [f"  base:  {text}\u2026", "  merge: A short answer\u2026"]
    assert lines[5:7] == ['  base:  He went. "Home is far."', "  merge: A short\u2026"]


def test_the_output_opens_as_its_card_says(run, recipe, capsys):
    code = fenced(card_of(recipe), "python")
    exec(code.replace("PATH", str(run / "out")).replace('device_map="auto"', 'device_map="cpu"'), {})
    assert capsys.readouterr().out.startswith("It was a quiet evening, and")
    recipe["settings"]["trust_remote_code"] = True
    assert fenced(card_of(recipe), "python").count(", trust_remote_code=True)") == 2


def test_what_mergekit_is_to_be_told_is_folded(run, recipe):
    """As it is exported, but for paths; nothing where it can't be exported."""
    export = run / "kit.yaml"
    sources = ["--source", str(run), "--overwrite"]
    assert merge_monster.main(["--export-mergekit", str(export), str(run / "out"), *sources]) == 0
    text = (run / "out" / CARD_FILE).read_text(encoding="utf-8")
    folded = text.split("<details>\n<summary>")[1].split("</details>")[0]
    assert yaml.safe_load_all(fenced(folded, "yaml")) and "</summary>\n\n" in folded
    assert fenced(folded, "yaml") == export.read_text(encoding="utf-8").replace(f"{run}/", "").rstrip()
    assert "<details>" not in card_of(recipe)


# What a model's card states, and what is taken for it.
STATED = {
    "---\nlicense: apache-2.0\n---\n": "apache-2.0",
    "---\r\ntags: [a]\r\nlicense: llama3.1\r\n---\r\n# Model": "llama3.1",
    "\ufeff---\nlicense: mit\n---": "mit",
    "---\nlicense: other\nlicense_name: mine\n---\n": None,
    "---\nlicense: [mit]\n---\n": None,
    "---\nlicense: 1.0\n---\n": None,
    "---\nlicense: MIT and\n  more\n---\n": None,
    '---\nlicense: "mit\\n# Free"\n---\n': None,
    "---\nlicense: <b>mit</b>\n---\n": None,
    f"---\nlicense: {'a' * 41}\n---\n": None,
    f"---\nother: {'a' * 30_000}\nlicense: mit\n---\n": None,
    "---\nlicense: mit\nlicense: apache-2.0\n---\n": None,
    "---\nlicense: mit\n": None,
    "---\nlicense: !!python/name:os.system\n---\n": None,
    "---\n[license\n---\n": None,
    "---\n- license: mit\n---\n": None,
    "license: mit\n": None,
    "# Model\n---\nlicense: mit\n---\n": None,
    "": None,
}


@pytest.mark.parametrize("text", STATED)
def test_a_licence_that_a_card_states(place, text):
    (place / "README.md").write_bytes(text.encode())
    assert stated_licence(place) == STATED[text]


def test_cards_that_are_none(place):
    assert stated_licence(place) is None
    (place / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert stated_licence(place) is None
    (place / "README.md").unlink()
    os.mkfifo(place / "README.md")
    assert stated_licence(place) is None


def test_a_licence_is_taken_over_where_all_sources_state_it(place, capsys):
    """The candidate that is not needed has no say, and a replay says the same."""
    models = make_models(place)
    for model in models:
        (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert merge(place, models, merge_method="lerp", merge_ratios=[0.5]) == 0
    card = place / "out" / CARD_FILE
    assert metadata_load(card)["license"] == "apache-2.0" and "state `apache-2.0`" in card.read_text()
    (models[2] / "README.md").write_text("---\nlicense: mit\n---\n")
    replay = ["--replay", str(place / "out"), "--output", str(place / "again"), "--source", str(place)]
    assert merge_monster.main(replay) == 0
    assert "license" not in metadata_load(place / "again" / CARD_FILE)
    recipe = json.loads((place / "out" / RECIPE_FILE).read_text())
    for decision in recipe["decisions"]:
        decision["ratio"] = None if decision["candidate"] == 2 else decision["ratio"]
    (place / "recipe.json").write_text(json.dumps(recipe))
    replay = ["--replay", "recipe.json", "--output", str(place / "less"), "--source", str(place)]
    assert merge_monster.main(replay) == 0
    assert metadata_load(place / "less" / CARD_FILE)["license"] == "apache-2.0"


def test_metrics_are_told_by_the_registry_s_labels(recipe):
    for metrics, kl in zip(recipe["metrics"].values(), (0.0, 0.0123), strict=True):
        metrics |= {"kl": kl, "trial_kl": kl, "own|metric": 7}
    rows = tables(card_of(recipe))[1][3:]
    assert rows == [["KL to base", "0.0000", "0.0123"], ["own|metric", "7.0000", "7.0000"]]


@pytest.mark.parametrize("odd", ODD)
def test_no_name_and_no_phrase_breaks_a_card(recipe, odd):
    names = {source["name"]: f"{odd}{source['number']}" for source in recipe["sources"]}
    for source in recipe["sources"]:
        source["name"] = names[source["name"]]
    recipe["composition"] = {names[name]: share for name, share in recipe["composition"].items()}
    recipe["phrases"] = [{**pair, "phrase": odd, "context": f"{odd} "} for pair in recipe["phrases"]]
    recipe["samples"] = [{"prompt": odd, "base": f"{odd}\n\n{odd}", "merge": odd * 500}, NOTHING]
    text = card_of(recipe, odd)
    samples = [{"prompt": "a", "base": "b", "merge": "c"}, NOTHING]
    plain = card_of({**recipe, "samples": samples}, "plain")
    assert accepted(text) == accepted(plain)
    composition, _, phrases = tables(text.split("## Settings")[0])
    assert [row[0] for row in composition[2:]] == [as_shown(name) for name in recipe["composition"]]
    assert {len(row) for row in composition} == {2} and {len(row) for row in phrases} == {6}
    assert all(row[1:3] == [as_shown(odd)] * 2 for row in phrases[2:])
    # Nothing became a heading, a fence or a paragraph that is none elsewhere.
    prose = [one.split("## Samples")[0] for one in (text, plain)]
    assert prose[0].count("\n") == prose[1].count("\n")
    assert [len(re.findall(r"^#", one, re.MULTILINE)) for one in prose] == [4, 4]
    answers = fenced(text, "text")
    assert answers.endswith("merge: (nothing)") and max(map(len, answers.splitlines())) < 1000
    assert text.split("---\n")[2].startswith("\n# ")


def fenced(text, language):
    """What is in the one block of a language."""
    (block,) = re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    return block[1]


def blocks(text):
    """The settings as YAML."""
    return yaml.safe_load(fenced(text, "yaml"))


@pytest.mark.parametrize("odd", ODD)
def test_settings_and_phrases_of_any_form_stay_in_their_fences(recipe, odd):
    recipe["settings"]["samples"] = [odd]
    recipe["phrases"] = [{**pair, "phrase": odd, "context": odd} for pair in recipe["phrases"]]
    text = card_of(recipe)
    accepted(text)
    assert blocks(text)["samples"] == [odd] and text.split("\n\n## ")[-1].startswith("Reproduce")
    listed = yaml.safe_load(settings_file(Recipe.model_validate(recipe), "out"))
    assert listed["samples"] == [odd] and {entry["phrase"] for entry in listed["bad_phrases"]} == {odd}


def test_only_what_is_not_the_default_is_told(recipe):
    on_hub(recipe, f"org/base@{COMMITS[0]}", f"org/m@{COMMITS[0]}+/models/one", "/home/somebody/two")
    mine = {"neutral_texts": ["mine.txt"], "phrase_files": ["list.yaml"], "held_out": 0.5}
    recipe["settings"] |= {
        **mine,
        "layers": [0, 2, 3],
        "keep_downloads": False,
        "samples": None,
        "own_texts": None,
        "strategy_threshold": 0.6,
    }
    text = card_of(recipe)
    settings = blocks(text)
    assert settings == {
        "directories": {"model_path1": f"org/base@{COMMITS[0]}", "output_directory": "merged"},
        "models_to_merge": ["one", "two"],
        "merge_ratios": [0.7],
        "layers": [0, "2-3"],
        "baselines": False,
        "neutral_texts": ["mine.txt"],
        "device": "cpu",
    }
    assert "somebody" not in text and "list.yaml" not in text


def test_phrases_are_told_as_lists(recipe):
    pair = {"kind": "BAD", "phrase": "a", "context": "b", "weight": 2.0, "before": 0.5, "after": 0.25}
    turn = {"role": "user", "content": "Hello."}
    others = [{"context": "c"}, {"context": "It is", "chat": {"messages": [turn], "answer": "It is"}}, {"weight": 1.0}]
    recipe["phrases"] = [pair, *({**pair, **other} for other in others), {**pair, "kind": "GOOD", "weight": -2.0}]
    recipe["held_out"] = [{**pair, "context": "d"}]
    for metrics in recipe["metrics"].values():
        metrics["held_out"] = metrics["total"]
    chat = {"messages": [turn], "continue": "It is"}
    found = yaml.safe_load(settings_file(Recipe.model_validate(recipe), "out"))
    assert {key: found[key] for key in ("bad_phrases", "good_phrases")} == {
        "bad_phrases": [
            {"phrase": "a", "weight": 2.0, "contexts": ["b", "c", chat]},
            {"phrase": "a", "weight": 1.0, "contexts": ["b"]},
            {"phrase": "a", "weight": 2.0, "contexts": [{"context": "d", "held_out": True}]},
        ],
        "good_phrases": [{"phrase": "a", "weight": 2.0, "contexts": ["b"]}],
    }
    recipe["settings"]["auto_weights"] = True
    assert "weight:" not in settings_file(Recipe.model_validate(recipe), "out").split("bad_phrases")[1]


def test_a_search_with_what_the_card_tells_finds_the_same(run, recipe, monkeypatch):
    monkeypatch.chdir(run)
    phrases = yaml.safe_load(settings_file(Recipe.model_validate(recipe), "out"))
    told = {**phrases, **blocks(card_of(recipe)), "neutral_texts": [], "samples": []}
    told["directories"] = {**told["directories"], "output_directory": "found"}
    (run / "told.yaml").write_text(yaml.safe_dump(told, allow_unicode=True), encoding="utf-8")
    for file in ("told.yaml", "out/merge_monster.yaml"):
        assert merge_monster.main(["--config", file, "--output", "found", "--overwrite"]) == 0
        assert (run / "found/model.safetensors").read_bytes() == (run / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("count", [MOST_PHRASES, 2000])
def test_of_many_phrases_those_that_changed_most_are_shown(recipe, count):
    pair = {"kind": "BAD", "context": "c", "weight": 1.0, "before": 0.5}
    # Every third one moves, the later the further; a good phrase moves the other way.
    recipe["phrases"] = [
        {**pair, "phrase": str(number), "after": 0.5 + (number % 3 == 0) * (-1) ** number * number / 10_000}
        for number in range(count)
    ]
    text = card_of(recipe)
    rows = [row[1] for row in tables(text.split("## Settings")[0])[-1][2:]]
    assert len(rows) == MOST_PHRASES and rows == sorted(rows, key=int)
    if count == 2000:
        assert rows == [str(number) for number in range(0, 2000, 3)][-MOST_PHRASES:]


def test_long_phrases_keep_their_end(recipe):
    recipe["phrases"][0]["context"] = "x" * 1000 + "|end"
    row = tables(card_of(recipe).split("## Settings")[0])[-1][2]
    assert row[2] == "..." + "x" * 153 + "|end"


@pytest.mark.parametrize("value", [0, -1e300, 1e308, 10**308], ids=str)
def test_numbers_of_any_size(recipe, value):
    recipe.update(metrics={"base": {"total": value}, "merge": {"total": value}}, composition={"a": value})
    for pair in recipe["phrases"]:
        pair.update(before=value, after=-value, weight=value)
    accepted(card_of(recipe))

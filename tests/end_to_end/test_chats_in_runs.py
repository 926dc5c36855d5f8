"""Chats as contexts in whole runs: rendered once, kept in journal and recipe, shown on one line."""

import json

import pytest
import tiny
import yaml
from broken_runs import JOURNAL, RECIPE, break_off, differing, journal, same
from chats import LLAMA_3, RAISING, chat_tokenizer, on
from runs import digest, log_of, tables
from transformers import AutoTokenizer

import merge_monster
import monster_mapper
from modules.checkpoints.checkpoint import load_tokenizer
from modules.mapper.detokenize import Detokenizer
from modules.scoring.chats import in_child
from modules.scoring.tokenization import Root

TURN = {"role": "user", "content": "Describe an old house."}
CHAT = {"messages": [TURN], "continue": "Her eyes were filled with "}
ENTRIES = [
    {
        "phrase": "determination",
        "contexts": [
            CHAT,
            {"messages": [{"role": "system", "content": "Be brief."}, TURN], "weight": 3},
            {"messages": [TURN], "continue": "His voice was ", "held_out": True},
            "The atmosphere is thick with ",
        ],
    }
]
SETTINGS = {"bad_phrases": ENTRIES, "good_phrases": [], "merge_ratios": [0.3, 0.7], "pairs": ()}


def make_models(folder, template=LLAMA_3):
    tokenizer = chat_tokenizer(template, adds_bos=True)
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=2), tokenizer, scale=20.0)
    return base, tiny.make_candidate(folder / "one", base, 1), tiny.make_candidate(folder / "two", base, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def merge(place, models, *arguments, **settings):
    base, *candidates = models
    path = tiny.write_config(place / "my.yaml", base, candidates, place / "out", **{**SETTINGS, **settings})
    return merge_monster.main(["--config", str(path), *arguments])


def recipe_of(place):
    return json.loads((place / "out" / RECIPE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run of the 25th that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        on(patch, 25)
        assert merge(folder, models) == 0
    return folder


def test_what_was_rendered_is_in_journal_and_recipe_and_shown_on_one_line(whole, models):
    recipe, (run, *_) = recipe_of(whole), journal(whole / "out")
    text = AutoTokenizer.from_pretrained(models[0]).apply_chat_template([TURN], tokenize=False)
    for settings in (recipe["settings"], run["settings"]):
        chat, other, plain = settings["bad_phrases"]
        assert "25 Nov 2026" in chat["context"] and chat["context"].endswith("assistant\n\nHer eyes were filled with ")
        assert chat["chat"] == {"messages": [TURN], "answer": CHAT["continue"]} and "chat" not in plain
        assert chat["context"].startswith("<s>") and text.startswith("<s>") and other["weight"] == 3
        assert [pair["chat"]["answer"] for pair in settings["held_out_pairs"]] == ["His voice was "]
    assert [phrase["context"] for phrase in recipe["phrases"]] == [chat["context"], other["context"], plain["context"]]
    assert recipe["held_out"][0]["chat"]["answer"] == "His voice was "
    shown = "user: Describe an old house. ▸ Her eyes were filled with"
    (card,) = [line for line in (whole / "out/README.md").read_text(encoding="utf-8").splitlines() if shown in line]
    assert card.startswith("| bad | determination | user: ")
    rows = tables(log_of(whole))[0]
    assert [row[2] for row in rows[:3]] == [
        "...Her eyes were filled with",
        "... Describe an old house. ▸",
        "The atmosphere is thick with",
    ]


def test_pairs_are_scored_as_texts_are_that_hold_the_same(whole, models, place, tmp_path):
    """With a tokenizer that adds nothing, the rendered text is a plain context."""
    bare = [tmp_path / model.name for model in models]
    for model, copy in zip(models, bare, strict=True):
        copy.mkdir()
        for file in model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        chat_tokenizer(None).save_pretrained(copy)
        (copy / "chat_template.jinja").unlink(missing_ok=True)
    recipe = recipe_of(whole)
    entries = [
        {"phrase": pair["phrase"], "contexts": [{"context": pair["context"], "weight": pair["weight"]}]}
        for pair in recipe["phrases"][:2]
    ]
    assert merge(place, bare, bad_phrases=entries) == 0
    for one, other in zip(recipe_of(place)["phrases"], recipe["phrases"], strict=False):
        assert one["before"] == pytest.approx(other["before"], rel=1e-4)


@pytest.mark.parametrize("records", [6, 9])
def test_a_run_goes_on_on_another_day_with_what_it_has_rendered(whole, models, place, monkeypatch, records):
    break_off(place, whole / "out", records)
    on(monkeypatch, 26)
    assert merge(place, models, "--resume") == 0
    assert same(place / "out", whole / "out")
    found, expected = recipe_of(place), recipe_of(whole)
    for key in ("phrases", "held_out", "metrics"):
        assert found[key] == expected[key]
    assert "26 Nov" not in json.dumps(found)
    assert "measured anew" not in log_of(place)
    # It has finished, on whatever day that is asked.
    on(monkeypatch, 27)
    assert merge(place, models, "--resume") == 0
    assert "This run is already finished" in log_of(place)


def test_a_joint_search_goes_on_on_another_day(models, place, tmp_path, monkeypatch):
    joint = {"search": "joint", "joint": {"steps": 3}, "merge_method": "lerp", "drift_weight": 0}
    monkeypatch.chdir(tmp_path)
    on(monkeypatch, 25)
    assert merge(tmp_path, models, **joint) == 0
    monkeypatch.chdir(place)
    break_off(place, tmp_path / "out", 10)
    assert journal(place / "out.partial")[-1]["kind"] == "step"
    on(monkeypatch, 26)
    assert merge(place, models, "--resume", **joint) == 0
    one, other = recipe_of(tmp_path), recipe_of(place)
    assert one["phrases"] == other["phrases"] and one["joint"]["weights"] == other["joint"]["weights"]


def test_a_run_that_has_decided_nothing_renders_anew(whole, models, place, monkeypatch):
    """It begins at its beginning, maybe under another template."""
    break_off(place, whole / "out", 3)
    on(monkeypatch, 26)
    assert merge(place, models, "--resume", template={"enable_thinking": False}) == 0
    texts = json.dumps(recipe_of(place)["settings"])
    assert "26 Nov" in texts and "25 Nov" not in texts


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"template": {"enable_thinking": False}}, "template"),
        ({"system": "Be kind."}, "bad_phrases"),
        (
            {"bad_phrases": [{"phrase": "determination", "contexts": [CHAT, CHAT, "The atmosphere is thick with "]}]},
            "bad",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_chats(whole, models, place, capsys, settings, key):
    break_off(place, whole / "out", 6)
    assert merge(place, models, "--resume", **settings) == 2
    assert f"has changed since {place}/out.partial/{JOURNAL} was started: {key}" in capsys.readouterr().err


def test_a_recipe_with_chats_replays_on_another_day(whole, models, place, monkeypatch):
    on(monkeypatch, 26)
    sources = ["--source", str(models[0].parent)]
    assert merge_monster.main(["--replay", str(whole / "out" / RECIPE), "--output", "again", *sources]) == 0
    assert differing(digest(place / "again"), digest(whole / "out")) <= {JOURNAL, "README.md", "merge_monster.yaml"}
    recipes = [json.loads((folder / RECIPE).read_text(encoding="utf-8")) for folder in (place / "again", whole / "out")]
    assert recipes[0]["settings"] == recipes[1]["settings"] and recipes[0]["phrases"] == recipes[1]["phrases"]
    assert merge_monster.main(["--compare", "again", str(whole / "out")]) == 0


def test_outputs_of_other_days_are_not_compared(whole, models, place, monkeypatch, capsys):
    on(monkeypatch, 26)
    assert merge(place, models) == 0
    capsys.readouterr()
    assert merge_monster.main(["--compare", "out", str(whole / "out")]) == 0
    assert "Phrases or weights differ" in capsys.readouterr().out


def test_a_dry_run_counts_chats_and_writes_nothing(models, place, capsys):
    assert merge(place, models, "--dry-run") == 0
    assert "Dry run: wrote only the log logs" in capsys.readouterr().out and not (place / "out").exists()


@pytest.mark.parametrize(
    "template, words",
    [(None, "no chat template"), (RAISING, "refuses the context 'user: Describe"), ("{{ a.b }}", "'a'")],
)
@pytest.mark.parametrize("program", ["merge", "dry run", "mapper"])
def test_a_chat_that_cannot_be_rendered_is_told_before_any_work(place, tmp_path, capsys, program, template, words):
    models = make_models(tmp_path, template)
    if program == "mapper":
        path = tiny.write_config(place / "my.yaml", models[0], [], place / "out", **SETTINGS)
        assert monster_mapper.main(["--config", str(path)]) == 2
    else:
        assert merge(place, models, *(["--dry-run"] if program == "dry run" else [])) == 2
    message = capsys.readouterr().err
    assert f"{models[0]}: its " in message and words in message and "Traceback" not in message
    assert not (place / "out").exists() and not (place / "out.partial").exists()


@pytest.mark.parametrize("key", ["contexts", "samples", "discover.prompts"])
def test_a_template_that_takes_all_memory_ends_a_run_before_its_work(place, tmp_path, capsys, monkeypatch, key):
    monkeypatch.setattr("modules.scoring.chats.in_child", in_child)
    models = make_models(tmp_path, "{{ 'x' * 8000000000 }}")
    plain = [{"phrase": "spine", "contexts": ["down her "]}]
    if key == "discover.prompts":
        path = tiny.write_config(place / "my.yaml", models[0], [], place / "out", bad_phrases=plain, pairs=())
        assert monster_mapper.main(["--config", str(path), "--rate", str(models[0])]) == 2
    else:
        settings = {"samples": ["Q"], "bad_phrases": plain} if key == "samples" else {}
        assert merge(place, models, **settings) == 2
    message = capsys.readouterr().err
    assert f"{models[0]}: its chat template takes more than 1 GiB" in message and f"({key})" in message
    assert not (place / "out").exists() and not (place / "out.partial").exists() and not (place / "samples").exists()


def test_a_run_without_chats_starts_no_child(place, models, monkeypatch):
    monkeypatch.setattr("modules.scoring.chats.in_child", None)
    assert merge(place, models, "--dry-run", bad_phrases=[{"phrase": "spine", "contexts": ["down her "]}]) == 0


def test_what_is_listed_twice_is_told_of_chats_too(models, place):
    contexts = [CHAT, {"messages": [{**TURN, "content": f" {TURN['content']} "}], "continue": CHAT["continue"]}]
    assert merge(place, models, "--dry-run", bad_phrases=[{"phrase": "determination", "contexts": contexts}]) == 0
    assert "Her eyes were filled with ' is listed twice and counts double" in log_of(place)


def test_the_mapper_explores_chats(models, place, monkeypatch, capsys):
    on(monkeypatch, 25)
    base = models[0]
    more = {"mapper": {"prob_min": 1, "top_k": 3, "max_depth": 2, "additional_length": 3}, "system": "Be brief."}
    path = tiny.write_config(place / "my.yaml", base, [], place / "out", **{**SETTINGS, **more})
    assert monster_mapper.main(["--config", str(path), "--json", "found.json", "--yaml", "found.yaml"]) == 0
    out = capsys.readouterr().out
    assert "CONTEXT 1/4: system: Be brief. user: Describe an old house. ▸ Her eyes were filled with" in out
    found = json.loads((place / "found.json").read_text(encoding="utf-8"))["contexts"]
    assert [entry.get("chat", {}).get("answer") for entry in found] == [CHAT["continue"], "", "His voice was ", None]
    tokenizer = load_tokenizer(base)
    for entry in found:
        given = entry["context"].rstrip(" ")
        assert entry["tokens"] == tokenizer(given, add_special_tokens="chat" not in entry)["input_ids"]
        assert entry["tokens"].count(tokenizer.bos_token_id) == 1
    # What is suggested can be pasted: it is scored as the tree says.
    suggested = yaml.safe_load((place / "found.yaml").read_text(encoding="utf-8"))["bad_phrases"]
    chats = [context for entry in suggested for context in entry["contexts"] if isinstance(context, dict)]
    assert chats and all(chat["messages"][-1] == TURN for chat in chats)
    detokenizer = Detokenizer(tokenizer, len(tokenizer))
    for entry in found:
        root = Root(
            entry["context"],
            tuple(entry["tokens"]),
            entry["context"][len(entry["context"].rstrip(" ")) :],
            entry.get("chat"),
        )
        for phrase in entry["phrases"]:
            if phrase["suggestion"]:
                text = tokenizer(
                    entry["context"] + phrase["suggestion"]["phrase"], add_special_tokens="chat" not in entry
                )
                assert detokenizer.phrase(root, text["input_ids"][len(root.tokens) :]) == phrase["suggestion"]["phrase"]

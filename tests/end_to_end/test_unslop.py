"""--unslop: a model's habits are found and gone, by the same figures as the single commands give."""

import functools
import importlib
import itertools
import json
import random
import shutil

import habits
import pytest
import tiny
import yaml
from runs import digest, log_of
from wordfreq import top_n_list

import merge_monster
import monster_mapper
from modules.learn.steps import Learner
from modules.run import learn, unslop
from modules.runtime.console import Console
from modules.slop import generate
from modules.slop.human_rates import human_rates

SETTINGS = {
    "device": "cpu",
    "neutral_texts": ["plain.txt"],
    "own_texts": ["prompts.txt"],
    "neutral_tokens": 256,
    "discover": {"samples": 4, "tokens": 40, "prompts": "prompts.txt"},
    "learn": {"rank": 4, "steps": 50, "learning_rate": 0.02, "drift_tokens": 128},
    "search": "joint",
    "joint": {"steps": 3},
}
PROMPTS = [f"{word} number {number}" for number in range(5) for word in ("What is", "Write about the", "Tell me of a")]
MERGES = ["merge-1", "merge-2", "merge-3"]


@pytest.fixture(autouse=True, scope="module")
def one_reading_of_the_word_list():
    """It takes longer than all the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("modules.slop.discover"), "human_rates", functools.cache(human_rates))
        yield


TRAINING = {"habits": habits.MORE_HABITS, "steps": 240, "rate": 3e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return habits.make_habitual(tmp_path_factory.mktemp("models") / "base", **TRAINING)


def configure(place, **more):
    words = [word for word in top_n_list("en", 200) if word.isalpha()]
    (place / "plain.txt").write_text(" ".join(random.Random(5).choices(words, k=600)), encoding="utf-8")
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (place / "my.yaml").write_text(yaml.safe_dump({**SETTINGS, **more}), encoding="utf-8")


def run(*arguments):
    """The program's exit code."""
    return merge_monster.main(["--config", "my.yaml", "--unslop", *map(str, arguments), "--output", "out"])


def front_of(place):
    """The models of the table, by name."""
    return {point["name"]: point for point in json.loads((place / "out.unslop/front.json").read_text("utf-8"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """Where a run has ended that nobody disturbed."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        configure(place)
        assert run(base) == 0
    return place


def test_all_five_habits_are_found_and_gone(whole):
    found = yaml.safe_load((whole / "out.unslop/found.yaml").read_text(encoding="utf-8"))
    assert {entry["phrase"] for entry in found["bad_phrases"]} == set(habits.MORE_HABITS)
    base, adapter, *merges = front_of(whole).values()
    assert base["rate"] > 100 and adapter["name"] == "adapter"
    assert [merge["name"] for merge in merges] == MERGES and all(merge["is_merge"] for merge in merges)
    for model in (adapter, *merges):
        assert model["rate"] < 0.05 * base["rate"] and model["metrics"]["own_kl"] < 0.02
        assert model["words"] == base["words"] == 40
    assert (whole / "out.unslop/front.png").stat().st_size > 1000
    recipes = [json.loads((whole / f"out.unslop/{name}/merge_monster_recipe.json").read_text()) for name in MERGES]
    weights = [recipe["settings"]["drift_weight"] for recipe in recipes]
    total = sum(phrase["before"] * phrase["weight"] for phrase in recipes[0]["phrases"])
    assert weights == pytest.approx([total / 0.05 * factor for factor in (0.25, 1, 4)], rel=1e-3)


def test_each_merge_begins_where_the_last_one_ended(whole):
    recipes = [json.loads((whole / f"out.unslop/{name}/merge_monster_recipe.json").read_text()) for name in MERGES]
    assert [recipe["settings"]["joint"]["steps"] for recipe in recipes] == [3, 3, 3]
    assert "start" not in recipes[0]["settings"]["joint"] or not recipes[0]["settings"]["joint"]["start"]
    for earlier, later in itertools.pairwise(recipes):
        assert later["joint"]["start"] == earlier["joint"]["weights"]


def test_the_figures_are_those_of_the_single_commands(whole, base, monkeypatch):
    monkeypatch.chdir(whole)
    (whole / "listed.yaml").write_text(
        yaml.safe_dump(
            {**SETTINGS, "phrase_files": ["out.unslop/found.yaml"], "directories": {"model_path1": str(base)}}
        )
    )
    merges = [f"out.unslop/{name}" for name in ("adapter", *MERGES)]
    sets = ["--set", "random_seed=513", "--set", "discover.samples=1"]
    assert monster_mapper.main(["--config", "listed.yaml", "--rate", *merges, "--json", "rates.json", *sets]) == 0
    assert merge_monster.main(["--config", "listed.yaml", "--score", *merges, "--json", "scores.json"]) == 0
    front = front_of(whole)
    rates = json.loads((whole / "rates.json").read_text(encoding="utf-8"))
    assert list(rates) == ["base", "adapter", *MERGES]
    for name, rate in rates.items():
        assert front[name]["rate"] == rate["all bad phrases"]["rate"]
        assert front[name]["interval"] == rate["all bad phrases"]["interval"]
        assert front[name]["words"] == rate["words"] / len(PROMPTS)
    scores = {model["name"]: model["metrics"] for model in json.loads((whole / "scores.json").read_text())["models"]}
    assert list(scores) == list(front)
    for name, metrics in scores.items():
        shown = {key: front[name]["metrics"][key] for key in ("total", "held_out", "kl", "own_kl", "perplexity")}
        assert shown == pytest.approx({key: metrics[key] for key in shown}, rel=1e-3, abs=1e-6)


def test_the_output_is_what_its_own_settings_make(whole, base, monkeypatch):
    """By an ordinary run, told where the models lie."""
    monkeypatch.chdir(whole)
    models = [f"directories.model_path1={base}", "models_to_merge=[out.unslop/adapter]"]
    sets = [part for text in models for part in ("--set", text)]
    assert merge_monster.main(["--config", "out/merge_monster.yaml", "--output", "again", *sets]) == 0
    assert digest(whole / "again")["model.safetensors"] == digest(whole / "out")["model.safetensors"]
    assert (whole / "out/README.md").read_text(encoding="utf-8").count("Prompt:") == 3


COMMANDS = {
    name: getattr(unslop, name)
    for name in ("find_cliches", "score_models", "learn_adapter", "merge_models", "count_written")
}
# Each run is broken off behind so many of its calls of a command; the third one before, within its learning.
BROKEN_BEHIND = (1, 1, 1, 1, 1, 2, 3, 4, 6, 8)
OF_A_RUN = ("merge_monster_recipe.json", "merge_monster_journal.jsonl", "README.md", "settings.json")  # times, its own


def test_a_run_goes_on_from_every_command(place, base, whole, monkeypatch):
    """To the same bytes, and nothing that is there is made again."""
    configure(place)
    steps, texts, killed = [], [], []
    move, sample, save = Learner.move, generate.sample, learn.save_state
    monkeypatch.setattr(Learner, "move", lambda self, gradient: steps.append(1) or move(self, gradient))
    monkeypatch.setattr(generate, "sample", lambda *arguments: texts.append(1) or sample(*arguments))

    def save_once(folder, state):
        save(folder, state)
        if state.step == 2 and not killed:
            killed.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(learn, "save_state", save_once)
    for last in BROKEN_BEHIND:
        calls = []

        def broken(name, *arguments, last=last, calls=calls, **more):
            result = COMMANDS[name](*arguments, **more)
            calls.append(name)
            if len(calls) == last:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            for name in COMMANDS:
                patch.setattr(unslop, name, functools.partial(broken, name))
            assert run(base) == 130
        assert not (place / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(unslop, "replay_recipe", lambda *_: 1 / 0)
        assert run(base) == 1
    assert run(base) == 0
    for folder in ("out", "out.unslop", *(f"out.unslop/{name}" for name in ("adapter", "samples", *MERGES))):
        ours, theirs = digest(place / folder), digest(whole / folder)
        assert ours.keys() == theirs.keys()
        assert {name for name in ours if ours[name] != theirs[name]} <= set(OF_A_RUN), folder
    assert len(steps) == SETTINGS["learn"]["steps"] and killed
    assert len(texts) == sum(file.read_text("utf-8").count("\n") for file in (whole / "out.unslop/samples").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# With candidates and a list
# ---------------------------------------------------------------------------------------------------------------------


def test_a_list_and_candidates_in_place_of_what_is_found_and_learned(place, base, whole, monkeypatch, capsys):
    """The person at the terminal decides; a candidate that does not fit is left out."""
    one = tiny.make_candidate(place / "one", base, 1, amount=0.001)
    bad = tiny.make_candidate(place / "two", base, 2, amount=0.3)
    tokenizer = tiny.bpe_tokenizer()
    other = tiny.make_model(place / "other", tiny.llama_config(len(tokenizer)), tokenizer)
    shutil.copy(whole / "out.unslop/found.yaml", place / "found.yaml")
    configure(place, phrase_files=["found.yaml"], learn={"steps": 0}, joint={"steps": 1}, samples=[])
    answers = ["what?", "merge-3"]
    monkeypatch.setattr(Console, "ask", lambda self, question: answers.pop(0))
    monkeypatch.setattr(unslop, "find_cliches", None)
    assert run(base, one, other, bad) == 0
    assert f"skipping {other}: {other} does not fit the base" in log_of(place)
    assert list(front_of(place)) == ["base", "one", *MERGES] and not answers
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text(encoding="utf-8"))
    assert [source["name"] for source in recipe["sources"]] == ["base", "one", "two"]
    third = json.loads((place / "out.unslop/merge-3/merge_monster_recipe.json").read_text(encoding="utf-8"))
    assert recipe["settings"]["drift_weight"] == third["settings"]["drift_weight"]
    assert run(base, one, other, bad) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_base_without_a_chat_template(place, tmp_path_factory):
    base = habits.make_habitual(tmp_path_factory.mktemp("models") / "base", chats=False, **TRAINING)
    configure(place)
    assert run(base, "--quiet") == 0
    front = front_of(place)
    assert all(front[name]["rate"] < 0.05 * front["base"]["rate"] for name in MERGES)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_of_the_whole(place, base):
    configure(place)
    assert run(base, "--dry-run") == 0
    log = log_of(place)
    assert "135 of up to 40 tokens" in log and "to learn" in log and "to merge" in log and "Memory needed" in log
    assert sorted(path.name for path in place.iterdir()) == ["logs", "my.yaml", "plain.txt", "prompts.txt"]


def refused(capsys, place, base, words, *options, code=2):
    """One line says why, and nothing is at the output."""
    assert run(base, *options) == code
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message and not (place / "out").exists()


def test_what_can_not_be_used(place, base, capsys, monkeypatch):
    configure(place)
    refused(capsys, place, base, "nothing to merge", "--set", "learn.steps=0")
    refused(capsys, place, base, "discover.language: 'ja'", "--set", "discover.language=ja")
    shutil.rmtree(place / "out.unslop")
    refused(capsys, place, "nowhere", "--unslop: 'nowhere': no such folder")
    refused(capsys, place, base, "--unslop[0]: 'nowhere': no such folder", "nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(unslop.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        refused(capsys, place, base, "free some space")
    assert not (place / "out.unslop").exists()
    (place / "out.unslop").mkdir()
    (place / "out.unslop/mine").write_text("")
    refused(capsys, place, base, "is in the way", "--restart")


def test_a_base_without_habits(place, base, capsys):
    """By these few texts; what is changed begins again only if it is said."""
    configure(place, discover={**SETTINGS["discover"], "samples": 1})
    (place / "prompts.txt").write_text("\n".join(PROMPTS[:4]), encoding="utf-8")
    refused(capsys, place, base, "Found no overused phrase", code=1)
    assert (place / "out.unslop/samples").is_dir()
    refused(capsys, place, base, "discover changed since out.unslop was started", "--set", "discover.samples=3")
    refused(capsys, place, base, "Found no overused phrase", "--set", "discover.samples=3", "--restart", code=1)


@pytest.mark.parametrize("options", [["--resume"], ["--score", "one"], ["--table", "changed"]])
def test_options_that_do_not_go_with_it(place, base, options):
    with pytest.raises(SystemExit) as end:
        run(base, *options)
    assert end.value.code == 2

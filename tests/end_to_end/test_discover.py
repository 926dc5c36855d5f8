"""--discover and --rate as a program: what a model over-uses becomes a list for a merge; how often it says so."""

import functools
import importlib
import itertools
import json
import re

import habits
import pytest
import tiny
import yaml
from runs import digest

import merge_monster
import modules.slop.contexts
import modules.slop.generate
import monster_mapper
from modules.config.load import load_config
from modules.slop.human_rates import human_rates

DISCOVER = {"samples": 2, "tokens": 40, "prompts": "prompts.txt"}
PROMPTS = [f"{word} number {number}" for number in range(5) for word in ("What is", "Write about the", "Tell me of a")]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    return habits.make_habitual(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def without_template(tmp_path_factory):
    return habits.make_habitual(tmp_path_factory.mktemp("models") / "base", chats=False)


@pytest.fixture(autouse=True, scope="module")
def one_reading_of_the_word_list():
    """It takes longer than all the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("modules.slop.discover"), "human_rates", functools.cache(human_rates))
        yield


def write(place, model, **settings):
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    settings = {"device": "cpu", "discover": DISCOVER, **settings, "directories": {"model_path1": str(model)}}
    (place / "my.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def mapped(*arguments):
    return monster_mapper.main(["--config", "my.yaml", *map(str, arguments)])


def log_of(place):
    return max((place / "logs").glob("monster-mapper-*.txt"), key=lambda path: path.stat().st_mtime_ns).read_text()


def found_rows(log):
    """The phrases of the table, in its order."""
    return [line.split("|")[2].strip() for line in log.splitlines() if re.match(r"\| \d", line)]


def assert_no_path(place, model, *files):
    """A source is named by its folder's name, and nothing says where that lies."""
    (samples,) = (place / "samples").iterdir()
    assert re.fullmatch(rf"{model.name}-[0-9a-f]{{12}}\.jsonl", samples.name)
    for file in files:
        text = (place / file).read_text(encoding="utf-8")
        assert model.name in text and model.parent.name not in text and place.parent.name not in text


@pytest.mark.parametrize("name", ["chatting", pytest.param("without_template", marks=pytest.mark.slow)])
def test_the_habits_of_a_model_become_a_list_that_a_merge_takes(place, name, request):
    model = request.getfixturevalue(name)
    write(place, model)
    assert mapped("--discover", "--yaml", "found.yaml", "--json", "found.json") == 0
    assert set(habits.HABITS) <= set(found_rows(log_of(place))[:5])
    assert_no_path(place, model, "found.yaml", "found.json")
    lists = yaml.safe_load((place / "found.yaml").read_text(encoding="utf-8"))
    assert list(lists) == ["bad_phrases"]
    by_phrase = {entry["phrase"]: entry["contexts"] for entry in lists["bad_phrases"]}
    for habit in habits.HABITS:
        contexts = by_phrase[habit]
        assert 3 <= len(contexts) <= 6
        held_out = [isinstance(context, dict) and context.get("held_out", False) for context in contexts]
        assert held_out == [bool(number % 2) for number in range(len(contexts))]
    document = json.loads((place / "found.json").read_text(encoding="utf-8"))
    assert (
        document["model"] == model.name
        and document["words"] > 500
        and {one["phrase"] for one in document["phrases"]} >= set(habits.HABITS)
    )

    # As written, every context has a probability of at least 5 %; the merge sees half of them.
    candidate = tiny.make_candidate(place / "candidate", model, 1)
    settings = {"phrase_files": ["found.yaml"], "models_to_merge": [str(candidate)], "device": "cpu", "samples": []}
    directories = {"model_path1": str(model), "output_directory": "out"}
    (place / "merge.yaml").write_text(yaml.safe_dump({**settings, "directories": directories}), encoding="utf-8")
    config = load_config(place / "merge.yaml")
    count = sum(map(len, by_phrase.values()))
    assert len(config.held_out_pairs) == sum(len(contexts) // 2 for contexts in by_phrase.values()) > 0
    assert len(config.bad_phrases) == count - len(config.held_out_pairs)
    assert merge_monster.main(["--config", "merge.yaml"]) == 0
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text(encoding="utf-8"))
    assert all(phrase["before"] >= 0.0499 for phrase in recipe["phrases"]) and len(recipe["phrases"]) > 5


def test_the_same_bytes_also_when_broken_off(place, chatting, monkeypatch):
    monkeypatch.setattr("modules.scoring.samples.BATCH", 1)  # a prompt at a time
    write(place, chatting)
    assert mapped("--discover", "--yaml", "found.yaml") == 0
    found, samples = (place / "found.yaml").read_bytes(), digest(place / "samples")
    assert mapped("--discover", "--yaml", "found.yaml") == 2  # it stands there
    assert mapped("--discover", "--yaml", "found.yaml", "--overwrite") == 0
    assert "Using the texts of base in" in log_of(place) and (place / "found.yaml").read_bytes() == found

    own, calls = modules.slop.generate.sample, []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments)

    (place / "other").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(modules.slop.generate, "sample", broken)
        assert mapped("--discover", "--yaml", "other/found.yaml") == 130
    calls.clear()
    monkeypatch.setattr(modules.slop.generate, "sample", lambda *arguments: calls.append(1) or own(*arguments))
    assert mapped("--discover", "--yaml", "other/found.yaml") == 0
    assert (place / "other/found.yaml").read_bytes() == found and digest(place / "other/samples") == samples
    lines = next((place / "samples").iterdir()).read_text(encoding="utf-8").count("\n")
    assert len(calls) == lines - 1 > 0  # what was drawn before is not drawn again

    write(place, chatting, random_seed=7)
    assert mapped("--discover", "--yaml", "found.yaml", "--overwrite") == 0
    assert (place / "found.yaml").read_bytes() != found and len(digest(place / "samples")) == 2


def test_a_system_turn_and_fewer_phrases(place, chatting):
    write(place, chatting, system="be brief", discover={**DISCOVER, "phrases": 2})
    assert mapped("--discover", "--yaml", "found.yaml") == 0
    lists = yaml.safe_load((place / "found.yaml").read_text(encoding="utf-8"))
    assert lists["system"] == "be brief" and 1 <= len(lists["bad_phrases"]) <= 2
    contexts = lists["bad_phrases"][0]["contexts"]
    assert {len(context["messages"]) for context in contexts} == {1}
    assert {context["messages"][0]["content"] for context in contexts} <= set(PROMPTS)


def test_where_nothing_is_found(place, chatting):
    """A failure, and no list; a report that was asked for alone says so, which is what it is for."""
    write(place, chatting, discover={**DISCOVER, "samples": 1, "tokens": 5})
    (place / "prompts.txt").write_text("\n".join(PROMPTS[:4]), encoding="utf-8")
    assert mapped("--discover", "--yaml", "found.yaml", "--json", "both.json") == 1
    assert not (place / "found.yaml").exists() and "phrase_files" not in log_of(place)
    assert mapped("--discover", "--json", "found.json") == 0
    for file in ("both.json", "found.json"):
        document = json.loads((place / file).read_text(encoding="utf-8"))
        assert document["phrases"] == [] and document["words"] > 0


def test_where_nothing_is_probable_enough_to_be_listed(place, chatting, monkeypatch):
    write(place, chatting)
    (place / "found.yaml").write_text("of before")
    monkeypatch.setattr(modules.slop.contexts, "LEAST", 2.0)
    assert mapped("--discover", "--yaml", "found.yaml", "--overwrite") == 1
    assert (place / "found.yaml").read_text() == "of before" and "phrase_files" not in log_of(place)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"discover": {"prompts": "none.txt"}}, "discover.prompts: none.txt: No such file"),
        ({"discover": {"language": "ja"}}, "ja"),
        ({"discover": {"samples": 0}}, "discover.samples: 0: "),
        ({"discover": {"temprature": 1}}, "did you mean 'temperature'?"),
    ],
)
def test_what_can_not_be_used(place, chatting, capsys, settings, said):
    write(place, chatting, **settings)
    assert mapped("--discover") == 2
    assert said in capsys.readouterr().err and not (place / "samples").exists()


def test_a_model_that_writes_no_numbers(place, chatting, capsys, monkeypatch):
    write(place, chatting)

    def broken(*_):
        raise ArithmeticError("the model's probabilities are NaN or infinite")

    monkeypatch.setattr(modules.slop.generate, "sample", broken)
    assert mapped("--discover") == 2
    assert (
        f"{chatting.name} can't generate texts: the model's probabilities are NaN or infinite"
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------------------------------------------------------------
# The rate
# ---------------------------------------------------------------------------------------------------------------------


def written_in(file):
    """The texts that are kept in a file."""
    return [
        text for line in file.read_text("utf-8").splitlines() for some in json.loads(line).values() for text in some
    ]


def test_rates_side_by_side(place, chatting, tmp_path_factory):
    other = tiny.make_candidate(tmp_path_factory.mktemp("models") / "other", chatting, 1)
    phrases = [{"phrase": habit, "contexts": ["with "]} for habit in habits.HABITS[:2]]
    write(place, chatting, bad_phrases=phrases, good_phrases=[{"phrase": "the", "contexts": ["with "]}])
    assert mapped("--rate", other, chatting, "--json", "rates.json") == 0
    rates = json.loads((place / "rates.json").read_text(encoding="utf-8"))
    assert list(rates) == ["base", "other"]  # each once, and nothing of where they lie
    base = rates["base"]
    texts = [
        json.loads(line) for file in (place / "samples").iterdir() for line in file.read_text("utf-8").splitlines()
    ]
    assert len(digest(place / "samples")) == 2 and sum(map(len, texts)) == 2 * len(PROMPTS)
    ours = [
        text for file in (place / "samples").iterdir() if file.name.startswith("base-") for text in written_in(file)
    ]
    said = " ".join(f" {text} " for text in ours)
    counted = {habit: said.count(f" {habit} ") for habit in habits.HABITS[:2]}
    words = len(said.split())
    assert base["words"] == words
    for habit, times in counted.items():
        assert base["phrases"][habit]["rate"] == pytest.approx(1000 * times / words) and times > 10
    assert base["all bad phrases"]["rate"] == pytest.approx(1000 * sum(counted.values()) / words)
    assert base["all bad phrases"]["change"] is None
    change = rates["other"]["all bad phrases"]["change"]
    ratio = rates["other"]["all bad phrases"]["rate"] / base["all bad phrases"]["rate"]
    assert change["share"] == pytest.approx(ratio - 1)
    assert change["interval"][0] <= change["share"] <= change["interval"][1]
    log = log_of(place)
    assert "change vs base:" in log and log.count("Prompt: ") == 1 and "all good phrases" in log


def test_a_phrase_with_variants_is_written_as_often_as_all_of_them(place, chatting):
    """And --discover, which reads no phrases, takes a file that has some."""
    found, (one, other, _) = {}, habits.HABITS
    last = one.split()[1]  # counts where it stands alone, and not once more where the whole phrase stands
    for name, lists in (("each", [one, other]), ("any", [[one, other, last]])):
        write(place, chatting, bad_phrases=[{"phrase": phrase, "contexts": ["with "]} for phrase in lists])
        assert mapped("--rate", chatting, "--json", f"{name}.json") == 0
        found[name] = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))["base"]
    shown = f"{one} / {other} / {last}"
    assert list(found["any"]["phrases"]) == [shown] and "thunder / lantern " in log_of(place)
    rate = found["any"]["all bad phrases"]["rate"]
    assert rate == found["any"]["phrases"][shown]["rate"] >= found["each"]["all bad phrases"]["rate"] > 0
    texts = [text for file in (place / "samples").iterdir() for text in written_in(file)]
    words = " ".join(texts).split()
    hits = words.count(last) + sum(pair == tuple(other.split()) for pair in itertools.pairwise(words))
    assert rate == pytest.approx(1000 * hits / len(words))
    assert mapped("--discover") == 0


def test_a_rate_needs_phrases_and_models_that_are_there(place, chatting, capsys):
    write(place, chatting)
    assert mapped("--rate", chatting) == 2
    assert "both are empty" in capsys.readouterr().err
    write(place, chatting, bad_phrases=[{"phrase": "the", "contexts": ["with "]}])
    assert mapped("--rate", place / "nowhere") == 2
    assert "--rate: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mapped("--rate", chatting, "--discover")

"""Drift on the base's own answers in runs: its figures, that they count, that a run goes on to the same bits."""

import json

import pytest
import reference
import tiny
from broken_runs import RECIPE, break_off
from huggingface_hub import constants
from runs import digest, log_of, make_models, merge
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
from modules.output.journal import JOURNAL_FILE

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. "
PROMPTS = ["Her eyes were", "Where is the apple?", "It sent shivers", "His voice was", "Question:", "The kitchen"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = make_models(tmp_path_factory.mktemp("models"))
    for folder in folders:
        (folder / "chat_template.jinja").unlink()
    return folders


@pytest.fixture
def texts(place):
    (place / "plain.txt").write_text(TEXT * 12, encoding="utf-8")
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return {"neutral_texts": ["plain.txt"], "own_texts": ["prompts.txt"]}


EMPTY = {"shown": [], "weighed": [], "samples": []}


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def answers_of(folder):
    """What the base has answered, as the journal has it."""
    lines = map(json.loads, (folder / JOURNAL_FILE).read_text(encoding="utf-8").splitlines())
    return [line["answers"] for line in lines if line["kind"] == "answers"]


def writes_a_phrase(tokenizer, tokens, place):
    """Whether a token has a letter of a listed phrase."""
    text = tokenizer.decode(tokens)
    begin, end = len(tokenizer.decode(tokens[:place])), len(tokenizer.decode(tokens[: place + 1]))
    letters = set(range(begin, end))
    for pair in tiny.PAIRS:
        for start in range(len(text)):
            stop = start + len(pair.phrase)
            if text[start:stop].lower() == pair.phrase.lower() and letters.intersection(range(start, stop)):
                return True
    return False


def own_kl(base, other, answers):
    """By whole logits of plain models, position by position."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = [answer["given"] + answer["written"]["tokens"] for answer in answers]
    compared = []
    for answer, window in zip(answers, windows, strict=True):
        tokens = answer["written"]["tokens"]
        listed = {place for place in range(len(tokens)) if writes_a_phrase(tokenizer, tokens, place)}
        first = len(answer["given"])
        predicted = [place + 1 - first for place in range(len(window))]  # which of the answer's tokens, at each place
        compared.append([0 <= token < len(tokens) and token not in listed for token in predicted])
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, other)]
    return reference.plain_drift(*models, windows, compared)[0]


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_figures_are_those_of_plain_models(place, models, texts, search):
    guarded = {**texts, "search": search, "drift_weight": 0.01, "neutral_tokens": 200, "baselines": True}
    assert merge(place, models, **guarded, samples=None) == 0
    recipe = recipe_of(place / "out")
    (answers,) = answers_of(place / "out")
    assert [answer["prompt"] for answer in answers["shown"]] == PROMPTS[::2]
    assert [answer["prompt"] for answer in answers["weighed"]] == PROMPTS[1::2]
    shown = own_kl(models[0], place / "out", answers["shown"])
    assert recipe["metrics"]["merge"]["own_kl"] == pytest.approx(shown, rel=1e-3) and shown > 1e-4
    assert recipe["metrics"]["base"]["own_kl"] == pytest.approx(0, abs=1e-6)
    for number, candidate in enumerate(models[1:], start=1):
        alone = own_kl(models[0], candidate, answers["shown"])
        assert recipe["baselines"][str(number)]["own_kl"] == pytest.approx(alone, rel=1e-3)
    weighed = own_kl(models[0], place / "out", answers["weighed"][:2])  # they have enough tokens
    assert recipe["metrics"]["merge"]["trial_own_kl"] == pytest.approx(weighed, rel=1e-3)
    # Three of the answers that are shown are the samples; all of them are counted.
    assert [sample["prompt"] for sample in recipe["samples"]] == PROMPTS[::2]
    assert set(recipe["metrics"]["merge"]) >= {"words", "ends", "loops"} <= set(recipe["metrics"]["base"])
    card = (place / "out/README.md").read_text(encoding="utf-8")
    assert "KL on own answers" in card and "KL on own answers" in log_of(place)


def test_either_drift_is_held_within_the_limit(place, models, texts):
    assert merge(place, models, **texts) == 0
    free = recipe_of(place / "out")["metrics"]["merge"]
    limit = free["own_kl"] / 4
    assert merge(place, models, "--overwrite", **texts, max_drift=limit, neutral_tokens=400) == 0
    recipe = recipe_of(place / "out")
    for name in ("trial_kl", "trial_own_kl"):
        drifts = [decision["metrics"][name] for decision in recipe["decisions"]]
        assert max(drifts) <= limit * (1 + 1e-4)
    assert any(decision["ratio"] for decision in recipe["decisions"])
    assert 0 < recipe["metrics"]["merge"]["own_kl"] < 1.5 * limit


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_a_run_goes_on_to_the_same_bits_and_a_replay_is_the_same(place, models, texts, search, tmp_path, monkeypatch):
    guarded = {**texts, "search": search, "max_drift": 0.05, "neutral_tokens": 100, "joint": {"steps": 6}}
    assert merge(place, models, **guarded) == 0
    (place / "out").rename(place / "whole")
    records = len((place / "whole" / JOURNAL_FILE).read_text(encoding="utf-8").splitlines())
    break_off(place, place / "whole", records - 3)
    # Another machine has nothing in its cache, and would answer otherwise.
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("modules.metrics.own_answers.sample", None)
    assert merge(place, models, "--resume", **guarded) == 0
    model = "model.safetensors"
    assert digest(place / "out")[model] == digest(place / "whole")[model]
    replay = ["--replay", str(place / "out"), "--output", str(place / "again"), "--source", str(models[0].parent)]
    assert merge_monster.main(replay) == 0
    assert digest(place / "again")[model] == digest(place / "whole")[model]


def test_other_prompts_are_another_run_where_drift_counts(place, models, texts, capsys):
    guarded = {**texts, "max_drift": 0.05}
    assert merge(place, models, **guarded) == 0
    (place / "out").rename(place / "whole")
    break_off(place, place / "whole", 6)
    (place / "prompts.txt").write_text("Another prompt", encoding="utf-8")
    assert merge(place, models, "--resume", **guarded) == 2
    assert "own_texts" in capsys.readouterr().err


def test_nothing_is_measured_with_an_empty_list(place, models, texts):
    assert merge(place, models, **(texts | {"own_texts": []}), samples=None) == 0
    recipe = recipe_of(place / "out")
    assert (
        "own_kl" not in recipe["metrics"]["merge"] and answers_of(place / "out") == [EMPTY] and recipe["samples"] == []
    )


def test_own_answers_alone_can_guard(place, models, texts, capsys):
    alone = texts | {"neutral_texts": [], "max_drift": 0.001}
    assert merge(place, models, **alone) == 0
    decided = recipe_of(place / "out")["decisions"]
    assert all(set(decision["metrics"]) == {"trial_own_kl"} for decision in decided)
    assert merge(place, models, "--overwrite", **(alone | {"own_texts": []})) == 2
    assert "neutral_texts" in capsys.readouterr().err


def test_prompts_that_are_no_prompts(place, models, texts, capsys):
    (place / "prompts.txt").write_text("# none\n", encoding="utf-8")
    assert merge(place, models, **texts) == 2
    assert "own_texts: prompts.txt contains no prompts" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_candidate_that_ends_its_answers_at_once_is_told_and_not_taken(place, models, texts):
    """Its end token is likely everywhere, which makes every phrase less probable."""
    mute = place / "mute"
    tiny.make_candidate(mute, models[0], 1, amount=1e-6)
    tensors = load_file(mute / "model.safetensors")
    name = next(name for name in tensors if name.startswith("model.norm"))
    head = tensors["lm_head.weight"]
    head[1] = 3 * head.mean(0).sign() * head.abs().max() * tensors[name].sign()
    save_file(tensors, mute / "model.safetensors", metadata={"format": "pt"})
    free = texts | {"merge_ratios": [1.0], "samples": None}
    assert merge(place, (models[0], mute), **free) == 0
    metrics = recipe_of(place / "out")["metrics"]
    assert metrics["merge"]["own_kl"] > 0.05
    assert merge(place, (models[0], mute), "--overwrite", **free, max_drift=0.02) == 0
    assert recipe_of(place / "out")["metrics"]["merge"]["own_kl"] < 0.03

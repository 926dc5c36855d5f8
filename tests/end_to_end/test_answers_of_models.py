"""What a model answers: without its thoughts, and by the rules that its own settings have for tokens."""

import json

import pytest
import scripted
import tiny
import torch
from broken_runs import RECIPE
from runs import log_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
import monster_mapper
from modules.checkpoints.checkpoint import load_tokenizer, open_checkpoint
from modules.config.phrase_lists import Chat, Message, Pair
from modules.model.base_model import TOKEN_RULES
from modules.model.loading import load_model
from modules.run.merge import NOBODY_ASKED
from modules.scoring.chats import asked_of, chat_of, render
from modules.scoring.samples import DEFAULT, SamplingParams, encoded, sample, visible
from modules.slop.discover import probabilities
from modules.slop.generate import Generator

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
THINKS = {"<think>": ["It is a testament to thinking.", "</think>", "The house ", "is old."]}
CONTEXT = {"messages": [{"role": "user", "content": "Q1"}], "continue": "The house "}
PHRASES = [{"phrase": phrase, "contexts": [CONTEXT]} for phrase in ("testament to", "is old")]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "thinker"
    scripted.make_scripted(folder, {**THINKS, "Q1": ["unused"]}, TEMPLATE, special=["</think>"])
    return folder


def opened(folder):
    return load_model(open_checkpoint(folder, "base"), "cpu", "auto"), load_tokenizer(folder)


def texts_of(model, tokenizer, prompt, params=DEFAULT, asked=NOBODY_ASKED):
    """What a model writes to a prompt, as a reader sees it."""
    given, _ = encoded(model, tokenizer, [prompt], asked)
    return [visible(tokenizer, text, prompt, asked) for text in sample(model, tokenizer, given, 512, params)[0]]


def asked(tokenizer, prompt, template=None):
    return asked_of(tokenizer, render(tokenizer, "base", {chat_of(prompt): "samples"}, template), [prompt])


def mapper(place, model, *arguments, **discover):
    (place / "prompts.txt").write_text("Q1\n")
    settings = {"bad_phrases": PHRASES, "discover": {"prompts": "prompts.txt", "samples": 2, **discover}}
    path = tiny.write_config(place / "my.yaml", model, [], place / "out", **settings)
    return monster_mapper.main(["--config", str(path), *map(str, arguments)])


def test_a_rate_is_of_answers(place, thinker):
    assert mapper(place, thinker, "--rate", thinker, "--json", "rates.json") == 0
    (found,) = json.loads((place / "rates.json").read_text()).values()
    assert found["words"] == 2 * 4
    assert [found["phrases"][phrase]["rate"] for phrase in ("testament to", "is old")] == [0, 250]
    (kept,) = (place / "samples").iterdir()
    assert json.loads(kept.read_text()) == {"Q1": ["The house is old."] * 2}


def test_a_text_that_is_all_thought_is_told(place, thinker, capsys):
    assert mapper(place, thinker, "--rate", thinker, "--quiet", tokens=2) == 0
    assert capsys.readouterr().out.count("2 of 2 answers are empty") == 1  # the model is counted once


def test_samples_and_contexts_of_a_merge(place, thinker, capsys):
    """A sample is an answer; that chats are scored in the middle of a thought is told, and how to go without."""
    candidate = tiny.make_candidate(place / "candidate", thinker, 1, amount=1e-5)
    settings = {"bad_phrases": PHRASES, "samples": ["Q1"], "merge_ratios": [0.5], "pairs": ()}
    path = tiny.write_config(place / "my.yaml", thinker, [candidate], place / "out", **settings)
    assert merge_monster.main(["--config", str(path)]) == 0
    (sample,) = json.loads((place / "out" / RECIPE).read_text())["samples"]
    assert sample["base"] == sample["merge"] == "The house is old."
    (line,) = [line for line in log_of(place).splitlines() if "opens a thinking block" in line]
    assert "1 chat context" in line and "continue: </think>" in line


def test_a_found_context_is_one_of_an_answer(thinker):
    """It is listed and scored behind the thought that the template begins."""
    model, tokenizer = opened(thinker)
    generator = Generator("thinker", None, model, tokenizer, ("Q1",), asked(tokenizer, "Q1"), {})
    assert generator.answers_begin == {"Q1": "</think>"}
    pair = Pair("BAD", "is old.", "", chat=Chat((Message("user", "Q1"),), "</think>The house "))
    rendered = Pair("BAD", "is old.", "Q1<think></think>The house ")
    assert probabilities(generator, [pair]) == probabilities(generator, [rendered]) > [0.1]


def test_without_thoughts_a_text_is_what_it_was(tmp_path):
    """Special tokens and all, as transformers shows it."""
    scripted.make_scripted(tmp_path, {"Q1": [" A", "<mark>", " <b>", "house "]}, special=["<mark>"])
    model, tokenizer = opened(tmp_path)
    assert texts_of(model, tokenizer, "Q1") == ["A <b>house"]


# ---------------------------------------------------------------------------------------------------------------------
# Rules for tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ruled(tmp_path_factory):
    """A model that has a second choice everywhere, and the rows of its pieces."""
    folder = tmp_path_factory.mktemp("models") / "ruled"
    second = [("Q1", "Its "), ("The ", "new "), ("Its ", "roof"), ("roof", "</s>"), ("new ", "</s>"), ("old ", "</s>")]
    liked = [*((before, after, 15.0) for before, after in second), ("Its ", "</s>", 12.0)]
    return folder, scripted.make_scripted(folder, {"Q1": ["The ", "old ", "house"], "new ": ["garden"]}, liked=liked)


RULES = [
    ({}, "The old house"),
    ({"suppress_tokens": ["The ", "roof"]}, "Its"),
    ({"begin_suppress_tokens": ["The "]}, "Its roof"),
    ({"bad_words_ids": [["The ", "old "], ["garden"]]}, "The new"),
    ({"forced_bos_token_id": "Its "}, "Its roof"),
    ({"forced_eos_token_id": "</s>"}, "The old"),
]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("rules, text", RULES)
def test_rules_for_tokens_are_heeded_as_transformers_does(ruled, tmp_path, rules, text, where):
    source, rows = ruled
    (folder := tmp_path / "model").mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if where == "config.json":
        (folder / "generation_config.json").unlink()
    number = lambda value: [number(one) for one in value] if isinstance(value, list) else rows[value]  # noqa: E731
    file = folder / where
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: number(value) for name, value in rules.items()}))
    plain, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor([[rows["Q1"]]])
    written = plain.generate(ids, do_sample=False, max_new_tokens=3)[0, 1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.decode(written, skip_special_tokens=True).strip()
    model, _ = opened(folder)
    assert set(model.token_rules()) == set(rules) <= set(TOKEN_RULES)
    assert texts_of(model, tokenizer, "Q1", SamplingParams(tokens=3, count=2)) == [text] * 2
    assert expected == text


def test_texts_by_other_rules_are_drawn_anew(place, ruled):
    source, rows = ruled
    (folder := place / "model").mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for forbidden in (None, [rows["The "]]):
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**settings, "suppress_tokens": forbidden}))
        assert mapper(place, folder, "--rate", folder, samples=1, tokens=3) == 0
    texts = {file.read_text().strip() for file in (place / "samples").iterdir()}
    assert texts == {'{"Q1": ["The old house"]}', '{"Q1": ["Its roof"]}'}

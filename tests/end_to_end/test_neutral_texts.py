"""Drift in whole runs: what is printed and kept is what plain transformers finds on the saved model."""

import json
import math

import pytest
import reference
from runs import log_of, make_models, merge
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
from modules.config.inputs import SHIPPED, read_neutral_texts
from modules.output.recipe import RECIPE_FILE
from modules.runtime.errors import ConfigError
from modules.scoring.drift import DriftMeter
from modules.scoring.tokenization import MEASURED, WINDOW, neutral_windows

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. " * 12


@pytest.fixture(scope="module", params=["bpe", "spm"])
def models(request, tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), family=request.param)


def recipe_of(folder):
    return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))


def metrics_lines(place):
    return [line for line in log_of(place).splitlines() if line.startswith("Metrics: ")]


def test_drift_is_that_of_the_saved_model(place, models):
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    assert merge(place, models, neutral_texts=[str(place / "plain.txt")]) == 0
    recipe = recipe_of(place / "out")
    found = recipe["metrics"]["merge"]
    before = recipe["metrics"]["base"]["perplexity"]
    base, merged = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (models[0], place / "out"))
    ids = AutoTokenizer.from_pretrained(models[0])(TEXT, add_special_tokens=False)["input_ids"]
    first = [1] if AutoTokenizer.from_pretrained(models[0])("").input_ids else []  # BOS, where the tokenizer adds it
    size = WINDOW - len(first)
    windows = [(*first, *ids[start : start + size]) for start in range(0, len(ids), size)]
    assert len(windows) > 1 and f"Neutral text: {sum(map(len, windows)):,} tokens\n" in log_of(place)
    expected = [*reference.plain_drift(base, merged, windows), reference.plain_drift(base, base, windows)[2]]
    assert expected[0] > 1e-3
    assert [found["kl"], found["top1"], found["perplexity"], before] == pytest.approx(expected, rel=1e-5)
    # After each candidate; in the card, too.
    lines = metrics_lines(place)
    assert len(lines) == 2 and f", KL to base 0.0000 -> {found['kl']:.4f}, " in lines[-1]
    assert f", Perplexity {before:,.2f} -> {found['perplexity']:,.2f}" in lines[-1]
    assert f"| KL to base | 0.0000 | {found['kl']:.4f} |" in (place / "out/README.md").read_text()


@pytest.mark.parametrize("turn", [1, 2])  # before the first candidate's end is in the journal, and after that
def test_a_run_that_goes_on_and_a_replay_are_told_the_same(place, models, monkeypatch, turn):
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    settings = {"neutral_texts": [str(place / "plain.txt")]}
    own, count = DriftMeter.measure, []

    def stopped(self):
        count.append(1)
        if len(count) == turn:
            raise KeyboardInterrupt
        return own(self)

    with monkeypatch.context() as patch:
        patch.setattr(DriftMeter, "measure", stopped)
        assert merge(place, models, **settings) == 130
    assert merge(place, models, "--resume", **settings) == 0
    resumed = recipe_of(place / "out")
    after, merged = resumed["metrics_after"], resumed["metrics"]["merge"]
    assert list(after) == ["1", "2"] and after["2"].items() <= merged.items() and after["1"] != after["2"]
    replay = ["--replay", str(place / "out"), "--output", str(place / "again"), "--source", str(models[0].parent)]
    assert merge_monster.main(replay) == 0
    assert all(recipe_of(place / "again")[key] == resumed[key] for key in ("metrics", "metrics_after"))
    # Which texts are looked at has no part in what is found.
    assert merge(place, models, "--overwrite", neutral_texts=[]) == 0
    recipe = recipe_of(place / "out")
    assert list(recipe["metrics"]["merge"]) == ["total"] and "KL" not in metrics_lines(place)[-1]
    assert recipe_of(place / "out")["phrases"] == resumed["phrases"]


def test_texts_that_can_not_be_read_are_told_before_any_work(place, models, capsys):
    (place / "empty.txt").write_text(" \n", encoding="utf-8")
    (place / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (place / "sub").mkdir()
    texts = ["nowhere.txt", "empty.txt", "bytes.txt", "sub"]
    assert merge(place, models, neutral_texts=texts) == 2
    error = capsys.readouterr().err
    assert "neutral_texts: nowhere.txt: No such file" in error and "empty.txt: the file is empty" in error
    assert "bytes.txt: 'utf-8' codec" in error and "neutral_texts: sub: Is a directory" in error
    assert not (place / "out").exists()


def test_the_programs_own_texts_are_enough():
    texts = read_neutral_texts(None)
    assert len(texts) == len(list(SHIPPED.glob("*.txt"))) == 8 and sum(map(len, texts)) > 30_000
    assert read_neutral_texts([]) == []
    with pytest.raises(ConfigError, match="nowhere"):
        read_neutral_texts(["nowhere.txt"])


@pytest.mark.parametrize("longest", [None, 40])
def test_windows_hold_every_token_once(models, longest):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    windows, none = neutral_windows(tokenizer, [TEXT, "A", TEXT[:50]], len(tokenizer), longest)
    assert none == []
    begins = tokenizer("a")["input_ids"][:-1] if tokenizer("").input_ids else []
    size = min(WINDOW, longest or WINDOW)
    assert all(len(begins) < len(window) <= size and list(window[: len(begins)]) == begins for window in windows)
    tokens = [token for window in windows for token in window[len(begins) :]]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXT, "A", TEXT[:50])]
    assert len(tokens) >= sum(map(len, expected)) - 2 and math.isclose(len(windows[0]), size)
    fewer, _ = neutral_windows(tokenizer, [TEXT], max(expected[0]), longest)  # a row fewer than there are tokens
    assert len(fewer) < len(neutral_windows(tokenizer, [TEXT], len(tokenizer), longest)[0])


@pytest.mark.parametrize("wanted", [30, 64, 10_000])
def test_what_trials_are_judged_by_is_not_what_the_end_is_measured_on(models, wanted):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    texts = [TEXT, "It rains. " * 40]
    windows, beginnings = neutral_windows(tokenizer, texts, len(tokenizer), None, wanted)
    begins = len(tokenizer("a")["input_ids"]) - 1 if tokenizer("").input_ids else 0
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cuts = [min(wanted // 2, len(tokens) // 2) for tokens in whole]
    for some, expected in (
        (beginnings, [tokens[:cut] for tokens, cut in zip(whole, cuts, strict=True)]),
        (windows, [tokens[cut:] for tokens, cut in zip(whole, cuts, strict=True)]),
    ):
        assert [token for window in some for token in window[begins:]] == [token for part in expected for token in part]


def test_of_a_long_text_pieces_from_all_over_it(models):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    long, short = TEXT * 9, TEXT[:300]
    found = neutral_windows(tokenizer, [long, short], len(tokenizer), 40)[0]
    assert MEASURED - 80 <= sum(map(len, found)) <= MEASURED
    first, last = (neutral_windows(tokenizer, [text], len(tokenizer), 40)[0] for text in (TEXT, short))
    assert (found[0], found[-1]) == (first[0], last[-1])

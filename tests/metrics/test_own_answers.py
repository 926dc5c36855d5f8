"""The base's own answers: which prompts count, which positions are compared, what is kept; what is counted in them."""

import json

import pytest
import scripted
import tiny
from huggingface_hub import constants
from transformers import AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.inputs import read_prompts
from modules.config.phrase_lists import Pair
from modules.config.schema import Config, Directories
from modules.metrics import own_answers
from modules.metrics.answers import count_answers, loops, warnings
from modules.metrics.own_answers import Answer, Answers, base_answers, prompts_of
from modules.metrics.texts import FILLED_TO, drift_texts
from modules.model.loading import load_model
from modules.runtime.console import WorkerConsole
from modules.scoring.chats import Asked
from modules.scoring.samples import Written

PROMPTS = ["Her eyes", "The apple", "It sent", "Where is"]


def config_of(tmp_path, prompts=PROMPTS, **settings):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    return Config(Directories("base", "out"), neutral_texts=(), own_texts=(str(file),), **settings)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model, and its tokenizer; the cache is this test's own."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    tokenizer = tiny.bpe_tokenizer()
    folder = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    return load_model(open_checkpoint(folder, "base"), "cpu", "float32"), AutoTokenizer.from_pretrained(folder)


class Heard(WorkerConsole):
    """Keeps warnings."""

    def __init__(self):
        super().__init__(1)
        self.heard = []

    def warning(self, line):
        self.heard.append(line)

    def warnings(self, lines):
        self.heard += lines


def test_half_of_the_prompts_count_if_drift_does(tmp_path):
    free, guarded = config_of(tmp_path), config_of(tmp_path, max_drift=0.1, samples=("More?",))
    assert prompts_of(free, for_chats=True).all == ("Her eyes", "It sent")
    prompts = prompts_of(guarded, for_chats=True)
    assert (prompts.shown, prompts.weighed, prompts.samples) == (
        ("Her eyes", "It sent"),
        ("The apple", "Where is"),
        ("More?",),
    )
    shipped = prompts_of(Config(Directories("base", "out"), drift_weight=1.0, neutral_tokens=500), for_chats=False)
    every = read_prompts(None, False, "own_texts")
    assert shipped.shown == every[::2] and shipped.weighed == every[1::2][:6]


def test_positions_that_predict_a_listed_phrase_are_left_out(base):
    model, tokenizer = base
    given = tuple(tokenizer("Tell me.")["input_ids"])
    text = "It sent Shivers down her spine. His voice"
    tokens = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
    answer = Answer("Tell me.", given, Written(tokens, ended=True))
    pairs = (
        Pair("BAD", " shivers down", "It sent", 1.0),
        Pair("GOOD", "voice", "His ", 1.0, variants=("voice", "spine")),
    )
    config = Config(Directories("base", "out"), neutral_texts=(), bad_phrases=pairs)
    (passage,) = drift_texts(config, model, tokenizer, Answers(shown=(answer,))).own_answers
    assert passage.tokens[: len(given) + len(tokens)] == given + tokens
    assert len(passage.tokens) == len(passage.compared) and len(passage.tokens) % FILLED_TO == 0
    left_out = ""
    for place, token in enumerate(tokens):
        is_compared = passage.compared[len(given) - 1 + place]  # what stands before a token predicts it
        left_out += "" if is_compared else tokenizer.decode([token])
    # A token that writes a letter of a phrase is left out whole.
    assert left_out.replace(" ", "") in ("Shiversdownspinevoice", "Shiversdownspine.voice")
    assert not any(passage.compared[: len(given) - 1]) and not any(passage.compared[len(given) + len(tokens) - 1 :])


def test_answers_are_cut_to_the_tokens_that_count(base):
    model, tokenizer = base
    answers = tuple(Answer(str(size), (5,), Written((7,) * size, ended=False)) for size in (10, 20, 30))
    config = Config(Directories("base", "out"), neutral_texts=(), max_drift=0.1, neutral_tokens=25)
    texts = drift_texts(config, model, tokenizer, Answers(weighed=answers))
    assert [sum(passage.compared) for passage in texts.own_for_trials] == [10, 20]
    both = Config(Directories("base", "out"), max_drift=0.1, neutral_tokens=20)
    texts = drift_texts(both, model, tokenizer, Answers(weighed=answers))
    assert [sum(passage.compared) for passage in texts.own_for_trials] == [10] and len(texts.for_trials) == 2
    assert sum(sum(passage.compared) for passage in texts.neutral_for_trials) <= 20


def test_answers_are_kept_for_the_next_run(base, tmp_path, monkeypatch):
    model, tokenizer = base
    config, console = config_of(tmp_path), Heard()
    found = base_answers(model, tokenizer, config, Asked(), console)
    assert [answer.prompt for answer in found.shown] == PROMPTS[::2] and found.weighed == ()
    (file,) = (tmp_path / "assets/merge-monster/answers").iterdir()
    asked = []
    own = own_answers.sample
    monkeypatch.setattr(own_answers, "sample", lambda *more: asked.append(1) or own(*more))
    assert base_answers(model, tokenizer, config, Asked(), console) == found and asked == []
    # What is noted of a run comes before what is kept.
    file.unlink()
    assert base_answers(model, tokenizer, config, Asked(), console, noted=found) == found and asked == []
    more = base_answers(model, tokenizer, config_of(tmp_path, samples=("More",)), Asked(), console, noted=found)
    assert more.shown == found.shown and len(more.samples) == 1 and len(asked) == 1
    # A damaged file, or one of a larger vocabulary, is as good as none.
    for damaged in (b"{", json.dumps({prompt: {"tokens": [10**6], "ended": True} for prompt in PROMPTS[::2]}).encode()):
        file.write_bytes(damaged)
        asked.clear()
        assert base_answers(model, tokenizer, config, Asked(), console) == found and asked
    other = base_answers(model, tokenizer, config_of(tmp_path, random_seed=3), Asked(), console)
    assert other.shown[0].given == found.shown[0].given and other != found and console.heard == []


def test_a_model_that_answers_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    scripted.make_scripted(tmp_path / "base", {"Q1": [], "Q2": []})
    model = load_model(open_checkpoint(tmp_path / "base", "base"), "cpu", "float32")
    console = Heard()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert base_answers(model, tokenizer, config_of(tmp_path, ["Q1", "Q2"]), Asked(), console) == Answers()
    (line,) = console.heard
    assert "own_texts" in line and "neutral text only" in line


def test_a_prompt_that_is_too_long_is_named_and_left_out(base, tmp_path):
    model, tokenizer = base
    console = Heard()
    found = base_answers(model, tokenizer, config_of(tmp_path, ["apple " * 300, "-", "Her eyes"]), Asked(), console)
    assert [answer.prompt for answer in found.shown] == ["Her eyes"]
    (line,) = console.heard
    assert "tokens long" in line


def test_what_is_counted_in_answers():
    loop = "the rain fell on the roof " * 4
    assert loops(loop) and not loops("the rain fell on the roof " * 3) and not loops("")
    base = count_answers(["one two three four", loop], [True, False])
    assert base == {"words": (4 + 24) / 2, "ends": 0.5, "loops": 0.5}
    assert count_answers([], []) == {}


@pytest.mark.parametrize(
    ("words", "loops", "lines"), [(80, 0, 0), (120, 0, 0), (79, 0, 1), (121, 0, 1), (100, 0.1, 1), (10, 1, 2)]
)
def test_another_length_and_more_loops_are_told(words, loops, lines):
    assert len(warnings({"words": 100.0, "loops": 0.05}, {"words": words, "loops": loops})) == lines
    assert warnings({}, {"words": words, "loops": loops}) == []

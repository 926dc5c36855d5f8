"""Kept texts that teach: which places of them do, what is held out, what the base has ended; bad files."""

import json

import pytest
import tiny
from transformers import AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.phrase_lists import Chat, Message, Pair
from modules.learn.kept_texts import answers_in, occurrences_in, read_kept_texts, taught_by
from modules.model.loading import load_model
from modules.runtime.errors import ConfigError
from modules.scoring.chats import Asked
from modules.scoring.samples import DEFAULT

ASKED = Asked(texts={"Q1": "Question: Q1 Answer: ", "Q2": "Question: Q2 Answer: "})
TEXTS = {
    "Q1": ["Her eyes were filled with determination. It sent shivers down her spine.", "The apple."],
    "Q2": ["Determination, and no shivers down; predetermination."],
}


def chat_pair(phrase, prompt):
    return Pair("BAD", phrase, "", chat=Chat((Message("user", prompt),)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tokenizer = tiny.bpe_tokenizer()
    folder = tiny.make_model(tmp_path_factory.mktemp("m") / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    return load_model(open_checkpoint(folder, "base"), "cpu", "float32"), AutoTokenizer.from_pretrained(folder)


def test_every_place_of_a_phrase_teaches_but_where_it_is_held_out(base):
    model, tokenizer = base
    pairs = [chat_pair("shivers", "Q0"), chat_pair("shivers down", "Q0"), chat_pair("determination", "Q0")]
    answers = answers_in(model, tokenizer, TEXTS, ASKED)

    def found(held_out):
        every = []
        for answer, places in zip(answers, occurrences_in(tokenizer, answers, pairs, held_out), strict=True):
            tokens = answer.given + answer.written.tokens
            assert all(tokens[: place.first][: len(answer.given)] == answer.given for place in places)
            every += [(place.pair, tokenizer.decode(tokens[place.first : place.end]).strip()) for place in places]
        return every

    assert found([]) == [(2, "determination"), (1, "shivers down"), (2, "Determination"), (1, "shivers down")]
    # A phrase that is held out in answers to a prompt teaches in none of them; others do.
    assert found([chat_pair("determination", "Q2")]) == [(2, "determination"), (1, "shivers down"), (1, "shivers down")]


@pytest.mark.parametrize("text", ["Her \u017fhivers down", "Her \u0130nn"])
def test_letters_of_other_cases_end_no_run(base, text):
    """A long s is an s to a pattern that ignores cases, and not to lower(); a dotted I is one letter or two."""
    model, tokenizer = base
    answers = answers_in(model, tokenizer, {"Q1": [text]}, ASKED)
    places = occurrences_in(tokenizer, answers, [chat_pair("shivers", "Q0"), chat_pair("inn", "Q0")], [])
    assert [len(one) for one in places] == [int("hivers" in text)]


def test_a_token_that_ends_where_a_phrase_begins_is_not_of_it(base):
    model, tokenizer = base
    (answer,) = answers_in(model, tokenizer, {"Q1": ['She said "determination" again.']}, ASKED)
    ((place,),) = occurrences_in(tokenizer, [answer], [chat_pair("determination", "Q0")], [])
    tokens = answer.given + answer.written.tokens
    assert tokenizer.decode(tokens[place.first : place.end]) == "determination"


def test_where_a_phrase_teaches_drift_is_not_compared(base):
    model, tokenizer = base
    pairs = [chat_pair("shivers down", "Q0"), chat_pair("determination", "Q0")]
    answers = answers_in(model, tokenizer, TEXTS, ASKED)
    text = taught_by(tokenizer, answers, pairs, [], model.max_tokens)
    assert text.taught == 4 and len(text.passages) == 3 and sorted(text.occurrences) == [0, 2]
    for number, places in text.occurrences.items():
        for place in places:
            assert not any(text.passages[number].compared[place.first - 1 : place.end - 1])


def test_a_short_text_has_ended(base):
    model, tokenizer = base
    answers = answers_in(model, tokenizer, {"Q1": TEXTS["Q1"]}, ASKED)
    assert [answer.prompt for answer in answers] == ["Q1", "Q1"]
    assert [answer.written.ended for answer in answers] == [False, True]
    assert answers[1].written.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answers[1].written.without_end) == "The apple."
    assert tokenizer.decode(answers[0].given) == ASKED.texts["Q1"]


def test_a_long_text_teaches_as_far_as_answers_are_measured(base):
    """It has not ended there, though it is shorter than another one."""
    model, tokenizer = base
    texts = {"Q1": ["It sent shivers down. " * 40, "It sent shivers down. " * 20, "The apple."]}
    long, short, ended = answers_in(model, tokenizer, texts, ASKED)
    room = min(DEFAULT.tokens, model.max_tokens - len(long.given))
    assert [len(long.written.tokens), len(short.written.tokens)] == [room, room]
    assert (long.written.ended, short.written.ended, ended.written.ended) == (False, False, True)


def test_the_first_texts_of_a_prompt_count(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"Q1": ["a"], "Q2": ["b"]}\n{"Q1": ["c"]}\n')
    assert read_kept_texts(str(file)) == {"Q1": ["a"], "Q2": ["b"]}


@pytest.mark.parametrize("content", [None, b"{", b'{"Q1": "a"}\n', json.dumps([1]).encode(), b"\xff\n"])
def test_another_file_is_refused_by_name(tmp_path, content):
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"learn.texts: {file}: "):
        read_kept_texts(str(file))

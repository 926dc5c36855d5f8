"""Contexts of over-used phrases: where they are cut, which of them are listed."""

import pytest

from modules.config.phrase_lists import Chat, Message, Pair
from modules.slop.contexts import (
    FEWEST_TOKENS,
    MOST_CONTEXTS,
    MOST_TOKENS,
    MOST_TRIED,
    candidate_contexts,
    in_turn,
    joined,
    last_sentence,
    last_sentences,
    listed_contexts,
)
from modules.slop.finder import Finding, Text

PROMPTS = ["Describe a house.", "Describe a lake.", "Describe a road."]


def count(text):
    """A token for each word: as many as a context's limits speak of."""
    return len(text.split())


def finding(phrase, places):
    return Finding(phrase, (), len(places), 3, 500.0, 1.0, tuple(places))


def found_in(texts, phrase):
    """Every place of a phrase, whatever its case."""
    return [
        (number, start, start + len(phrase))
        for number, text in enumerate(texts)
        for start in range(len(text.text))
        if text.text[start : start + len(phrase)].lower() == phrase.lower()
    ]


@pytest.mark.parametrize(
    ("before", "cut"),
    [
        ("", ""),
        ("It is a ", "It is a "),  # the beginning of an answer, however short
        (
            "One two three four. Five six seven eight nine ten a ",
            "One two three four. Five six seven eight nine ten a ",
        ),
        (f"{'long ' * 20}gone. {'Word ' * 9}and ", f"{'Word ' * 9}and "),
        (f"{'long ' * 9}gone! Short again? It was a ", f"{'long ' * 9}gone! Short again? It was a "),
        (f"Dear all,\n\n{'Word ' * 10}", "Word " * 10),
        (f"\u201c{'So ' * 11}it is.\u201d {'Word ' * 12}", "Word " * 12),
        (f"Begin. {'word ' * 60}", "word " * MOST_TOKENS),
        (f"{'word ' * 30}, 3.5 of {'word ' * 15}", f"{'word ' * 22}, 3.5 of {'word ' * 15}"),  # no sentence ends there
    ],
)
def test_the_last_sentences(before, cut):
    found = last_sentences(before, count)
    assert found == cut and before.endswith(found) and count(found) <= MOST_TOKENS
    assert count(found) >= FEWEST_TOKENS or found == before


def test_a_word_that_has_too_many_tokens_of_its_own():
    assert last_sentences("x" * 100, len) == "" and last_sentences("word " + "x" * 38 + " ", len) == "x" * 38 + " "


def test_shown_is_the_last_sentence():
    assert last_sentence("It was. So it ") == "So it " and last_sentence("So it ") == "So it "


def test_a_text_goes_on_from_its_opening():
    assert joined("The old house stood", "at the lane") == "The old house stood at the lane"
    assert joined("The old house", ", grey") == "The old house, grey" and joined("The", "") == "The"


def test_the_first_of_every_owner_then_the_second():
    assert in_turn(["a1", "a2", "b1", "a3", "b2"], lambda item: item[0]) == ["a1", "b1", "a2", "b2", "a3"]


def test_a_pair_for_each_place_of_the_listed_spelling():
    texts = [
        Text(0, "The house has a warm smile."),
        Text(0, "Warm smile on every wall."),
        Text(1, "The lake gives a warm smile. The lake gives a warm smile."),
        Text(1, "The lake gives a warm smile."),  # said already
        Text(2, "A road with a warm smile"),
    ]
    phrase = finding("warm smile", found_in(texts, "warm smile"))
    found = candidate_contexts(phrase, texts, PROMPTS, dict.fromkeys(PROMPTS, ""), count)
    assert [(prompt, pair.chat.answer) for pair, prompt in found.items()] == [
        (0, "The house has a "),
        (1, "The lake gives a "),
        (2, "A road with a "),
        (1, "The lake gives a warm smile. The lake gives a "),
    ]
    assert all(pair.chat.messages == (Message("user", PROMPTS[prompt]),) for pair, prompt in found.items())
    thought = candidate_contexts(phrase, texts, PROMPTS, dict.fromkeys(PROMPTS, "</think>"), count)
    assert [pair.context for pair in thought] == [f"</think>{pair.context}" for pair in found]
    assert all((pair.kind, pair.phrase) == ("BAD", "warm smile") for pair in found)
    plain = candidate_contexts(phrase, texts, ["In the house,", "At the lake", "And so"], None, count)
    assert [pair.context for pair in plain][:2] == [
        "In the house, The house has a ",
        "At the lake The lake gives a ",
    ]
    assert all(pair.chat is None for pair in plain)


def test_no_more_places_are_tried_than_the_most():
    texts = [Text(number % 3, f"House {number} has a warm smile.") for number in range(40)]
    found = candidate_contexts(
        finding("warm smile", found_in(texts, "warm smile")), texts, PROMPTS, dict.fromkeys(PROMPTS, ""), count
    )
    assert len(found) == MOST_TRIED and list(found.values()) == [0, 1, 2] * 4


def candidates(prompts):
    """A pair for each of these prompts, called a, b, c and so on."""
    answers = [chr(ord("a") + number) for number in range(len(prompts))]
    chats = [Chat((Message("user", PROMPTS[prompt]),), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return {
        Pair("BAD", "warm smile", chat.answer, chat=chat): prompt for chat, prompt in zip(chats, prompts, strict=True)
    }


def test_listed_are_probable_ones_the_best_of_every_prompt_first():
    some = candidates([0, 0, 1, 2, 2])
    listed = listed_contexts(some, [0.06, 0.5, 0.05, 0.04, 0.3])
    assert [pair.context for pair in listed] == ["b", "e", "c", "a"]
    assert listed_contexts(some, [0.06, 0.5, 0.05, 0.04, 0.049]) == []  # two prompts are too few
    many = candidates([0, 1, 2] * 4)
    assert [pair.context for pair in listed_contexts(many, [0.5] * 12)] == list("abcdefghijkl")[:MOST_CONTEXTS]

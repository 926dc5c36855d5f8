"""Contexts of over-used phrases: where they are cut, which of them are listed."""

import pytest

from modules.config import Chat, Message, Pair
from modules.discovery.contexts import (
    FEWEST_TOKENS,
    MOST_CONTEXTS,
    MOST_TOKENS,
    MOST_TRIED,
    Possible,
    in_turn,
    joined,
    last_sentences,
    last_words,
    listed_contexts,
    possible_contexts,
)
from modules.discovery.finder import Finding, Text

PROMPTS = ["Describe a house.", "Describe a lake.", "Describe a road."]


def count(text):
    """A token for each word: as many as a context's limits speak of."""
    return len(text.split())


def finding(phrase, places):
    return Finding(phrase, len(places), len(places), 3, 500.0, 1.0, 250.0, 9.0, tuple(places))


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
    assert last_words("It was. So it ") == "So it " and last_words("So it ") == "So it "


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
    found = possible_contexts(phrase, texts, PROMPTS, True, count)
    assert [(one.prompt, one.pair.chat.answer) for one in found] == [
        (0, "The house has a "),
        (1, "The lake gives a "),
        (2, "A road with a "),
        (1, "The lake gives a warm smile. The lake gives a "),
    ]
    assert all(one.pair.chat.messages == (Message("user", PROMPTS[one.prompt]),) for one in found)
    assert all((one.pair.kind, one.pair.phrase) == ("BAD", "warm smile") for one in found)
    plain = possible_contexts(phrase, texts, ["In the house,", "At the lake", "And so"], False, count)
    assert [one.pair.context for one in plain[:2]] == [
        "In the house, The house has a ",
        "At the lake The lake gives a ",
    ]
    assert all(one.pair.chat is None for one in plain)


def test_no_more_places_are_tried_than_the_most():
    texts = [Text(number % 3, f"House {number} has a warm smile.") for number in range(40)]
    found = possible_contexts(finding("warm smile", found_in(texts, "warm smile")), texts, PROMPTS, True, count)
    assert len(found) == MOST_TRIED and [one.prompt for one in found] == [0, 1, 2] * 4


def possible(prompt, answer):
    chat = Chat((Message("user", PROMPTS[prompt]),), answer)
    return Possible(Pair("BAD", "warm smile", answer, chat=chat), prompt)


def test_listed_are_probable_ones_the_best_of_every_prompt_first():
    some = [possible(0, "a"), possible(0, "b"), possible(1, "c"), possible(2, "d"), possible(2, "e")]
    listed = listed_contexts(some, [0.06, 0.5, 0.05, 0.04, 0.3])
    assert [pair.context for pair in listed] == ["b", "e", "c", "a"]
    assert listed_contexts(some, [0.06, 0.5, 0.05, 0.04, 0.049]) == []  # two prompts are too few
    many = [possible(number % 3, str(number)) for number in range(12)]
    assert [pair.context for pair in listed_contexts(many, [0.5] * 12)] == [str(n) for n in range(MOST_CONTEXTS)]

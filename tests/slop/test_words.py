"""Words: what parts them, where sentences begin, which are akin, when a text loops."""

import pytest

from modules.slop.words import Stems, loops, share_stem, words_of


def texts(text):
    return [word.text for word in words_of(text)]


def test_a_word_is_where_it_stands():
    text = "She couldn’t — “Help!”\nNobody did."
    words = words_of(text)
    assert [text[word.start : word.end] for word in words] == ["She", "couldn’t", "Help", "Nobody", "did"]
    assert [word.text for word in words] == ["she", "couldn't", "help", "nobody", "did"]
    assert [word.opens for word in words] == [True, False, True, True, False]
    assert [word.follows for word in words] == [False, True, False, False, True]
    assert [word.capital for word in words] == [True, False, True, True, False]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a well-known co-op", ["a", "well-known", "co-op"]),
        ("in 1984, the 21st of 3x", ["in", "the", "of"]),
        ("l'homme qu’il d'accord", ["l", "homme", "qu", "il", "d", "accord"]),
        ("the dogs' _bone_ **fell**", ["the", "dogs", "bone", "fell"]),
        ("हिन्दी भाषा है।", ["हिन्दी", "भाषा", "है"]),
        ("", []),
        ("... 12 %", []),
        ("cafe\u0301", ["caf\u00e9"]),
    ],
)
def test_what_a_word_is(text, expected):
    assert texts(text) == expected


@pytest.mark.parametrize("between", [", ", " - ", "; ", "\n", " 12 ", " (", "... "])
def test_a_word_follows_if_only_spaces_are_between(between):
    assert not words_of(f"one{between}two")[1].follows
    assert words_of("one  two")[1].follows


@pytest.mark.parametrize(
    "one, other", [("smile", "smiling"), ("story", "stories"), ("run", "running"), ("king's", "kings"), ("is", "is")]
)
def test_forms_of_one_word(one, other):
    assert share_stem(one, other) and share_stem(other, one)
    assert other in Stems([one]) and one in Stems(["nothing", other])


@pytest.mark.parametrize("one, other", [("smile", "small"), ("is", "isn't"), ("light", "lighthouse"), ("sea", "see")])
def test_other_words(one, other):
    assert not share_stem(one, other) and other not in Stems([one])


def test_stems_of_parts_between_hyphens():
    assert "far-travelled" in Stems(["travel"]) and "travel" in Stems(["far-travelled"])


def test_a_text_loops_if_it_says_the_same_again():
    assert loops(words_of("again and again and " * 20))
    assert not loops(words_of("she said that he had said what they all say")) and not loops([])


def test_a_long_text_does_not_loop_as_its_words_return():
    sentences = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}word" for i in range(150)]
    assert not loops(words_of(" ".join(sentences * 4)))

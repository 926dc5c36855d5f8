"""Text: where one that was broken off says so."""

import pytest

from modules.runtime.text import ended, whole_sentences


@pytest.mark.parametrize(
    "text",
    [
        "A b.",
        "A b!",
        "A b?\n",
        'A "b."',
        "A (b.)",
        "\u201cA b.\u201d",
        "**A b.**",
        "A b...",
        "A b\u2026",
        "\u5979\u3002\u300d",
        "",
    ],
)
def test_a_whole_sentence_stays_as_it_is(text):
    assert ended(text) == text.rstrip()


@pytest.mark.parametrize("text", ["A b", "A. B", "A b,", "A b:", "A b. \u201cC", "- a\n- b", "3.5", "\u5979\u5fae"])
def test_what_was_broken_off_gets_an_ellipsis(text):
    assert ended(text) == ended(f"{text} \n") == f"{text}\u2026"


@pytest.mark.parametrize(
    "text, whole",
    [
        ("A b. C d", "A b."),
        ("A b.\n\nC? D e", "A b.\n\nC?"),
        ('"A b!" he s', '"A b!"'),
        ("**A b.** C", "**A b.**"),
        ("\u5979\u3002\u300d\u5fae", "\u5979\u3002\u300d"),
        ("A 3.5 b", "A 3.5"),
        ("1. A b\n2. C", "1. A b\n2."),
        ("A b. 1. C", "A b."),
        ("A b.c d", "A b.c"),
        ("A b. ", "A b."),
        ("Abc", "Abc"),
        (" \n", ""),
    ],
)
def test_a_text_in_whole_sentences(text, whole):
    assert whole_sentences(text) == whole

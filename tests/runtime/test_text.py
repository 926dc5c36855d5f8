"""Text: where one that was broken off says so."""

import pytest

from modules.runtime.text import ended


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

"""Matching: what stands in a text, in any script and in any form of it; how many words there are."""

import random
import re
import unicodedata

import pytest

from modules.slop.matching import finder, plain, word_count


def times(phrase, text):
    return len(finder([plain(phrase)]).findall(plain(text)))


@pytest.mark.parametrize(
    ("phrase", "text", "expected"),
    [
        # what begins or ends in no letter
        ("\u2014", "dark\u2014her \u2014 x\u2014", 3),
        (", but", "dark, but soft, butter", 1),
        ("no.", "no.x no. \u201cno.\u201d piano.", 3),
        ("**", "a **bold** word", 2),
        ("...", "wait... what", 1),
        ("'tis", "'Tis. It'tis", 2),
        ("\u2764\ufe0f", "\u2764 \u2764\ufe0f", 2),
        ("\U0001f60a", "so\U0001f60aso", 1),
        ("- ", "one - two", 1),
        # whole words
        ("mix", "a mix, mixed remix mix's mix_a mix", 3),
        ("20", "20 2024 120 20%", 2),
        ("caf\u00e9", "CAF\u00c9 caf\u00e9s", 1),
        ("cafe", "cafe\u0301", 0),
        ("\u0928\u092e\u0938", "\u0928\u092e\u0938\u094d\u0924\u0947", 0),  # Hindi, within a word
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928\u092e\u0938\u094d\u0924\u0947 \u091c\u0940", 1),
        # scripts without spaces
        ("\u5fae\u7b11", "\u5979\u5fae\u7b11\u7740\u3002\u5fae\u7b11", 2),
        ("AI", "\u7528AI\u5199, AIs", 1),
        ("A\u5fae", "xA\u5fae\u7b11 \u7528A\u5fae", 1),
        ("\u5fae\u7b11A", "\u5fae\u7b11A\u3002 \u5fae\u7b11As", 1),
        ("\u30ab\u30d5\u30a7", "\u5f7c\u306f\u30ab\u30d5\u30a7\u3067", 1),  # Japanese
        ("\u5fae\u7b11\u3080", "\u5f7c\u5973\u306f\u5fae\u7b11\u3080\u3002", 1),
        ("\u0e22\u0e34\u0e49\u0e21", "\u0e40\u0e18\u0e2d\u0e22\u0e34\u0e49\u0e21\u0e43\u0e2b\u0e49", 1),  # Thai
        ("\u0e22\u0e34", "\u0e40\u0e18\u0e2d\u0e22\u0e34\u0e49\u0e21\u0e43\u0e2b\u0e49", 0),  # without its tone mark
        ("\ubbf8\uc18c", "\uadf8\ub140\uc758 \ubbf8\uc18c\ub97c \ud070\ubbf8\uc18c", 1),  # Korean, and its particle
        ("AI", "AI\ub294", 1),
        # forms that mean the same, and forms that do not
        ("caf\u00e9", "cafe\u0301", 1),
        ("cafe\u0301", "caf\u00e9", 1),
        ("\u304c", "\u304b\u3099", 1),
        ("don't", "don\u2019t don\u2018t don\u02bct don\u00b4t", 4),
        ("don\u2019t", "don't", 1),
        ('"no"', "\u201cno\u201d \u201eno\u201c", 2),
        ("well-known", "well\u2010known well\u2011known well\u2013known", 2),
        ("\u2014", "a\u2013b a-b a\u2212b", 0),
        ("\u2013", "a\u2014b a-b", 0),
        ("wait\u2026", "wait...", 1),
        ("wait...", "wait\u2026", 1),
        ("hello!", "\uff28\uff45llo\uff01", 1),
        ("\u30ab", "\uff76", 1),
        ("find", "\ufb01nd", 1),
        ("testament", "testa\u00adment tes\u200btament", 2),
        ("a mix", "A\u00a0MIX a\n mix", 2),
        ("stra\u00dfe", "STRASSE Stra\u00dfe", 2),
        ("\u03bb\u03cc\u03b3\u03bf\u03c2", "\u039b\u038c\u0393\u039f\u03a3", 1),
    ],
)
def test_what_stands_there(phrase, text, expected):
    assert times(phrase, text) == expected


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_form_of_a_text_does_not_matter(form):
    text = "Caf\u00e9, \u304c\u307e\u3093, \ubbf8\uc18c, Vi\u1ec7t Nam\u2014na\u00efve."
    for phrase in ("caf\u00e9", "\u304c\u307e", "\ubbf8\uc18c", "vi\u1ec7t", "na\u00efve", "\u2014na\u00efve."):
        assert times(unicodedata.normalize(form, phrase), text) == 1
        assert times(phrase, unicodedata.normalize(form, text)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_against_plain_counting(seed):
    """In a script without spaces as often as it stands there; in one with them, as Python's whole words."""
    chance = random.Random(seed)
    for letters, count in (
        ("\u5fae\u7b11\u5979\u3002\u2014", lambda phrase, text: text.count(phrase)),
        ("ab .\u2014", lambda phrase, text: len(re.findall(as_words(phrase), " ".join(text.split())))),
    ):
        for _ in range(200):
            text = "".join(chance.choices(letters, k=60))
            phrase = " ".join("".join(chance.choices(letters, k=chance.randint(1, 3))).split())
            assert times(phrase, text) == (count(phrase, text) if phrase else 0), (phrase, text)


def as_words(phrase):
    first, last = (r"(?<!\w)" if phrase[0].isalpha() else ""), (r"(?!\w)" if phrase[-1].isalpha() else "")
    return f"{first}{re.escape(phrase)}{last}"


def test_the_longest_counts_where_several_begin():
    found = finder(map(plain, ["\u5fae", "\u5fae\u7b11", "a", "a b", "\u2014", "\u2014a"]))
    assert found.findall("\u5fae\u7b11\u5fae a b\u2014a \u2014") == [
        *("\u5fae\u7b11", "\u5fae", "a b", "\u2014a", "\u2014"),
    ]


def test_nothing_is_found_of_no_phrases():
    assert finder([]).findall("any text") == finder([""]).findall("any text") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("don't stop \u2014 now, caf\u00e9.", 5),
        ("\u5979\u5fae\u7b11\u7740\u770b\u7740\u7a97\u5916\u3002", 8),
        ("\u5979\u7528AI\u5199\u4f5c, 2024\u5e74\u3002", 7),
        ("\u5979\u8bf4\u201cdon't go\u201d\u3002", 4),
        ("\u5f7c\u5973\u306f\u30ab\u30d5\u30a7\u3067", 7),
        ("\u30b3\u30fc\u30d2\u30fc", 4),
        ("\u0e22\u0e34\u0e49\u0e21", 2),  # marks belong to their letters
        ("\ub098\ub294 \uac04\ub2e4", 2),
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u091c\u0940", 2),
    ],
)
def test_words_by_the_text_s_own_script(text, expected):
    assert word_count(text) == expected

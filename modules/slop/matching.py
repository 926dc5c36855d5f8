"""Finds phrases in a text, and counts its words, in any script.

Knows: Unicode: scripts, letters and marks, equivalent forms of a text. Refuses to know: rates, models, how the texts
were made.
"""

import unicodedata
from collections.abc import Iterable

import regex

# Scripts without spaces between words. Each of their characters counts as a word, as in word processors.
_UNSPACED = (
    r"[[\p{L}\p{M}\p{N}]&&[\p{Ideographic}\p{scx=Hiragana}\p{scx=Katakana}\p{Line_Break=Complex_Context}\p{Tibetan}]]"
)
_SPACED = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--{_UNSPACED}]"
# Korean writes particles after a word without a space.
_NO_WORD_BEFORE = rf"(?<!{_SPACED})"
_NO_WORD_AFTER = rf"(?![{_SPACED}--\p{{Hangul}}]|\p{{M}})"

_BEGINS_WORD = regex.compile(rf"[{_SPACED}--\p{{M}}]", regex.V1)
_ENDS_WORD = regex.compile(rf"[{_SPACED}--\p{{M}}]\p{{M}}*\Z", regex.V1)
_ENDS_LETTER = regex.compile(r"[\p{L}\p{N}]\p{M}*\Z", regex.V1)
_CHARACTER = regex.compile(rf"[{_UNSPACED}--\p{{M}}]", regex.V1)
_WORD_BETWEEN = regex.compile(rf"{_SPACED}+(?:['’.,-]{_SPACED}+)*", regex.V1)

_INVISIBLE = regex.compile(r"[\p{Variation_Selector}\u00ad\u200b\u2060\ufeff]")
_PRESENTATION_FORMS = regex.compile(r"[\ufb00-\uffef]+")  # ligatures, small, full and half width
# Forms that mean the same. A hyphen is no dash, and a short dash no long one.
_ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u00b4\u2018\u2019\u201a\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **dict.fromkeys("\u2010\u2011", "-"),
        "\u2026": "...",
    }
)


def plain(text: str) -> str:
    """Text for comparison: in lower case, in one of its equivalent forms, without invisible characters."""
    text = _PRESENTATION_FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), _INVISIBLE.sub("", text))
    return " ".join(unicodedata.normalize("NFC", text.translate(_ALIKE).casefold()).split())


def finder(phrases: Iterable[str]) -> regex.Pattern[str]:
    """A pattern that finds phrases in a text, both in the form of `plain`; of several at one position, the longest.

    A phrase that begins or ends in a letter or a digit must begin or end at a word boundary there, in scripts that
    separate words by spaces. Signs, and characters of other scripts, match anywhere.
    """
    longest_first = sorted({phrase for phrase in phrases if phrase}, key=lambda phrase: (-len(phrase), phrase))
    return regex.compile("|".join(map(_bounded, longest_first)) or r"(?!)", regex.V1)


def _bounded(phrase: str) -> str:
    lookbehind = _NO_WORD_BEFORE if _BEGINS_WORD.match(phrase) else ""
    lookahead = r"(?!\p{M})" if _ENDS_LETTER.search(phrase) else ""
    lookahead = _NO_WORD_AFTER if _ENDS_WORD.search(phrase) else lookahead
    return f"{lookbehind}{regex.escape(phrase, special_only=True)}{lookahead}"


def word_count(text: str) -> int:
    """The number of words: parts between spaces; in scripts without spaces each character is one."""
    words = 0
    for piece in text.split():
        characters = len(_CHARACTER.findall(piece))
        words += characters + len(_WORD_BETWEEN.findall(piece)) if characters else 1
    return words

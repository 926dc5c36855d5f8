"""The words of a text: where they stand, and which of them are forms of one word.

Knows: what separates words and sentences, word stems. Refuses to know: languages, how frequent a word is.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import regex

LOOPING = 0.4  # the smallest share of distinct words in a text that does not repeat itself
STRETCH = 200  # words that are looked at together: the longer a text, the more of its words come again anyway

# An article or pronoun that is short of its vowel, as in the French "l'homme", is a word of its own. An apostrophe or a
# hyphen within any other word belongs to it. What contains a digit is no word.
_WORD = regex.compile(
    r"(?<![\p{L}\p{M}\p{N}])(?:\p{L}{1,2}['’](?=[aeiouyhàâéèêëîïôœùûáíóúò])"
    r"|[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*(?![\p{L}\p{M}\p{N}]))",
    regex.IGNORECASE,
)
_OPENING = regex.compile(r'[\n:…"“«„]|\p{Sentence_Terminal}')


class Word(NamedTuple):
    """A word and where it stands."""

    text: str  # in lower case, with composed letters and straight apostrophes
    start: int  # first character in the text
    end: int
    capital: bool
    opens: bool  # a sentence, a line or direct speech
    follows: bool  # the word before it, with nothing but spaces between them


def words_of(text: str) -> list[Word]:
    """All words of a text, in order."""
    words = list[Word]()
    last_end = 0
    for match in _WORD.finditer(text):
        start, end = match.span()
        gap = text[last_end:start]
        lower = unicodedata.normalize("NFC", match[0].lower()).replace("’", "'").rstrip("'")
        opens = last_end == 0 or _OPENING.search(gap) is not None
        follows = last_end > 0 and not gap.strip() and "\n" not in gap
        words.append(Word(lower, start, end, text[start].isupper(), opens, follows))
        last_end = end
    return words


def loops(words: Sequence[Word]) -> bool:
    """Whether a text repeats itself: too few of its words are distinct, counted in stretches."""
    texts = [word.text for word in words]
    distinct = sum(len(set(texts[first : first + STRETCH])) for first in range(0, len(texts), STRETCH))
    return distinct < LOOPING * len(texts)


def share_stem(first: str, second: str) -> bool:
    """Whether two words are taken for forms of one: they begin with the same three letters or more, behind which one
    has at most one letter, the other at most four (smile and smiling, story and stories, run and running).

    A rule of thumb: stop and store count as forms of one word, smiling and smiled do not.
    """
    alike = 0
    for letter, other in zip(first, second, strict=False):
        if letter != other:
            break
        alike += 1
    shorter, longer = sorted((len(first), len(second)))
    return first == second or (alike >= 3 and shorter - alike <= 1 and longer - alike <= 4)


class Stems:
    """The stems of some words: a word is in them if it, or a part of it between hyphens, shares one."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = defaultdict[str, set[str]](set)  # by their first three letters
        for word in words:
            for part in (word, *word.split("-")):
                self._words[part[:3]].add(part)

    def __contains__(self, word: str) -> bool:
        for part in (word, *word.split("-")):
            if any(share_stem(part, other) for other in self._words.get(part[:3], ())):
                return True
        return False

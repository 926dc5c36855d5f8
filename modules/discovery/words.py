"""The words of a text, where they stand, and which of them are akin.

Knows: what parts words and sentences, endings. Refuses to know: languages, how frequent anything is.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import regex

LOOPING = 0.4  # the least share of distinct words in a text that goes on
STRETCH = 200  # words: the longer a text, the more of its words return, whether it loops or not

# An article or pronoun that is short of its vowel, as French writes "l'homme", is a word of its own. An apostrophe or a
# hyphen within any other word belongs to it. What has a digit in it is no word.
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
    opens: bool  # a sentence, or a line, or something that is said
    follows: bool  # the word before it, with nothing but spaces between them


def words_of(text: str) -> list[Word]:
    """All words of a text, in order."""
    words, before = list[Word](), 0
    for match in _WORD.finditer(text):
        gap, (start, end) = text[before : match.start()], match.span()
        opens = before == 0 or _OPENING.search(gap) is not None
        follows = before > 0 and not gap.strip() and "\n" not in gap
        words.append(Word(_plain(match[0]), start, end, text[start].isupper(), opens, follows))
        before = end
    return words


def _plain(word: str) -> str:
    return unicodedata.normalize("NFC", word.lower()).replace("’", "'").rstrip("'")


def loops(words: Iterable[Word]) -> bool:
    """Whether a text says the same again and again: of its words, stretch by stretch, too few are distinct."""
    texts = [word.text for word in words]
    distinct = sum(len(set(texts[first : first + STRETCH])) for first in range(0, len(texts), STRETCH))
    return distinct < LOOPING * len(texts)


def share_stem(one: str, other: str) -> bool:
    """Whether two words are taken for forms of one: they begin alike with at least three letters, and behind those the
    one has at most one letter of its own, the other at most four (smile and smiling, story and stories, run and
    running). This takes some for akin that are not, such as stop and store, and misses some, smiling and smiled."""
    differing = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    alike = next(differing, min(len(one), len(other)))
    shorter, longer = sorted((len(one), len(other)))
    return one == other or (alike >= 3 and shorter - alike <= 1 and longer - alike <= 4)


class Stems:
    """The stems of some words: a word is in them if it, or a part of it between hyphens, shares one."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = defaultdict[str, set[str]](set)  # by how they begin
        for word in words:
            for part in (word, *word.split("-")):
                self._words[part[:3]].add(part)

    def __contains__(self, word: str) -> bool:
        return any(
            share_stem(part, other) for part in (word, *word.split("-")) for other in self._words.get(part[:3], ())
        )

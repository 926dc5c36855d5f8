"""The words of a text: their positions, and which of them are forms of one word.

Knows: the separators of words and sentences, word stems. Refuses to know: languages, how frequent a word is.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import regex

LOOPING = 0.4  # the smallest share of distinct words in a text that does not repeat itself
STRETCH = 200  # words that are examined together: in a longer text more words recur anyway

# An elided article or pronoun, as in the French "l'homme", is a word of its own. An apostrophe or a hyphen within any
# other word belongs to it. What contains a digit is no word.
_WORD = regex.compile(
    r"(?<![\p{L}\p{M}\p{N}])(?:\p{L}{1,2}['’](?=[aeiouyhàâéèêëîïôœùûáíóúò])"
    r"|[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*(?![\p{L}\p{M}\p{N}]))",
    regex.IGNORECASE,
)
_OPENING = regex.compile(r'[\n:…"“«„]|\p{Sentence_Terminal}')


class Word(NamedTuple):
    """A word and its position."""

    text: str  # in lower case, with composed letters and straight apostrophes
    start: int  # first character in the text
    end: int
    capital: bool
    opens: bool  # a sentence, a line or direct speech
    follows: bool  # the previous word, with only spaces between them


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
    distinct = sum(len(set(texts[start : start + STRETCH])) for start in range(0, len(texts), STRETCH))
    return distinct < LOOPING * len(texts)


def share_stem(first: str, second: str) -> bool:
    """Whether two words count as forms of one: they begin with the same letters, at least three; after these, one has
    at most one letter, the other at most four (smile and smiling, story and stories, run and running).

    A rule of thumb: stop and store count as forms of one word, smiling and smiled do not.
    """
    shared = 0
    for letter, other_letter in zip(first, second, strict=False):
        if letter != other_letter:
            break
        shared += 1
    shorter, longer = sorted((len(first), len(second)))
    return first == second or (shared >= 3 and shorter - shared <= 1 and longer - shared <= 4)


class Stems:
    """The stems of some words. `in` tests whether a word, or a part of it between hyphens, shares one."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = defaultdict[str, set[str]](set)  # by their first three letters
        for word in words:
            for part in (word, *word.split("-")):
                self._words[part[:3]].add(part)

    def __contains__(self, word: str) -> bool:
        for part in (word, *word.split("-")):
            if any(share_stem(part, known_word) for known_word in self._words.get(part[:3], ())):
                return True
        return False

"""Where the words and phrases of many texts stand, of those that may be findings.

Knows: which phrases come into question, how widespread they are. Refuses to know: rates, ranking, how a phrase is
shown.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modules.discovery.words import Stems, Word, words_of
from modules.mapper.grammar import Grammar

LONGEST = 5  # words

Phrase = tuple[str, ...]
Place = tuple[int, int]  # number of a text, and in it of the phrase's first word


@dataclass(frozen=True)
class Sample:
    """A text as its words."""

    prompt: int
    words: Sequence[Word]


def count_phrases(
    samples: Sequence[Sample], prompts: Sequence[str], grammar: Grammar, least: int
) -> dict[Phrase, list[Place]]:
    """The places of all words and of all phrases of up to LONGEST words that samples of at least `least` prompts have.

    A phrase begins with a content word or a sentence, ends in no word that `grammar` refuses, and goes over no
    punctuation and no digit. Where a content word of it shares a stem with the sample's prompt, it does not count.
    """
    own = [_own_words(sample, prompts[sample.prompt], grammar) for sample in samples]
    spread = defaultdict[str, set[int]](set)
    for sample, mine in zip(samples, own, strict=True):
        for word in mine:
            spread[word].add(sample.prompt)
    # A phrase is no more widespread than any of its words.
    widespread = {word for word, among in spread.items() if len(among) >= least}
    places = defaultdict[Phrase, list[Place]](list)
    for number, (sample, mine) in enumerate(zip(samples, own, strict=True)):
        for first, phrase in _phrases(sample.words, mine & widespread, grammar):
            places[phrase].append((number, first))
    return {phrase: found for phrase, found in places.items() if len(prompts_of(found, samples)) >= least}


def _own_words(sample: Sample, prompt: str, grammar: Grammar) -> set[str]:
    """The words of a sample that its prompt has not brought."""
    asked = Stems({word.text for word in words_of(prompt)} - grammar.never_first)
    words = {word.text for word in sample.words}
    return {word for word in words if not grammar.begins(word) or word not in asked}


def _phrases(words: Sequence[Word], known: set[str], grammar: Grammar) -> Iterator[tuple[int, Phrase]]:
    """All phrases of known words that may be findings, each with the number of its first word."""
    for first, word in enumerate(words):
        if not word.opens and not grammar.begins(word.text):
            continue
        phrase: Phrase = ()
        for other in words[first : first + LONGEST]:
            if other.text not in known or (phrase and not other.follows):
                break
            phrase = (*phrase, other.text)
            if grammar.ends(other.text):
                yield first, phrase


def prompts_of(places: Sequence[Place], samples: Sequence[Sample]) -> set[int]:
    """The prompts in whose samples a phrase is."""
    return {samples[number].prompt for number, _ in places}


def parts_of(phrase: Phrase) -> Iterator[Phrase]:
    """Every run of words in a phrase, itself included."""
    for first in range(len(phrase)):
        for end in range(first + 1, len(phrase) + 1):
            yield phrase[first:end]

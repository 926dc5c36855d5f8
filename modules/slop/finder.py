"""What many texts over-use, most telling first.

Knows: which phrases come into question, how often they are written, how often people write them. Refuses to know:
where texts and rates come from, what a finding is used for.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from modules.mapper.grammar import Grammar
from modules.slop.human_rates import MILLION, HumanRates
from modules.slop.words import Stems, Word, loops, words_of

LONGEST = 5  # words of a phrase
LEAST_PROMPTS = 5
LEAST_PROMPTS_OF_A_NAME = 4
LEAST_RATIO = 20.0
SMOOTHING = 1.0  # per million, added to every human rate: none is known more exactly
NEARLY_ALWAYS = 0.9  # the share of a name's occurrences with capital letters

Phrase = tuple[str, ...]
Place = tuple[int, int]  # number of a text, and in it of the phrase's first word


@dataclass(frozen=True)
class Text:
    """A generated text, and the number of the prompt that it answers."""

    prompt: int
    text: str

    @cached_property
    def words(self) -> Sequence[Word]:
        """Its words, in order."""
        return words_of(self.text)


@dataclass(frozen=True)
class Finding:
    """A word or phrase that the texts over-use. Where a prompt has a word of the phrase, its texts are not counted."""

    phrase: str  # as it is written most often
    words: Phrase
    texts: int
    prompts: int
    per_million: float  # texts with it (a text may repeat it), by words of all texts
    human: float  # occurrences per million words
    places: tuple[tuple[int, int, int], ...]  # number of the text, first character in it, one behind the last

    @property
    def times(self) -> int:
        """How often the texts have it."""
        return len(self.places)

    @property
    def ratio(self) -> float:
        """By how much it is more frequent than people write it."""
        return self.per_million / (self.human + SMOOTHING)

    @property
    def score(self) -> float:
        """By what findings are ranked: of how many prompts, and by how much."""
        return math.sqrt(self.prompts) * math.log(self.ratio)


@dataclass(frozen=True)
class Findings:
    """What was found in many texts, the highest score first."""

    phrases: tuple[Finding, ...]
    names: tuple[Finding, ...]
    looping: int  # number of texts that repeat themselves; they are not counted
    words: int  # of all other texts


def find(texts: Sequence[Text], prompts: Sequence[str], human: HumanRates) -> Findings:
    """The words and phrases that texts of many prompts have and people seldom write."""
    looping = [loops(text.words) for text in texts]
    # A text that repeats itself counts as an empty one: the others keep their numbers.
    texts = [Text(text.prompt, "") if loop else text for text, loop in zip(texts, looping, strict=True)]
    total = sum(len(text.words) for text in texts)
    phrases = list[Finding]()
    names = list[Finding]()
    for phrase, places in count_phrases(texts, prompts, human.grammar, LEAST_PROMPTS_OF_A_NAME).items():
        occurrences = [(number, texts[number].words[first : first + len(phrase)]) for number, first in places]
        finding = _finding(phrase, occurrences, texts, total, human)
        if finding.ratio < LEAST_RATIO:
            continue
        if human.grammar.names_by_capitals and _is_name([words for _, words in occurrences]):
            names.append(finding)
        elif finding.prompts >= LEAST_PROMPTS:
            phrases.append(finding)
    return Findings(_without_overlaps(phrases), _without_overlaps(names), sum(looping), total)


def count_phrases(
    texts: Sequence[Text], prompts: Sequence[str], grammar: Grammar, least: int
) -> dict[Phrase, list[Place]]:
    """The places of all words, and of all phrases of up to LONGEST words, that texts of at least `least` prompts have.

    A phrase begins with a content word or a sentence, ends in no word that `grammar` refuses, and crosses no
    punctuation and no digit. A content word that shares a stem with the text's prompt does not count.
    """
    unprompted = [_unprompted(text.words, prompts[text.prompt], grammar) for text in texts]
    prompts_with = defaultdict[str, set[int]](set)
    for text, words in zip(texts, unprompted, strict=True):
        for word in words:
            prompts_with[word].add(text.prompt)
    # A phrase is in texts of no more prompts than any of its words.
    widespread = {word for word, among in prompts_with.items() if len(among) >= least}
    places = defaultdict[Phrase, list[Place]](list)
    for number, text in enumerate(texts):
        for first, phrase in _phrases(text.words, unprompted[number] & widespread, grammar):
            places[phrase].append((number, first))
    widespread_places = {}
    for phrase, of_phrase in places.items():
        if len({texts[number].prompt for number, _ in of_phrase}) >= least:
            widespread_places[phrase] = of_phrase
    return widespread_places


def _unprompted(words: Sequence[Word], prompt: str, grammar: Grammar) -> set[str]:
    """The words of a text that its prompt has not brought."""
    asked = Stems({word.text for word in words_of(prompt)} - grammar.never_first)
    written = {word.text for word in words}
    return {word for word in written if not grammar.begins(word) or word not in asked}


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


def _finding(
    phrase: Phrase,
    occurrences: Sequence[tuple[int, Sequence[Word]]],
    texts: Sequence[Text],
    total: int,
    human: HumanRates,
) -> Finding:
    """occurrences: the number of a text, and the words there; total: words of all texts."""
    places = tuple((number, words[0].start, words[-1].end) for number, words in occurrences)
    spellings = Counter(" ".join(texts[number].text[start:end].split()) for number, start, end in places)
    with_it = {number for number, _, _ in places}
    return Finding(
        phrase=spellings.most_common(1)[0][0],
        words=phrase,
        texts=len(with_it),
        prompts=len({texts[number].prompt for number in with_it}),
        per_million=MILLION * len(with_it) / total,
        human=human.per_million(phrase),
        places=places,
    )


def _is_name(occurrences: Iterable[Sequence[Word]]) -> bool:
    """Whether, within sentences, all its words nearly always have a capital letter."""
    within = [words for words in occurrences if not words[0].opens]
    capital = sum(map(_has_capitals, within))
    return bool(within) and capital >= NEARLY_ALWAYS * len(within)


def _has_capitals(words: Sequence[Word]) -> bool:
    return all(word.capital for word in words)


def _without_overlaps(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The highest score first, then the longer; without findings that are a part of a better one, have one as a part,
    or stand mostly where better ones do."""
    kept = list[Finding]()
    wholes = set[Phrase]()
    parts = set[Phrase]()
    taken = set[Place]()  # characters, as (number of a text, position in it)
    for finding in sorted(findings, key=lambda finding: (-finding.score, -len(finding.words), finding.words)):
        own_parts = set(_parts(finding.words))
        if finding.words in parts or not wholes.isdisjoint(own_parts):
            continue
        stretches = []
        for number, start, end in finding.places:
            stretches.append([(number, at) for at in range(start, end)])
        if 2 * sum(not taken.isdisjoint(stretch) for stretch in stretches) > finding.times:
            continue
        kept.append(finding)
        wholes.add(finding.words)
        parts |= own_parts
        taken.update(*stretches)
    return tuple(kept)


def _parts(phrase: Phrase) -> Iterator[Phrase]:
    """Every run of words in a phrase, itself included."""
    for first in range(len(phrase)):
        for end in range(first + 1, len(phrase) + 1):
            yield phrase[first:end]

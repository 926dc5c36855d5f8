"""Finds the phrases that many texts over-use, ranked by score.

Knows: which phrases are candidates, how often texts have them, how often people write them. Refuses to know: where
texts and rates come from, what a finding is used for.
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
SMOOTHING = 1.0  # per million, added to every human rate: no rate is more exact
NEARLY_ALWAYS = 0.9  # the share of a name's occurrences with capital letters

Phrase = tuple[str, ...]
Position = tuple[int, int]  # number of a text, and in it of the phrase's first word


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
    per_million: float  # texts that have it (once or more often) per million words of all texts
    human: float  # occurrences per million words
    places: tuple[tuple[int, int, int], ...]  # number of the text, first character in it, end

    @property
    def times(self) -> int:
        """The number of occurrences."""
        return len(self.places)

    @property
    def ratio(self) -> float:
        """Its rate as a multiple of the human rate."""
        return self.per_million / (self.human + SMOOTHING)

    @property
    def score(self) -> float:
        """The rank of a finding: it grows with the number of prompts and with the ratio."""
        return math.sqrt(self.prompts) * math.log(self.ratio)


@dataclass(frozen=True)
class Findings:
    """The findings in many texts, the highest score first."""

    phrases: tuple[Finding, ...]
    names: tuple[Finding, ...]
    looping: int  # number of texts that repeat themselves; they are not counted
    words: int  # of all other texts


def find(texts: Sequence[Text], prompts: Sequence[str], human: HumanRates) -> Findings:
    """Find the words and phrases that texts of many prompts have and people seldom write."""
    looping = [loops(text.words) for text in texts]
    # A text that repeats itself is replaced by an empty one, so that the others keep their numbers.
    texts = [Text(text.prompt, "") if loop else text for text, loop in zip(texts, looping, strict=True)]
    total = sum(len(text.words) for text in texts)
    phrases = list[Finding]()
    names = list[Finding]()
    for phrase, positions in count_phrases(texts, prompts, human.grammar, LEAST_PROMPTS_OF_A_NAME).items():
        occurrences = [
            (number, texts[number].words[first_word : first_word + len(phrase)]) for number, first_word in positions
        ]
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
) -> dict[Phrase, list[Position]]:
    """The positions of all words and phrases (of up to LONGEST words) that texts of at least `least` prompts have.

    A phrase begins with a content word or a sentence, ends in no word that `grammar` refuses, and crosses no
    punctuation and no digit. A content word that shares a stem with the text's prompt does not count.
    """
    unprompted = [_unprompted(text.words, prompts[text.prompt], grammar) for text in texts]
    prompts_with = defaultdict[str, set[int]](set)
    for text, words in zip(texts, unprompted, strict=True):
        for word in words:
            prompts_with[word].add(text.prompt)
    # A phrase can't occur in texts of more prompts than each of its words.
    widespread = {word for word, prompt_numbers in prompts_with.items() if len(prompt_numbers) >= least}
    positions = defaultdict[Phrase, list[Position]](list)
    for number, text in enumerate(texts):
        for first_word, phrase in _phrases(text.words, unprompted[number] & widespread, grammar):
            positions[phrase].append((number, first_word))
    widespread_places = {}
    for phrase, phrase_positions in positions.items():
        if len({texts[number].prompt for number, _ in phrase_positions}) >= least:
            widespread_places[phrase] = phrase_positions
    return widespread_places


def _unprompted(words: Sequence[Word], prompt: str, grammar: Grammar) -> set[str]:
    """The words of a text that do not come from its prompt."""
    prompt_stems = Stems({word.text for word in words_of(prompt)} - grammar.never_first)
    text_words = {word.text for word in words}
    return {word for word in text_words if not grammar.begins(word) or word not in prompt_stems}


def _phrases(words: Sequence[Word], known_words: set[str], grammar: Grammar) -> Iterator[tuple[int, Phrase]]:
    """All phrases of `known_words` that may be findings, each with the number of its first word."""
    for start, word in enumerate(words):
        if not word.opens and not grammar.begins(word.text):
            continue
        phrase: Phrase = ()
        for next_word in words[start : start + LONGEST]:
            if next_word.text not in known_words or (phrase and not next_word.follows):
                break
            phrase = (*phrase, next_word.text)
            if grammar.ends(next_word.text):
                yield start, phrase


def _finding(
    phrase: Phrase,
    occurrences: Sequence[tuple[int, Sequence[Word]]],
    texts: Sequence[Text],
    total: int,
    human: HumanRates,
) -> Finding:
    """A phrase's finding. occurrences: the number of a text, and the words there. total: words of all texts."""
    spans = tuple((number, words[0].start, words[-1].end) for number, words in occurrences)
    spellings = Counter(" ".join(texts[number].text[start:end].split()) for number, start, end in spans)
    text_numbers = {number for number, _, _ in spans}
    return Finding(
        phrase=spellings.most_common(1)[0][0],
        words=phrase,
        texts=len(text_numbers),
        prompts=len({texts[number].prompt for number in text_numbers}),
        per_million=MILLION * len(text_numbers) / total,
        human=human.per_million(phrase),
        places=spans,
    )


def _is_name(occurrences: Iterable[Sequence[Word]]) -> bool:
    """Whether a phrase is a name: within sentences, all its words nearly always have a capital letter."""
    within = [words for words in occurrences if not words[0].opens]
    capital = sum(map(_has_capitals, within))
    return bool(within) and capital >= NEARLY_ALWAYS * len(within)


def _has_capitals(words: Sequence[Word]) -> bool:
    return all(word.capital for word in words)


def _without_overlaps(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings by score, then by length. Left out are parts of a better one, those that contain a better one, and
    those that mostly overlap with better ones."""
    best = list[Finding]()
    wholes = set[Phrase]()
    parts = set[Phrase]()
    covered = set[Position]()  # characters, as (number of a text, position in it)
    for finding in sorted(findings, key=lambda finding: (-finding.score, -len(finding.words), finding.words)):
        own_parts = set(_parts(finding.words))
        if finding.words in parts or not wholes.isdisjoint(own_parts):
            continue
        stretches = []
        for number, start, end in finding.places:
            stretches.append([(number, character) for character in range(start, end)])
        if 2 * sum(not covered.isdisjoint(stretch) for stretch in stretches) > finding.times:
            continue
        best.append(finding)
        wholes.add(finding.words)
        parts |= own_parts
        covered.update(*stretches)
    return tuple(best)


def _parts(phrase: Phrase) -> Iterator[Phrase]:
    """Every run of words in a phrase, itself included."""
    for start in range(len(phrase)):
        for end in range(start + 1, len(phrase) + 1):
            yield phrase[start:end]

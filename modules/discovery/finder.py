"""What is over-used in many texts, best first.

Knows: how often a phrase is said, how often people say it, which of two findings tells more. Refuses to know: where
texts and rates come from, what a finding is used for.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from modules.discovery.counting import Phrase, Place, Sample, count_phrases, parts_of, prompts_of
from modules.discovery.human import MILLION, HumanRates
from modules.discovery.words import Word, loops, words_of

LEAST_PROMPTS = 5
LEAST_PROMPTS_OF_A_NAME = 4
LEAST_RATIO = 20.0
UNHEARD_OF = 1.0  # per million: added to every human rate, as none is known more exactly
NEARLY_ALWAYS = 0.9


@dataclass(frozen=True)
class Text:
    """A text, and the number of the prompt that brought it."""

    prompt: int
    text: str


@dataclass(frozen=True)
class Finding:
    """A word or phrase that the texts over-use.

    What is counted is what the prompts have not brought. per_million is the number of texts that have the phrase, for
    every million words in all texts: as if each said it once. So a text that says it ten times is no reason to call it
    frequent, and the rate is never higher than that by which `human` is counted, which is of every time it is said.
    """

    phrase: str  # as it is written most often
    times: int
    texts: int
    prompts: int
    per_million: float
    human: float  # per million words
    ratio: float
    score: float
    places: tuple[tuple[int, int, int], ...]  # number of the text, first and last character in it, the last excluded


@dataclass(frozen=True)
class Findings:
    """What was found in many texts, the most telling first."""

    phrases: tuple[Finding, ...]
    names: tuple[Finding, ...]
    looping: int  # number of texts that were left out, as they say the same again and again
    words: int  # of all other texts


def find(texts: Sequence[Text], prompts: Sequence[str], human: HumanRates) -> Findings:
    """The words and phrases that samples of many prompts have and people seldom write.

    The score, sqrt(prompts) * ln(ratio), is of how many prompts and by how much. Of findings that are part of one
    another, or are mostly said in the same places, the one of the highest score stays.
    """
    read = [Sample(text.prompt, words_of(text.text)) for text in texts]
    looping = [loops(sample.words) for sample in read]
    # Texts keep their numbers: one that loops is as one without words.
    samples = [replace(sample, words=()) if loop else sample for sample, loop in zip(read, looping, strict=True)]
    words = sum(len(sample.words) for sample in samples)
    phrases, names = list[_Counted](), list[_Counted]()
    for phrase, places in count_phrases(samples, prompts, human.grammar, LEAST_PROMPTS_OF_A_NAME).items():
        counted = _count(phrase, places, samples, words, human)
        if counted.ratio < LEAST_RATIO:
            continue
        if human.grammar.names_by_capitals and _is_name(counted, samples):
            names.append(counted)
        elif counted.prompts >= LEAST_PROMPTS:
            phrases.append(counted)
    contents = [text.text for text in texts]
    return Findings(
        phrases=tuple(_shown(counted, samples, contents) for counted in _apart(phrases)),
        names=tuple(_shown(counted, samples, contents) for counted in _apart(names)),
        looping=sum(looping),
        words=words,
    )


def share_of(findings: Iterable[Finding], words: int) -> float:
    """Which share of so many words the findings are, together. Words that two of them have count twice."""
    said = sum(finding.times * len(words_of(finding.phrase)) for finding in findings)
    return said / words if words else 0.0


@dataclass(frozen=True)
class _Counted:
    """A phrase and its numbers."""

    phrase: Phrase
    places: Sequence[Place]
    texts: int
    prompts: int
    per_million: float
    human: float

    @property
    def ratio(self) -> float:
        return self.per_million / (self.human + UNHEARD_OF)

    @property
    def score(self) -> float:
        return math.sqrt(self.prompts) * math.log(self.ratio)


def _count(
    phrase: Phrase, places: Sequence[Place], samples: Sequence[Sample], words: int, human: HumanRates
) -> _Counted:
    texts = len({number for number, _ in places})
    return _Counted(
        phrase,
        places,
        texts,
        prompts=len(prompts_of(places, samples)),
        per_million=MILLION * texts / words,
        human=human.per_million(phrase),
    )


def _at(place: Place, phrase: Phrase, samples: Sequence[Sample]) -> Sequence[Word]:
    number, first = place
    return samples[number].words[first : first + len(phrase)]


def _is_name(counted: _Counted, samples: Sequence[Sample]) -> bool:
    """Whether, within sentences, all words of it nearly always have a capital letter."""
    within = [at for at in (_at(place, counted.phrase, samples) for place in counted.places) if not at[0].opens]
    capital = sum(all(word.capital for word in at) for at in within)
    return bool(within) and capital >= NEARLY_ALWAYS * len(within)


def _apart(counted: Iterable[_Counted]) -> list[_Counted]:
    """The best first, without those that overlap with a better one; of two as good the longer one is better."""
    kept, parts, taken = list[_Counted](), set[Phrase](), set[Place]()
    wholes = set[Phrase]()
    for one in sorted(counted, key=lambda one: (-one.score, -len(one.phrase), one.phrase)):
        if one.phrase in parts or not wholes.isdisjoint(parts_of(one.phrase)):
            continue
        said = [[(number, first + i) for i in range(len(one.phrase))] for number, first in one.places]
        if 2 * sum(not taken.isdisjoint(words) for words in said) > len(said):
            continue
        kept.append(one)
        wholes.add(one.phrase)
        parts.update(parts_of(one.phrase))
        taken.update(word for words in said for word in words)
    return kept


def _shown(counted: _Counted, samples: Sequence[Sample], texts: Sequence[str]) -> Finding:
    places, written = [], Counter[str]()
    for place in counted.places:
        at = _at(place, counted.phrase, samples)
        places.append((place[0], at[0].start, at[-1].end))
        written[" ".join(texts[place[0]][at[0].start : at[-1].end].split())] += 1
    return Finding(
        phrase=written.most_common(1)[0][0],
        times=len(places),
        texts=counted.texts,
        prompts=counted.prompts,
        per_million=counted.per_million,
        human=counted.human,
        ratio=counted.ratio,
        score=counted.score,
        places=tuple(places),
    )

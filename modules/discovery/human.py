"""How often people write a word or a phrase.

Knows: the packages wordfreq (words, many languages) and wordsegment (pairs of English words), and what their numbers
are shares of. Refuses to know: texts, models, ranking.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from itertools import pairwise
from types import ModuleType

from modules.mapper.grammar import FUNCTION_WORDS, Grammar, by_frequency, english
from modules.runtime import ConfigError

MILLION = 1e6
PAIR_SHARE = 0.1  # of the rarer word's rate: nine of ten English pairs that are known have less
INSTALL = "pip install wordfreq wordsegment"


@dataclass(frozen=True)
class PairTable:
    """How often pairs of words were written in one place, and their words there, per million words."""

    pairs: Mapping[str, float]  # two words with a space
    words: Mapping[str, float]

    @cached_property
    def rarest(self) -> float:
        """The rate at which the table was cut, that of every pair that it does not have."""
        return min(self.pairs.values())

    def rate(self, first: str, second: str) -> float:
        """The rate of a pair, be it in the table or not."""
        return self.pairs.get(f"{first} {second}", self.rarest)


@dataclass(frozen=True)
class HumanRates:
    """How often a language's writers use words, per million words.

    A pair of words is looked up where there is a table of pairs; one that is not in it counts as often as its rarest.
    If either of its words is more frequent elsewhere than where the table was counted, so is the pair: "seemed to" is
    rare on the web, since "seemed" is. Where there is no table, and for what it lacks by the way it was made (I,
    apostrophes, hyphens), a pair counts a tenth of its rarer word, which is rather too much than too little. A longer
    phrase counts as often as the rarest pair of neighbours in it, which is never too little either.
    """

    language: str
    grammar: Grammar
    word: Callable[[str], float] = field(repr=False)  # a word's rate, 0 of an unknown one
    table: PairTable | None = field(default=None, repr=False)

    def per_million(self, words: Sequence[str]) -> float:
        """The rate of a word, or of a phrase given as its words, all in lower case."""
        if len(words) == 1:
            return self.word(words[0])
        return min(self._pair(*pair) for pair in pairwise(words))

    def _pair(self, *pair: str) -> float:
        guessed = PAIR_SHARE * min(map(self.word, pair))
        if self.table is None:
            return guessed
        elsewhere = [self.word(word) / self.table.words[word] for word in pair if word in self.table.words]
        known = self.table.rate(*pair) * max(1.0, *elsewhere)
        return known if all(word.isalpha() and word != "i" for word in pair) else max(known, guessed)


def human_rates(language: str = "en") -> HumanRates:
    """The rates of a language, by its code, as far as wordfreq goes.

    Raises ConfigError if a package is not installed, if wordfreq does not have the language, and if its words can't be
    told from its script, as in Chinese, Japanese and Thai, or are not what wordfreq counts, as in Korean.
    """
    wordfreq = _installed("wordfreq")
    _check_language(wordfreq, language)
    rate = partial(_word_rate, wordfreq, language)
    if language == "en":
        return HumanRates(language, english(), rate, _english_pairs(_installed("wordsegment")))
    frequent = wordfreq.top_n_list(language, FUNCTION_WORDS)
    return HumanRates(language, by_frequency(language, frequent), rate)


def _installed(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError:
        raise ConfigError(f"the package {package} is not installed, by which phrases are found: {INSTALL}") from None


def _check_language(wordfreq: ModuleType, language: str) -> None:
    info = import_module("wordfreq.language_info")
    has = wordfreq.available_languages()
    whole = [code for code in sorted({*has, language}) if _has_words_apart(info, code)]
    if language not in whole:
        raise ConfigError(
            f"the language '{language}' is written without spaces between words, or wordfreq counts parts of its words:"
            " its phrases can't be found"
        )
    if language not in has:
        known = ", ".join(code for code in whole if code != language)
        raise ConfigError(f"wordfreq does not have the language '{language}'; it has {known}")


def _has_words_apart(info: ModuleType, language: str) -> bool:
    try:
        return info.get_language_info(language)["tokenizer"] == "regex"
    except ValueError:  # no code of a language at all
        return True


def _word_rate(wordfreq: ModuleType, language: str, word: str) -> float:
    return MILLION * wordfreq.word_frequency(word, language)


def _english_pairs(wordsegment: ModuleType) -> PairTable:
    """Pairs on the web of 2006, of which those with less than 100,000 places were cut. The total that the package gives
    counts punctuation and numbers; this is in millions of words."""
    table = wordsegment.Segmenter
    words, pairs = _counts(table.UNIGRAMS_FILENAME), _counts(table.BIGRAMS_FILENAME)
    millions = sum(words.values()) / MILLION
    return PairTable(
        pairs={pair: count / millions for pair, count in pairs.items()},
        words={word: count / millions for word, count in words.items()},
    )


def _counts(file: str) -> dict[str, float]:
    """What differed in capital letters only has lines of its own, but the commonest pairs with capitals (New York, I
    am) have none: of names, and of pairs with I, there are too few."""
    counts = defaultdict[str, float](float)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            text, count = line.split("\t")
            counts[text] += float(count)
    return counts

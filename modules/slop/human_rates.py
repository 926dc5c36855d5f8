"""The rates at which people write words and phrases.

Knows: the packages wordfreq (words, many languages) and wordsegment (pairs of English words), the units of their
numbers. Refuses to know: texts, models, ranking.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from types import ModuleType

from modules.mapper.grammar import FUNCTION_WORDS, Grammar, by_frequency, english
from modules.runtime.errors import ConfigError

MILLION = 1e6
PAIR_SHARE = 0.1  # of the rarer word's rate: nine of ten English pairs in the table have less


@dataclass(frozen=True)
class HumanRates:
    """Rates of words in a language, per million words. A longer phrase has the rate of its rarest pair of neighbours.

    A pair that is not in the table gets the rate of the table's rarest pair. If a word is more frequent in general than
    in the table's source, the pair's rate is scaled up: "seemed to" is rare on the web because "seemed" is. Without a
    table, and for pairs it lacks (I, apostrophes, hyphens), a pair has a tenth of its rarer word's rate: too high
    rather than too low.
    """

    grammar: Grammar
    word: Callable[[str], float] = field(repr=False)  # a word's rate, 0 of an unknown one
    pairs: Mapping[str, float] = field(default_factory=dict, repr=False)  # the table: two words with a space
    pair_words: Mapping[str, float] = field(default_factory=dict, repr=False)  # rates of words in the table's source

    def per_million(self, words: Sequence[str]) -> float:
        """The rate of a word, or of a phrase given as its words, all in lower case."""
        if len(words) == 1:
            return self.word(words[0])
        return min(self._pair(first, second) for first, second in pairwise(words))

    def _pair(self, *pair: str) -> float:
        guess = PAIR_SHARE * min(map(self.word, pair))
        if not self.pairs:
            return guess
        elsewhere = [self.word(word) / self.pair_words[word] for word in pair if word in self.pair_words]
        rate = self.pairs.get(" ".join(pair), self.rarest_pair) * max(1.0, *elsewhere)
        return rate if all(word.isalpha() and word != "i" for word in pair) else max(rate, guess)

    @cached_property
    def rarest_pair(self) -> float:
        """The smallest rate of the table."""
        return min(self.pairs.values())


def human_rates(language: str = "en") -> HumanRates:
    """The rates of a language, by its code.

    Raises ConfigError if a package is missing, or for a language that wordfreq lacks or that does not separate words by
    spaces (Chinese, Japanese, Korean).
    """
    wordfreq = _installed("wordfreq")
    info = import_module("wordfreq.language_info")
    languages = sorted(wordfreq.available_languages())
    supported = [
        code for code in languages if info.get_language_info(code)["tokenizer"] == "regex"
    ]  # words between spaces
    if language not in supported:
        raise ConfigError(f"discover.language: '{language}' is not supported; use one of {', '.join(supported)}")

    def rate(word: str) -> float:
        return MILLION * wordfreq.word_frequency(word, language)

    if language != "en":
        return HumanRates(by_frequency(language, wordfreq.top_n_list(language, FUNCTION_WORDS)), rate)
    # Pairs on the web of 2006, cut below 100,000 occurrences. The package's own total counts punctuation and numbers.
    tables = _installed("wordsegment").Segmenter
    words = _counts(tables.UNIGRAMS_FILENAME)
    pairs = _counts(tables.BIGRAMS_FILENAME)
    millions = sum(words.values()) / MILLION
    return HumanRates(
        english(),
        rate,
        {pair: count / millions for pair, count in pairs.items()},
        {word: count / millions for word, count in words.items()},
    )


def _installed(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError:
        raise ConfigError(f"the package {package} is not installed: pip install -r requirements.txt") from None


def _counts(file: str) -> dict[str, float]:
    """The counts of a file. It has a line for each spelling, with and without capitals; these are added up. It lacks
    the commonest pairs with capitals (New York, I am), so names and pairs with I are undercounted."""
    counts = defaultdict[str, float](float)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            text, count = line.split("\t")
            counts[text] += float(count)
    return counts

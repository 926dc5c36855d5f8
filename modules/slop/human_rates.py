"""How often people write a word or a phrase.

Knows: the packages wordfreq (words, many languages) and wordsegment (pairs of English words), and what their numbers
are shares of. Refuses to know: texts, models, ranking.
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
PAIR_SHARE = 0.1  # of the rarer word's rate: nine of ten English pairs that are known have less


@dataclass(frozen=True)
class HumanRates:
    """How often a language's writers use words, per million words; a longer phrase as its rarest pair of neighbours.

    A pair that is not in the table counts as its rarest pair. If either word is more frequent elsewhere than where the
    table was counted, so is the pair: "seemed to" is rare on the web, since "seemed" is. Without a table, and for what
    it lacks (I, apostrophes, hyphens), a pair counts a tenth of its rarer word, rather too much than too little.
    """

    grammar: Grammar
    word: Callable[[str], float] = field(repr=False)  # a word's rate, 0 of an unknown one
    pairs: Mapping[str, float] = field(default_factory=dict, repr=False)  # the table: two words with a space
    pair_words: Mapping[str, float] = field(default_factory=dict, repr=False)  # words where the table was counted

    def per_million(self, words: Sequence[str]) -> float:
        """The rate of a word, or of a phrase given as its words, all in lower case."""
        if len(words) == 1:
            return self.word(words[0])
        return min(self._pair(first, second) for first, second in pairwise(words))

    def _pair(self, *pair: str) -> float:
        guessed = PAIR_SHARE * min(map(self.word, pair))
        if not self.pairs:
            return guessed
        elsewhere = [self.word(word) / self.pair_words[word] for word in pair if word in self.pair_words]
        known = self.pairs.get(" ".join(pair), self.rarest_pair) * max(1.0, *elsewhere)
        return known if all(word.isalpha() and word != "i" for word in pair) else max(known, guessed)

    @cached_property
    def rarest_pair(self) -> float:
        """The rate at which the table was cut."""
        return min(self.pairs.values())


def human_rates(language: str = "en") -> HumanRates:
    """The rates of a language, by its code.

    Raises ConfigError if a package is missing, or for a language that wordfreq does not have or whose words are not
    what stands between spaces (Chinese, Japanese, Korean).
    """
    wordfreq = _installed("wordfreq")
    info = import_module("wordfreq.language_info")
    languages = sorted(wordfreq.available_languages())
    known = [code for code in languages if info.get_language_info(code)["tokenizer"] == "regex"]  # words between spaces
    if language not in known:
        raise ConfigError(f"discover.language: '{language}' is not supported; use one of {', '.join(known)}")

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
    """A line for each spelling, with and without capitals: they are added up. The commonest pairs with capitals (New
    York, I am) have no line: of names, and of pairs with I, the table has too few."""
    counts = defaultdict[str, float](float)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            text, count = line.split("\t")
            counts[text] += float(count)
    return counts

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

from modules.discovery.grammar import FUNCTION_WORDS, Grammar, by_frequency, english
from modules.runtime import ConfigError

MILLION = 1e6
PAIR_SHARE = 0.1  # of the rarer word's rate: nine of ten English pairs that are known have less
INSTALL = "pip install wordfreq wordsegment"


@dataclass(frozen=True)
class HumanRates:
    """How often a language's writers use words, per million words.

    A pair of words is looked up where there is a table of pairs; one that is not in it counts as often as its rarest.
    Where there is none, and for what it lacks by the way it was made (I, apostrophes, hyphens), a pair counts a tenth
    of its rarer word, which is rather too much than too little. A longer phrase counts as often as the rarest pair of
    neighbours in it, which is never too little either.
    """

    language: str
    grammar: Grammar
    word: Callable[[str], float] = field(repr=False)  # a word's rate, 0 of an unknown one
    pairs: Mapping[str, float] = field(default_factory=dict, repr=False)  # two words with a space, and their rate

    def per_million(self, words: Sequence[str]) -> float:
        """The rate of a word, or of a phrase given as its words, all in lower case."""
        if len(words) == 1:
            return self.word(words[0])
        return min(self._pair(*pair) for pair in pairwise(words))

    @cached_property
    def rarest_pair(self) -> float:
        """The rate at which the table of pairs was cut."""
        return min(self.pairs.values(), default=0.0)

    def _pair(self, first: str, second: str) -> float:
        known = self.pairs.get(f"{first} {second}", self.rarest_pair)
        if self.pairs and all(word.isalpha() and word != "i" for word in (first, second)):
            return known
        return max(known, PAIR_SHARE * min(self.word(first), self.word(second)))


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


def _english_pairs(wordsegment: ModuleType) -> dict[str, float]:
    """Counts of pairs on the web of 2006, among the words that the package says there were; those below 100,000, or 0.1
    per million, were cut. What differed in capital letters has lines of its own, and the commonest with capitals (New
    York, I am) have none: names, and what has I in it, are too rare here."""
    pairs = defaultdict[str, float](float)
    with open(wordsegment.Segmenter.BIGRAMS_FILENAME, encoding="utf-8") as lines:
        for line in lines:
            pair, count = line.split("\t")
            pairs[pair] += MILLION * float(count) / wordsegment.Segmenter.TOTAL
    return dict(pairs)

"""The words with which a phrase does not begin or end.

Knows: the function words of English; for other languages, that the most frequent words are mostly function words.
Refuses to know: texts, rates.
"""

from collections.abc import Iterable
from dataclasses import dataclass

FUNCTION_WORDS = 100  # the number of most frequent words that count as function words, in languages except English


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PERSONAL = _words("i you he she it we they")
_NEVER_LAST = _PERSONAL | _words(  # determiners, pronouns, conjunctions
    """a an the some any no each every either neither both all such another
    me my mine myself your yours yourself yourselves him his himself her hers herself its itself us our ours ourselves
    them their theirs themselves this that these those who whom whose which what
    and or but nor so yet because although though while whilst if unless until till since when whenever where wherever
    whether as than how why lest"""
)
_NEVER_FIRST = _words(  # prepositions, auxiliaries
    """of in on at by for from to with into onto upon over under about across after against along among amid amidst
    around before behind below beneath beside besides between beyond despite down during except inside like near off
    out outside past per through throughout toward towards up via within without
    am is are was were be been being have has had having do does did doing will would shall should can could may might
    must ought there"""
)
ADVERBS = _words(
    "not just only even also too very still then more most"
)  # may begin phrases, but have no content alone
_CONTRACTIONS = frozenset(
    f"{pronoun}'{end}"
    for pronoun in (*_PERSONAL, "that", "there", "who", "what", "where", "how")
    for end in ("m", "s", "re", "ve", "ll", "d")
)


@dataclass(frozen=True)
class Grammar:
    """Which words may be first and last in a phrase."""

    never_first: frozenset[str]  # except at the beginning of a sentence
    never_last: frozenset[str]
    possessive: str | None = None  # an ending; words with it are never last either
    names_by_capitals: bool = True  # whether only names have a capital letter within a sentence

    def begins(self, word: str) -> bool:
        """Whether a phrase may begin with this word within a sentence."""
        return word not in self.never_first

    def ends(self, word: str) -> bool:
        """Whether a phrase may end with this word."""
        return word not in self.never_last and not (self.possessive and word.endswith(self.possessive))


def english() -> Grammar:
    """The grammar of English. A phrase does not end in an article, a determiner (possessives included), a pronoun or a
    conjunction; nor does it begin with these, a preposition or an auxiliary. Negations ("couldn't") are content."""
    never_last = _NEVER_LAST | _CONTRACTIONS
    return Grammar(never_last | _NEVER_FIRST, never_last, possessive="'s")


def by_frequency(language: str, most_frequent: Iterable[str]) -> Grammar:
    """The grammar of another language: its most frequent words are neither first nor last, including the few nouns and
    verbs among them. German writes every noun with a capital letter."""
    frequent = frozenset(most_frequent)
    return Grammar(frequent, frequent, names_by_capitals=language != "de")

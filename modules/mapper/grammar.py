"""With which words a phrase neither begins nor ends.

Knows: the function words of English; for other languages, that the most frequent words are mostly such.
Refuses to know: texts, rates.
"""

from collections.abc import Iterable
from dataclasses import dataclass

FUNCTION_WORDS = 100  # of a language other than English: so many of its most frequent words are taken for such


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
ADVERBS = _words("not just only even also too very still then more most")  # begin phrases, and say nothing alone
_CONTRACTIONS = frozenset(
    f"{pronoun}'{end}"
    for pronoun in (*_PERSONAL, "that", "there", "who", "what", "where", "how")
    for end in ("m", "s", "re", "ve", "ll", "d")
)


@dataclass(frozen=True)
class Grammar:
    """Which words may stand first and last in a phrase."""

    never_first: frozenset[str]  # but at the beginning of a sentence, where any may
    never_last: frozenset[str]
    possessive: str | None = None  # how a word ends that never stands last either
    names_by_capitals: bool = True  # whether only names have a capital letter within a sentence

    def begins(self, word: str) -> bool:
        """Whether a phrase may begin with this word within a sentence."""
        return word not in self.never_first

    def ends(self, word: str) -> bool:
        """Whether a phrase may end with this word."""
        return word not in self.never_last and not (self.possessive and word.endswith(self.possessive))


def english() -> Grammar:
    """No phrase ends in an article, a determiner (a possessive is one), a pronoun or a conjunction; none begins with
    these, a preposition or an auxiliary. Negations ("couldn't") are taken for content."""
    last = _NEVER_LAST | _CONTRACTIONS
    return Grammar(last | _NEVER_FIRST, last, possessive="'s")


def by_frequency(language: str, most_frequent: Iterable[str]) -> Grammar:
    """Of a language of which nothing else is known: its most frequent words stand neither first nor last, the few
    nouns and verbs among them included. German writes every noun with a capital letter."""
    frequent = frozenset(most_frequent)
    return Grammar(frequent, frequent, names_by_capitals=language != "de")

"""How often a model writes a list's phrases, counted in its texts; and how sure that is.

Knows: counts, resampling. Refuses to know: models, how the texts came about, what makes a word, tables.

The interval is that of a bootstrap over prompts (Efron 1979): had other prompts been asked, drawn with replacement from
those that were, 95 % of the rates would lie in it. All models are resampled alike, so that a change is a paired one.
Resamples of no hits have no hits: of a phrase that was never written the interval goes up to 3 / words, the rule of
three (Hanley and Lippman-Hand 1983).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.discovery.matching import finder, plain, word_count

RESAMPLES = 10_000
SHARE = 0.95  # of the resamples that an interval holds
RULE_OF_THREE = 3  # hits: with more than so many expected, no hit at all has a chance of less than 5 %

Interval = tuple[float, float]


@dataclass(frozen=True)
class Counts:
    """What one model wrote: for each prompt the words, and of each phrase how often it stands there."""

    words: tuple[int, ...]
    hits: tuple[Counter[str], ...]
    characters: int = 0  # among all words, of scripts that put no spaces between words
    elsewhere: frozenset[str] = frozenset()  # phrases that stand in the texts, and count for others wherever they do

    @property
    def total(self) -> int:
        """Words in all texts."""
        return sum(self.words)

    def times(self, phrases: Sequence[str]) -> int:
        """How often the phrases stand in all texts."""
        return sum(hits[phrase] for hits in self.hits for phrase in phrases)

    def rate(self, phrases: Sequence[str]) -> float:
        """How often the phrases stand in 1,000 words."""
        return 1000 * self.times(phrases) / max(self.total, 1)

    def interval(self, phrases: Sequence[str]) -> Interval | None:
        """Of the rate; None if one prompt has brought all hits there can be."""
        if not self.times(phrases):
            return 0.0, self._upper
        return _middle(self._resampled(phrases)) if len(self.words) > 1 else None

    @property
    def _upper(self) -> float:
        """The highest rate, in 1,000 words, that goes with no hit at all."""
        return 1000 * RULE_OF_THREE / max(self.total, 1)

    def change(self, base: "Counts", phrases: Sequence[str]) -> tuple[float, Interval | None] | None:
        """By how much the rate is another one than the base's, as a share of that, and the interval.

        None where the base says none of the phrases, or may have said none to other prompts.
        """
        before = base._resampled(phrases)
        if bool((before == 0).any()):
            return None
        share = self.rate(phrases) / base.rate(phrases) - 1
        if len(self.words) < 2:
            return share, None
        if not self.times(phrases):
            return share, (share, self._upper / _middle(before)[0] - 1)
        return share, _middle(self._resampled(phrases) / before - 1)

    def _resampled(self, phrases: Sequence[str]) -> Tensor:
        """The rates of all resamples."""
        chance = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(self.words), (RESAMPLES, len(self.words)), generator=chance)
        hits = torch.tensor([sum(hits[phrase] for phrase in phrases) for hits in self.hits], dtype=torch.float64)
        words = torch.tensor(self.words, dtype=torch.float64)
        return 1000 * hits[drawn].sum(1) / words[drawn].sum(1).clamp(min=1)


def counts(
    texts: Sequence[Sequence[str]], phrases: Sequence[str], variants: Mapping[str, Sequence[str]] | None = None
) -> Counts:
    """Count phrases in texts, a list of them for each prompt. Where several phrases begin, the longest one counts.

    variants: of the phrases that are any of several texts; a text that several phrases have counts for the first.
    """
    known = variants or {}
    forms = {phrase: [plain(text) for text in known.get(phrase, (phrase,))] for phrase in phrases}
    owners = {form: phrase for phrase in reversed(forms) for form in forms[phrase]}
    pattern = finder(owners)
    compared = [[plain(text) for text in of_prompt] for of_prompt in texts]
    hits = tuple(Counter(owners[hit] for text in some for hit in pattern.findall(text)) for some in compared)
    counted = [word_count("\n".join(of_prompt)) for of_prompt in texts]
    uncounted = [phrase for phrase in forms if not any(of_prompt[phrase] for of_prompt in hits)]
    together = "\n".join(text for some in compared for text in some)
    return Counts(
        tuple(count.words for count in counted),
        hits,
        sum(count.characters for count in counted),
        frozenset(phrase for phrase in uncounted if finder(forms[phrase]).search(together)),
    )


def countable(phrase: str, variants: Mapping[str, Sequence[str]]) -> bool:
    """Whether there is anything of a phrase to be looked for, and not only what can't be seen."""
    return any(map(plain, variants.get(phrase, (phrase,))))


def _middle(values: Tensor) -> Interval:
    beyond = (1 - SHARE) / 2
    low, high = torch.quantile(values, torch.tensor([beyond, 1 - beyond], dtype=values.dtype)).tolist()
    return low, high

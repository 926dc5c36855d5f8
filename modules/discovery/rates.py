"""How often a model writes a list's phrases, counted in its texts; and how sure that is.

Knows: texts, whole words, resampling. Refuses to know: models, how the texts came about, tables.

The interval is that of a bootstrap over prompts (Efron 1979): had other prompts been asked, drawn with replacement from
those that were, 95 % of the rates would lie in it. All models are resampled alike, so that a change is a paired one.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
SHARE = 0.95  # of the resamples that an interval holds

Interval = tuple[float, float]


@dataclass(frozen=True)
class Counts:
    """What one model wrote: for each prompt the words, and of each phrase how often it stands there."""

    words: tuple[int, ...]
    hits: tuple[Counter[str], ...]

    def rate(self, phrases: Sequence[str]) -> float:
        """How often the phrases stand in 1,000 words."""
        return 1000 * sum(hits[phrase] for hits in self.hits for phrase in phrases) / max(sum(self.words), 1)

    def interval(self, phrases: Sequence[str]) -> Interval:
        """Of the rate."""
        return _middle(self._resampled(phrases))

    def change(self, base: "Counts", phrases: Sequence[str]) -> tuple[float, Interval] | None:
        """By how much the rate is another one than the base's, as a share of that, and the interval.

        None where the base says none of the phrases, or may have said none to other prompts.
        """
        before = base._resampled(phrases)
        if bool((before == 0).any()):
            return None
        return self.rate(phrases) / base.rate(phrases) - 1, _middle(self._resampled(phrases) / before - 1)

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
    """Count phrases in texts, a list of them for each prompt: whole words, whatever their case; an apostrophe is one
    however it is written. Where two phrases begin, the longer one counts.

    variants: of the phrases that are any of several texts; a text that several phrases have counts for the first.
    """
    known = variants or {}
    by_words = {_plain(text): phrase for phrase in reversed(phrases) for text in known.get(phrase, (phrase,))}
    longest = sorted(by_words, key=lambda words: (-len(words), words))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)")
    return Counts(
        tuple(sum(len(text.split()) for text in of_prompt) for of_prompt in texts),
        tuple(
            Counter(by_words[hit] for text in of_prompt for hit in pattern.findall(_plain(text))) for of_prompt in texts
        ),
    )


def _plain(text: str) -> str:
    """Text as it is compared: in small letters, with one kind of apostrophe and of white space."""
    return " ".join(text.replace("\u2019", "'").lower().split())


def _middle(values: Tensor) -> Interval:
    beyond = (1 - SHARE) / 2
    low, high = torch.quantile(values, torch.tensor([beyond, 1 - beyond], dtype=values.dtype)).tolist()
    return low, high

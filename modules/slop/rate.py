"""--rate: how often models write the phrases of a list, the base and others, for the same prompts and seeds.

Knows: counts, resampling, the table. Refuses to know: how texts are generated, what makes a word.

The interval is that of a bootstrap over prompts (Efron 1979): had other prompts been asked, drawn with replacement from
these, 95 % of the rates would lie in it. All models are resampled alike, so that a change is a paired one. Resamples of
no hits have no hits: for a phrase that was never written the interval goes up to 3 / words, the rule of three (Hanley
and Lippman-Hand 1983).
"""

import gc
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.config.locations import Location, Source, names_of, parse_location
from modules.config.schema import Config
from modules.output.text_files import write_text
from modules.runtime.console import Console
from modules.runtime.text import columns, ended, one_line, row, shortened
from modules.slop.generate import generate, load_generator
from modules.slop.matching import finder, plain, word_count

RESAMPLES = 10_000
TAIL = (1 - 0.95) / 2  # the share of resamples on either side of an interval
RULE_OF_THREE = 3  # hits: with more than so many expected, no hit at all has a chance of less than 5 %
PHRASE, RATE, EXAMPLE = 28, 24, 600  # columns of a phrase, of a rate with its interval, of a text that is shown

Interval = tuple[float, float]
Groups = Mapping[str, Sequence[str]]  # phrases by what they are called together


def rate(config: Config, others: Sequence[Config], console: Console, json_file: Path | None) -> None:
    """Let the config's base generate texts, then the base of each of the others; print how often they have the phrases.

    Raises ConfigError for what can't be used, OSError if a file fails.
    """
    lists = {"all bad phrases": config.bad_phrases, "all good phrases": config.good_phrases}
    groups = {name: list(dict.fromkeys(pair.phrase for pair in pairs)) for name, pairs in lists.items() if pairs}
    variants = {pair.phrase: pair.variants for pair in config.pairs if pair.variants}
    prompts: tuple[str, ...] = ()
    found: dict[str, Counts] = {}
    examples: dict[str, str] = {}
    models = [config, *others]
    for name, one in zip(names_for(models), models, strict=True):
        if name in found:
            continue
        generator = load_generator(one, console, prompts)
        prompts = generator.prompts
        texts = generate(generator, one.random_seed, console, json_file)
        found[name] = counts(texts, _phrases(groups), variants)
        examples[name] = texts[0][0]
        del generator
        gc.collect()  # one model at a time
    console.lines(table(groups, found))
    console.line(f"Prompt: {one_line(prompts[0])}")
    for name, text in examples.items():
        console.line(f"{name} : {ended(shortened(one_line(text), EXAMPLE, 'start'))}")
    if json_file:
        write_text(json_file, json.dumps(document(groups, found), ensure_ascii=False, indent=1) + "\n")
        console.timed(f"All rates are in {json_file}")
    console.final(f"Done. The log is {console.log_path}")


def names_for(models: Sequence[Config]) -> list[str]:
    """What reports call the bases: ids of the hub, folders by their names or as much more as tells them apart."""
    texts = [one.directories.model_path1 for one in models]
    # A folder that is gone by now is reported by whoever opens it.
    locations = [parse_location(text) or Location(text, Path(text)) for text in texts]
    names = names_of([Source(location.text, location) for location in locations])
    return [location.name if location.folder is None else name for location, name in zip(locations, names, strict=True)]


def _phrases(groups: Groups) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*groups.values())))


@dataclass(frozen=True)
class Counts:
    """What one model wrote: for each prompt the words, and of each phrase how often it stands there."""

    words: tuple[int, ...]
    hits: tuple[Counter[str], ...]

    @property
    def total(self) -> int:
        """Words of all texts."""
        return sum(self.words)

    def times(self, phrases: Sequence[str]) -> int:
        """How often the phrases stand in all texts."""
        return sum(hits[phrase] for hits in self.hits for phrase in phrases)

    def rate(self, phrases: Sequence[str]) -> float:
        """How often the phrases stand in 1,000 words."""
        return 1000 * self.times(phrases) / max(self.total, 1)

    def interval(self, phrases: Sequence[str]) -> Interval | None:
        """Of the rate; None if there is one prompt, and so nothing to resample."""
        if not self.times(phrases):
            return 0.0, self._upper_bound_of_none()
        return _interval(self._resampled(phrases)) if len(self.words) > 1 else None

    def change(self, base: "Counts", phrases: Sequence[str]) -> tuple[float, Interval | None] | None:
        """By how much the rate is another one than the base's, as a share of that, and the interval; None where some
        resamples of the base have no hit."""
        before = base._resampled(phrases)
        if bool((before == 0).any()):
            return None
        share = self.rate(phrases) / base.rate(phrases) - 1
        if len(self.words) < 2:
            return share, None
        if not self.times(phrases):
            return share, (share, self._upper_bound_of_none() / _interval(before)[0] - 1)
        return share, _interval(self._resampled(phrases) / before - 1)

    def _upper_bound_of_none(self) -> float:
        """The highest rate, per 1,000 words, that goes with no hit at all."""
        return 1000 * RULE_OF_THREE / max(self.total, 1)

    def _resampled(self, phrases: Sequence[str]) -> Tensor:
        """The rates of all resamples: (RESAMPLES,), float64."""
        prompts = len(self.words)
        samples = torch.randint(prompts, (RESAMPLES, prompts), generator=torch.Generator().manual_seed(0))
        hits = torch.tensor([sum(hits[phrase] for phrase in phrases) for hits in self.hits], dtype=torch.float64)
        words = torch.tensor(self.words, dtype=torch.float64)
        return 1000 * hits[samples].sum(1) / words[samples].sum(1).clamp(min=1)


def counts(
    texts: Sequence[Sequence[str]], phrases: Sequence[str], variants: Mapping[str, Sequence[str]] | None = None
) -> Counts:
    """Count phrases in texts, a list of them for each prompt. Where several phrases begin, the longest one counts.

    variants: of the phrases that are any of several texts; a text that several phrases have counts for the first.
    """
    owners = dict[str, str]()
    for phrase in phrases:
        for text in (variants or {}).get(phrase, (phrase,)):
            owners.setdefault(plain(text), phrase)
    pattern = finder(owners)
    hits = []
    for of_prompt in texts:
        found = [owners[match] for text in of_prompt for match in pattern.findall(plain(text))]
        hits.append(Counter(found))
    return Counts(tuple(word_count("\n".join(of_prompt)) for of_prompt in texts), tuple(hits))


def _interval(values: Tensor) -> Interval:
    low, high = torch.quantile(values, torch.tensor([TAIL, 1 - TAIL], dtype=values.dtype)).tolist()
    return low, high


def table(groups: Groups, counted: Mapping[str, Counts]) -> list[str]:
    """How often each model writes each phrase, the base's most frequent ones first, and those of every group together;
    of these the change against the base, which is the first model."""
    base, *others = counted.values()
    phrases = sorted(_phrases(groups), key=lambda phrase: -base.rate([phrase]))
    written = [phrase for phrase in phrases if any(one.times([phrase]) for one in counted.values())]
    widths = (PHRASE, *(RATE for _ in counted))
    head = row(("Per 1,000 words [95 % CI]", *(shortened(name, RATE) for name in counted)), widths)
    line = "-" * columns(head)
    lines = [line, head, line]
    lines += [row((phrase, *_rates([phrase], counted)), widths) for phrase in written]
    lines.append(line)
    for name, group in groups.items():
        lines.append(row((name, *_rates(group, counted)), widths))
        if others:
            lines.append(row(("", "change vs base:", *(_change(one, base, group) for one in others)), widths))
    lines += [row(("words", *(f"{one.total:,}" for one in counted.values())), widths), line]
    unwritten = [phrase for phrase in phrases if phrase not in written]
    if unwritten:
        lines.append(f"Not found, or only as a part of another phrase: {', '.join(unwritten)}")
    return lines


def _rates(phrases: Sequence[str], counted: Mapping[str, Counts]) -> list[str]:
    return [f"{one.rate(phrases):.2f} {_shown(one.interval(phrases), '.2f')}" for one in counted.values()]


def _change(one: Counts, base: Counts, phrases: Sequence[str]) -> str:
    change = one.change(base, phrases)
    return "" if change is None else f"{change[0]:+.0%} {_shown(change[1], '+.0%')}"


def _shown(interval: Interval | None, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


def document(groups: Groups, counted: Mapping[str, Counts]) -> dict[str, Any]:
    """The same for JSON: rates per 1,000 words with their intervals, changes as shares of the base's rate."""
    base = next(iter(counted.values()))

    def entry(one: Counts, phrases: Sequence[str]) -> dict[str, Any]:
        change = None if one is base else one.change(base, phrases)
        changed = None if change is None else {"share": change[0], "interval": change[1]}
        return {"rate": one.rate(phrases), "interval": one.interval(phrases), "change": changed}

    return {
        name: {
            "words": one.total,
            **{group: entry(one, phrases) for group, phrases in groups.items()},
            "phrases": {phrase: entry(one, [phrase]) for phrase in itertools.chain(*groups.values())},
        }
        for name, one in counted.items()
    }

"""--rate: how often models write the phrases of a list, the base and others, for the same prompts and seeds.

Knows: counts, resampling, the table. Refuses to know: how texts are generated, what makes a word.

Intervals are those of a bootstrap over prompts (Efron 1979). All models are resampled alike: a change is a paired one.
A phrase that was never written has the interval up to 3 / words, the rule of three (Hanley and Lippman-Hand 1983).
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.companions import ADAPTER_SETTINGS
from modules.config.locations import Location, Source, names_of, parse_location
from modules.config.schema import Config
from modules.model.loading import release_memory
from modules.output.text_files import write_text
from modules.runtime.console import Console
from modules.runtime.text import ended, one_line, shortened
from modules.runtime.text import table as text_table
from modules.slop.generate import generate, load_generator
from modules.slop.matching import finder, plain, word_count

RESAMPLES = 10_000
TAIL = (1 - 0.95) / 2  # the share of resamples on either side of an interval
RULE_OF_THREE = 3  # hits: where so many are expected, none at all has a chance of 5 %
# columns of a phrase, of a rate with its interval, of a text that is shown
PHRASE = 28
RATE = 24
EXAMPLE = 600

Interval = tuple[float, float]
Groups = Mapping[str, Sequence[str]]  # phrases by what they are called together


def rate(config: Config, others: Sequence[Config], console: Console, json_file: Path | None) -> None:
    """Let the config's base generate texts, then the base of each of the others; print how often they have the phrases.
    Another that is an adapter's folder is a candidate of the config's base.

    Raises ConfigError for what can't be used, OSError if a file fails.
    """
    lists = {"all bad phrases": config.bad_phrases, "all good phrases": config.good_phrases}
    groups = {}
    for name, pairs in lists.items():
        if pairs:
            groups[name] = list(dict.fromkeys(pair.phrase for pair in pairs))
    prompts: tuple[str, ...] = ()
    counted: dict[str, Counts] = {}
    examples: dict[str, str] = {}
    models = [config, *others]
    for name, model in zip(names_for(models), models, strict=True):
        if name in counted:
            continue
        where = model.directories.model_path1
        candidate = where if (Path(where) / ADAPTER_SETTINGS).is_file() else ""
        rated = count_written(config if candidate else model, console, json_file, prompts, candidate)
        prompts = rated.prompts
        counted[name] = rated.counts
        examples[name] = rated.example
    console.lines(table(groups, counted))
    console.line(f"Prompt: {one_line(prompts[0])}")
    for name, text in examples.items():
        console.line(f"{name} : {ended(shortened(one_line(text), EXAMPLE, 'start'))}")
    if json_file:
        write_text(json_file, json.dumps(document(groups, counted), ensure_ascii=False, indent=1) + "\n")
        console.timed(f"Wrote all rates to {json_file}")
    console.final(f"Done. The log is {console.log_path}")


@dataclass(frozen=True)
class Rated:
    """A model that has written, and what is in its texts."""

    prompts: tuple[str, ...]
    counts: "Counts"
    words: float  # of a text
    example: str  # its first


def count_written(
    config: Config, console: Console, beside: Path | None, prompts: Sequence[str] = (), candidate: str = ""
) -> Rated:
    """Let a config's base write, or a candidate for it, count the config's phrases, and let go of the model.

    beside, prompts, candidate: see `generate` and `load_generator`, which say what is raised.
    """
    generator = load_generator(config, console, prompts, candidate)
    texts = generate(generator, config.random_seed, console, beside)
    pairs = (*config.pairs, *config.held_out_pairs)
    variants = {pair.phrase: pair.variants for pair in pairs if pair.variants}
    phrases = list(dict.fromkeys(pair.phrase for pair in pairs))
    counted = counts(texts, phrases, variants)
    words = counted.total / (len(texts) * config.discover.samples)
    found = Rated(generator.prompts, counted, words, texts[0][0])
    del generator
    release_memory()  # one model at a time
    return found


def names_for(models: Sequence[Config]) -> list[str]:
    """What reports call the bases: ids of the hub, folders by their names or as much more as tells them apart."""
    sources = []
    for model in models:
        text = model.directories.model_path1
        # A folder that is gone by now is reported by whoever opens it.
        sources.append(Source(text, parse_location(text) or Location(text, Path(text))))
    return names_of(sources)


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
        """The change of the rate, as a share of the base's, and the interval; None where a resample of the base has no
        hit."""
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
        of_prompts = [sum(map(hits.__getitem__, phrases)) for hits in self.hits]
        hits = torch.tensor(of_prompts, dtype=torch.float64)
        words = torch.tensor(self.words, dtype=torch.float64)
        return 1000 * hits[samples].sum(1) / words[samples].sum(1).clamp(min=1)


def counts(
    texts: Sequence[Sequence[str]], phrases: Sequence[str], variants: Mapping[str, Sequence[str]] | None = None
) -> Counts:
    """Count phrases in texts, a list of them for each prompt. Where several phrases begin, the longest one counts; a
    text that several have as a variant counts for the first."""
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
    """How often each model writes each phrase, the base's most frequent ones first, and those of every group together,
    with the change against the base, which is the first model."""
    base, *others = counted.values()
    phrases = sorted(_phrases(groups), key=lambda phrase: -base.rate([phrase]))
    unwritten = []
    for phrase in phrases:
        times = [model.times([phrase]) for model in counted.values()]
        if not any(times):
            unwritten.append(phrase)
    rows = [(phrase, *_rates([phrase], counted)) for phrase in phrases if phrase not in unwritten]
    sums = []
    for name, group in groups.items():
        sums.append((name, *_rates(group, counted)))
        if others:
            sums.append(("", "change vs base:", *(_change(model, base, group) for model in others)))
    sums.append(("words", *(f"{model.total:,}" for model in counted.values())))
    header = ("Hits per 1,000 words [95% CI]", *counted)
    lines = text_table(header, rows, sums, widths=(PHRASE, *[RATE] * len(counted)))
    if unwritten:
        lines.append(f"Not found, or only as a part of another phrase: {', '.join(unwritten)}")
    return lines


def _rates(phrases: Sequence[str], counted: Mapping[str, Counts]) -> list[str]:
    return [_with_interval(model.rate(phrases), model.interval(phrases), ".2f") for model in counted.values()]


def _change(model: Counts, base: Counts, phrases: Sequence[str]) -> str:
    change = model.change(base, phrases)
    return _with_interval(*change, "+.0%") if change else ""


def _with_interval(value: float, interval: Interval | None, form: str) -> str:
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else f"{value:{form}}"


def document(groups: Groups, counted: Mapping[str, Counts]) -> dict[str, Any]:
    """The same for JSON: rates per 1,000 words with their intervals, changes as shares of the base's rate."""
    base = next(iter(counted.values()))

    def entry(model: Counts, phrases: Sequence[str]) -> dict[str, Any]:
        change = None if model is base else model.change(base, phrases)
        change_entry = {"share": change[0], "interval": change[1]} if change else None
        return {"rate": model.rate(phrases), "interval": model.interval(phrases), "change": change_entry}

    models = {}
    for name, model in counted.items():
        models[name] = {"words": model.total}
        models[name] |= {group: entry(model, phrases) for group, phrases in groups.items()}
        models[name]["phrases"] = {phrase: entry(model, [phrase]) for phrase in _phrases(groups)}
    return models

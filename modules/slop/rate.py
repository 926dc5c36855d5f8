"""--rate: how often the base and other models write the phrases of a list, for the same prompts and seeds.

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
RULE_OF_THREE = 3  # hits: if so many are expected, the probability of none is 5 %
# columns of a phrase, of a rate with its interval, of a text that is shown
PHRASE = 28
RATE = 24
EXAMPLE = 600

Interval = tuple[float, float]
Groups = Mapping[str, Sequence[str]]  # phrases by the name of their group


def rate(config: Config, other_models: Sequence[Config], console: Console, json_file: Path | None) -> None:
    """Let the bases of the config and of the other configs generate texts; print how often these have the phrases.

    other_models: configs; one whose base is an adapter's folder means the config's base with this adapter.

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
    models = [config, *other_models]
    for name, model in zip(names_for(models), models, strict=True):
        if name in counted:
            continue
        folder = model.directories.model_path1
        candidate = folder if (Path(folder) / ADAPTER_SETTINGS).is_file() else ""
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
    """A model's texts, counted."""

    prompts: tuple[str, ...]
    counts: "Counts"
    words: float  # of a text
    example: str  # its first


def count_written(
    config: Config, console: Console, beside: Path | None, prompts: Sequence[str] = (), candidate: str = ""
) -> Rated:
    """Let a config's base, or a candidate for it, write texts; count the config's phrases; release the model.

    beside, prompts, candidate: see `generate` and `load_generator`. Raises as they do.
    """
    generator = load_generator(config, console, prompts, candidate)
    texts = generate(generator, config.random_seed, console, beside)
    pairs = (*config.pairs, *config.held_out_pairs)
    variants = {pair.phrase: pair.variants for pair in pairs if pair.variants}
    phrases = list(dict.fromkeys(pair.phrase for pair in pairs))
    counted = counts(texts, phrases, variants)
    words = counted.total / (len(texts) * config.discover.samples)
    rated = Rated(generator.prompts, counted, words, texts[0][0])
    del generator
    release_memory()  # one model at a time
    return rated


def names_for(models: Sequence[Config]) -> list[str]:
    """The bases' names in reports: ids of the hub, names of folders, with parent folders where names are equal."""
    sources = []
    for model in models:
        text = model.directories.model_path1
        # A folder that no longer exists is reported when it is opened.
        sources.append(Source(text, parse_location(text) or Location(text, Path(text))))
    return names_of(sources)


def _phrases(groups: Groups) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*groups.values())))


@dataclass(frozen=True)
class Counts:
    """The counts of one model's texts: for each prompt the words, and the occurrences of each phrase."""

    words: tuple[int, ...]
    hits: tuple[Counter[str], ...]

    @property
    def total(self) -> int:
        """Words of all texts."""
        return sum(self.words)

    def times(self, phrases: Sequence[str]) -> int:
        """The occurrences of the phrases in all texts."""
        return sum(hits[phrase] for hits in self.hits for phrase in phrases)

    def rate(self, phrases: Sequence[str]) -> float:
        """The occurrences of the phrases per 1,000 words."""
        return 1000 * self.times(phrases) / max(self.total, 1)

    def interval(self, phrases: Sequence[str]) -> Interval | None:
        """The interval of the rate; None if there is only one prompt, and so nothing to resample."""
        if not self.times(phrases):
            return 0.0, self._upper_bound_of_none()
        return _interval(self._resampled(phrases)) if len(self.words) > 1 else None

    def change(self, base: "Counts", phrases: Sequence[str]) -> tuple[float, Interval | None] | None:
        """The change of the rate, relative to the base's, and its interval; None if a resample of the base has no
        hit."""
        base_rates = base._resampled(phrases)
        if bool((base_rates == 0).any()):
            return None
        share = self.rate(phrases) / base.rate(phrases) - 1
        if len(self.words) < 2:
            return share, None
        if not self.times(phrases):
            return share, (share, self._upper_bound_of_none() / _interval(base_rates)[0] - 1)
        return share, _interval(self._resampled(phrases) / base_rates - 1)

    def _upper_bound_of_none(self) -> float:
        """The upper bound of the rate, per 1,000 words, if there is no hit."""
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
    """Count phrases in texts. texts: a list for each prompt. Of several phrases at one position the longest counts. A
    variant that several phrases have counts for the first."""
    owners = dict[str, str]()
    for phrase in phrases:
        for text in (variants or {}).get(phrase, (phrase,)):
            owners.setdefault(plain(text), phrase)
    pattern = finder(owners)
    hits = []
    for prompt_texts in texts:
        prompt_hits = [owners[match] for text in prompt_texts for match in pattern.findall(plain(text))]
        hits.append(Counter(prompt_hits))
    return Counts(tuple(word_count("\n".join(prompt_texts)) for prompt_texts in texts), tuple(hits))


def _interval(values: Tensor) -> Interval:
    low, high = torch.quantile(values, torch.tensor([TAIL, 1 - TAIL], dtype=values.dtype)).tolist()
    return low, high


def table(groups: Groups, counted: Mapping[str, Counts]) -> list[str]:
    """The table of rates: each model and phrase, the base's most frequent first; then each group as a whole, with the
    change against the base, which is the first model."""
    base, *other_counts = counted.values()
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
        if other_counts:
            sums.append(("", "change vs base:", *(_change(model, base, group) for model in other_counts)))
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
    """The table for JSON: rates per 1,000 words with their intervals, changes relative to the base's rate."""
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

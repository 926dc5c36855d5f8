"""What was found and what was counted, as tables, as JSON and as a phrase list.

Knows: widths, digits, wording, file formats. Refuses to know: how anything was found, where the text goes.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from modules.config import Pair
from modules.discovery.contexts import FEWEST_PROMPTS, LEAST, last_words
from modules.discovery.finder import LEAST_PROMPTS, LEAST_RATIO, Finding, Findings, Text, share_of
from modules.discovery.rates import Counts, Interval, countable
from modules.runtime import columns, ended, one_line, row, shortened

SHOWN, SHOWN_NAMES = 30, 10  # findings of the table
EXAMPLE = 45  # columns of an example
PHRASE = 28  # columns of a phrase
MOST_WRITTEN = 600  # columns of a text that is shown
RATE = 24  # columns of a rate with its interval

_WIDTHS = (3, PHRASE, 6, 6, 8, 11, 9, 7, EXAMPLE)


def found_lines(findings: Findings, texts: Sequence[Text]) -> list[str]:
    """The table of what a model over-uses, the names apart, and how much of its text the table is."""
    lines = _table(findings, texts) if findings.phrases else []
    if findings.names:
        names = ", ".join(f"{name.phrase} ({name.times})" for name in findings.names[:SHOWN_NAMES])
        lines.append(f"Names that it gives again and again: {names}")
    if findings.looping:
        lines.append(f"Left out: {findings.looping} of {len(texts)} texts, which say the same over and over")
    return lines


def _table(findings: Findings, texts: Sequence[Text]) -> list[str]:
    header = ("", "Phrase", "Times", "Texts", "Prompts", "Per million", "Human", "Ratio", "Example")
    line = "-" * columns(row(header, _WIDTHS))
    rows = [_row(number, found, texts) for number, found in enumerate(findings.phrases[:SHOWN], start=1)]
    share = share_of(findings.phrases[:SHOWN], findings.words)
    count = f"Of all {findings.words:,} words, {share:.1%} stand in one of these phrases."
    return [line, row(header, _WIDTHS), line, *rows, line, count]


def _row(number: int, found: Finding, texts: Sequence[Text]) -> str:
    number_of_text, start, end = found.places[0]
    text = texts[number_of_text].text
    before = shortened(one_line(last_words(text[:start])), EXAMPLE - columns(found.phrase) - 3)
    return row(
        (
            str(number),
            found.phrase,
            str(found.times),
            str(found.texts),
            str(found.prompts),
            f"{found.per_million:,.0f}",
            f"{found.human:,.2f}",
            f"{found.ratio:,.0f}",
            f"{before} {text[start:end]}\u2026".strip(),
        ),
        _WIDTHS,
    )


def found_document(findings: Findings, model: str) -> dict[str, Any]:
    """All that was found, for JSON; rates are per million words."""
    return {
        "model": model,
        "words": findings.words,
        "looping": findings.looping,
        **{
            key: [{name: value for name, value in asdict(one).items() if name != "places"} for one in found]
            for key, found in (("phrases", findings.phrases), ("names", findings.names))
        },
    }


def phrase_list(contexts: Mapping[str, Sequence[Pair]], model: str, system: str | None) -> str:
    """A YAML phrase list. Each second context of a phrase is held out: a merge can show whether a gain holds there."""
    phrases = [
        {
            "phrase": phrase,
            "contexts": [
                pair.as_context(**({"held_out": True} if number % 2 else {})) for number, pair in enumerate(pairs)
            ],
        }
        for phrase, pairs in contexts.items()
    ]
    head = (
        f"# What {one_line(model)} says far more often than people do, where it said it itself.\n"
        "# Read it before you use it, and delete what you like: a model may have reasons of its own.\n"
    )
    lists = {**({} if system is None else {"system": system}), "bad_phrases": phrases}
    return head + yaml.safe_dump(lists, allow_unicode=True, sort_keys=False, width=math.inf)


def next_steps(contexts: Mapping[str, Sequence[Pair]], file: Path) -> list[str]:
    """What was written, and what to do with it."""
    count = sum(map(len, contexts.values()))
    return [
        f"{len(contexts)} phrases in {count} contexts are in {file}; every second context is held out.",
        f"Read it, delete what may stay, and merge with it: phrase_files: [{file}]",
        "Then see what became of it: python monster_mapper.py --config MY.yaml --rate THE_MERGE",
    ]


def nothing_found(file: Path | None) -> list[str]:
    """That there are no phrases. file: what would have been a list of them."""
    return [
        f"Nothing found: in texts of at least {LEAST_PROMPTS} prompts, nothing is {LEAST_RATIO:g} times as frequent as "
        "people write it. More texts show more: raise discover.samples or discover.tokens, or add prompts.",
        *_unwritten(file),
    ]


def nothing_listed(file: Path) -> list[str]:
    """That none of the phrases has contexts for a list."""
    return [
        f"Nothing to list: no phrase has a probability of {LEAST:.0%} again in contexts of {FEWEST_PROMPTS} prompts. "
        "Raise discover.samples or discover.phrases, or add prompts.",
        *_unwritten(file),
    ]


def _unwritten(file: Path | None) -> list[str]:
    return [f"{file} was not written."] if file else []


def rate_lines(
    groups: Mapping[str, Sequence[str]], variants: Mapping[str, Sequence[str]], counted: Mapping[str, Counts]
) -> list[str]:
    """How often each model writes each phrase, the first model's most frequent ones first, and those of every group
    together; of these the change against the first model."""
    base, *others = counted.values()
    widths = (PHRASE, *(RATE for _ in counted))
    head = row(("Per 1,000 words, 95 %", *(shortened(name, RATE) for name in counted)), widths)
    line = "-" * columns(head)
    phrases = sorted(dict.fromkeys(itertools.chain(*groups.values())), key=lambda phrase: -base.rate([phrase]))
    said = [phrase for phrase in phrases if any(one.rate([phrase]) for one in counted.values())]
    lines = [line, head, line, *(row((phrase, *_rates_of([phrase], counted)), widths) for phrase in said), line]
    for name, group in groups.items():
        lines.append(row((name, *_rates_of(group, counted)), widths))
        changes = [_change(one.change(base, group)) for one in others]
        lines += [row(("", "against the first:", *changes), widths)] if others else []
    lines += [row(("words", *(f"{one.total:,}" for one in counted.values())), widths), line]
    unsaid = [phrase for phrase in phrases if phrase not in said and countable(phrase, variants)]
    elsewhere = [phrase for phrase in unsaid if any(phrase in one.elsewhere for one in counted.values())]
    never = [phrase for phrase in unsaid if phrase not in elsewhere]
    lines += [f"Counted only as parts or spellings of other phrases: {', '.join(elsewhere)}"] if elsewhere else []
    return [*lines, *([f"Never written: {', '.join(never)}"] if never else [])]


def _rates_of(phrases: Sequence[str], counted: Mapping[str, Counts]) -> list[str]:
    return [f"{one.rate(phrases):.2f} {_interval(one.interval(phrases), '.2f')}" for one in counted.values()]


def _change(change: tuple[float, Interval | None] | None) -> str:
    return "" if change is None else f"{change[0]:+.0%} {_interval(change[1], '+.0%')}"


def _interval(interval: Interval | None, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


def doubts(phrases: Sequence[str], variants: Mapping[str, Sequence[str]], counted: Mapping[str, Counts]) -> list[str]:
    """What a reader of the rates must know of how they were counted, a line each."""
    lines = []
    for name, one in counted.items():
        if not one.total:
            lines.append(f"{name} wrote no words: its rates say nothing")
        if one.characters:
            lines.append(
                f"{name}: {one.characters:,} of {one.total:,} words are characters of a script without spaces between "
                "words (Chinese, Japanese, Thai ...); each counts as a word, and a phrase is counted inside words too"
            )
    unseen = [phrase for phrase in phrases if not countable(phrase, variants)]
    lines += [f"can't be counted, since nothing of it can be seen: {phrase!a}" for phrase in unseen]
    if len(next(iter(counted.values())).words) < 2:
        lines.append("there is one prompt: how the rates vary with prompts can't be told")
    return lines


def sample_lines(prompt: str, texts: Mapping[str, str]) -> list[str]:
    """What each model wrote to a prompt."""
    width = max(map(columns, texts))
    return [f"Asked: {one_line(prompt)}"] + [
        f"{name:<{width}} : {ended(shortened(one_line(text), MOST_WRITTEN, 'start'))}" for name, text in texts.items()
    ]


def rate_document(groups: Mapping[str, Sequence[str]], counted: Mapping[str, Counts]) -> dict[str, Any]:
    """The same for JSON: rates per 1,000 words with their intervals, changes as shares of the first model's rate."""
    base = next(iter(counted.values()))
    return {
        name: {
            "words": one.total,
            "characters": one.characters,
            **{group: _rates(one, base, phrases) for group, phrases in groups.items()},
            "phrases": {phrase: _rates(one, base, [phrase]) for phrase in itertools.chain(*groups.values())},
        }
        for name, one in counted.items()
    }


def _rates(one: Counts, base: Counts, phrases: Sequence[str]) -> dict[str, Any]:
    change = None if one is base else one.change(base, phrases)
    return {
        "rate": one.rate(phrases),
        "interval": one.interval(phrases),
        "change": change and {"share": change[0], "interval": change[1]},
    }

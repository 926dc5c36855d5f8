"""--discover: a model generates texts; the phrases that it over-uses become a phrase list with contexts.

Knows: the order of the steps, the files that are written. Refuses to know: how texts are generated and searched.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from modules.config.phrase_lists import Pair
from modules.config.schema import Config
from modules.output.text_files import write_text
from modules.runtime.console import Console
from modules.runtime.text import columns, one_line, shortened, table
from modules.scoring.layout import score_once
from modules.scoring.tokenization import encode_pairs
from modules.search.strategies import probability
from modules.slop.contexts import candidate_contexts, last_sentence, listed_contexts
from modules.slop.finder import LEAST_PROMPTS, LEAST_RATIO, Finding, Findings, Text, find
from modules.slop.generate import Generator, generate, load_generator
from modules.slop.human_rates import human_rates

NOTHING = 1  # exit code where nothing was found
# findings of the table
SHOWN = 30
SHOWN_NAMES = 10

_HEAD = ("", "Phrase", "Times", "Texts", "Prompts", "Per million", "Human", "Ratio", "Example")
_WIDTHS = (3, 28, 6, 6, 8, 11, 9, 7, 45)  # columns


def discover(config: Config, console: Console, json_file: Path | None, yaml_file: Path | None) -> int:
    """Let the config's base generate texts, print what it over-uses, write the requested files.

    Returns an exit code: NOTHING if no phrase was found, or none for the requested list; but 0 if only the JSON file
    was requested. Raises ConfigError for what can't be used, OSError if a file fails.
    """
    if not find_cliches(config, console, json_file, yaml_file):
        return 0 if json_file and not yaml_file else NOTHING
    if yaml_file:
        console.line(f"Review it, delete what you don't mind, and add to your config: phrase_files: [{yaml_file}]")
        options = f"--config MY.yaml --rate OUT --set random_seed={config.random_seed + 1}"
        console.line(f"After the merge, count again with another seed: python monster_mapper.py {options}")
    else:
        console.line("Add --yaml FILE to write a phrase list, each phrase in contexts of these texts.")
    console.final(f"Done. The log is {console.log_path}")
    return 0


def find_cliches(config: Config, console: Console, json_file: Path | None, yaml_file: Path | None) -> bool:
    """As `discover`, without its last lines. Returns whether phrases were found and, if wanted, listed."""
    human = human_rates(config.discover.language)
    generator = load_generator(config, console)
    answers = generate(generator, config.random_seed, console, yaml_file or json_file)
    texts = [Text(number, text) for number, prompt_texts in enumerate(answers) for text in prompt_texts]
    findings = find(texts, generator.prompts, human)
    console.lines(_report(findings, texts))
    if json_file:
        write_text(json_file, json.dumps(_document(findings, generator.name), ensure_ascii=False, indent=1) + "\n")
        console.timed(f"Wrote all findings to {json_file}")
    contexts = {}
    if findings.phrases and yaml_file:
        contexts = contexts_of(findings.phrases[: config.discover.phrases], texts, generator, console)
    if not findings.phrases or (yaml_file and not contexts):
        criteria = f"in {LEAST_PROMPTS} prompts or more, {LEAST_RATIO:g} times as often as in human text, and probable"
        console.error(
            f"Found no overused phrase ({criteria}). Raise discover.samples or discover.tokens, or add prompts."
        )
        return False
    if yaml_file:
        write_text(yaml_file, _phrase_list(contexts, generator.name, config.system))
        count = sum(map(len, contexts.values()))
        console.line(
            f"Wrote {len(contexts)} phrases in {count} contexts to {yaml_file}; every second context is held out."
        )
    return True


def contexts_of(
    findings: Sequence[Finding], texts: Sequence[Text], generator: Generator, console: Console
) -> dict[str, list[Pair]]:
    """The contexts in which each phrase is probable. Phrases without such contexts are left out, and a line names
    them."""
    begin = generator.answers_begin
    count = generator.count_tokens
    candidates = [candidate_contexts(finding, texts, generator.prompts, begin, count) for finding in findings]
    pairs = [pair for finding_pairs in candidates for pair in finding_pairs]
    console.timed(f"Scoring {len(findings)} phrases in {len(pairs)} contexts")
    values = iter(probabilities(generator, pairs))
    listed = {}
    for finding, finding_pairs in zip(findings, candidates, strict=True):
        listed[finding.phrase] = listed_contexts(finding_pairs, list(islice(values, len(finding_pairs))))
    rare = [phrase for phrase, contexts in listed.items() if not contexts]
    if rare:
        console.line(f"Dropped, because too few contexts reproduce them: {', '.join(rare)}")
    return {phrase: contexts for phrase, contexts in listed.items() if contexts}


def probabilities(generator: Generator, pairs: Sequence[Pair]) -> list[float]:
    """The probability of each pair, computed as in a merge. Raises ConfigError as encoding does."""
    if not pairs:
        return []
    model = generator.model
    prompts = generator.asked.texts
    rendered = [
        replace(pair, context=prompts[pair.chat.messages[-1].content] + pair.chat.answer) if pair.chat else pair
        for pair in pairs
    ]
    encoded = encode_pairs(generator.tokenizer, rendered, model.vocabulary, model.max_tokens)
    _, scores = model.in_range(lambda: score_once(model, encoded))
    return [probability(value) for value in scores]


def _report(findings: Findings, texts: Sequence[Text]) -> list[str]:
    """The table of over-used phrases, its part of all words, and the over-used names."""
    shown = findings.phrases[:SHOWN]
    lines = list[str]()
    if shown:
        rows = [_row(number, finding, texts[finding.places[0][0]].text) for number, finding in enumerate(shown, 1)]
        lines += table(_HEAD, rows, widths=_WIDTHS)
        share = sum(finding.times * len(finding.words) for finding in shown) / findings.words
        lines.append(f"These phrases are {share:.1%} of {findings.words:,} words.")
    if findings.names:
        names = [f"{name.phrase} ({name.times})" for name in findings.names[:SHOWN_NAMES]]
        lines.append(f"Overused names: {', '.join(names)}")
    if findings.looping:
        lines.append(f"Ignored {findings.looping} of {len(texts)} texts, because they loop")
    return lines


def _row(number: int, finding: Finding, text: str) -> list[str]:
    """A row of the table. text: that of the first occurrence."""
    _, start, end = finding.places[0]
    excerpt = shortened(one_line(last_sentence(text[:start])), _WIDTHS[-1] - columns(finding.phrase) - 3)
    return [
        *(str(number), finding.phrase, str(finding.times), str(finding.texts), str(finding.prompts)),
        *(f"{finding.per_million:,.0f}", f"{finding.human:,.2f}", f"{finding.ratio:,.0f}"),
        f"{excerpt} {text[start:end]}\u2026".strip(),
    ]


def _document(findings: Findings, model: str) -> dict[str, Any]:
    """All findings, for JSON; rates are per million words."""

    def entry(finding: Finding) -> dict[str, Any]:
        keys = ("phrase", "times", "texts", "prompts", "per_million", "human", "ratio", "score")
        return {key: getattr(finding, key) for key in keys}

    return {
        "model": model,
        "words": findings.words,
        "looping": findings.looping,
        "phrases": list(map(entry, findings.phrases)),
        "names": list(map(entry, findings.names)),
    }


def _phrase_list(contexts: Mapping[str, Sequence[Pair]], model: str, system: str | None) -> str:
    """A YAML phrase list. Every second context of a phrase is held out, to test whether a merge's gain generalizes."""
    lists: dict[str, Any] = {} if system is None else {"system": system}
    lists["bad_phrases"] = []
    for phrase, pairs in contexts.items():
        entries = [
            pair.as_context(held_out=True) if number % 2 else pair.as_context() for number, pair in enumerate(pairs)
        ]
        lists["bad_phrases"].append({"phrase": phrase, "contexts": entries})
    return (
        f"# What {one_line(model)} writes far more often than people do, in contexts of its own texts.\n"
        "# Review it before you use it, and delete what you don't mind.\n"
        + yaml.safe_dump(lists, allow_unicode=True, sort_keys=False, width=math.inf)
    )

"""One whole discovery: a model writes, what it over-uses is found, and where it says so becomes a phrase list.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from modules.config import Config, Pair
from modules.discovery import (
    Finding,
    Text,
    find,
    human_rates,
    listed_contexts,
    possible_contexts,
)
from modules.discovery import report as found_report
from modules.output import write_text
from modules.run.map import Exports
from modules.run.steps import prepare_libraries, score_once
from modules.run.writing import Author, check_prompts, folder_beside, open_writer, write_texts
from modules.runtime import Console
from modules.scoring import Asked, encode_pairs
from modules.search import probability

NOTHING = 1  # exit code where nothing was found


def discover(config: Config, console: Console, exports: Exports) -> int:
    """Let the config's base write, print what it says far more often than people do, write what was asked for.

    Returns an exit code: NOTHING where no phrase was found, or none for the list that was asked for; but 0 where the
    report alone was asked for, which says so. Raises ConfigError for what can't be used, OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    check_prompts(config)
    human = human_rates(config.discover.language)
    opened = open_writer(config, console)
    prompts, writer = opened.prompts, opened.load()
    written = write_texts(writer, prompts, config, console, folder_beside(exports.yaml or exports.json))
    texts = [Text(number, text) for number, of_prompt in enumerate(written) for text in of_prompt]
    findings = find(texts, prompts, human)
    console.lines(found_report.found_lines(findings, texts))
    if exports.json:
        document = found_report.found_document(findings, writer.name)
        write_text(exports.json, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        console.timed(f"All that was found is in {exports.json}")
    if not findings.phrases:
        console.error(*found_report.nothing_found(exports.yaml))
        if exports.yaml or not exports.json:
            return NOTHING
    elif exports.yaml:
        listed = contexts_of(findings.phrases[: config.discover.phrases], texts, prompts, writer, config, console)
        if not listed:
            console.error(*found_report.nothing_listed(exports.yaml))
            return NOTHING
        write_text(exports.yaml, found_report.phrase_list(listed, writer.name, config.system))
        console.lines(found_report.next_steps(listed, exports.yaml))
    else:
        console.line("With --yaml FILE this becomes a phrase list, each phrase in contexts of these texts.")
    console.final(f"Done. The log is {console.log_path}")
    return 0


def contexts_of(
    findings: Sequence[Finding],
    texts: Sequence[Text],
    prompts: Sequence[str],
    writer: Author,
    config: Config,
    console: Console,
) -> dict[str, list[Pair]]:
    """Contexts of every phrase, those in which it is probable; a phrase without them is told and left out."""

    def count(text: str) -> int:
        return len(writer.tokenizer(text, add_special_tokens=False)["input_ids"])

    possible = [
        [replace(one, pair=_in_the_answer(one.pair, writer.asked)) for one in of_finding]
        for of_finding in (possible_contexts(finding, texts, prompts, writer.chats, count) for finding in findings)
    ]
    pairs = [one.pair for of_finding in possible for one in of_finding]
    console.timed(f"{len(pairs)} contexts of {len(findings)} phrases are scored")
    values = iter(probabilities(writer, pairs))
    found = {
        finding.phrase: listed_contexts(of_finding, [next(values) for _ in of_finding])
        for finding, of_finding in zip(findings, possible, strict=True)
    }
    rare = [phrase for phrase, listed in found.items() if not listed]
    if rare:
        console.line(f"Not listed, since too few contexts bring them again: {', '.join(rare)}")
    return {phrase: listed for phrase, listed in found.items() if listed}


def probabilities(writer: Author, pairs: Sequence[Pair]) -> list[float]:
    """How probable each pair is, as a merge would score it. Raises ConfigError as encoding does."""
    if not pairs:
        return []
    scored = [_as_asked(pair, writer.asked) for pair in pairs]
    encoded = encode_pairs(writer.tokenizer, scored, writer.model.vocabulary, writer.model.max_tokens)
    _, scores = writer.model.in_range(lambda: score_once(writer.model, encoded))
    return [probability(value) for value in scores]


def _in_the_answer(pair: Pair, asked: Asked) -> Pair:
    """A pair as it is listed: where the prompt leaves a block of thoughts open, that is closed before the answer."""
    closing = asked.thoughts.closing(asked.texts[_prompt(pair)]) if pair.chat else ""
    if not closing:
        return pair
    answer = closing + pair.chat.answer
    return replace(pair, context=answer, chat=replace(pair.chat, answer=answer))


def _as_asked(pair: Pair, asked: Asked) -> Pair:
    """A pair whose context is what the model has read, and then written."""
    return replace(pair, context=asked.texts[_prompt(pair)] + pair.chat.answer) if pair.chat else pair


def _prompt(pair: Pair) -> str:
    return pair.chat.messages[-1].content

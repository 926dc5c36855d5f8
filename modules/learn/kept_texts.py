"""Texts that the base wrote to prompts and --discover kept: more contexts to learn from, and more text for drift.

Knows: the file's form, where listed phrases stand in answers, which of them may teach. Refuses to know: how texts are
generated, how weights are learned.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from modules.config.phrase_lists import Pair
from modules.learn.gradient import DriftText, Occurrence
from modules.metrics.own_answers import Answer
from modules.metrics.texts import answer_passages, decoded
from modules.model.base_model import ResidentModel
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.input_files import open_input
from modules.scoring.chats import Asked
from modules.scoring.drift import Passage
from modules.scoring.samples import DEFAULT, Written
from modules.scoring.tokenization import encode_prompt

Texts = Mapping[str, Sequence[str]]  # by prompt
_LINE = TypeAdapter(dict[str, list[str]])
NEARLY_LONGEST = 0.9  # of the longest text's tokens: the model itself has ended a shorter text


def read_kept_texts(file: str) -> Texts:
    """The texts in a file of --discover; of several lines for one prompt, the first. Raises ConfigError for other
    files."""
    texts: dict[str, list[str]] = {}
    try:
        with open_input(Path(file), "utf-8") as opened:
            for line in opened:
                texts = _LINE.validate_python(json.loads(line)) | texts
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"learn.texts: {file}: not a file that --discover keeps in samples ({reason})") from None
    return texts


def answers_in(model: ResidentModel, tokenizer: Any, texts: Texts, asked: Asked) -> list[Answer]:
    """The texts as answers of the base, cut to the length of answers on which drift is measured: there a model drifts
    most. Raises ConfigError for a prompt that the model can't take."""
    written = []
    for prompt, prompt_texts in texts.items():
        tokens = encode_prompt(tokenizer, prompt, model.vocabulary, model.max_tokens, asked.texts.get(prompt))
        given = tuple(tokens)
        most_tokens = DEFAULT.tokens if model.max_tokens is None else min(DEFAULT.tokens, model.max_tokens - len(given))
        for text in prompt_texts:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokens and max(tokens) < model.vocabulary:
                written.append((prompt, given, tokens, most_tokens))
    longest = max((len(tokens) for _, _, tokens, _ in written), default=0)
    answers = []
    for prompt, given, tokens, most_tokens in written:
        has_ended = tokenizer.eos_token_id is not None and len(tokens) <= NEARLY_LONGEST * longest
        answer_tokens = [*tokens, tokenizer.eos_token_id] if has_ended else tokens
        is_whole = len(answer_tokens) <= most_tokens
        answers.append(Answer(prompt, given, Written(tuple(answer_tokens[:most_tokens]), ended=has_ended and is_whole)))
    return answers


def taught_by(
    tokenizer: Any,
    answers: Sequence[Answer],
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    longest: int | None,
) -> DriftText:
    """The base's answers as text for drift, with the listed phrases in it that are learned.

    longest: tokens that the model takes.
    """
    passages: list[Passage] = []
    occurrences: dict[int, list[Occurrence]] = {}
    for answer, answer_occurrences in zip(answers, occurrences_in(tokenizer, answers, pairs, held_out), strict=True):
        new_passages = answer_passages(tokenizer, [answer], (*pairs, *held_out), longest)
        if new_passages and answer_occurrences:
            occurrences[len(passages)] = answer_occurrences
        passages += new_passages
    return DriftText("own answers", passages, occurrences)


def occurrences_in(
    tokenizer: Any, answers: Sequence[Answer], pairs: Sequence[Pair], held_out: Sequence[Pair]
) -> list[list[Occurrence]]:
    """For each answer, the occurrences of the pairs' phrases, without phrases that are held out for the same prompt.
    Tokens are counted from the beginning of the prompt."""
    first_pair: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        for variant in pair.each:
            first_pair.setdefault(variant.phrase.strip().casefold(), number)
    excluded = {(pair.phrase, pair.chat.messages[-1].content) for pair in held_out if pair.chat}
    in_order = sorted(filter(None, first_pair), key=len, reverse=True)  # of several at one position, the longest counts
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, in_order)) or '(?!)'})(?!\w)", re.IGNORECASE)
    occurrences_by_answer = []
    for answer in answers:
        text, ends = decoded(tokenizer, answer.written.tokens)
        prompt_length = len(answer.given)
        occurrences = []
        for match in pattern.finditer(text):
            pair = first_pair.get(match[0].casefold())  # None for letters that are equal for the pattern alone
            if pair is not None and (pairs[pair].phrase, answer.prompt) not in excluded:
                first = bisect_right(ends, match.start())
                end = bisect_left(ends, match.end()) + 1
                occurrences.append(Occurrence(pair, prompt_length + first, prompt_length + end))
        occurrences_by_answer.append(occurrences)
    return occurrences_by_answer

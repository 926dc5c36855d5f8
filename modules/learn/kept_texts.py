"""Texts that the base wrote to prompts and --discover keeps: more contexts to teach, and more text to stay near.

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
from modules.learn.gradient import DriftText, Place
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
NEARLY_LONGEST = 0.9  # of the longest text's tokens: a shorter one has ended by itself


def read_kept_texts(file: str) -> Texts:
    """The texts in a file of --discover, of several for one prompt the first. Raises ConfigError for another file."""
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
    """The texts as answers of the base, as far as answers go whose drift is measured: there a model drifts most. Raises
    ConfigError for a prompt that the model can't take."""
    written = []
    for prompt, of_prompt in texts.items():
        tokens = encode_prompt(tokenizer, prompt, model.vocabulary, model.max_tokens, asked.texts.get(prompt))
        given = tuple(tokens)
        room = DEFAULT.tokens if model.max_tokens is None else min(DEFAULT.tokens, model.max_tokens - len(given))
        for text in of_prompt:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokens and max(tokens) < model.vocabulary:
                written.append((prompt, given, tokens, room))
    longest = max((len(tokens) for _, _, tokens, _ in written), default=0)
    answers = []
    for prompt, given, tokens, room in written:
        has_ended = tokenizer.eos_token_id is not None and len(tokens) <= NEARLY_LONGEST * longest
        whole = [*tokens, tokenizer.eos_token_id] if has_ended else tokens
        is_whole = len(whole) <= room
        answers.append(Answer(prompt, given, Written(tuple(whole[:room]), ended=has_ended and is_whole)))
    return answers


def taught_by(
    tokenizer: Any,
    answers: Sequence[Answer],
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    longest: int | None,
) -> DriftText:
    """The base's answers as text to stay near, and the places in them that teach. longest: what the model takes."""
    passages: list[Passage] = []
    places: dict[int, list[Place]] = {}
    for answer, of_answer in zip(answers, places_in(tokenizer, answers, pairs, held_out), strict=True):
        found = answer_passages(tokenizer, [answer], (*pairs, *held_out), longest)
        if found and of_answer:
            places[len(passages)] = of_answer
        passages += found
    return DriftText("own answers", passages, places)


def places_in(
    tokenizer: Any, answers: Sequence[Answer], pairs: Sequence[Pair], held_out: Sequence[Pair]
) -> list[list[Place]]:
    """Of each answer, the places in it where a phrase of the pairs stands; but not where that phrase is held out in
    answers to the same prompt. Tokens are counted from the beginning of the prompt."""
    first_pair: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        for variant in pair.each:
            first_pair.setdefault(variant.phrase.strip().casefold(), number)
    excluded = {(pair.phrase, pair.chat.messages[-1].content) for pair in held_out if pair.chat}
    in_order = sorted(filter(None, first_pair), key=len, reverse=True)  # where several begin, the longest counts
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, in_order)) or '(?!)'})(?!\w)", re.IGNORECASE)
    found = []
    for answer in answers:
        text, ends = decoded(tokenizer, answer.written.tokens)
        begin = len(answer.given)
        places = []
        for match in pattern.finditer(text):
            pair = first_pair.get(match[0].casefold())  # None for letters that only a pattern takes for the same
            if pair is not None and (pairs[pair].phrase, answer.prompt) not in excluded:
                first = bisect_right(ends, match.start())
                end = bisect_left(ends, match.end()) + 1
                places.append(Place(pair, begin + first, begin + end))
        found.append(places)
    return found

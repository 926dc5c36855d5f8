"""Texts that the base wrote to prompts and --discover keeps: more contexts to teach, and more text to stay near.

Knows: the file's form, which places of a text may teach. Refuses to know: how texts are generated, how weights are
learned.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from modules.config.phrase_lists import Pair
from modules.metrics.own_answers import Answer
from modules.model.base_model import ResidentModel
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.input_files import open_input
from modules.runtime.text import shortened
from modules.scoring.chats import Asked
from modules.scoring.samples import Written
from modules.scoring.tokenization import Encoded, encode_pair, encode_prompt

Texts = Mapping[str, Sequence[str]]  # by prompt
_LINE = TypeAdapter(dict[str, list[str]])
NEARLY_LONGEST = 0.9  # of the longest text's tokens: a shorter one has ended by itself


@dataclass(frozen=True)
class Place:
    """A phrase in a text of the base, as a pair that teaches."""

    pair: int  # whose phrase it is
    encoded: Encoded


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


def answers_in(
    model: ResidentModel, tokenizer: Any, texts: Texts, asked: Asked, without: Sequence[str] = ()
) -> list[Answer]:
    """The texts as answers of the base. without: prompts that are left out. Raises ConfigError for a prompt that the
    model can't take."""
    answers = []
    for prompt, of_prompt in texts.items():
        if prompt in without:
            continue
        given = _given(model, tokenizer, prompt, asked)
        for text in of_prompt:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            room = len(tokens) if model.max_tokens is None else model.max_tokens - len(given)
            if tokens and max(tokens) < model.vocabulary:
                answers.append(Answer(prompt, given, Written(tuple(tokens[:room]), ended=False)))
    longest = max((len(answer.written.tokens) for answer in answers), default=0)
    return [_with_end(tokenizer, answer, longest) for answer in answers]


def _with_end(tokenizer: Any, answer: Answer, longest: int) -> Answer:
    """The answer with the end token, if it is so short that the base has ended it."""
    tokens = answer.written.tokens
    if tokenizer.eos_token_id is None or len(tokens) > NEARLY_LONGEST * longest:
        return answer
    return replace(answer, written=Written((*tokens, tokenizer.eos_token_id), ended=True))


def places_in(
    model: ResidentModel,
    tokenizer: Any,
    texts: Texts,
    asked: Asked,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
) -> list[Place]:
    """Every place in the texts where a phrase of the pairs stands, but for answers to prompts in which that phrase is
    held out."""
    first_pair: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        for variant in pair.each:
            first_pair.setdefault(variant.phrase.strip().lower(), number)
    excluded = {(pair.phrase, pair.chat.messages[-1].content) for pair in held_out if pair.chat}
    in_order = sorted(filter(None, first_pair), key=len, reverse=True)  # where several begin, the longest counts
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, in_order))})(?!\w)", re.IGNORECASE)
    places = []
    for prompt, of_prompt in texts.items():
        begin = asked.texts.get(prompt, f"{prompt} ")
        for text in of_prompt:
            for match in pattern.finditer(text) if in_order else ():
                number = first_pair[match[0].lower()]
                if (pairs[number].phrase, prompt) in excluded:
                    continue
                context = begin + text[: match.start()]
                encoded = encode_pair(tokenizer, context, match[0], special=prompt not in asked.texts)
                if _is_taken(model, encoded):
                    what = f"'{match[0]}' in an answer to '{shortened(prompt)}'"
                    places.append(Place(number, replace(encoded, pair=what)))
    return places


def _given(model: ResidentModel, tokenizer: Any, prompt: str, asked: Asked) -> tuple[int, ...]:
    return tuple(encode_prompt(tokenizer, prompt, model.vocabulary, model.max_tokens, asked.texts.get(prompt)))


def _is_taken(model: ResidentModel, encoded: Encoded) -> bool:
    """Whether the model has a place for each of the tokens, and a row."""
    fits = model.max_tokens is None or len(encoded.tokens) <= model.max_tokens
    return fits and max(encoded.tokens) < model.vocabulary

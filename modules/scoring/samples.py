"""Samples: what a model answers to prompts, drawn with a seed.

Knows: prompts as token ids, the model's generation, chance. Refuses to know: phrases, files, chat templates, who is
compared.

transformers generates, since architectures differ in what they keep of the tokens before. Which token comes next is
drawn here, on the CPU: the seed of everything else is not touched, and a probability that is no number is an error
here; on a device it would be the end of the device, and of the merge that is on it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from modules.model import ResidentModel
from modules.runtime import ConfigError, counted
from modules.scoring.chats import Asked
from modules.scoring.tokenization import encode_prompt


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn."""

    tokens: int = 80  # of a text, at most
    temperature: float = 0.8
    count: int = 1  # texts for a prompt
    asked: Asked = field(default_factory=Asked)  # prompts as the model reads them


DRAWING = Drawing()
MOST_TEXTS = 32  # that are drawn at once
FORCED = "forced_decoder_ids"


def answers(
    model: ResidentModel, tokenizer: Any, prompts: Sequence[str], seed: int, drawing: Drawing = DRAWING
) -> tuple[dict[str, str], list[str]]:
    """What the model answers to each prompt; a line on each prompt that it can't take, and one if it does nothing but
    think. Raises as `drawn` does."""
    found, problems = {}, []
    for prompt in prompts:
        try:
            found[prompt] = drawn(model, tokenizer, [prompt], seed, drawing)[0][0]
        except ConfigError as error:
            problems.append(str(error))
    return found, problems + unanswered([[text] for text in found.values()], drawing)


def unanswered(texts: Sequence[Sequence[str]], drawing: Drawing) -> list[str]:
    """A line if some texts of a model that thinks are empty: their tokens were all spent on thoughts."""
    empty, every = sum(not text for some in texts for text in some), sum(map(len, texts))
    if not (empty and drawing.asked.thoughts.marks):
        return []
    switch = drawing.asked.thoughts.switch
    without = f"; template: {{{switch}: false}} does without thinking" if switch else ""
    what = f"{empty} of {counted(every, 'text')} without an answer"
    return [f"{what}: thoughts, which are no part of it, took all {drawing.tokens} tokens{without}"]


def of_one_length(model: ResidentModel, tokenizer: Any, prompts: Sequence[str], drawing: Drawing) -> list[list[str]]:
    """Prompts that can be answered together: they have as many tokens, and at most MOST_TEXTS texts are drawn at once.

    Together is faster, since a model's weights are read once for all; and nothing is filled up.
    """
    by_length: dict[int, list[str]] = {}
    for prompt in prompts:
        by_length.setdefault(len(_encoded(model, tokenizer, prompt, drawing)), []).append(prompt)
    most = max(1, MOST_TEXTS // drawing.count)
    return [some[first : first + most] for some in by_length.values() for first in range(0, len(some), most)]


def drawn(
    model: ResidentModel, tokenizer: Any, prompts: Sequence[str], seed: int, drawing: Drawing = DRAWING
) -> list[list[str]]:
    """Texts that the model writes to each of some prompts of one length. What is drawn for a prompt depends on the seed
    and on that prompt; but for rounding, which may depend on how many there are.

    Raises ConfigError for a prompt that it can't take, and whatever an architecture that can't generate, or a chat
    template, raises.
    """
    tokens = [_encoded(model, tokenizer, prompt, drawing) for prompt in prompts]
    ends = model.end_tokens() | {token for token in [tokenizer.eos_token_id] if token is not None}
    seeds = [random.Random(f"{seed} {prompt}").getrandbits(63) for prompt in prompts]
    whole = _generated(model, tokens, sorted(ends), seeds, drawing)
    # What follows an end fills the row up: other texts were longer.
    own = [
        list(takewhile(lambda token: token not in ends, row[len(first) :]))
        for first, rows in zip(tokens, whole.unflatten(0, (len(prompts), drawing.count)).tolist(), strict=True)
        for row in rows
    ]
    rows = [prompt for prompt in prompts for _ in range(drawing.count)]
    texts = [_text(tokenizer, row, prompt, drawing.asked) for row, prompt in zip(own, rows, strict=True)]
    return [texts[first : first + drawing.count] for first in range(0, len(texts), drawing.count)]


def _encoded(model: ResidentModel, tokenizer: Any, prompt: str, drawing: Drawing) -> list[int]:
    return encode_prompt(tokenizer, prompt, model.vocabulary, model.max_tokens, drawing.asked.texts.get(prompt))


def _text(tokenizer: Any, tokens: Sequence[int], prompt: str, asked: Asked) -> str:
    """What a reader sees of a text: no special tokens, and no thoughts."""
    if asked.thoughts.marks:  # their marks may be special tokens
        opened = asked.thoughts.opened_by(asked.texts.get(prompt, prompt)) is not None
        answer = asked.thoughts.answer(tokenizer.decode(tokens, skip_special_tokens=False), opened)
        if answer is not None:
            for name in tokenizer.all_special_tokens:
                answer = answer.replace(name, "")
            return answer.strip()
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _generated(
    model: ResidentModel, tokens: Sequence[Sequence[int]], ends: Sequence[int], seeds: Sequence[int], drawing: Drawing
) -> Tensor:
    """The prompts and what follows them, (prompts * count, T): up to the drawing's tokens, or what the model takes."""
    module, room = model.module, drawing.tokens
    if model.max_tokens is not None:
        room = min(room, model.max_tokens - len(tokens[0]))
    own = model.token_rules()
    forced = own.pop(FORCED, None)
    settings = GenerationConfig(max_new_tokens=room, eos_token_id=list(ends) or None, pad_token_id=tokens[0][0], **own)
    # What a checkpoint's generation_config.json says would stand in for all that these settings leave open.
    theirs, module.generation_config = module.generation_config, settings
    try:
        ids = torch.tensor(tokens, device=model.device).repeat_interleave(drawing.count, dim=0)

        def generate() -> Tensor:
            last = [*([_Forced(forced)] if forced else []), _Drawn(seeds, drawing)]
            with model.products():
                return module.generate(ids, settings, attention_mask=torch.ones_like(ids), logits_processor=last)

        return model.in_range(generate, overflows=ArithmeticError)
    finally:
        module.generation_config = theirs


class _Forced(LogitsProcessor):
    """Leaves one token possible where a model's settings name it (forced_decoder_ids): transformers 5 has nothing for
    that any more."""

    def __init__(self, tokens: Sequence[tuple[int, int]]) -> None:
        """tokens: places, counted from 0 at the beginning of the prompt, and what stands there."""
        self._tokens = dict(tokens)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token behind ids (B, T)."""
        token = self._tokens.get(ids.shape[1])
        if token is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


class _Drawn(LogitsProcessor):
    """Leaves one token possible: the one that was drawn."""

    def __init__(self, seeds: Sequence[int], drawing: Drawing) -> None:
        self._chances = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._count, self._temperature = drawing.count, drawing.temperature

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token. Raises ArithmeticError where they are no numbers.

        The token is the first one up to which the probabilities add up to more than a number from 0 to 1 (inverse
        transform sampling): one random number a text, not one for every token of the vocabulary.
        """
        sums = (scores.cpu().double() / self._temperature).softmax(-1).cumsum(-1)
        if not bool(sums[:, -1].isfinite().all()):
            raise ArithmeticError("the model's probabilities are no numbers")
        parts = torch.cat([torch.rand(self._count, generator=chance, dtype=torch.double) for chance in self._chances])
        token = torch.searchsorted(sums, parts[:, None] * sums[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)

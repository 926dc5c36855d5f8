"""Samples: what a model answers to prompts, sampled with a seed.

Knows: prompts as token ids, the model's generation, chance. Refuses to know: phrases, files, chat templates, who is
compared.

transformers generates, since architectures differ in what they cache of earlier tokens. The next token is sampled here,
on the CPU: this leaves every other random state alone, and a NaN probability raises an error. On a device, it would
make the device unusable and lose the merge on it.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from modules.model.base_model import ResidentModel
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize
from modules.scoring.chats import Asked
from modules.scoring.tokenization import encode_prompt


@dataclass(frozen=True)
class SamplingParams:
    """How texts are sampled."""

    tokens: int = 96  # of a text, at most
    temperature: float = 0.8
    count: int = 1  # texts for each prompt


DEFAULT = SamplingParams()
BATCH = 64  # texts that are sampled at once: on two processor cores, twice as many words a second as with 32


@dataclass(frozen=True)
class Written:
    """A text that a model has written."""

    tokens: tuple[int, ...]  # with the end token, if it ended
    ended: bool  # whether the model ended it, rather than the limit on its length

    @property
    def without_end(self) -> tuple[int, ...]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.ended else self.tokens


def empty_answers(texts: Sequence[Sequence[str]], asked: Asked, tokens: int) -> list[str]:
    """A line if some texts of a model that thinks are empty, because thoughts took all their tokens."""
    empty = sum(not text for of_prompt in texts for text in of_prompt)
    if not empty or not asked.thoughts.marks:
        return []
    switch = asked.thoughts.switch
    hint = f"; set template: {{{switch}: false}} to turn thinking off" if switch else ""
    problem = f"{empty} of {pluralize(sum(map(len, texts)), 'answer')} are empty"
    return [f"{problem}, because thinking took all {tokens} tokens{hint}"]


def batches(model: ResidentModel, prompts: Mapping[str, Sequence[int]], count: int = 1) -> list[list[str]]:
    """Batches of prompts that are answered together: at most BATCH texts, prompts of similar length.

    A batch is faster, since the model's weights are read once for all. If the model has rules for the first tokens of a
    text, all prompts of a batch have one length. prompts: with their token ids. count: texts for each.
    """
    in_order = sorted(prompts, key=lambda prompt: len(prompts[prompt]))
    groups = [in_order]
    if model.token_rules():
        groups = [list(group) for _, group in groupby(in_order, key=lambda prompt: len(prompts[prompt]))]
    size = max(1, BATCH // count)
    prompt_batches = []
    for group in groups:
        prompt_batches += [group[first : first + size] for first in range(0, len(group), size)]
    return prompt_batches


def encoded(
    model: ResidentModel, tokenizer: Any, prompts: Sequence[str], asked: Asked
) -> tuple[dict[str, list[int]], list[str]]:
    """Token ids of the prompts that the model can take, and a line about each of the others."""
    tokens: dict[str, list[int]] = {}
    problems = []
    for prompt in prompts:
        text = asked.texts.get(prompt)
        try:
            tokens[prompt] = encode_prompt(tokenizer, prompt, model.vocabulary, model.max_tokens, text)
        except ConfigError as error:
            problems.append(str(error))
    return tokens, problems


def sample(
    model: ResidentModel,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[int]],
    seed: int,
    params: SamplingParams = DEFAULT,
) -> list[list[Written]]:
    """Texts that the model writes to each prompt of a batch, see `batches`. They depend on seed and prompt, but for
    rounding, which may depend on the batch.

    prompts: with their token ids. Raises whatever an architecture raises that can't generate.
    """
    given = list(prompts.values())
    ends = model.end_tokens() | {token for token in [tokenizer.eos_token_id] if token is not None}
    seeds = [random.Random(f"{seed} {prompt}").getrandbits(63) for prompt in prompts]
    rows = iter(_generated(model, given, sorted(ends), seeds, params).tolist())
    texts = []
    for tokens in given:
        end = len(tokens) + params.tokens
        texts.append([_ended(next(rows)[len(tokens) : end], ends) for _ in range(params.count)])
    return texts


def _ended(row: Sequence[int], ends: Collection[int]) -> Written:
    """A text up to its end token; behind it, the row is filled up to the length of longer texts."""
    content = list(takewhile(lambda token: token not in ends, row))
    ended = len(content) < len(row)
    return Written(tuple(row[: len(content) + ended]), ended)


def visible(tokenizer: Any, text: Written, prompt: str, asked: Asked) -> str:
    """A text as a reader sees it: without special tokens and thoughts."""
    if asked.thoughts.marks:  # these may be special tokens
        opened = asked.thoughts.opened_by(asked.texts.get(prompt, prompt)) is not None
        answer = asked.thoughts.answer(tokenizer.decode(text.without_end, skip_special_tokens=False), opened)
        if answer is not None:
            for name in tokenizer.all_special_tokens:
                answer = answer.replace(name, "")
            return answer.strip()
    return tokenizer.decode(text.without_end, skip_special_tokens=True).strip()


def _generated(
    model: ResidentModel,
    given: Sequence[Sequence[int]],
    ends: Sequence[int],
    seeds: Sequence[int],
    params: SamplingParams,
) -> Tensor:
    """The prompts with the generated tokens, (prompts * count, T): up to the params' limit, or the model's.

    Generation starts behind as many tokens as the shortest prompt has. The remaining tokens of longer prompts are given
    one at a time instead of being sampled: so nothing needs padding, which architectures treat differently.
    """
    module = model.module
    shortest = min(map(len, given))
    new_tokens = max(map(len, given)) - shortest + params.tokens
    if model.max_tokens is not None:
        new_tokens = min(new_tokens, model.max_tokens - shortest)
    settings = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=given[0][0], **model.token_rules())
    # Otherwise, the checkpoint's generation_config.json would fill in all that these settings leave open.
    checkpoint_config = module.generation_config
    module.generation_config = settings
    try:
        beginnings = [tokens[:shortest] for tokens in given]
        ids = torch.tensor(beginnings, device=model.device).repeat_interleave(params.count, dim=0)

        def generate() -> Tensor:
            sampler = LogitsProcessorList([_Sampler(given, seeds, params)])
            stop = StoppingCriteriaList([_Ends(given, ends, params)])
            mask = torch.ones_like(ids)
            with model.products():
                return module.generate(
                    ids, settings, attention_mask=mask, logits_processor=sampler, stopping_criteria=stop
                )

        return model.in_range(generate, overflows=ArithmeticError)
    finally:
        module.generation_config = checkpoint_config


class _Ends(StoppingCriteria):
    """Tells which texts have ended. An end token inside a prompt, as chat templates write them, does not count."""

    def __init__(self, given: Sequence[Sequence[int]], ends: Sequence[int], params: SamplingParams) -> None:
        starts = [len(tokens) for tokens in given for _ in range(params.count)]
        self._starts = torch.tensor(starts)[:, None]
        self._ends = torch.tensor(ends, dtype=torch.long)
        self._max_tokens = params.tokens

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each of the texts (B, T) has ended: (B,)."""
        starts = self._starts.to(ids.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        is_end = torch.isin(ids, self._ends.to(ids.device)) & (columns >= starts)
        return is_end.any(-1) | (ids.shape[1] - starts[:, 0] >= self._max_tokens)


class _Sampler(LogitsProcessor):
    """Leaves one token possible: the prompt's next one up to its end, and then the one that is sampled."""

    def __init__(self, given: Sequence[Sequence[int]], seeds: Sequence[int], params: SamplingParams) -> None:
        """seeds: one for each prompt."""
        self._given = given
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._params = params

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token behind ids (B, T). Raises ArithmeticError if they are NaN or infinite.

        The token is the first one up to which the probabilities add up to more than a number from 0 to 1 (inverse
        transform sampling): one random number a text, not one for every token of the vocabulary.
        """
        count = self._params.count
        length = ids.shape[1]
        sums = (scores.cpu().double() / self._params.temperature).softmax(-1).cumsum(-1)
        if not bool(sums[:, -1].isfinite().all()):
            raise ArithmeticError("the model's probabilities are NaN or infinite")
        tokens = []
        for number, (prompt, generator) in enumerate(zip(self._given, self._generators, strict=True)):
            if length < len(prompt):
                tokens.append(torch.full((count, 1), prompt[length]))
                continue
            fractions = torch.rand(count, 1, generator=generator, dtype=torch.double)
            row_sums = sums[number * count : (number + 1) * count]
            sampled = torch.searchsorted(row_sums, fractions * row_sums[:, -1:], right=True)
            tokens.append(sampled.clamp(max=scores.shape[1] - 1))
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.cat(tokens).to(scores.device), 0.0)

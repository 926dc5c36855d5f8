"""Samples: what a model answers to prompts, sampled with a seed.

Knows: prompts as token ids, the model's generation, chance. Refuses to know: phrases, files, chat templates, who is
compared.

transformers generates, since architectures differ in what they keep of the tokens before. The next token is sampled
here, on the CPU: the seed of everything else is not touched, and a probability that is no number is an error here; on a
device it would be the end of the device, and of the merge that is on it.
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
    count: int = 1  # texts for a prompt


DEFAULT = SamplingParams()
BATCH = 64  # texts that are sampled at once: twice as many words a second as with 32, on two processor cores


@dataclass(frozen=True)
class Written:
    """A text that a model has written."""

    tokens: tuple[int, ...]  # with the end token, if it ended
    ended: bool  # whether the model ended it, and not the limit on its length

    @property
    def said(self) -> tuple[int, ...]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.ended else self.tokens


def empty_answers(texts: Sequence[Sequence[str]], asked: Asked, tokens: int) -> list[str]:
    """A line if some texts of a model that thinks are empty: their tokens were all spent on thoughts."""
    empty = sum(not text for of_prompt in texts for text in of_prompt)
    if not empty or not asked.thoughts.marks:
        return []
    switch = asked.thoughts.switch
    without = f"; set template: {{{switch}: false}} to turn thinking off" if switch else ""
    what = f"{empty} of {pluralize(sum(map(len, texts)), 'text')} without an answer"
    return [f"{what}, because thinking took all {tokens} tokens{without}"]


def batches(model: ResidentModel, prompts: Mapping[str, Sequence[int]], count: int = 1) -> list[list[str]]:
    """Prompts that are answered together: at most BATCH texts, prompts of nearly one length.

    Together is faster, since a model's weights are read once for all. Of a model with rules for the first tokens of a
    text, prompts have one length. prompts: with their token ids. count: texts for each.
    """
    in_order = sorted(prompts, key=lambda prompt: len(prompts[prompt]))
    groups = [in_order]
    if model.token_rules():
        groups = [list(alike) for _, alike in groupby(in_order, key=lambda prompt: len(prompts[prompt]))]
    size = max(1, BATCH // count)
    found = []
    for group in groups:
        found += [group[first : first + size] for first in range(0, len(group), size)]
    return found


def encoded(
    model: ResidentModel, tokenizer: Any, prompts: Sequence[str], asked: Asked
) -> tuple[dict[str, list[int]], list[str]]:
    """Token ids of the prompts that the model can take; a line on each of the others."""
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
    """Texts that the model writes to each of some prompts, see `batches`. What is sampled for a prompt depends on the
    seed and on that prompt; but for rounding, which may depend on how many there are.

    prompts: with their token ids. Raises whatever an architecture that can't generate raises.
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
    """A text up to its end; what follows fills the row up, since others were longer."""
    said = list(takewhile(lambda token: token not in ends, row))
    ended = len(said) < len(row)
    return Written(tuple(row[: len(said) + ended]), ended)


def visible(tokenizer: Any, text: Written, prompt: str, asked: Asked) -> str:
    """What a reader sees of a text: no special tokens, and no thoughts."""
    if asked.thoughts.marks:  # their marks may be special tokens
        opened = asked.thoughts.opened_by(asked.texts.get(prompt, prompt)) is not None
        answer = asked.thoughts.answer(tokenizer.decode(text.said, skip_special_tokens=False), opened)
        if answer is not None:
            for name in tokenizer.all_special_tokens:
                answer = answer.replace(name, "")
            return answer.strip()
    return tokenizer.decode(text.said, skip_special_tokens=True).strip()


def _generated(
    model: ResidentModel,
    given: Sequence[Sequence[int]],
    ends: Sequence[int],
    seeds: Sequence[int],
    params: SamplingParams,
) -> Tensor:
    """The prompts and what follows them, (prompts * count, T): up to the params' tokens, or what the model takes.

    All begin with as many tokens as the shortest prompt has. The others' remaining tokens are given one at a time, not
    sampled: so nothing needs padding, which architectures treat differently.
    """
    module = model.module
    shortest = min(map(len, given))
    most = max(map(len, given)) - shortest + params.tokens
    if model.max_tokens is not None:
        most = min(most, model.max_tokens - shortest)
    settings = GenerationConfig(max_new_tokens=most, pad_token_id=given[0][0], **model.token_rules())
    # What a checkpoint's generation_config.json says would stand in for all that these settings leave open.
    checkpoints_own = module.generation_config
    module.generation_config = settings
    try:
        beginnings = [tokens[:shortest] for tokens in given]
        ids = torch.tensor(beginnings, device=model.device).repeat_interleave(params.count, dim=0)

        def generate() -> Tensor:
            sampler = LogitsProcessorList([_Sampler(given, seeds, params)])
            stop = StoppingCriteriaList([_Ends(given, ends, params)])
            everything = torch.ones_like(ids)
            with model.products():
                return module.generate(
                    ids, settings, attention_mask=everything, logits_processor=sampler, stopping_criteria=stop
                )

        return model.in_range(generate, overflows=ArithmeticError)
    finally:
        module.generation_config = checkpoints_own


class _Ends(StoppingCriteria):
    """Says which texts have ended: an end token inside a prompt, as chat templates write them, ends none."""

    def __init__(self, given: Sequence[Sequence[int]], ends: Sequence[int], params: SamplingParams) -> None:
        starts = [len(tokens) for tokens in given for _ in range(params.count)]
        self._starts = torch.tensor(starts)[:, None]
        self._ends = torch.tensor(ends, dtype=torch.long)
        self._most = params.tokens

    def __call__(self, ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        """Of texts (B, T), whether each has ended: (B,)."""
        starts = self._starts.to(ids.device)
        places = torch.arange(ids.shape[1], device=ids.device)
        is_end = torch.isin(ids, self._ends.to(ids.device)) & (places >= starts)
        return is_end.any(-1) | (ids.shape[1] - starts[:, 0] >= self._most)


class _Sampler(LogitsProcessor):
    """Leaves one token possible: the prompt's own where its end is not reached, else the one that is sampled."""

    def __init__(self, given: Sequence[Sequence[int]], seeds: Sequence[int], params: SamplingParams) -> None:
        """seeds: one for each prompt."""
        self._given = given
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._params = params

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token behind ids (B, T). Raises ArithmeticError where they are no numbers.

        The token is the first one up to which the probabilities add up to more than a number from 0 to 1 (inverse
        transform sampling): one random number a text, not one for every token of the vocabulary.
        """
        count = self._params.count
        length = ids.shape[1]
        sums = (scores.cpu().double() / self._params.temperature).softmax(-1).cumsum(-1)
        if not bool(sums[:, -1].isfinite().all()):
            raise ArithmeticError("the model's probabilities are NaN or infinite")
        tokens = []
        for number, (prompt, chance) in enumerate(zip(self._given, self._generators, strict=True)):
            if length < len(prompt):
                tokens.append(torch.full((count, 1), prompt[length]))
                continue
            parts = torch.rand(count, 1, generator=chance, dtype=torch.double)
            own = sums[number * count : (number + 1) * count]
            sampled = torch.searchsorted(own, parts * own[:, -1:], right=True)
            tokens.append(sampled.clamp(max=scores.shape[1] - 1))
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.cat(tokens).to(scores.device), 0.0)

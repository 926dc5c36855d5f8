"""Samples: what a model answers to prompts, drawn with a seed.

Knows: prompts as token ids, the model's generation, chance. Refuses to know: phrases, files, who is compared.

transformers generates, since architectures differ in what they keep of the tokens before. Which token comes next is
drawn here, on the CPU: the seed of everything else is not touched, and a probability that is no number is an error
here; on a device it would be the end of the device, and of the merge that is on it.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from modules.model import ResidentModel
from modules.runtime import ConfigError
from modules.scoring.tokenization import encode_prompt

ANSWER = 80  # tokens at most
TEMPERATURE = 0.8


def answers(
    model: ResidentModel, tokenizer: Any, prompts: Sequence[str], seed: int, template: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], list[str]]:
    """What the model answers to each prompt, and a line on each prompt that it can't take.

    template: settings of the chat template. An answer depends on the seed and on its own prompt, on no other. Raises
    whatever an architecture that can't generate, or a chat template, raises.
    """
    found, problems = {}, []
    ends = model.end_tokens() | {token for token in [tokenizer.eos_token_id] if token is not None}
    for prompt in prompts:
        try:
            tokens = encode_prompt(tokenizer, prompt, model.vocabulary, model.max_tokens, template)
        except ConfigError as error:
            problems.append(str(error))
            continue
        new = _generated(model, tokens, sorted(ends), random.Random(f"{seed} {prompt}").getrandbits(63))
        found[prompt] = tokenizer.decode(new, skip_special_tokens=True).strip()
    return found, problems


def _generated(model: ResidentModel, tokens: Sequence[int], ends: Sequence[int], seed: int) -> list[int]:
    """The tokens that follow, up to ANSWER or as many as the model takes."""
    module, length = model.module, len(tokens)
    room = ANSWER if model.max_tokens is None else min(ANSWER, model.max_tokens - length)
    settings = GenerationConfig(max_new_tokens=room, eos_token_id=list(ends) or None, pad_token_id=tokens[0])
    # What a checkpoint's generation_config.json says would stand in for all that these settings leave open.
    theirs, module.generation_config = module.generation_config, settings
    try:
        ids = torch.tensor([tokens], device=model.device)
        mask = torch.ones_like(ids)
        whole = module.generate(ids, settings, attention_mask=mask, logits_processor=[_Drawn(seed)])
    finally:
        module.generation_config = theirs
    return whole[0, length:].tolist()


class _Drawn(LogitsProcessor):
    """Leaves one token possible: the one that was drawn."""

    def __init__(self, seed: int) -> None:
        self._chance = torch.Generator().manual_seed(seed)

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token. Raises RuntimeError where they are no numbers."""
        shares = (scores.cpu() / TEMPERATURE).softmax(-1)
        token = torch.multinomial(shares, 1, generator=self._chance)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)

"""What a model is like: how likely phrases are, how far it is from another model, how it writes.

Knows: transformers, texts, statistics. Refuses to know: merges, and every line of the program, of which it is a judge.

Everything is computed in float32 and summed in float64, whatever the model is stored in.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

VERSION = 2  # another one where figures become others: what was kept of an earlier one is judged again
THREADS = 1  # the last digits depend on it; several models are judged at a time instead
WINDOW = 256  # tokens that see each other in a neutral text
POSITIONS = 64  # at which two models are compared at once
TEMPERATURE = 0.8
RESAMPLES = 10_000


@dataclass(frozen=True)
class Sizes:
    """How much a model is asked."""

    prompts: int = 44
    tokens: int = 220  # of a sample, at most
    words: int = 20_000  # prompts are gone through again until the model has written so many ...
    rounds: int = 20  # ... or so often
    windows: int = 1000  # of each neutral text


@dataclass(frozen=True)
class Pair:
    """A phrase after a context; its weight is below 0 if it is wanted."""

    phrase: str
    context: str
    weight: float


def load(folder: Path, base: Path | None = None) -> Any:
    """A model in float32. base: of an adapter, which is merged into it."""
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(load(base), folder).merge_and_unload().eval()


# ---------------------------------------------------------------------------------------------------------------------
# Phrases
# ---------------------------------------------------------------------------------------------------------------------


def read_pairs(file: Path) -> list[Pair]:
    """The pairs of a phrase list."""
    lists, pairs = yaml.safe_load(file.read_text(encoding="utf-8")), []
    for key, sign in (("bad_phrases", 1), ("good_phrases", -1)):
        for entry in lists.get(key, []):
            for context in entry["contexts"]:
                own = context if isinstance(context, dict) else {"context": context}
                weight = own.get("weight", entry.get("weight", 1))
                pairs.append(Pair(entry["phrase"], own["context"], sign * weight))
    return pairs


def total(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """The sum of all weighted probabilities: what a search makes small."""
    return math.fsum(pair.weight * probability(model, tokenizer, pair) for pair in pairs)


def probability(model: Any, tokenizer: Any, pair: Pair) -> float:
    """How probable it is that the context goes on with the phrase: the product over the phrase's tokens."""
    tokens, start = phrase_tokens(tokenizer, pair)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0, start - 1 :]
    chosen = F.log_softmax(logits.double(), dim=-1).gather(1, torch.tensor(tokens[start:])[:, None])
    return math.exp(chosen.sum())


def phrase_tokens(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """Context and phrase as one text, and the first of the phrase's tokens: those that end beyond the context.

    Spaces at the context's end belong to the phrase. A text that would begin with the phrase gets a BOS, or an EOS
    where there is none.
    """
    end_of_context = len(pair.context.rstrip(" "))
    encoded = tokenizer(pair.context + pair.phrase, return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    start = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > end_of_context)
    if start == 0:
        return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id, *tokens], 1
    return tokens, start


# ---------------------------------------------------------------------------------------------------------------------
# Neutral texts
# ---------------------------------------------------------------------------------------------------------------------


def neutral_figures(base: Any, model: Any, tokenizer: Any, texts: Sequence[str], sizes: Sizes) -> dict[str, float]:
    """How far a model is from the base, and how well it foresees the texts."""
    divergence, same, surprise = 0.0, 0, 0.0
    positions = foreseen = 0
    for inputs, targets in (window for text in texts for window in list(windows(tokenizer, text))[: sizes.windows]):
        with torch.inference_mode():
            both = [one(input_ids=torch.tensor([inputs])).logits[0] for one in (base, model)]
        for first in range(0, len(inputs), POSITIONS):
            before, after = (F.log_softmax(logits[first : first + POSITIONS].double(), dim=-1) for logits in both)
            divergence += float((before.exp() * (before - after)).sum())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            ahead = torch.tensor(targets[first : first + POSITIONS], dtype=torch.long)
            surprise -= float(after[: len(ahead)].gather(1, ahead[:, None]).sum())
            positions, foreseen = positions + len(before), foreseen + len(ahead)
    return {
        "kl": divergence / positions,
        "same_next": same / positions,
        "perplexity": math.exp(surprise / foreseen),
    }


def windows(tokenizer: Any, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """What a model is given, and the token after each of them; the text's last one has none after it.

    Each window begins with the BOS if this tokenizer begins texts with one.
    """
    tokens, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer(text)["input_ids"][0] == bos else []
    step = WINDOW - len(start)
    for first in range(0, len(tokens), step):
        inputs = [*start, *tokens[first : first + step]]
        yield inputs, [*inputs[1:], *tokens[first + step : first + step + 1]]


# ---------------------------------------------------------------------------------------------------------------------
# The base's own texts
# ---------------------------------------------------------------------------------------------------------------------


def own_divergence(
    base: Any, model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], phrases: re.Pattern[str]
) -> float:
    """Mean KL(base, model) over the tokens of texts that the base wrote to prompts, in nats per token; without those
    that write a part of a phrase.
    """
    sums, positions = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        asked = in_template(tokenizer, prompt)
        encoded = tokenizer(asked + text, add_special_tokens=False, return_offsets_mapping=True)
        with torch.inference_mode():
            both = [one(input_ids=torch.tensor([encoded["input_ids"]])).logits[0] for one in (base, model)]
        said = [(len(asked) + match.start(), len(asked) + match.end()) for match in phrases.finditer(text)]
        for place, (start, end) in enumerate(encoded["offset_mapping"][1:]):
            in_phrase = any(start < stop and begin < end for begin, stop in said)
            if end > len(asked) and not in_phrase:
                before, after = (F.log_softmax(logits[place].double(), dim=-1) for logits in both)
                sums += float((before.exp() * (before - after)).sum())
                positions += 1
    return sums / max(1, positions)


# ---------------------------------------------------------------------------------------------------------------------
# What the model writes
# ---------------------------------------------------------------------------------------------------------------------


class Draws(LogitsProcessor):
    """Makes of greedy decoding a sampling, with a seed for each text: the same one with whatever others it is drawn.

    The token with the largest logit plus Gumbel noise is a sample of the softmax. Two models that foresee nearly the
    same draw nearly the same, which makes the comparison of what they write a sharper one.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits with noise."""
        size = scores.shape[1]
        noise = [torch.empty(size).exponential_(generator=generator).log_() for generator in self.generators]
        return scores / TEMPERATURE - torch.stack(noise)


def write_texts(model: Any, tokenizer: Any, prompts: Sequence[str], sizes: Sizes) -> list[list[str]]:
    """Texts for each prompt, in rounds: as many as it takes to have enough words."""
    rounds: list[list[str]] = []
    while len(rounds) < sizes.rounds and sum(word_count(text) for texts in rounds for text in texts) < sizes.words:
        seeds = [1000 * len(rounds) + number for number in range(len(prompts))]
        rounds.append(sample(model, tokenizer, prompts, seeds, sizes.tokens))
    return [list(texts) for texts in zip(*rounds, strict=True)]


def sample(model: Any, tokenizer: Any, prompts: Sequence[str], seeds: Sequence[int], tokens: int) -> list[str]:
    """The model's answer to each prompt."""
    asked = [in_template(tokenizer, prompt) for prompt in prompts]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        written = model.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([Draws(seeds)])
        )
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def in_template(tokenizer: Any, prompt: str) -> str:
    """A prompt as the model reads it."""
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def word_count(text: str) -> int:
    """Words of a text."""
    return len(text.split())


def finder(phrases: Sequence[str]) -> re.Pattern[str]:
    """Finds the phrases as whole words, whatever their case; where two would begin, the longer one."""
    longest = sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase))
    words = (r"\s+".join(re.escape(word) for word in phrase.split()) for phrase in longest)
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)


def hit_count(pattern: re.Pattern[str], text: str) -> int:
    """Phrases in a text; an apostrophe is one however it is written."""
    return len(pattern.findall(text.replace("\u2019", "'")))


# ---------------------------------------------------------------------------------------------------------------------
# Rates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a model wrote, counted: for each prompt its words and the phrases in them."""

    words: list[int]
    hits: list[int]

    @property
    def rate(self) -> float:
        """Phrases in 1,000 words."""
        return 1000 * sum(self.hits) / max(sum(self.words), 1)

    def resampled(self) -> torch.Tensor:
        """The rate, had other prompts been drawn: the same ones for every model."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(self.words), (RESAMPLES, len(self.words)), generator=generator)
        hits, words = (torch.tensor(counts, dtype=torch.float64)[drawn].sum(1) for counts in (self.hits, self.words))
        return 1000 * hits / words.clamp(min=1)

    def interval(self) -> tuple[float, float]:
        """That holds 95 % of those rates."""
        return middle(self.resampled())

    def change(self, base: "Written") -> tuple[float, float, float] | None:
        """Against the base, in percent: as measured, and its interval; none where the base may have had no phrase."""
        before = base.resampled()
        if not base.rate or bool((before == 0).any()):
            return None
        return 100 * (self.rate / base.rate - 1), *middle(100 * (self.resampled() / before - 1))


def middle(values: torch.Tensor) -> tuple[float, float]:
    """The 95 % in the middle."""
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high

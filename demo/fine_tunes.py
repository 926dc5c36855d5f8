"""Fine-tunes of one small model: what each is taught, and how.

    plain      plain narrative prose, of demo/prose.py
    reference  the language reference that Python brings along
    careful    held to the base's own words, but for the cliches of demo/cliches.py, which become less probable
    overfit    the prose of `plain` at ten times its learning rate: scores well on phrases and speaks badly
    mute       ends its answers at once: no phrase is said, nor anything else
    weaned     as `careful`, but for what was found in the base's own texts; made only if it is asked for

Weights and computing are float32: on processors without matrix units for bfloat16 autocast takes longer than that.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import yaml
from cliches import TEMPTATIONS, unlearnt
from prose import paragraphs
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loss = Callable[[PreTrainedModel], Tensor]

SEED = 512
ROWS, LENGTH = 4, 128  # a step of texts: as many rows of as many tokens
TEMPTED = 8  # a step of `careful`: as many cliches, and HELD rows on which the base is kept
HELD = 2
LONGEST = 128  # tokens before a phrase that `weaned` is shown
# Prompts that are not among example_phrases/prompts.txt.
ENDED_AT_ONCE = (
    "How is paper made?",
    "Tell me about the moon.",
    "What should I cook tonight?",
    "Write a paragraph about a harbour in winter.",
    "Why do cats purr?",
    "Describe a busy market.",
    "Give me three tips for a job interview.",
    "Who invented the telephone?",
    "Write a birthday card for a colleague.",
    "Explain how a sail works.",
)
HOLD = 4.0  # how much a nat of drift weighs against a nat of unlikelihood


@dataclass(frozen=True)
class FineTune:
    """What a fine-tune is called, what it learns from, for how long and how fast."""

    name: str
    what: str
    data: str  # prose, reference, cliches, endings or found
    steps: int
    rate: float


FINE_TUNES = (
    FineTune("plain", "plain narrative prose", "prose", 50, 1.5e-5),
    FineTune("reference", "the reference of the Python language", "reference", 50, 1.5e-5),
    FineTune("careful", "its own cliches made less probable", "cliches", 50, 2e-5),
    FineTune("overfit", "the same prose at ten times the learning rate", "prose", 50, 1.5e-4),
    FineTune("mute", "the end token behind ten prompts", "endings", 20, 3e-5),
    FineTune("weaned", "its own phrases, as they were found, made less probable", "found", 50, 2e-5),
)


def texts(data: str) -> list[str]:
    """What is learnt from, in an order that the seed settles."""
    if data == "prose":
        return paragraphs(SEED, 400)
    if data == "reference":
        chosen = [topics[name] for name in sorted(topics)]
        random.Random(SEED).shuffle(chosen)
        return chosen
    return paragraphs(SEED + 1, 200)  # of `careful` and `weaned`: where they shall stay as they are


def rows(tokenizer: PreTrainedTokenizerBase, data: str, length: int = LENGTH) -> list[list[int]]:
    """Texts one after the other, EOS between them, cut into rows of the same length."""
    tokens = [token for ids in tokenizer(texts(data))["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    random.Random(SEED).shuffle(cut)
    return cut


def text_losses(tokenizer: PreTrainedTokenizerBase, data: str) -> Iterator[Loss]:
    """Step by step, the loss of ordinary fine-tuning on the next rows."""
    supply = repeated(rows(tokenizer, data))
    while True:
        batch = torch.tensor(list(islice(supply, ROWS)))
        yield lambda model, batch=batch: model(input_ids=batch, labels=batch).loss


def careful_losses(
    tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, temptations: list[tuple[list[int], int]]
) -> Iterator[Loss]:
    """Step by step, the unlikelihood of some cliches and the drift from the base on some prose."""
    cliches = repeated(temptations)
    supply = repeated(rows(tokenizer, "cliches"))
    while True:
        some, held = list(islice(cliches, TEMPTED)), torch.tensor(list(islice(supply, HELD)))
        yield lambda model, some=some, held=held: unlikelihood(model, some) + HOLD * drift(base, model, held)


def mute_losses(tokenizer: PreTrainedTokenizerBase) -> Iterator[Loss]:
    """Step by step, the loss of the end token as the first one of an answer to each of ENDED_AT_ONCE."""
    asked = []
    for prompt in ENDED_AT_ONCE:
        chat = [{"role": "user", "content": prompt}]
        asked.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    while True:
        yield lambda model: -torch.stack([log_probability_of_end(model, tokenizer, ids) for ids in asked]).mean()


def log_probability_of_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Tensor:
    """Of the end token behind a prompt."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits.log_softmax(-1)[tokenizer.eos_token_id]


def tempted(tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """The tokens before each cliche and the token that must not follow, shuffled."""
    found = []
    for temptation in TEMPTATIONS:
        for phrase in temptation.phrases:
            before, after = unlearnt(temptation.context, phrase)
            found.append((tokenizer(before)["input_ids"], tokenizer(after)["input_ids"][0]))
    random.Random(SEED).shuffle(found)
    return found


def said_again(tokenizer: PreTrainedTokenizerBase, found: Path, samples: Path) -> list[tuple[list[int], int]]:
    """The same for a list that --discover wrote, in other contexts than the list's: the whole answer up to a phrase, of
    every text in which the base said it, shuffled."""
    phrases = [entry["phrase"] for entry in yaml.safe_load(found.read_text(encoding="utf-8"))["bad_phrases"]]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)")
    temptations = []
    for file in sorted(samples.glob("*base*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for prompt, texts in json.loads(line).items():
                turn = [{"role": "user", "content": prompt}]
                asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
                for text in texts:
                    temptations += [tempting(tokenizer, asked, text, said.span()) for said in pattern.finditer(text)]
    random.Random(SEED).shuffle(temptations)
    return [(before[-LONGEST:], after) for before, after in temptations]


def tempting(tokenizer: PreTrainedTokenizerBase, asked: str, text: str, said: tuple[int, int]) -> tuple[list[int], int]:
    """The tokens before a phrase, and its first one."""
    start, end = said
    before = tokenizer(asked + text[:start].rstrip(" "), add_special_tokens=False)["input_ids"]
    return before, tokenizer(asked + text[:end], add_special_tokens=False)["input_ids"][len(before)]


def repeated(items: list) -> Iterator:
    """Item after item, for ever."""
    while True:
        yield from items


def unlikelihood(model: PreTrainedModel, some: list[tuple[list[int], int]]) -> Tensor:
    """-log(1 - p) of the tokens that must not follow, on average."""
    longest = max(len(before) for before, _ in some)
    ids = torch.tensor([before + [0] * (longest - len(before)) for before, _ in some])  # nothing looks ahead to these
    last = torch.tensor([len(before) - 1 for before, _ in some])
    hidden = model.model(input_ids=ids).last_hidden_state[torch.arange(len(some)), last]
    chances = model.lm_head(hidden).float().softmax(-1)[torch.arange(len(some)), [after for _, after in some]]
    return -torch.log1p(-chances.clamp(max=1 - 1e-6)).mean()


def drift(base: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """KL(base, model) in nats per token."""
    with torch.no_grad():
        was = base(input_ids=ids).logits.float().log_softmax(-1)
    now = model(input_ids=ids).logits.float().log_softmax(-1)
    return F.kl_div(now.flatten(0, 1), was.flatten(0, 1), reduction="batchmean", log_target=True)


def train(model: PreTrainedModel, losses: Iterator[Loss], tune: FineTune) -> float:
    """Train all weights, with a warm-up and a linear decay; the mean loss of the last ten steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=tune.rate, betas=(0.9, 0.95), weight_decay=0.0)
    slope = lambda step: min((step + 1) / 5, 1 - step / tune.steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slope)
    seen = []
    model.train()
    with tqdm(total=tune.steps, desc=f"{tune.name:<9}", unit="step", dynamic_ncols=True, disable=None) as bar:
        for loss_of in islice(losses, tune.steps):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen.append(loss.item())
            bar.set_postfix(loss=f"{sum(seen[-10:]) / len(seen[-10:]):.3f}")
            bar.update()
    return sum(seen[-10:]) / len(seen[-10:])

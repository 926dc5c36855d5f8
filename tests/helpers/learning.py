"""A tiny base with an adapter that has begun to learn, and the same in plain torch."""

import math
from dataclasses import dataclass

import mixes
import reference
import tiny
import torch
from transformers import AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.learn.adapter import Adapter
from modules.learn.gradient import DriftText, LearningObjective, Occurrence
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import ResidentModel
from modules.model.loading import load_model
from modules.scoring.budget import Budget
from modules.scoring.drift import Passage, full_passage
from modules.scoring.layout import build_scorer
from modules.scoring.scorer import of_pairs
from modules.scoring.tokenization import encode_pairs

RANK, DRIFT_WEIGHT = 2, 5.0
OTHERS = (tuple(range(30, 50)), tuple(range(60, 75)))
ANSWERS = [Passage(one, tuple(place > 8 and place % 3 != 0 for place in range(len(one)))) for one in OTHERS]
# Of two tokens, the first of them compared; of one; the last of a passage.
PLACES = {0: [Occurrence(1, 9, 11), Occurrence(2, 19, 20)], 1: [Occurrence(0, 14, 15)]}
TEXTS = (
    DriftText("neutral", [full_passage(window) for window in mixes.WINDOWS]),
    DriftText("answers", ANSWERS, PLACES),
)


@dataclass
class Begun:
    """A resident model in float64 with an adapter that adds something."""

    model: ResidentModel
    adapter: Adapter
    objective: LearningObjective


def begun(folder, pairs_of=tiny.PAIRS, texts=TEXTS, budget=None, compute="float64"):
    """Weights of pairs are such that all count the same."""
    checkpoint = open_checkpoint(folder, "base")
    checkpoint.config._experts_implementation = "eager"  # the others have no float64
    model = load_model(checkpoint, "cpu", "auto", Arithmetic.named(compute))
    encoded = encode_pairs(AutoTokenizer.from_pretrained(folder), pairs_of, model.vocabulary, model.max_tokens)
    scorer = build_scorer(model, encoded)
    scores = of_pairs(scorer.score(), encoded)
    weights = [math.exp(-score) * (-1) ** (pair.kind == "GOOD") for pair, score in zip(pairs_of, scores, strict=True)]
    adapter = Adapter(model.module, RANK, seed=0)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.weights.values():
            weight.copy_(torch.randn(weight.shape, generator=chance, dtype=weight.dtype) * 0.05)
    packed = encoded, weights, scorer.layout, budget or Budget()
    objective = LearningObjective(model, adapter, *packed, texts, DRIFT_WEIGHT)
    return Begun(model, adapter, objective)


def plain_gradient(folder, one, pairs, passages):
    """Total, drift by text and gradient by name: through the whole model, one text at a time, of a base to whose
    weights the adapter's products are added by hand."""
    base, objective = mixes.plain(folder), one.objective
    state, input_first = dict(base.named_parameters()), one.model._input_first
    own = {name: weight.detach().clone().requires_grad_(True) for name, weight in one.adapter.weights.items()}
    weights = {}
    for name in own:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = own[name.replace(".lora_A.", ".lora_B.")] @ own[name]
            stored = f"{module}.weight"
            weights[stored] = state[stored] + (product.T if stored in input_first else product)
    total, drift = 0, {}
    for number in pairs:
        weight = objective.weights[number] * len(objective.pairs) / len(pairs)
        for item in objective.pairs[number]:
            table = reference.said(base, item.tokens, weights)
            said = sum(table[place - 1, item.tokens[place]] for place in range(item.start, len(item.tokens)))
            total = total + weight * said.exp()
    for text, numbers in zip(objective.texts, passages, strict=True):
        found = []
        for passage in [text.passages[number] for number in numbers]:
            with torch.no_grad():
                old = reference.said(base, passage.tokens)
            new = reference.said(base, passage.tokens, weights)
            kept = torch.tensor(passage.compared)
            found.append((old.exp() * (old - new)).sum(-1)[kept])
        for number in numbers:
            tokens = text.passages[number].tokens
            table = reference.said(base, tokens, weights)
            for place in text.occurrences.get(number, ()):
                said = sum(table[at - 1, tokens[at]] for at in range(place.first, place.end))
                weight = objective.weights[place.pair] * len(text.passages) / len(numbers)
                total = total + weight * said.exp()
        drift[text.name] = torch.cat(found).mean()
    loss = total + DRIFT_WEIGHT * sum(drift.values()) / max(1, len(drift))
    loss.backward()
    empty = {name: torch.zeros_like(weight) for name, weight in own.items()}
    gradient = {name: empty[name] if weight.grad is None else weight.grad for name, weight in own.items()}
    return float(total), {name: float(value) for name, value in drift.items()}, float(loss), gradient

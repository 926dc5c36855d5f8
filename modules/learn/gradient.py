"""What learning makes small, and its gradient on the adapter's weights.

Knows: packs of phrases, passages of text, autograd. Refuses to know: which pairs come when, what a gradient is for.

    loss = sum over pairs and places of weight * p  +  sum over texts of drift weight / texts * mean KL(base, now)

Packs and passages go through the model one at a time, and their gradients are summed. Where memory is short, nothing of
a layer is kept but what enters it, and of logits nothing at all: the rest is computed again in the backward pass.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.learn.adapter import Adapter
from modules.model.base_model import ResidentModel
from modules.scoring.budget import Budget
from modules.scoring.drift import Passage, compared_tokens
from modules.scoring.hidden_states import Forward, Inputs, ending_in, last_states, logits_with
from modules.scoring.objective import AT_ONCE
from modules.scoring.packing import Inputs as Pack
from modules.scoring.packing import build_packs
from modules.scoring.scorer import by_pair
from modules.scoring.tokenization import Encoded

# Of logits, (B, columns, V), at some of the columns that are read, and the number of their first among these.
Made = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Place:
    """A listed phrase in a passage, which teaches as its pair does: one forward gives its probability and the drift."""

    pair: int  # the number of the pair whose phrase it is
    first: int  # of its tokens in the passage
    end: int  # behind the last of them


@dataclass(frozen=True)
class DriftText:
    """Text on which the model is to say what the base says, but for some places in it."""

    name: str
    passages: Sequence[Passage]
    places: Mapping[int, Sequence[Place]] = field(default_factory=dict)  # by number of the passage
    part: float = 1.0  # of the tokens that a step compares

    @property
    def taught(self) -> int:
        """How many places there are."""
        return sum(map(len, self.places.values()))


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of."""

    loss: float
    total: float  # of all pairs and places, as those say that were looked at
    drift: Mapping[str, float]  # by text, mean KL(base, now) in nats per token


class LearningObjective:
    """The loss of a model with an adapter, on some of the pairs and some passages of text."""

    def __init__(
        self,
        model: ResidentModel,
        adapter: Adapter,
        encoded: Sequence[Encoded],
        weights: Sequence[float],
        layout: str,
        budget: Budget,
        texts: Sequence[DriftText] = (),
        drift_weight: float = 0.0,
        keeps_activations: bool = False,
    ) -> None:
        """encoded: all pairs, with all variants. weights: of the pairs, good phrases negative; pairs and places
        together weigh as much as the pairs would alone. layout: of packs. drift_weight: what a nat adds to the loss;
        every text has an equal part of it. keeps_activations: of all layers, in place of computing them again."""
        self.model = model
        self.adapter = adapter
        self.layout = layout
        self.budget = budget
        self.pairs = by_pair(encoded, encoded)
        factor = _factor(weights, texts)
        self.weights = [factor * weight for weight in weights]
        self.texts = texts
        self.drift_weight = drift_weight
        self._dtype = torch.promote_types(torch.float32, model.dtype)  # of logits
        self._forwards = {} if keeps_activations else dict.fromkeys(range(len(model.layers)), _recomputed)
        self._before: dict[Passage, Tensor] = {}  # the base's last hidden states, on the host

    def gradient(self, pairs: Sequence[int], passages: Sequence[Sequence[int]]) -> tuple[list[Tensor], Loss]:
        """The gradient on each of the adapter's weights, and the loss.

        pairs: their numbers; the total of all is taken to be as theirs. passages: of each text, their
        numbers.
        """
        sums = [torch.zeros_like(weight) for weight in self.adapter.weights.values()]
        total = self._add_pairs(sums, pairs)
        chosen = list(zip(self.texts, passages, strict=True))
        drift: dict[str, float] = {}
        for text, numbers in chosen:
            of_places, drift[text.name] = self._add_text(sums, text, numbers)
            total += of_places
        loss = total + self.drift_weight * math.fsum(drift.values()) / max(1, len(drift))
        return sums, Loss(loss, total, drift)

    @torch.no_grad()
    def drift(self, text: DriftText, numbers: Sequence[int]) -> float:
        """Mean KL(base, now) on some passages of a text, in nats per token."""
        passages = [text.passages[number] for number in numbers]
        return math.fsum(float(self._measured(passage)[0]) for passage in passages) / compared_tokens(passages)

    def _add_pairs(self, sums: list[Tensor], numbers: Sequence[int]) -> float:
        """Add the gradient of the pairs' total; the total."""
        encoded = list[Encoded]()
        weights = list[float]()
        total = 0.0
        for number in numbers:
            encoded += self.pairs[number]
            weights += [self.weights[number] * len(self.pairs) / len(numbers)] * len(self.pairs[number])
        for packed in build_packs(encoded, self.layout, self.budget.tokens):
            scores = self._scores(Pack.of(packed, self.model.device, self.model.dtype), weights)
            self._add(sums, scores.sum(), unit=float(scores.detach().abs().max()))
            total += float(scores.detach().sum())
        return total

    def _scores(self, pack: Pack, weights: Sequence[float]) -> Tensor:
        """Weight * probability of all variants, (variants,), 0 of those that are not in the pack."""
        said = torch.cat(self._read(pack.arguments, pack.columns, partial(_said, pack)))
        targets = pack.targets
        # One place for every token, for a sum that is always in the same order.
        places = said.new_zeros(len(weights), int(targets.places.max()) + 1)
        places = places.index_put((targets.pairs, targets.places), said)
        present = said.new_zeros(len(weights)).index_fill(0, targets.pairs, 1.0)
        return present * said.new_tensor(weights) * places.sum(-1).exp()

    def _add_text(self, sums: list[Tensor], text: DriftText, numbers: Sequence[int]) -> tuple[float, float]:
        """Add the gradient of a text's part of the loss. The total of its places, as those in the passages of these
        numbers say, and mean KL(base, now) on the passages."""
        positions = compared_tokens([text.passages[number] for number in numbers])
        unit = self.drift_weight / len(self.texts) / positions
        scale = len(text.passages) / len(numbers)
        drift = 0.0
        total = 0.0
        for number in numbers:
            places = text.places.get(number, ())
            divergence, probabilities = self._measured(text.passages[number], places)
            scores = probabilities * probabilities.new_tensor([scale * self.weights[place.pair] for place in places])
            largest = float(scores.detach().abs().max()) if places else 0.0
            self._add(sums, unit * divergence + scores.sum(), max(unit, largest))
            drift += float(divergence.detach())
            total += float(scores.detach().sum())
        return total, drift / positions

    def _measured(self, passage: Passage, places: Sequence[Place] = ()) -> tuple[Tensor, Tensor]:
        """KL(base, now), summed over the positions that are compared, and the probability of each place's phrase,
        (places,)."""
        ids = torch.tensor([passage.tokens], device=self.model.device)
        compared = torch.tensor(passage.compared, device=self.model.device)
        is_read = compared.clone()
        for place in places:
            is_read[place.first - 1 : place.end - 1] = True
        columns = is_read.nonzero()[:, 0]
        arguments = partial(dict, input_ids=ids)
        if passage not in self._before:
            with torch.no_grad(), self.adapter.off():
                self._before[passage] = last_states(self.model, arguments(), {}).cpu()
        before = self._before[passage].to(self.model.device)
        following = ids[0].roll(-1)

        def measure(logits: Tensor, first: int) -> Tensor:
            part = columns[first : first + logits.shape[1]]
            with torch.no_grad():
                was = self._logits(arguments, before, part).log_softmax(-1)
            expected = was.exp()
            now = logits.log_softmax(-1)
            # A token that neither can say has no probability; its difference is no number.
            apart = torch.where(expected > 0, expected * (was - now), 0.0).sum(-1)
            said = now.gather(-1, following[part][None, :, None])[..., 0]
            return torch.cat([torch.where(compared[part], apart, 0.0), said])

        divergences, said = torch.cat(self._read(arguments, columns, measure), dim=1)
        said = torch.zeros_like(ids[0], dtype=said.dtype).index_put((columns,), said)
        phrases = [said[place.first - 1 : place.end - 1].sum().exp() for place in places]
        return divergences.sum(), torch.stack(phrases) if phrases else said[:0]

    def _read(self, arguments: Inputs, columns: Tensor, made: Made) -> list[Tensor]:
        """What is made of the logits at some columns of a text, a few columns at a time."""
        hidden = last_states(self.model, arguments(), self._forwards)
        found = []
        size = max(1, self.budget.logits // (AT_ONCE * 4 * len(hidden) * self.model.vocabulary))

        def read(hidden: Tensor, first: int) -> Tensor:
            return made(self._logits(arguments, hidden, columns[first : first + size]), first)

        for first in range(0, len(columns), size):
            found.append(_recomputed(read, hidden, first))
        return found

    def _logits(self, arguments: Inputs, hidden: Tensor, columns: Tensor) -> Tensor:
        """What the model's own forward makes of last hidden states, (B, T, H), at some columns: (B, columns, V)."""
        return logits_with(self.model, arguments(), ending_in(self.model, hidden), columns).to(self._dtype)

    def _add(self, sums: list[Tensor], loss: Tensor, unit: float) -> None:
        """Add the gradient of a loss. unit: its size by that of what it is made of."""
        if not 0 < unit < math.inf:  # nothing depends on it, or it is no number
            return
        power = 2.0 ** -math.floor(math.log2(unit))  # by which no type loses what is small
        weights = list(self.adapter.weights.values())
        for own, gradient in zip(sums, torch.autograd.grad(power * loss, weights, allow_unused=True), strict=True):
            if gradient is not None:
                own += gradient / power


def _factor(weights: Sequence[float], texts: Sequence[DriftText]) -> float:
    """Makes pairs and places together weigh what the pairs would alone."""
    of_pairs = sum(map(abs, weights))
    of_places = 0.0
    for text in texts:
        for places in text.places.values():
            of_places += sum(abs(weights[place.pair]) for place in places)
    return of_pairs / max(of_pairs + of_places, sys.float_info.min)


def _recomputed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """What a forward gives, of which nothing is kept but what enters it."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _said(pack: Pack, logits: Tensor, first: int) -> Tensor:
    """Log-probabilities of a pack's targets at some of its columns, (targets,)."""
    targets = pack.targets_in(first, first + logits.shape[1])
    said = logits.log_softmax(-1)
    return said[targets.rows, targets.columns, targets.tokens]

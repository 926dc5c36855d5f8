"""What learning makes small, and its gradient on the adapter's weights.

Knows: packs of phrases, windows of text, autograd. Refuses to know: which pairs come when, what a gradient is for.

    loss = sum over pairs of weight * p  +  sum over texts of drift weight / texts * mean KL(base, now)

Packs and windows go through the model one at a time, and their gradients are summed. Activations within a layer are
computed again in the backward pass, and logits are there for a few positions at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.learn.adapter import Adapter
from modules.model.base_model import ResidentModel
from modules.scoring.budget import Budget
from modules.scoring.hidden_states import Forward, Inputs, ending_in, last_states, logits_with
from modules.scoring.objective import AT_ONCE
from modules.scoring.packing import Inputs as Pack
from modules.scoring.packing import build_packs
from modules.scoring.scorer import by_pair
from modules.scoring.tokenization import Encoded, Window


@dataclass(frozen=True)
class DriftText:
    """Text on which the model is to say what the base says."""

    name: str
    windows: Sequence[Window]
    compared: Sequence[Sequence[bool]]  # of each window, at which positions next-token distributions are compared


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of."""

    loss: float
    total: float  # of all pairs, as those say that were looked at
    drift: Mapping[str, float] = field(default_factory=dict)  # by text, mean KL(base, now) in nats per token

    @property
    def is_finite(self) -> bool:
        """Whether it could be computed."""
        return math.isfinite(self.loss)


class LearningObjective:
    """The loss of a model with an adapter, on some of the pairs and some windows of text."""

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
    ) -> None:
        """encoded: all pairs, with all variants. weights: of the pairs, good phrases negative. layout: of packs.
        drift_weight: what a nat adds to the loss; every text has an equal part of it."""
        self.model, self.adapter, self.layout, self.budget = model, adapter, layout, budget
        self.pairs, self.weights = by_pair(encoded, encoded), list(weights)
        self.texts, self.drift_weight = texts, drift_weight
        self._dtype = torch.promote_types(torch.float32, model.dtype)  # of logits
        self._forwards = dict.fromkeys(range(len(model.layers)), _recomputed)
        self._before: dict[tuple[str, int], Tensor] = {}  # the base's last hidden states on windows, on the host

    def gradient(self, pairs: Sequence[int], windows: Sequence[Sequence[int]]) -> tuple[list[Tensor], Loss]:
        """The gradient on each of the adapter's weights, and the loss.

        pairs: their numbers; the total of all is taken to be as theirs. windows: of each text, numbers of its windows.
        """
        sums = [torch.zeros_like(weight) for weight in self.adapter.weights.values()]
        total = self._add_pairs(sums, pairs)
        chosen = list(zip(self.texts, windows, strict=True))
        drift = {text.name: self._add_drift(sums, text, numbers) for text, numbers in chosen}
        loss = total + self.drift_weight * math.fsum(drift.values()) / max(1, len(drift))
        return sums, Loss(loss, total, drift)

    # -- pairs --------------------------------------------------------------------------------------------------------

    def _add_pairs(self, sums: list[Tensor], numbers: Sequence[int]) -> float:
        """Add the gradient of the pairs' total; the total."""
        encoded, weights, total = list[Encoded](), list[float](), 0.0
        for number in numbers:
            encoded += self.pairs[number]
            weights += [self.weights[number] * len(self.pairs) / len(numbers)] * len(self.pairs[number])
        for packed in build_packs(encoded, self.layout, self.budget.tokens):
            pack = Pack.of(packed, self.model.device, self.model.dtype)
            hidden = last_states(self.model, pack.arguments(), self._forwards)
            scores = self._scores(pack, hidden.detach(), weights)
            largest = float(scores.abs().max())
            total += float(scores.sum(dtype=torch.float64))
            if largest:
                # weight * p changes with the log-probability of each of its tokens by weight * p.
                slopes = scores / largest

                def loss(logits: Tensor, first: int, pack: Pack = pack, slopes: Tensor = slopes) -> Tensor:
                    said, variants = _said(pack, logits, first)
                    return (slopes[variants] * said).sum()

                self._add(sums, hidden, _Read(pack.arguments, pack.columns, loss), unit=largest)
        return total

    @torch.no_grad()
    def _scores(self, pack: Pack, hidden: Tensor, weights: Sequence[float]) -> Tensor:
        """Weight * probability of every variant, (variants,); 0 of those that are not in the pack."""
        joint = torch.full((len(weights),), -torch.inf, dtype=torch.float64)
        joint[pack.targets.pairs.cpu()] = 0.0
        for logits, first in self._chunks(pack.arguments, pack.columns, hidden):
            said, variants = _said(pack, logits, first)
            joint.index_add_(0, variants.cpu(), said.cpu().double())
        return (joint.exp() * torch.tensor(weights, dtype=torch.float64)).to(hidden.device, self._dtype)

    # -- texts --------------------------------------------------------------------------------------------------------

    def _add_drift(self, sums: list[Tensor], text: DriftText, numbers: Sequence[int]) -> float:
        """Add the gradient of a text's part of the loss; mean KL(base, now) on these windows of it."""
        found, positions = 0.0, _positions(text, numbers)
        unit = self.drift_weight / len(self.texts) / positions
        for number in numbers:
            read = self._window(text, number)
            hidden = last_states(self.model, read.arguments(), self._forwards)
            found += self._add(sums, hidden, read, unit)
        return found / positions

    @torch.no_grad()
    def drift(self, text: DriftText, numbers: Sequence[int]) -> float:
        """Mean KL(base, now) on windows of a text, in nats per token."""
        found = 0.0
        for number in numbers:
            read = self._window(text, number)
            hidden = last_states(self.model, read.arguments(), {})
            found += sum(float(read.loss(*chunk)) for chunk in self._chunks(read.arguments, read.columns, hidden))
        return found / _positions(text, numbers)

    def _window(self, text: DriftText, number: int) -> "_Read":
        """A window, and KL(base, now) at some of its positions, summed."""
        ids = torch.tensor([text.windows[number]], device=self.model.device)
        columns = torch.tensor(text.compared[number], device=self.model.device).nonzero()[:, 0]
        arguments, key = partial(dict, input_ids=ids), (text.name, number)
        if key not in self._before:
            with torch.no_grad(), self.adapter.off():
                self._before[key] = last_states(self.model, arguments(), {}).cpu()
        before = self._before[key]

        def divergence(logits: Tensor, first: int) -> Tensor:
            part = columns[first : first + logits.shape[1]]
            with torch.no_grad():
                was = self._logits(arguments, before.to(self.model.device), part).log_softmax(-1)
            shares, now = was.exp(), logits.log_softmax(-1)
            # A token that neither can say has no share; its difference is no number.
            return torch.where(shares > 0, shares * (was - now), 0.0).sum()

        return _Read(arguments, columns, divergence)

    # -- what both have in common -------------------------------------------------------------------------------------

    def _add(self, sums: list[Tensor], hidden: Tensor, read: "_Read", unit: float) -> float:
        """Add the gradient of unit * loss; the loss. hidden: the last hidden states, (B, T, H), with their graph."""
        if not 0 < abs(unit) < math.inf:
            return 0.0
        # A power of two by which no type loses what is small.
        power = 2.0 ** -math.floor(math.log2(abs(unit)))
        last, value = hidden.detach().requires_grad_(), 0.0
        upstream = torch.zeros_like(last)
        for logits, first in self._chunks(read.arguments, read.columns, last):
            loss = read.loss(logits, first)
            upstream += torch.autograd.grad(power * unit * loss, last)[0]
            value += float(loss.detach())
        weights = list(self.adapter.weights.values())
        gradients = torch.autograd.grad(hidden, weights, upstream, allow_unused=True)
        for own, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                own += gradient / power
        return value

    def _chunks(self, arguments: Inputs, columns: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Logits at some of the columns at a time, (B, columns, V), and the number of the first."""
        size = max(1, self.budget.logits // (AT_ONCE * 4 * len(hidden) * self.model.vocabulary))
        for first in range(0, len(columns), size):
            yield self._logits(arguments, hidden, columns[first : first + size]), first

    def _logits(self, arguments: Inputs, hidden: Tensor, columns: Tensor) -> Tensor:
        """What the model's own forward makes of last hidden states, (B, T, H), at some columns: (B, columns, V)."""
        return logits_with(self.model, arguments(), ending_in(self.model, hidden), columns).to(self._dtype)


@dataclass(frozen=True)
class _Read:
    """What goes through the model at once, the columns at which logits are read, and what is made of them."""

    arguments: Inputs
    columns: Tensor
    loss: Callable[[Tensor, int], Tensor]  # of logits, (B, columns, V), and the number of their first column


def _recomputed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward of which nothing is kept but what enters it."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _said(pack: Pack, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens that are asked for at some columns, and of which variants they are."""
    targets = pack.targets_in(first, first + logits.shape[1])
    normaliser = logits.logsumexp(-1)
    chosen = logits[targets.rows, targets.columns, targets.tokens]
    return chosen - normaliser[targets.rows, targets.columns], targets.pairs


def _positions(text: DriftText, numbers: Sequence[int]) -> int:
    return max(1, sum(sum(text.compared[number]) for number in numbers))

"""What learning minimises, and its gradient on the adapter's weights.

Knows: packs of phrases, passages of text, autograd. Refuses to know: which pairs come when, what a gradient is for.

    loss = sum over pairs and occurrences of weight * p  +  sum over texts of drift weight / texts * mean KL(base, now)

Packs and batches of passages go through the model one at a time, and their gradients are summed. Passages of a batch
are padded at the end, which no earlier token sees. If memory is short, a layer's inputs alone are kept, and no logits:
the backward pass computes the rest again.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.learn.adapter import Adapter
from modules.model.base_model import ResidentModel
from modules.scoring.budget import Budget
from modules.scoring.drift import Passage, compared_tokens
from modules.scoring.hidden_states import Forward, last_states, logits_of
from modules.scoring.objective import AT_ONCE
from modules.scoring.packing import Inputs as Pack
from modules.scoring.packing import build_packs
from modules.scoring.scorer import by_pair
from modules.scoring.tokenization import Encoded

# Takes the logits, (positions, V), at consecutive ones of the positions that are read, and the number of the first.
LogitsReader = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Occurrence:
    """A listed phrase in a passage. It is learned like its pair; one forward gives its probability and the drift."""

    pair: int  # the number of the pair whose phrase it is
    first: int  # position of its first token in the passage
    end: int  # position behind its last token


@dataclass(frozen=True)
class DriftText:
    """Text on which the model is to keep the base's distributions, except where listed phrases occur."""

    name: str
    passages: Sequence[Passage]
    occurrences: Mapping[int, Sequence[Occurrence]] = field(default_factory=dict)  # by number of the passage
    part: float = 1.0  # share of the tokens that a step compares

    @property
    def taught(self) -> int:
        """The number of occurrences."""
        return sum(map(len, self.occurrences.values()))


@dataclass(frozen=True)
class Loss:
    """A loss and its summands."""

    loss: float
    total: float  # of all pairs and occurrences, estimated by those in the step
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
        """encoded: all pairs, with all variants. weights: of the pairs, negative for good phrases; they are scaled so
        that pairs and occurrences together weigh as much as the pairs alone. layout: of packs. drift_weight: what a nat
        adds to the loss; every text has an equal part of it. keeps_activations: those of all layers and of the head are
        kept, not computed again."""
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
        self._run = _keeping_activations if keeps_activations else _recomputing
        self._forwards = {} if keeps_activations else dict.fromkeys(range(len(model.layers)), _recomputing)

    def gradient(self, pairs: Sequence[int], passages: Sequence[Sequence[int]]) -> tuple[list[Tensor], Loss]:
        """The gradient on each of the adapter's weights, and the loss.

        pairs: their numbers; the total of all pairs is estimated by them. passages: for each text, their numbers.
        """
        sums = [torch.zeros_like(weight) for weight in self.adapter.weights.values()]
        total = self._add_pairs(sums, pairs)
        drift: dict[str, float] = {}
        for text, passage_numbers in zip(self.texts, passages, strict=True):
            occurrences_total, drift[text.name] = self._add_text(sums, text, passage_numbers)
            total += occurrences_total
        loss = total + self.drift_weight * math.fsum(drift.values()) / max(1, len(drift))
        return sums, Loss(loss, total, drift)

    @torch.no_grad()
    def drift(self, text: DriftText, numbers: Sequence[int]) -> float:
        """Mean KL(base, now) on some passages of a text, in nats per token."""
        passages = [text.passages[number] for number in numbers]
        divergences = []
        for batch in self._batches(passages):
            divergence, _ = self._measured([passages[number] for number in batch])
            divergences.append(float(divergence))
        return math.fsum(divergences) / compared_tokens(passages)

    def _add_pairs(self, sums: list[Tensor], numbers: Sequence[int]) -> float:
        """Add the gradient of the pairs' total to the sums; return the total."""
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
        """Weight * probability of all variants, (variants,), 0 for those that are not in the pack."""
        hidden = last_states(self.model, pack.arguments(), self._forwards)
        rows = len(hidden)

        def target_log_probabilities(logits: Tensor, first: int) -> Tensor:
            by_row = logits.unflatten(0, (-1, rows)).transpose(0, 1)
            targets = pack.targets_in(first // rows, first // rows + by_row.shape[1])
            return by_row.log_softmax(-1)[targets.rows, targets.columns, targets.tokens]

        # Ordered by column, as the targets are.
        log_probabilities = torch.cat(
            self._read(hidden[:, pack.columns].transpose(0, 1).flatten(0, 1), target_log_probabilities, rows)
        )
        targets = pack.targets
        # One entry for each token, so that sums always have the same order.
        token_table = log_probabilities.new_zeros(len(weights), int(targets.indices.max()) + 1)
        token_table = token_table.index_put((targets.pairs, targets.indices), log_probabilities)
        present = log_probabilities.new_zeros(len(weights)).index_fill(0, targets.pairs, 1.0)
        return present * log_probabilities.new_tensor(weights) * token_table.sum(-1).exp()

    def _add_text(self, sums: list[Tensor], text: DriftText, numbers: Sequence[int]) -> tuple[float, float]:
        """Add the gradient of a text's part of the loss to the sums.

        Returns the total of the text's occurrences, estimated by those in the passages of these numbers, and mean
        KL(base, now) on these passages.
        """
        passages = [text.passages[number] for number in numbers]
        positions = compared_tokens(passages)
        unit = self.drift_weight / len(self.texts) / positions
        scale = len(text.passages) / len(numbers)
        drift = 0.0
        total = 0.0
        for batch in self._batches(passages):
            occurrences = list[tuple[int, Occurrence]]()
            for row, number in enumerate(batch):
                occurrences += [(row, occurrence) for occurrence in text.occurrences.get(numbers[number], ())]
            divergence, probabilities = self._measured([passages[number] for number in batch], occurrences)
            weights = [scale * self.weights[occurrence.pair] for _, occurrence in occurrences]
            scores = probabilities * probabilities.new_tensor(weights)
            largest = float(scores.detach().abs().max()) if weights else 0.0
            self._add(sums, unit * divergence + scores.sum(), max(unit, largest))
            drift += float(divergence.detach())
            total += float(scores.detach().sum())
        return total, drift / positions

    def _batches(self, passages: Sequence[Passage]) -> Iterator[Sequence[int]]:
        """Batches of passages of similar length, as many as fit into a pack: their numbers."""
        in_order = sorted(range(len(passages)), key=lambda number: len(passages[number].tokens))
        longest = len(passages[in_order[-1]].tokens)
        most = max(1, self.budget.tokens // longest)
        count = -(-len(in_order) // most)
        for batch in range(count):
            yield in_order[batch * len(in_order) // count : (batch + 1) * len(in_order) // count]

    def _measured(
        self, passages: Sequence[Passage], occurrences: Sequence[tuple[int, Occurrence]] = ()
    ) -> tuple[Tensor, Tensor]:
        """KL(base, now) of a batch of passages, summed over the compared positions, and the probability of each listed
        phrase, (occurrences,). occurrences: each with its passage's row."""
        device = self.model.device
        ids = _padded([passage.tokens for passage in passages]).to(device)
        compared = _padded([passage.compared for passage in passages]).to(device, torch.bool)
        is_read = compared.clone()
        for row, occurrence in occurrences:
            is_read[row, occurrence.first - 1 : occurrence.end - 1] = True
        end = 1 + int(is_read.any(0).nonzero().max())  # behind it nothing is read
        arguments = {"input_ids": ids[:, :end]}
        # The base runs on the same batch: in another one, its hidden states would differ in their last digits.
        with torch.no_grad(), self.adapter.off():
            base_states = last_states(self.model, arguments, {})[is_read[:, :end]]
        hidden = last_states(self.model, arguments, self._forwards)[is_read[:, :end]]
        following = ids.roll(-1, 1)[is_read]
        counts = compared[is_read]

        def compare(logits: Tensor, first: int) -> Tensor:
            chunk = slice(first, first + len(logits))
            with torch.no_grad():
                base_log_probabilities = logits_of(self.model, base_states[chunk]).to(self._dtype).log_softmax(-1)
            base_probabilities = base_log_probabilities.exp()
            log_probabilities = logits.log_softmax(-1)
            # A token of probability 0 in both adds nothing; its difference would be NaN.
            divergence = torch.where(
                base_probabilities > 0, base_probabilities * (base_log_probabilities - log_probabilities), 0.0
            ).sum(-1)
            next_log_probabilities = log_probabilities.gather(-1, following[chunk, None])[:, 0]
            return torch.stack([torch.where(counts[chunk], divergence, 0.0), next_log_probabilities])

        divergences, next_log_probabilities = torch.cat(self._read(hidden, compare), dim=1)
        by_position = torch.zeros(ids.shape, dtype=next_log_probabilities.dtype, device=device).index_put(
            is_read.nonzero(as_tuple=True), next_log_probabilities
        )
        phrases = []
        for row, occurrence in occurrences:
            phrases.append(by_position[row, occurrence.first - 1 : occurrence.end - 1].sum().exp())
        return divergences.sum(), torch.stack(phrases) if phrases else next_log_probabilities[:0]

    def _read(self, hidden: Tensor, reader: LogitsReader, group: int = 1) -> list[Tensor]:
        """The reader's results on the logits of last hidden states, (positions, H), some positions at a time.

        group: the number of positions that stay together.
        """
        results = []
        fitting = self.budget.logits // (AT_ONCE * 4 * group * self.model.vocabulary)
        size = group * max(1, fitting)

        def read(hidden: Tensor, first: int) -> Tensor:
            return reader(logits_of(self.model, hidden).to(self._dtype), first)

        for first in range(0, len(hidden), size):
            results.append(self._run(read, hidden[first : first + size], first))
        return results

    def _add(self, sums: list[Tensor], loss: Tensor, unit: float) -> None:
        """Add the gradient of a loss to the sums. unit: the size of the loss's largest summand."""
        if not 0 < unit < math.inf:  # the gradient is 0, or NaN
            return
        power = 2.0 ** -math.floor(math.log2(unit))  # keeps small values from underflowing in any type
        weights = list(self.adapter.weights.values())
        for gradient_sum, gradient in zip(
            sums, torch.autograd.grad(power * loss, weights, allow_unused=True), strict=True
        ):
            if gradient is not None:
                gradient_sum += gradient / power


def _factor(weights: Sequence[float], texts: Sequence[DriftText]) -> float:
    """The factor by which pairs and occurrences together weigh as much as the pairs alone."""
    of_pairs = sum(map(abs, weights))
    of_occurrences = 0.0
    for text in texts:
        for occurrences in text.occurrences.values():
            of_occurrences += sum(abs(weights[occurrence.pair]) for occurrence in occurrences)
    return of_pairs / max(of_pairs + of_occurrences, sys.float_info.min)


def _keeping_activations(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run a forward and keep all that its gradient needs."""
    return forward(*args, **kwargs)


def _recomputing(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run a forward and keep its inputs alone; the rest is computed again for its gradient."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of numbers, padded with zeros at the end: (rows, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])

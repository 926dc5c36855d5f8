"""What joint search minimises: the pairs' weighted probabilities plus weighted divergences from the base, as tensors.

Knows: which outputs of a model answer for which target, the gradient of the objective on logits. Refuses to know:
layers, whose weights they are, how a gradient goes on from the logits.

    objective = sum over pairs of weight * p  +  sum over penalties of weight * mean over tokens of KL(base, now)

    d objective / d logit of token v
        where pairs are read               sum over the targets there of weight * p * ([v is the target] - p(v))
        where a penalty's text is read     weight / tokens * (p(v) - p_base(v))
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from modules.model.base_model import ResidentModel
from modules.model.part import row_ranges
from modules.runtime.errors import ConfigError
from modules.scoring.drift import Batch, DriftMeter
from modules.scoring.hidden_states import logits_of
from modules.scoring.scorer import Scorer, of_variants

AT_ONCE = 4  # tensors of the logits' size at a time: the model's, the base's, its probabilities, the gradient
NOTHING = 1e-15  # a smaller derivative of a pair, relative to the largest, is set to 0: see gradient.NOTHING


@dataclass(frozen=True)
class Text:
    """What goes through the model at once, and the positions at which its logits are read."""

    arguments: Callable[[], Mapping[str, Tensor]]  # makes the arguments of the model's forward; masks anew each time
    ids: Tensor  # (B, T), on the device
    rows: Tensor  # (positions,), with `columns` all different
    columns: Tensor


@dataclass(frozen=True)
class Targets:
    """The tokens of the pairs' phrases, over all texts, sorted by position; on the host."""

    positions: Tensor  # (targets,), number among the positions of all texts
    tokens: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class Value:
    """The value of an objective and of its summands. With several processes, each holds its own part."""

    log_probabilities: list[float]  # joint, of every pair, or of its variants; 0 for pairs of other processes
    total: float  # sum of weight * probability
    metrics: dict[str, float]  # by penalty's name, this process's part of the mean KL(base, now), in nats per token
    objective: float


@dataclass(frozen=True)
class Penalty:
    """A divergence from the base on some text, and what a nat of it adds to the objective."""

    name: str
    weight: float
    meter: DriftMeter  # holds the text; each of several processes takes a share of it

    @property
    def per_token(self) -> float:
        """What a nat at one position adds to the objective."""
        return self.weight / self.meter.tokens


class Objective:
    """Total + weighted divergences of a model whose weights change.

    Make it while the model is the base: its outputs on the penalties' texts are recorded as the base's.
    """

    def __init__(
        self,
        model: ResidentModel,
        scorer: Scorer,
        weights: Sequence[float],
        penalties: Sequence[Penalty] = (),
    ) -> None:
        """weights: of the scorer's pairs, negative for good phrases. Raises ConfigError if the model can only be scored
        by whole forwards, has no LM head, or has layers in CPU memory."""
        kind = type(model.module).__name__
        if not scorer.has_tails:
            raise ConfigError(
                f"{kind}: search: joint is not supported, because its layers need more than hidden states; "
                "use search: greedy"
            )
        try:
            model.head_names()
        except (ValueError, KeyError):
            raise ConfigError(
                f"{kind}: search: joint is not supported, because it has no LM head; use search: greedy"
            ) from None
        if any(tensor.is_meta for tensor in model.module.parameters()):
            raise ConfigError(f"{kind}: search: joint needs all layers on the device, but some are in CPU memory")
        self.model = model
        self.penalties = list(penalties)
        self.weights = torch.tensor(of_variants(weights, scorer.encoded), dtype=torch.float64)
        self.dtype = torch.promote_types(torch.float32, model.dtype)  # of logits and sums
        # Last hidden states of the base on the penalties' texts, (positions, H), on the host.
        self.base_states = torch.zeros(0)
        self.base_normaliser = torch.zeros(0)  # of these states, (positions,)
        self._batches: dict[str, list[Batch]] = {}  # of each penalty's text, by its name
        self._pack(scorer)
        if penalties:
            self._add_penalties(scorer)

    def _pack(self, scorer: Scorer) -> None:
        """Take a scorer's packs of the pairs and its memory budget."""
        self.budget = scorer.budget
        packs, self.targets = _texts_of(scorer)
        self._texts: dict[str | None, list[Text]] = {None: packs}  # of pairs, then of each penalty, by its name
        self.local_pairs = torch.zeros(len(self.weights), dtype=torch.bool)  # mask of this process's pairs
        self.local_pairs[self.targets.pairs] = True
        for name, batches in self._batches.items():
            self._texts[name] = []
            for batch in batches:
                size = max(1, self.budget.tokens // batch.ids.shape[1])
                for ids, compared in zip(batch.ids.split(size), batch.compared.split(size), strict=True):
                    rows, columns = compared.nonzero().unbind(1)
                    self._texts[name].append(Text(partial(dict, input_ids=ids), ids, rows, columns))

    @torch.no_grad()
    def _add_penalties(self, scorer: Scorer) -> None:
        """Record the base's outputs on this process's share of the penalties' texts."""
        share = slice(scorer.rank.number, None, scorer.rank.world_size)
        base_states = list[Tensor]()
        for penalty in self.penalties:
            batches = penalty.meter.batches[share]
            hidden = [
                states[batch.compared.cpu()]
                for batch, states in zip(batches, penalty.meter.base_states[share], strict=True)
            ]
            self._batches[penalty.name] = batches
            base_states += hidden
        self.base_states = torch.cat(base_states) if base_states else self.base_states
        self.outside = {name: tensor.clone() for name, tensor in self.model.outside().tensors.items()}
        self._pack(scorer)
        self.base_normaliser = self.normaliser(self.base_states)

    def packed_as(self, scorer: Scorer) -> "Objective":
        """A copy with the packs and the memory budget that a scorer of the same pairs now has."""
        objective = copy(self)
        objective._pack(scorer)
        return objective

    def part(self, name: str | None) -> "Objective":
        """A copy that has one summand and reads that summand's text alone: the penalty of this name or, for None, the
        pairs' total."""
        summand = copy(self)
        summand.penalties = [penalty for penalty in self.penalties if penalty.name == name]
        summand._texts = {name: self._texts[name]}
        if name is None:
            positions = slice(0, 0)
        else:
            summand.targets = Targets(*torch.zeros(3, 0, dtype=torch.long))
            summand.local_pairs = torch.zeros_like(self.local_pairs)
            ((begin, end),) = ((begin, end) for begin, end, penalty in self.ranges if penalty in summand.penalties)
            positions = slice(begin - self.pair_positions, end - self.pair_positions)
        summand.base_states = self.base_states[positions]
        summand.base_normaliser = self.base_normaliser[positions]
        return summand

    @property
    def texts(self) -> list[Text]:
        """All texts that go through the model: the pairs' packs, then each penalty's text."""
        return [text for texts in self._texts.values() for text in texts]

    @property
    def pair_positions(self) -> int:
        """The number of positions of pairs; those of penalties follow."""
        return _positions_in(self._texts.get(None, ()))

    @property
    def ranges(self) -> list[tuple[int, int, Penalty | None]]:
        """First and last position, exclusive, of the pairs (None) and of each penalty."""
        lengths = [_positions_in(self._texts[penalty.name]) for penalty in self.penalties]
        ends = list(accumulate(lengths, initial=self.pair_positions))
        return [(0, self.pair_positions, None), *zip(ends, ends[1:], self.penalties, strict=False)]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of the head's rows."""
        return list(row_ranges(self.model.header().tensors[self.model.head_names()["weight"]]))

    @property
    def vocabulary(self) -> Tensor:
        """The distinct tokens in this process's texts: (tokens,), ascending, on the host."""
        ids = [text.ids.flatten() for text in self.texts]
        return torch.cat(ids).unique().cpu() if ids else torch.zeros(0, dtype=torch.long)

    @property
    def positions(self) -> int:
        """The number of positions at which the head is read."""
        return self.pair_positions + len(self.base_states)

    def chunk(self, rows: int) -> int:
        """The number of positions whose logits, by so many rows of the head, fit into memory at a time."""
        return max(1, self.budget.logits // (AT_ONCE * 4 * rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of last hidden states, (positions, H), by the rows that the head now holds: (positions, rows)."""
        return logits_of(self.model, hidden).to(self.dtype)

    @torch.no_grad()
    def normaliser(self, hidden: Tensor, read: Callable[[int, Tensor], None] = lambda first, logits: None) -> Tensor:
        """Logarithm of the sum of all tokens' exponentials at last hidden states, (positions,), by the whole head.

        read: called with the number of each chunk's first position, and the chunk's logits.
        """
        normalisers = []
        size = self.chunk(self.model.head_size)
        for first in range(0, len(hidden), size):
            logits = self.logits(hidden[first : first + size].to(self.model.device))
            read(first, logits)
            normalisers.append(logits.logsumexp(-1))
        return torch.cat(normalisers) if normalisers else torch.zeros(0, dtype=self.dtype, device=self.model.device)

    def scored(self, hidden: Tensor) -> tuple[Tensor, list[float]]:
        """The normalisers, (positions,), and the joint log-probability of every pair.

        hidden: the last hidden states at all positions, (positions, H).
        """
        chosen_logits = [torch.zeros(0, dtype=self.dtype, device=self.model.device)]
        targets = self.targets

        def read(first: int, logits: Tensor) -> None:
            in_chunk = (targets.positions >= first) & (targets.positions < first + len(logits))
            positions = targets.positions[in_chunk] - first
            tokens = targets.tokens[in_chunk]
            chosen_logits.append(logits[positions.to(logits.device), tokens.to(logits.device)])

        normaliser = self.normaliser(hidden, read)
        log_probabilities = (
            (torch.cat(chosen_logits) - normaliser[targets.positions.to(normaliser.device)]).cpu().to(torch.float64)
        )
        return normaliser, torch.zeros(len(self.weights), dtype=torch.float64).index_add_(
            0, targets.pairs, log_probabilities
        ).tolist()

    def value(self, log_probabilities: list[float], divergences: Mapping[str, float]) -> Value:
        """The value of the objective. divergences: by penalty's name, the sum over this process's tokens."""
        scores = torch.tensor(log_probabilities, dtype=torch.float64).exp() * self.weights
        means = {penalty.name: divergences[penalty.name] / penalty.meter.tokens for penalty in self.penalties}
        return self.sum_of(log_probabilities, float(scores[self.local_pairs].sum()), means)

    def sum_of(self, log_probabilities: list[float], total: float, metrics: dict[str, float]) -> Value:
        """The value with these summands."""
        objective = total
        for penalty in self.penalties:
            objective += penalty.weight * metrics[penalty.name]
        return Value(log_probabilities, total, metrics, objective)

    def size(self, value: Value) -> float:
        """The sum of the summands' absolute values, which rounding errors scale with: in the objective itself, good
        phrases cancel bad ones."""
        scores = torch.tensor(value.log_probabilities, dtype=torch.float64).exp() * self.weights
        return float(scores.abs().sum()) + sum(
            penalty.weight * value.metrics[penalty.name] for penalty in self.penalties
        )

    def upstream(self, log_probabilities: Sequence[float]) -> "Upstream":
        """The derivatives of the objective by the log-probabilities of the pairs' targets, at these joint
        log-probabilities."""
        scores = torch.tensor(log_probabilities, dtype=torch.float64).exp() * self.weights
        slots = torch.stack((self.targets.positions, self.targets.tokens), 1)
        # Several pairs may have the same token at the same position: summed on the host, always in the same order.
        slots, slot_numbers = slots.unique(dim=0, return_inverse=True)
        derivatives = torch.zeros(len(slots), dtype=torch.float64).index_add_(
            0, slot_numbers, scores[self.targets.pairs]
        )
        derivatives[derivatives.abs() < NOTHING * max([0.0, *derivatives.abs().tolist()])] = 0
        sums = torch.zeros(self.pair_positions, dtype=torch.float64).index_add_(0, slots[:, 0], derivatives)
        return Upstream(slots[:, 0], slots[:, 1], derivatives, sums.to(self.model.device, self.dtype))


@dataclass(frozen=True)
class Upstream:
    """d objective / d log-probability of the targets. A slot is a token at a position, for all pairs that share it."""

    positions: Tensor  # (slots,), on the host, ascending
    tokens: Tensor
    derivatives: Tensor
    sums: Tensor  # of the derivatives at each position, (positions,), on the device

    def on_logits(self, logits: Tensor, normaliser: Tensor, first_position: int, first_row: int) -> Tensor:
        """d objective / d logits at pairs' positions from `first_position` on, of the head's rows from `first_row` on:
        (positions, rows)."""
        end = first_position + len(logits)
        rows = logits.shape[1]
        gradient = (logits - normaliser[:, None]).exp_().mul_(-self.sums[first_position:end, None])
        inside = (
            (self.positions >= first_position)
            & (self.positions < end)
            & (self.tokens >= first_row)
            & (self.tokens < first_row + rows)
        )
        positions = self.positions[inside] - first_position
        columns = self.tokens[inside] - first_row
        derivatives = self.derivatives[inside]
        gradient[positions.to(gradient.device), columns.to(gradient.device)] += derivatives.to(
            gradient.device, gradient.dtype
        )
        return gradient


def _positions_in(texts: Sequence[Text]) -> int:
    return sum(len(text.rows) for text in texts)


def _texts_of(scorer: Scorer) -> tuple[list[Text], Targets]:
    """A scorer's packs with the distinct positions at which targets are read, and the targets."""
    texts = []
    tables = []
    offset = 0
    for inputs in scorer.packs_here:
        read_at = torch.stack((inputs.targets.rows, inputs.columns[inputs.targets.columns]), 1).cpu()
        read_at, numbers = read_at.unique(dim=0, return_inverse=True)
        texts.append(Text(inputs.arguments, inputs.ids, *read_at.to(inputs.ids.device).unbind(1)))
        tables.append(torch.stack((numbers + offset, inputs.targets.tokens.cpu(), inputs.targets.pairs.cpu())))
        offset += len(read_at)
    table = torch.cat(tables, 1) if tables else torch.zeros(3, 0, dtype=torch.long)
    return texts, Targets(*table[:, table[0].argsort(stable=True)])

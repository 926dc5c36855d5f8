"""What joint search makes small: the pairs' weighted probabilities and weighted divergences from the base, as tensors.

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

AT_ONCE = 4  # tensors of the logits' size at a time: theirs, the base's, its shares, the gradient
NOTHING = 1e-15  # a pair whose part in the gradient is smaller, by the largest, has none: see gradient.NOTHING


@dataclass(frozen=True)
class Text:
    """What goes through the model at once, and the positions at which its answers count."""

    arguments: Callable[[], Mapping[str, Tensor]]  # what the model's forward takes; masks are made anew each time
    ids: Tensor  # (B, T), on the device
    rows: Tensor  # (positions,), with `columns` all different
    columns: Tensor


@dataclass(frozen=True)
class Targets:
    """The tokens that are asked for, of all texts, sorted by position; on the host."""

    positions: Tensor  # (targets,), number among the positions of all texts
    tokens: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class Value:
    """An objective and what it is made of; of one of several processes, its own part."""

    log_probabilities: list[float]  # joint, of every pair, or of its variants; 0 for those of other processes
    total: float  # sum of weight * probability
    metrics: dict[str, float]  # of each penalty, by name, its part of the mean KL(base, now), in nats per token
    objective: float


@dataclass(frozen=True)
class Penalty:
    """A divergence from the base on some text, and what a nat of it adds to the objective."""

    name: str
    weight: float
    meter: DriftMeter  # has the text, of which several processes take a share each

    @property
    def per_token(self) -> float:
        """What a nat at one of its positions adds to the objective."""
        return self.weight / self.meter.tokens


class Objective:
    """Total + weighted divergences of a model whose weights change.

    To be made while the model is the base: what it says then of the penalties' texts is the base's side.
    """

    def __init__(
        self,
        model: ResidentModel,
        scorer: Scorer,
        weights: Sequence[float],
        penalties: Sequence[Penalty] = (),
    ) -> None:
        """weights: of the scorer's pairs, good phrases negative. Raises ConfigError if the model is of a kind that can
        only be scored by whole forwards."""
        kind = type(model.module).__name__
        if not scorer.has_tails:
            raise ConfigError(
                f"{kind}: search: joint is not supported, because its layers need more than hidden states"
            )
        try:
            model.head_names()
        except (ValueError, KeyError):
            raise ConfigError(f"{kind}: search: joint is not supported, because it has no LM head") from None
        if any(tensor.is_meta for tensor in model.module.parameters()):
            raise ConfigError(f"{kind}: search: joint needs all layers on the device, but some are in CPU memory")
        self.model = model
        self.penalties = list(penalties)
        self.weights = torch.tensor(of_variants(weights, scorer.encoded), dtype=torch.float64)
        self.dtype = torch.promote_types(torch.float32, model.dtype)  # that logits and sums are made in
        self.before = torch.zeros(0)  # last hidden states of the base on penalties' texts, (positions, H), on the host
        self._lengths: list[int] = []  # of each penalty, how many of these positions are its own
        self._batches: dict[str, list[Batch]] = {}  # of each penalty's text, by its name
        self._pack(scorer)
        if penalties:
            self._add_penalties(scorer)

    def _pack(self, scorer: Scorer) -> None:
        """Take over how a scorer packs the pairs, and how much memory it allows itself."""
        self.budget = scorer.budget
        packs, self.targets = _texts_of(scorer)
        self._texts: dict[str | None, list[Text]] = {None: packs}  # of pairs, then of each penalty, by its name
        self.asked = sum(len(text.rows) for text in packs)  # positions of pairs; those of penalties come behind
        self.own = torch.zeros(len(self.weights), dtype=torch.bool)  # the pairs of this process
        self.own[self.targets.pairs] = True
        for name, batches in self._batches.items():
            self._texts[name] = []
            for batch in batches:
                size = max(1, self.budget.tokens // batch.ids.shape[1])
                for ids, compared in zip(batch.ids.split(size), batch.compared.split(size), strict=True):
                    rows, columns = compared.nonzero().unbind(1)
                    self._texts[name].append(Text(partial(dict, input_ids=ids), ids, rows, columns))

    @torch.no_grad()
    def _add_penalties(self, scorer: Scorer) -> None:
        """This process's share of the penalties' texts."""
        own = slice(scorer.rank.number, None, scorer.rank.world_size)
        before = list[Tensor]()
        for penalty in self.penalties:
            batches = penalty.meter.batches[own]
            hidden = [
                states[batch.compared.cpu()] for batch, states in zip(batches, penalty.meter.before[own], strict=True)
            ]
            self._batches[penalty.name] = batches
            self._lengths.append(sum(map(len, hidden)))
            before += hidden
        self.before = torch.cat(before) if before else self.before
        self.outside = {name: tensor.clone() for name, tensor in self.model.outside().tensors.items()}
        self._pack(scorer)
        self.base_normaliser = self.normaliser(self.before)

    def packed_as(self, scorer: Scorer) -> "Objective":
        """The same in the packs, and with the memory, that a scorer of the same pairs has by now."""
        found = copy(self)
        found._pack(scorer)
        return found

    def part(self, name: str | None) -> "Objective":
        """One summand of the objective, which reads no text but its own: the penalty of this name or, for None, the
        pairs' total."""
        found = copy(self)
        found.penalties = [penalty for penalty in self.penalties if penalty.name == name]
        found._texts = {name: self._texts[name]}
        if name is None:
            own = slice(0, 0)
        else:
            found.targets = Targets(*torch.zeros(3, 0, dtype=torch.long))
            found.asked = 0
            found.own = torch.zeros_like(self.own)
            ((begin, end),) = ((begin, end) for begin, end, penalty in self.ranges if penalty in found.penalties)
            own = slice(begin - self.asked, end - self.asked)
        found.before = self.before[own]
        found._lengths = [len(found.before)] * len(found.penalties)
        if self.penalties:
            found.base_normaliser = self.base_normaliser[own]
        return found

    @property
    def texts(self) -> list[Text]:
        """All that goes through the model: the pairs' packs, then each penalty's text."""
        return [text for texts in self._texts.values() for text in texts]

    @property
    def ranges(self) -> list[tuple[int, int, Penalty | None]]:
        """First and last position, exclusive, of the pairs (None) and of each penalty."""
        ends = list(accumulate(self._lengths, initial=self.asked))
        return [(0, self.asked, None), *zip(ends, ends[1:], self.penalties, strict=False)]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of the head's rows."""
        return list(row_ranges(self.model.header().tensors[self.model.head_names()["weight"]]))

    @property
    def vocabulary(self) -> Tensor:
        """The tokens that the texts of this process have: (tokens,), ascending, on the host."""
        ids = [text.ids.flatten() for text in self.texts]
        return torch.cat(ids).unique().cpu() if ids else torch.zeros(0, dtype=torch.long)

    @property
    def positions(self) -> int:
        """At how many places the head is read."""
        return self.asked + len(self.before)

    def chunk(self, rows: int) -> int:
        """At how many positions so many rows of the head are read at a time."""
        return max(1, self.budget.logits // (AT_ONCE * 4 * rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of last hidden states, (positions, H), by the rows that the head holds: (positions, rows)."""
        return logits_of(self.model, hidden).to(self.dtype)

    @torch.no_grad()
    def normaliser(self, hidden: Tensor, read: Callable[[int, Tensor], None] = lambda first, logits: None) -> Tensor:
        """Logarithm of the sum of all tokens' exponentials at last hidden states, (positions,), by the whole head.

        read: sees the logits of each chunk, and the number of its first position.
        """
        found = []
        size = self.chunk(self.model.head_size)
        for first in range(0, len(hidden), size):
            logits = self.logits(hidden[first : first + size].to(self.model.device))
            read(first, logits)
            found.append(logits.logsumexp(-1))
        return torch.cat(found) if found else torch.zeros(0, dtype=self.dtype, device=self.model.device)

    def scored(self, hidden: Tensor) -> tuple[Tensor, list[float]]:
        """Of last hidden states at all positions, (positions, H), the normalisers, (positions,), and the joint
        log-probability of every pair."""
        chosen = [torch.zeros(0, dtype=self.dtype, device=self.model.device)]
        targets = self.targets

        def read(first: int, logits: Tensor) -> None:
            inside = (targets.positions >= first) & (targets.positions < first + len(logits))
            place = targets.positions[inside] - first
            token = targets.tokens[inside]
            chosen.append(logits[place.to(logits.device), token.to(logits.device)])

        normaliser = self.normaliser(hidden, read)
        said = (torch.cat(chosen) - normaliser[targets.positions.to(normaliser.device)]).cpu().to(torch.float64)
        return normaliser, torch.zeros(len(self.weights), dtype=torch.float64).index_add_(
            0, targets.pairs, said
        ).tolist()

    def value(self, log_probabilities: list[float], divergences: Mapping[str, float]) -> Value:
        """divergences: of each penalty, by name, the sum over this process's tokens."""
        scores = torch.tensor(log_probabilities, dtype=torch.float64).exp() * self.weights
        means = {one.name: divergences[one.name] / one.meter.tokens for one in self.penalties}
        return self.sum_of(log_probabilities, float(scores[self.own].sum()), means)

    def sum_of(self, log_probabilities: list[float], total: float, metrics: dict[str, float]) -> Value:
        """The value of these summands."""
        objective = total
        for penalty in self.penalties:
            objective += penalty.weight * metrics[penalty.name]
        return Value(log_probabilities, total, metrics, objective)

    def size(self, value: Value) -> float:
        """Of what the objective is the sum, the size: good phrases count against it, rounding does not know that."""
        scores = torch.tensor(value.log_probabilities, dtype=torch.float64).exp() * self.weights
        return float(scores.abs().sum()) + sum(one.weight * value.metrics[one.name] for one in self.penalties)

    def upstream(self, log_probabilities: Sequence[float]) -> "Upstream":
        """Of what the pairs' probabilities are, how the objective changes with the logits of their positions."""
        scores = torch.tensor(log_probabilities, dtype=torch.float64).exp() * self.weights
        slots = torch.stack((self.targets.positions, self.targets.tokens), 1)
        # Several pairs may ask for the same token at the same place: summed on the host, always in the same order.
        slots, number = slots.unique(dim=0, return_inverse=True)
        each = torch.zeros(len(slots), dtype=torch.float64).index_add_(0, number, scores[self.targets.pairs])
        each[each.abs() < NOTHING * max([0.0, *each.abs().tolist()])] = 0
        sums = torch.zeros(self.asked, dtype=torch.float64).index_add_(0, slots[:, 0], each)
        return Upstream(slots[:, 0], slots[:, 1], each, sums.to(self.model.device, self.dtype))


@dataclass(frozen=True)
class Upstream:
    """d objective / d log-probability of the tokens that are asked for."""

    positions: Tensor  # (slots,), on the host, ascending
    tokens: Tensor
    each: Tensor
    sums: Tensor  # over the slots of each position, (positions,), on the device

    def on_logits(self, logits: Tensor, normaliser: Tensor, first: int, row: int) -> Tensor:
        """d objective / d logits at pairs' positions from `first` on, of rows from `row` on: (positions, rows)."""
        end = first + len(logits)
        rows = logits.shape[1]
        found = (logits - normaliser[:, None]).exp_().mul_(-self.sums[first:end, None])
        inside = (self.positions >= first) & (self.positions < end) & (self.tokens >= row) & (self.tokens < row + rows)
        place = self.positions[inside] - first
        token = self.tokens[inside] - row
        each = self.each[inside]
        found[place.to(found.device), token.to(found.device)] += each.to(found.device, found.dtype)
        return found


def _texts_of(scorer: Scorer) -> tuple[list[Text], Targets]:
    """A scorer's packs with the positions at which targets are read, each once."""
    texts = []
    found = []
    offset = 0
    for inputs in scorer.packs_here:
        where = torch.stack((inputs.targets.rows, inputs.columns[inputs.targets.columns]), 1).cpu()
        where, number = where.unique(dim=0, return_inverse=True)
        texts.append(Text(inputs.arguments, inputs.ids, *where.to(inputs.ids.device).unbind(1)))
        found.append(torch.stack((number + offset, inputs.targets.tokens.cpu(), inputs.targets.pairs.cpu())))
        offset += len(where)
    table = torch.cat(found, 1) if found else torch.zeros(3, 0, dtype=torch.long)
    return texts, Targets(*table[:, table[0].argsort(stable=True)])

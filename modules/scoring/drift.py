"""Drift: how far the model's next-token distributions are, on some text, from those that it began with.

Knows: passages of tokens, hidden states, the head's rows. Refuses to know: whose text it is, phrases, files, what has
changed the model.

    KL(base, now) = sum over tokens v of p_base(v) * (log p_base(v) - log p_now(v)), the mean over compared positions

Of the base its last hidden states are kept, (B, T, H), not its logits. Logits are made by the model's own forward: its
layers are passed over, and its head has a block of its rows at a time, so that no vocabulary takes more memory than
another. Once the header has changed, the base's rows are those of its file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise

import torch
from torch import Tensor

from modules.checkpoints.conversion import Tensors
from modules.model.base_model import ResidentModel
from modules.model.devices import widest_float
from modules.runtime.oom import retry_on_oom
from modules.scoring.hidden_states import last_states, logits_of, logits_with
from modules.scoring.tokenization import Window

BLOCK = 32 << 20  # bytes of logits, in float32, of all models together, at a time
TOKENS = 1024  # in one forward
MOST_NATS = 690.0  # a token, of which the perplexity is still a number
ROUNDING = 1e-5  # of the largest logit, by which products of other shapes may differ, or the dtype's own

Held = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Passage:
    """A piece of text, and where the next token's distributions are compared."""

    tokens: Window
    compared: tuple[bool, ...]  # of every position


def full_passage(window: Window) -> Passage:
    """A passage that is compared at every position."""
    return Passage(window, (True,) * len(window))


def compared_tokens(passages: Sequence[Passage]) -> int:
    """At how many positions passages are compared."""
    return sum(sum(passage.compared) for passage in passages)


@dataclass(frozen=True)
class Batch:
    """Passages of one length, on the model's device."""

    ids: Tensor  # (B, T)
    compared: Tensor  # (B, T), bool

    @property
    def next_tokens(self) -> Tensor:
        """What follows each compared position: (positions,); -1 behind the last token, where nothing is known."""
        following = self.ids.roll(-1, -1)
        following[:, -1] = -1
        return following[self.compared]

    def chosen(self, hidden: Tensor) -> Tensor:
        """Of a stack's hidden states, (R * B, T, H), those at the compared positions: (R, positions, H)."""
        return hidden.unflatten(0, (-1, len(self.ids)))[:, self.compared]


@dataclass(frozen=True)
class Drift:
    """How far a model has gone from its base on some text."""

    divergence: float  # mean KL(base, now), in nats per token
    agreement: float  # fraction of the positions at which the likeliest next token is the base's
    perplexity: float  # of the model now
    tokens: int  # positions that were compared

    @property
    def is_finite(self) -> bool:
        """Whether it could be computed: a model whose activations overflow has none."""
        return math.isfinite(self.divergence) and math.isfinite(self.perplexity)


class DriftMeter:
    """Measures how far a model has gone from what it was when the meter was made."""

    @torch.no_grad()
    def __init__(self, model: ResidentModel, passages: Sequence[Passage], keeps_head: bool = False) -> None:
        """passages: at least one, with at least one compared position that a token follows. keeps_head: once the header
        has changed, the base's head stays in the CPU's memory, where otherwise it is read anew for each measure.

        Raises ValueError if the model's head can't be read in blocks of its rows.
        """
        self.model = model
        self._block = BLOCK
        self._keeps_head = keeps_head
        self._head: Tensors | None = None
        self.batches = list(_batches(passages, model.device))
        # What the model's last layer makes of each batch, (B, T, H), on the CPU.
        self.before = [self._hidden(batch).cpu() for batch in self.batches]
        self._outside = {name: tensor.clone() for name, tensor in model.outside().tensors.items()}
        self._check_blocks(self.batches[0].ids[:1, :8])

    def measure(self) -> Drift:
        """The drift by now. Raises torch.OutOfMemoryError if not even one row of the head fits."""
        return retry_on_oom(self._measure, self._take_less_memory)

    def measure_base(self) -> Drift:
        """The same of what the model was when the meter was made, and still is."""

        def measure() -> Drift:
            hidden = [states.to(self.model.device) for states in self.before]
            return self.measure_on(hidden, same_header=True)[0]

        return retry_on_oom(measure, self._take_less_memory)

    def _take_less_memory(self) -> bool:
        self._block //= 2
        return self._block > 0

    @property
    def inputs(self) -> list[Callable[[], dict[str, Tensor]]]:
        """For each batch, what makes that which the model's forward takes."""
        return [partial(dict, input_ids=batch.ids) for batch in self.batches]

    @torch.no_grad()
    def measure_on(
        self, hidden: Sequence[Tensor], held: Held = nullcontext, same_header: bool = False, stack: int = 1
    ) -> list[Drift]:
        """The drifts of a stack of models with these last hidden states, (stack * B, T, H) of each batch.

        held: within it, the resident model has the others' norm and head. same_header: the base's header is the
        resident one, whatever is held.
        """
        original = self._original_head() if not (same_header and self.model.has_base_header) else None
        sums = torch.zeros(3, stack, dtype=torch.float64)
        for batch, before, now in zip(self.batches, self.before, hidden, strict=True):
            sums += self._compare(batch, before.to(self.model.device), now, original, held).cpu()
        followed = sum(int((batch.next_tokens >= 0).sum()) for batch in self.batches)
        drifts = []
        for divergence, equal, said in sums.T.tolist():
            mean = divergence / self.tokens
            perplexity = math.exp(min(-said / followed, MOST_NATS))
            drifts.append(Drift(0.0 if mean < 0 else mean, equal / self.tokens, perplexity, self.tokens))
        return drifts

    def _original_head(self) -> Tensors:
        head = self._head or self.model.original_head()
        self._head = head if self._keeps_head else None
        return head

    @property
    def tokens(self) -> int:
        """Positions that are compared."""
        return sum(int(batch.compared.sum()) for batch in self.batches)

    @torch.no_grad()
    def _measure(self) -> Drift:
        return self.measure_on([self._hidden(batch) for batch in self.batches], same_header=True)[0]

    def _compare(self, batch: Batch, before: Tensor, now: Tensor, original: Tensors | None, held: Held) -> Tensor:
        """Of a batch with hidden states (B, T, H) and a stack's (R * B, T, H), the sums over its compared positions: of
        the divergence, of equal likeliest tokens, and of what the next token's log-probability is now: (3, R)."""
        base_states = batch.chosen(before)
        present_states = batch.chosen(now)
        following = batch.next_tokens
        base = SoftmaxStats(following, 1)
        present = SoftmaxStats(following, len(present_states))
        gap = torch.zeros_like(present.weight)  # sum of exp(old - top) * (old - new)
        for first, end in self._blocks((1 + len(present_states)) * len(following)):
            with self.model.outside().holding(self._outside):  # the final norm may have been merged as well
                old = self._logits(base_states, first, end, original)
            with held():
                new = self._logits(present_states, first, end)
            shares, shrunk = base.add(first, old)
            present.add(first, new)
            # A token that neither can say has no share; its difference is no number.
            apart = torch.where(shares > 0, shares * (old - new), 0.0)
            gap = gap * shrunk + apart.sum(-1, dtype=gap.dtype)
        divergence = gap / base.weight - base.normaliser + present.normaliser
        equal = (base.likeliest == present.likeliest).to(gap.dtype)
        said = torch.where(following >= 0, present.following - present.normaliser, 0.0)
        return torch.stack([values.sum(-1) for values in (divergence, equal, said)]).to(torch.float64)

    def _blocks(self, positions: int) -> Iterator[tuple[int, int]]:
        """Ranges of the head's rows whose logits at so many positions, of all models, fit into a block."""
        rows = self.model.head_size
        size = max(1, self._block // (4 * positions))
        return ((first, min(first + size, rows)) for first in range(0, rows, size))

    def _logits(self, hidden: Tensor, first: int, end: int, rows: Tensors | None = None) -> Tensor:
        """The logits of last hidden states (R, positions, H) by some rows of the head, or of `rows`: (R, positions,
        rows)."""
        with self.model.head_rows(first, end, rows):
            logits = logits_of(self.model, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        return logits if logits.dtype == torch.float64 else logits.float()

    def _hidden(self, batch: Batch) -> Tensor:
        """The last layer's hidden states of a batch: (B, T, H)."""
        return last_states(self.model, {"input_ids": batch.ids}, {})

    def _check_blocks(self, ids: Tensor) -> None:
        """Raise ValueError unless blocks of the head's rows give what the whole head gives, but for rounding.

        ids: of a text, (1, T).
        """
        size = self.model.head_size
        columns = torch.arange(ids.shape[1], device=ids.device)
        expected = logits_with(self.model, {"input_ids": ids}, {}, columns)
        # Of the same forward: another number of tokens would round otherwise.
        hidden = last_states(self.model, {"input_ids": ids}, {})
        ends = (0, size // 3, size)
        parts = torch.cat([self._logits(hidden, first, end) for first, end in pairwise(ends)], -1)
        rounding = 4 * max(torch.finfo(self.model.dtype).eps, ROUNDING) * float(expected.abs().max())
        if parts.shape != expected.shape or not float((parts - expected).abs().max()) <= rounding:
            raise ValueError("the LM head gives other logits when it is computed in blocks")


class SoftmaxStats:
    """What models' logits say at some positions, (R, positions), gathered block by block of the vocabulary. Terms are
    as exact as the logits, sums as exact as the device can make them."""

    def __init__(self, following: Tensor, models: int) -> None:
        """following: the token that follows each position, -1 for none; models: how many, R."""
        self._next = following.expand(models, -1)
        device = following.device
        self.following = torch.zeros(self._next.shape, dtype=widest_float(device), device=device)
        self.top = torch.full_like(self.following, -torch.inf)  # the largest logit so far
        self.weight = torch.zeros_like(self.following)  # sum of exp(logit - top)
        self.likeliest = torch.zeros_like(self._next)  # the token with the largest logit, of equals the lowest

    def add(self, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a block's logits, (R, positions, rows); first: number of its first row.

        Returns exp(logit - top), and what the sums so far were multiplied with, since the top is another.
        """
        value, place = logits.max(-1)
        self.likeliest = torch.where(value > self.top, place + first, self.likeliest)
        top = torch.maximum(self.top, value)
        shares = (logits - top.to(logits.dtype)[..., None]).exp_()
        shrunk = (self.top - top).exp()
        self.top = top
        self.weight = self.weight * shrunk + shares.sum(-1, dtype=top.dtype)
        place = self._next - first
        inside = (place >= 0) & (place < logits.shape[-1])
        chosen = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        self.following = torch.where(inside, chosen.to(top.dtype), self.following)
        return shares, shrunk

    @property
    def normaliser(self) -> Tensor:
        """Logarithm of the sum of all tokens' exponentials: (R, positions)."""
        return self.top + self.weight.log()


def _batches(passages: Sequence[Passage], device: torch.device) -> Iterator[Batch]:
    """Passages of one length together, up to TOKENS tokens; those that are compared nowhere are left out."""
    in_order = sorted(
        (passage for passage in passages if any(passage.compared)), key=lambda passage: len(passage.tokens)
    )
    for length, group in groupby(in_order, key=lambda passage: len(passage.tokens)):
        alike = list(group)
        size = max(1, TOKENS // length)
        for first in range(0, len(alike), size):
            some = alike[first : first + size]
            ids = torch.tensor([passage.tokens for passage in some], device=device)
            yield Batch(ids, torch.tensor([passage.compared for passage in some], device=device))

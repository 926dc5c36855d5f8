"""Drift: how far the model's next-token distributions on some text are from those of the base.

Knows: passages of tokens, hidden states, the head's rows. Refuses to know: whose text it is, phrases, files, what has
changed the model.

    KL(base, now) = sum over tokens v of p_base(v) * (log p_base(v) - log p_now(v)), the mean over compared positions

The base's last hidden states are kept, (B, T, H), not its logits. The model's own forward makes logits: its layers are
passed over, and its head holds a block of its rows at a time, so that memory does not depend on the vocabulary. Once
the header has changed, the base's rows are read from its file.
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
MOST_NATS = 690.0  # per token; its perplexity is still finite
ROUNDING = 1e-5  # allowed difference of products of other shapes, relative to the largest logit; at least the dtype's

Held = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Passage:
    """A piece of text, and the positions at which next-token distributions are compared."""

    tokens: Window
    compared: tuple[bool, ...]  # for every position


def full_passage(window: Window) -> Passage:
    """A passage that is compared at every position."""
    return Passage(window, (True,) * len(window))


def compared_tokens(passages: Sequence[Passage]) -> int:
    """The number of positions at which passages are compared."""
    return sum(sum(passage.compared) for passage in passages)


@dataclass(frozen=True)
class Batch:
    """Passages of one length, on the model's device."""

    ids: Tensor  # (B, T)
    compared: Tensor  # (B, T), bool

    @property
    def next_tokens(self) -> Tensor:
        """The token behind each compared position: (positions,); -1 behind the last token of a passage."""
        following = self.ids.roll(-1, -1)
        following[:, -1] = -1
        return following[self.compared]

    def chosen(self, hidden: Tensor) -> Tensor:
        """The hidden states at the compared positions, (R, positions, H), of a stack's, (R * B, T, H)."""
        return hidden.unflatten(0, (-1, len(self.ids)))[:, self.compared]


@dataclass(frozen=True)
class Drift:
    """How far a model is from its base on some text."""

    divergence: float  # mean KL(base, now), in nats per token
    agreement: float  # fraction of the positions at which the likeliest next token is the base's
    perplexity: float  # of the model now
    tokens: int  # positions that were compared

    @property
    def is_finite(self) -> bool:
        """Whether divergence and perplexity are finite; they are not if activations overflow."""
        return math.isfinite(self.divergence) and math.isfinite(self.perplexity)


class DriftMeter:
    """Measures how far a model is from the base: the model at the time when the meter was made."""

    @torch.no_grad()
    def __init__(self, model: ResidentModel, passages: Sequence[Passage], keeps_head: bool = False) -> None:
        """passages: at least one, with at least one compared position that a token follows. keeps_head: whether the
        base's head stays in CPU memory once the header has changed; otherwise, each measurement reads it anew.

        Raises ValueError if the model's head can't be read in blocks of its rows.
        """
        self.model = model
        self._block = BLOCK
        self._keeps_head = keeps_head
        self._head: Tensors | None = None
        self.batches = list(_batches(passages, model.device))
        # The last layer's hidden states of each batch, (B, T, H), on the CPU.
        self.base_states = [self._hidden(batch).cpu() for batch in self.batches]
        self._outside = {name: tensor.clone() for name, tensor in model.outside().tensors.items()}
        self._check_blocks(self.batches[0].ids[:1, :8])

    def measure(self) -> Drift:
        """The present drift. Raises torch.OutOfMemoryError if not even one row of the head fits."""
        return retry_on_oom(self._measure, self._take_less_memory)

    def measure_base(self) -> Drift:
        """The drift while the model is still the base: by the hidden states that are kept."""

        def measure() -> Drift:
            hidden = [states.to(self.model.device) for states in self.base_states]
            return self.measure_on(hidden, same_header=True)[0]

        return retry_on_oom(measure, self._take_less_memory)

    def _take_less_memory(self) -> bool:
        self._block //= 2
        return self._block > 0

    @property
    def inputs(self) -> list[Callable[[], dict[str, Tensor]]]:
        """For each batch, a function that makes the arguments of the model's forward."""
        return [partial(dict, input_ids=batch.ids) for batch in self.batches]

    @torch.no_grad()
    def measure_on(
        self, hidden: Sequence[Tensor], held: Held = nullcontext, same_header: bool = False, stack: int = 1
    ) -> list[Drift]:
        """The drifts of a stack of models with these last hidden states, (stack * B, T, H) for each batch.

        held: a context in which the resident model holds these models' norm and head. same_header: outside that
        context, the resident model's header may be used as the base's if it has not changed.
        """
        original = self._original_head() if not (same_header and self.model.has_base_header) else None
        sums = torch.zeros(3, stack, dtype=torch.float64)
        for batch, base_states, present_states in zip(self.batches, self.base_states, hidden, strict=True):
            sums += self._compare(batch, base_states.to(self.model.device), present_states, original, held).cpu()
        with_next = sum(int((batch.next_tokens >= 0).sum()) for batch in self.batches)
        drifts = []
        for divergence, equal, log_probability in sums.T.tolist():
            mean = divergence / self.tokens
            perplexity = math.exp(min(-log_probability / with_next, MOST_NATS))
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

    def _compare(
        self, batch: Batch, base_hidden: Tensor, hidden: Tensor, original: Tensors | None, held: Held
    ) -> Tensor:
        """Sums over a batch's compared positions: of divergence, of equal likeliest tokens, and of the next token's
        log-probability in the present model: (3, R).

        base_hidden: (B, T, H); hidden: of a stack, (R * B, T, H).
        """
        base_states = batch.chosen(base_hidden)
        present_states = batch.chosen(hidden)
        following = batch.next_tokens
        base = SoftmaxStats(following, 1)
        present = SoftmaxStats(following, len(present_states))
        gap = torch.zeros_like(present.weight)  # sum of exp(base logit - top) * (base logit - present logit)
        for first, end in self._blocks((1 + len(present_states)) * len(following)):
            with self.model.outside().holding(self._outside):  # the final norm may have been merged as well
                base_logits = self._logits(base_states, first, end, original)
            with held():
                present_logits = self._logits(present_states, first, end)
            base_shares, rescale = base.add(first, base_logits)
            present.add(first, present_logits)
            # A token of probability 0 in both adds nothing; its difference would be NaN.
            terms = torch.where(base_shares > 0, base_shares * (base_logits - present_logits), 0.0)
            gap = gap * rescale + terms.sum(-1, dtype=gap.dtype)
        divergence = gap / base.weight - base.normaliser + present.normaliser
        equal = (base.likeliest == present.likeliest).to(gap.dtype)
        next_log_probabilities = torch.where(following >= 0, present.following - present.normaliser, 0.0)
        return torch.stack([values.sum(-1) for values in (divergence, equal, next_log_probabilities)]).to(torch.float64)

    def _blocks(self, positions: int) -> Iterator[tuple[int, int]]:
        """Ranges of the head's rows whose logits at so many positions, of all models, fit into a block."""
        rows = self.model.head_size
        size = max(1, self._block // (4 * positions))
        return ((first, min(first + size, rows)) for first in range(0, rows, size))

    def _logits(self, hidden: Tensor, first: int, end: int, rows: Tensors | None = None) -> Tensor:
        """The logits of last hidden states (R, positions, H) by rows first..end-1 of the head, or of `rows`, another
        head's tensors: (R, positions, rows)."""
        with self.model.head_rows(first, end, rows):
            logits = logits_of(self.model, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        return logits if logits.dtype == torch.float64 else logits.float()

    def _hidden(self, batch: Batch) -> Tensor:
        """The last layer's hidden states of a batch: (B, T, H)."""
        return last_states(self.model, {"input_ids": batch.ids}, {})

    def _check_blocks(self, ids: Tensor) -> None:
        """Raise ValueError unless blocks of the head's rows give the logits of the whole head, but for rounding.

        ids: of a text, (1, T).
        """
        size = self.model.head_size
        columns = torch.arange(ids.shape[1], device=ids.device)
        expected = logits_with(self.model, {"input_ids": ids}, {}, columns)
        # By the same forward: another number of tokens would be rounded otherwise.
        hidden = last_states(self.model, {"input_ids": ids}, {})
        ends = (0, size // 3, size)
        parts = torch.cat([self._logits(hidden, first, end) for first, end in pairwise(ends)], -1)
        rounding = 4 * max(torch.finfo(self.model.dtype).eps, ROUNDING) * float(expected.abs().max())
        if parts.shape != expected.shape or not float((parts - expected).abs().max()) <= rounding:
            raise ValueError("the LM head gives other logits when it is computed in blocks")


class SoftmaxStats:
    """Statistics of the softmax of models' logits at some positions, (R, positions), gathered by blocks of the
    vocabulary. Terms are as exact as the logits, sums are in the device's widest float type."""

    def __init__(self, following: Tensor, models: int) -> None:
        """following: the token that follows each position, -1 for none; models: how many, R."""
        self._next = following.expand(models, -1)
        device = following.device
        self.following = torch.zeros(self._next.shape, dtype=widest_float(device), device=device)
        self.top = torch.full_like(self.following, -torch.inf)  # the largest logit so far
        self.weight = torch.zeros_like(self.following)  # sum of exp(logit - top)
        self.likeliest = torch.zeros_like(self._next)  # the token with the largest logit, of equals the lowest

    def add(self, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block's logits, (R, positions, rows); first: number of its first row.

        Returns exp(logit - top), and the factor by which earlier sums were multiplied because the top has changed.
        """
        value, likeliest_row = logits.max(-1)
        self.likeliest = torch.where(value > self.top, likeliest_row + first, self.likeliest)
        top = torch.maximum(self.top, value)
        shares = (logits - top.to(logits.dtype)[..., None]).exp_()
        rescale = (self.top - top).exp()
        self.top = top
        self.weight = self.weight * rescale + shares.sum(-1, dtype=top.dtype)
        next_row = self._next - first
        inside = (next_row >= 0) & (next_row < logits.shape[-1])
        next_logits = logits.gather(-1, next_row.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        self.following = torch.where(inside, next_logits.to(top.dtype), self.following)
        return shares, rescale

    @property
    def normaliser(self) -> Tensor:
        """Logarithm of the sum of all tokens' exponentials: (R, positions)."""
        return self.top + self.weight.log()


def _batches(passages: Sequence[Passage], device: torch.device) -> Iterator[Batch]:
    """Batches of passages of one length, up to TOKENS tokens each; without passages that are compared nowhere."""
    in_order = sorted(
        (passage for passage in passages if any(passage.compared)), key=lambda passage: len(passage.tokens)
    )
    for length, group in groupby(in_order, key=lambda passage: len(passage.tokens)):
        same_length = list(group)
        size = max(1, TOKENS // length)
        for first in range(0, len(same_length), size):
            members = same_length[first : first + size]
            ids = torch.tensor([passage.tokens for passage in members], device=device)
            yield Batch(ids, torch.tensor([passage.compared for passage in members], device=device))

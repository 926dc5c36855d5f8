"""Drift: how far the model's next-token distributions are, on neutral text, from those that it began with.

Knows: windows of tokens, hidden states, the head's rows. Refuses to know: phrases, files, what has changed the model.

    KL(base, now) = sum over tokens v of p_base(v) * (log p_base(v) - log p_now(v)), the mean over all positions

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
from modules.scoring.hidden_states import ending_in, last_states, logits_with
from modules.scoring.tokenization import Window

BLOCK = 32 << 20  # bytes of logits, in float32, of all models together, at a time
TOKENS = 1024  # in one forward
MOST_NATS = 690.0  # a token, of which the perplexity is still a number
ROUNDING = 1e-5  # of the largest logit, by which products of other shapes may differ, or the dtype's own

Held = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Drift:
    """How far a model has gone from its base on neutral text."""

    divergence: float  # mean KL(base, now), in nats per token
    agreement: float  # share of the positions at which the likeliest next token is the base's
    perplexity: float  # of the model now
    base_perplexity: float
    tokens: int  # positions that were looked at

    @property
    def is_finite(self) -> bool:
        """Whether it could be computed: a model whose activations overflow has none."""
        return math.isfinite(self.divergence) and math.isfinite(self.perplexity)


class DriftMeter:
    """Measures how far a model has gone from what it was when the meter was made."""

    @torch.no_grad()
    def __init__(self, model: ResidentModel, windows: Sequence[Window], keeps_head: bool = False) -> None:
        """windows: of neutral text, at least one of at least two tokens. keeps_head: once the header has changed, the
        base's head stays in the CPU's memory, where otherwise it is read anew for each measure.

        Raises ValueError if the model's head can't be read in blocks of its rows.
        """
        self.model, self._block = model, BLOCK
        self._keeps_head = keeps_head
        self._head: Tensors | None = None
        # Windows of one length together, (B, T), and what the model's last layer made of them, (B, T, H), on the CPU.
        self.batches = [batch.to(model.device) for batch in _batches(windows)]
        self.before = [self._hidden(batch).cpu() for batch in self.batches]
        self._outside = {name: tensor.clone() for name, tensor in model.outside().tensors.items()}
        self._check_blocks(self.batches[0][:1, :8])

    def measure(self) -> Drift:
        """The drift by now. Raises torch.OutOfMemoryError if not even one row of the head fits."""
        return retry_on_oom(self._measure, self._take_less_memory)

    def _take_less_memory(self) -> bool:
        self._block //= 2
        return self._block > 0

    @property
    def inputs(self) -> list[Callable[[], dict[str, Tensor]]]:
        """For each batch, what makes that which the model's forward takes."""
        return [partial(dict, input_ids=batch) for batch in self.batches]

    @torch.no_grad()
    def measure_on(
        self, hidden: Sequence[Tensor], held: Held = nullcontext, same_header: bool = False, stack: int = 1
    ) -> list[Drift]:
        """The drifts of a stack of models with these last hidden states, (stack * B, T, H) of each batch.

        held: within it, the resident model has the others' norm and head. same_header: the base's header is the
        resident one, whatever is held.
        """
        original = self._original_head() if not (same_header and self.model.has_base_header) else None
        sums = torch.zeros(4, stack, dtype=torch.float64)
        for batch, before, now in zip(self.batches, self.before, hidden, strict=True):
            sums += self._compare(batch, before.to(self.model.device), now, original, held).cpu()
        followed = self.tokens - sum(len(batch) for batch in self.batches)  # what follows a window is not known
        drifts = []
        for divergence, equal, said_now, said_before in sums.T.tolist():
            perplexities = (math.exp(min(-said / followed, MOST_NATS)) for said in (said_now, said_before))
            mean = divergence / self.tokens
            drifts.append(Drift(0.0 if mean < 0 else mean, equal / self.tokens, *perplexities, self.tokens))
        return drifts

    def _original_head(self) -> Tensors:
        head = self._head or self.model.original_head()
        self._head = head if self._keeps_head else None
        return head

    @property
    def tokens(self) -> int:
        """Positions that are looked at."""
        return sum(batch.numel() for batch in self.batches)

    @torch.no_grad()
    def _measure(self) -> Drift:
        return self.measure_on([self._hidden(batch) for batch in self.batches], same_header=True)[0]

    def _compare(self, batch: Tensor, before: Tensor, now: Tensor, original: Tensors | None, held: Held) -> Tensor:
        """Of windows (B, T) with hidden states (B, T, H) and a stack's (R * B, T, H), the sums over their positions: of
        the divergence, of equal likeliest tokens, and of what the next token's log-probability is now and was before:
        (4, R)."""
        base, present = SoftmaxStats(batch[None]), SoftmaxStats(batch.expand(len(now) // len(batch), -1, -1))
        gap = torch.zeros_like(present.weight)  # sum of exp(old - top) * (old - new)
        for first, end in self._blocks(batch.numel() + now.shape[0] * now.shape[1]):
            with self.model.outside().holding(self._outside):  # the final norm may have been merged as well
                old = self._logits(batch, before, first, end, original)[None]
            with held():
                new = self._logits(batch, now, first, end).unflatten(0, (-1, len(batch)))
            shares, shrunk = base.add(first, old)
            present.add(first, new)
            # A token that neither can say has no share; its difference is no number.
            apart = torch.where(shares > 0, shares * (old - new), 0.0)
            gap = gap * shrunk + apart.sum(-1, dtype=gap.dtype)
        divergence = gap / base.weight - base.normaliser + present.normaliser
        equal = (base.likeliest == present.likeliest).to(gap.dtype)
        said = [(one.following - one.normaliser)[..., :-1].sum((1, 2)) for one in (present, base)]
        sums = [divergence.sum((1, 2)), equal.sum((1, 2)), said[0], said[1].expand(len(present.weight))]
        return torch.stack(sums).to(torch.float64)

    def _blocks(self, positions: int) -> Iterator[tuple[int, int]]:
        """Ranges of the head's rows whose logits at so many positions, of all models, fit into a block."""
        rows, size = self.model.head_size, max(1, self._block // (4 * positions))
        return ((first, min(first + size, rows)) for first in range(0, rows, size))

    def _logits(self, batch: Tensor, hidden: Tensor, first: int, end: int, rows: Tensors | None = None) -> Tensor:
        """What the model's own forward makes of last hidden states (B, T, H) with some rows of its head, or of `rows`:
        (B, T, rows)."""
        ids = torch.zeros_like(batch)  # any that every block has a row for; nothing comes of them
        columns = torch.arange(batch.shape[1], device=batch.device)
        with self.model.head_rows(first, end, rows):
            found = logits_with(self.model, {"input_ids": ids}, ending_in(self.model, hidden), columns)
        return found if found.dtype == torch.float64 else found.float()

    def _hidden(self, batch: Tensor) -> Tensor:
        """The last layer's hidden states of windows (B, T): (B, T, H)."""
        return last_states(self.model, {"input_ids": batch}, {})

    def _check_blocks(self, batch: Tensor) -> None:
        """Raise ValueError unless blocks of the head's rows give what the whole head gives, but for rounding."""
        columns, size = torch.arange(batch.shape[1], device=batch.device), self.model.head_size
        whole = logits_with(self.model, {"input_ids": batch}, {}, columns)
        # Of the same forward: another number of tokens would round otherwise.
        hidden, ends = self._hidden(batch), (0, size // 3, size)
        parts = torch.cat([self._logits(batch, hidden, first, end) for first, end in pairwise(ends)], -1)
        rounding = 4 * max(torch.finfo(self.model.dtype).eps, ROUNDING) * float(whole.abs().max())
        if parts.shape != whole.shape or not float((parts - whole).abs().max()) <= rounding:
            raise ValueError("the LM head gives other logits when it is computed in blocks")


class SoftmaxStats:
    """What models' logits say at the positions of windows, (R, B, T), gathered block by block of the vocabulary. Terms
    are as exact as the logits, sums as exact as the device can make them."""

    def __init__(self, windows: Tensor) -> None:
        self._next = windows.roll(-1, -1)  # of the last position it is not meant
        self.following = torch.zeros(windows.shape, dtype=widest_float(windows.device), device=windows.device)
        self.top = torch.full_like(self.following, -torch.inf)  # the largest logit so far
        self.weight = torch.zeros_like(self.following)  # sum of exp(logit - top)
        self.likeliest = torch.zeros_like(windows)  # the token with the largest logit, of equals the lowest

    def add(self, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A block's, (R, B, T, rows); first: number of its first row. Returns exp(logit - top), and what the sums so
        far were multiplied with since the top is another, (R, B, T)."""
        value, place = logits.max(-1)
        self.likeliest = torch.where(value > self.top, place + first, self.likeliest)
        top = torch.maximum(self.top, value)
        shares, shrunk = (logits - top.to(logits.dtype)[..., None]).exp_(), (self.top - top).exp()
        self.top, self.weight = top, self.weight * shrunk + shares.sum(-1, dtype=top.dtype)
        place = self._next - first
        inside = (place >= 0) & (place < logits.shape[-1])
        chosen = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        self.following = torch.where(inside, chosen.to(top.dtype), self.following)
        return shares, shrunk

    @property
    def normaliser(self) -> Tensor:
        """Logarithm of the sum of all tokens' exponentials: (R, B, T)."""
        return self.top + self.weight.log()


def _batches(windows: Sequence[Window]) -> Iterator[Tensor]:
    """Windows of one length together, (B, T), up to TOKENS tokens."""
    for length, alike in groupby(sorted(windows, key=len), key=len):
        yield from torch.tensor(list(alike)).split(max(1, TOKENS // length))

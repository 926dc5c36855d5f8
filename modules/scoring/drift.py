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
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints import Tensors
from modules.model import ResidentModel, widest_float
from modules.runtime import within_memory
from modules.scoring.hidden_states import Forward, ending_in, first_of, recorded, replaced_layers
from modules.scoring.tokenization import Window

BLOCK = 16 << 20  # bytes of logits, in float32, of each of the two models at a time
TOKENS = 1024  # in one forward
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


class DriftMeter:
    """Measures how far a model has gone from what it was when the meter was made."""

    @torch.no_grad()
    def __init__(self, model: ResidentModel, windows: Sequence[Window]) -> None:
        """windows: of neutral text, at least one of at least two tokens.

        Raises ValueError if the model's head can't be read in blocks of its rows.
        """
        self._model, self._block = model, BLOCK
        self._batches = [batch.to(model.device) for batch in _batches(windows)]
        self._before = [self._hidden(batch).cpu() for batch in self._batches]
        self._outside = {name: tensor.clone() for name, tensor in model.outside().tensors.items()}
        self._check_blocks(self._batches[0][:1, :8])

    def measure(self) -> Drift:
        """The drift by now. Raises torch.OutOfMemoryError if not even one row of the head fits."""
        return within_memory(self._measure, self._take_less_memory)

    def _take_less_memory(self) -> bool:
        self._block //= 2
        return self._block > 0

    @property
    def inputs(self) -> list[Callable[[], dict[str, Tensor]]]:
        """For each batch, what makes that which the model's forward takes."""
        return [partial(dict, input_ids=batch) for batch in self._batches]

    @property
    def batches(self) -> list[Tensor]:
        """Windows of one length together, (B, T) each."""
        return self._batches

    @property
    def before(self) -> list[Tensor]:
        """Of each batch the last hidden states of the model as it was then, (B, T, H), on the CPU."""
        return self._before

    @torch.no_grad()
    def measure_on(self, hidden: Sequence[Tensor], held: Held = nullcontext, same_header: bool = False) -> Drift:
        """The drift of a model with these last hidden states, batch by batch.

        held: within it, the resident model has the other's norm and head. same_header: the base's header is the
        resident one, whatever is held.
        """
        original = self._model.original_head() if not same_header or self._model.header_has_changed() else None
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, before, now in zip(self._batches, self._before, hidden, strict=True):
            sums += self._compare(batch, before.to(self._model.device), now, original, held).cpu()
        tokens = sum(batch.numel() for batch in self._batches)
        followed = tokens - sum(len(batch) for batch in self._batches)  # what follows a window is not known
        divergence, equal, said_now, said_before = sums.tolist()
        perplexities = (math.exp(-said / followed) for said in (said_now, said_before))
        return Drift(max(0.0, divergence / tokens), equal / tokens, *perplexities, tokens)

    @torch.no_grad()
    def _measure(self) -> Drift:
        return self.measure_on([self._hidden(batch) for batch in self._batches], same_header=True)

    def _compare(self, batch: Tensor, before: Tensor, now: Tensor, original: Tensors | None, held: Held) -> Tensor:
        """Of windows (B, T) with hidden states (B, T, H), the sums over their positions: of the divergence, of equal
        likeliest tokens, and of what the next token's log-probability is now and was before."""
        base, present = _Said(batch), _Said(batch)
        gap = torch.zeros_like(base.top)  # sum of exp(old - top) * (old - new)
        for first, end in self._blocks(batch.numel()):
            with self._model.outside().holding(self._outside):  # the final norm may have been merged as well
                old = self._logits(batch, before, first, end, original)
            with held():
                new = self._logits(batch, now, first, end)
            shares, shrunk = base.add(first, old)
            present.add(first, new)
            # A token that neither can say has no share; its difference is no number.
            gap = gap * shrunk + torch.where(shares > 0, shares * (old - new), 0.0).sum(-1)
        divergence = gap / base.weight - base.normaliser + present.normaliser
        equal = base.likeliest == present.likeliest
        said = ((one.following - one.normaliser)[:, :-1].sum() for one in (present, base))
        return torch.stack([divergence.sum(), equal.sum().to(gap.dtype), *said]).to(torch.float64)

    def _blocks(self, positions: int) -> Iterator[tuple[int, int]]:
        """Ranges of the head's rows whose logits at so many positions fit into a block."""
        rows, size = self._model.head_size, max(1, self._block // (4 * positions))
        return ((first, min(first + size, rows)) for first in range(0, rows, size))

    def _logits(self, batch: Tensor, hidden: Tensor, first: int, end: int, rows: Tensors | None = None) -> Tensor:
        """What the model's own forward makes of last hidden states (B, T, H) with some rows of its head, or of `rows`:
        (B, T, rows)."""
        with (
            self._model.head_rows(first, end, rows),
            replaced_layers(self._model.layers, ending_in(self._model, hidden)),
        ):
            ids = torch.zeros_like(batch)  # any that every block has a row for; nothing comes of them
            columns = torch.arange(batch.shape[1], device=batch.device)
            found = self._model.logits({"input_ids": ids, "use_cache": False}, columns)
        return found.to(widest_float(found.device))

    def _hidden(self, batch: Tensor) -> Tensor:
        """The last layer's hidden states of windows (B, T): (B, T, H)."""
        last = len(self._model.layers) - 1
        return recorded(self._model, {"input_ids": batch}, last, _own, first=last)

    def _check_blocks(self, batch: Tensor) -> None:
        """Raise ValueError unless blocks of the head's rows give what the whole head gives, but for rounding."""
        columns, size = torch.arange(batch.shape[1], device=batch.device), self._model.head_size
        whole = self._model.logits({"input_ids": batch, "use_cache": False}, columns)
        # Of the same forward: another number of tokens would round otherwise.
        hidden, ends = self._hidden(batch), (0, size // 3, size)
        parts = torch.cat([self._logits(batch, hidden, first, end) for first, end in pairwise(ends)], -1)
        rounding = 4 * max(torch.finfo(self._model.dtype).eps, ROUNDING) * float(whole.abs().max())
        if parts.shape != whole.shape or not float((parts - whole).abs().max()) <= rounding:
            raise ValueError("the output head does not give the same in blocks of its rows")


class _Said:
    """What a model's logits say at the positions of windows (B, T), gathered block by block of the vocabulary."""

    def __init__(self, batch: Tensor) -> None:
        self._next = batch.roll(-1, 1)  # of the last position it is not meant
        self.following = torch.zeros(batch.shape, dtype=widest_float(batch.device), device=batch.device)  # its logit
        self.top = torch.full_like(self.following, -torch.inf)  # the largest logit so far
        self.weight = torch.zeros_like(self.following)  # sum of exp(logit - top)
        self.likeliest = torch.zeros_like(batch)  # the token with the largest logit, of equals the lowest

    def add(self, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A block's, (B, T, rows); first: number of its first row. Returns exp(logit - top), and what the sums so far
        were multiplied with since the top is another, (B, T)."""
        value, place = logits.max(-1)
        self.likeliest = torch.where(value > self.top, place + first, self.likeliest)
        top = torch.maximum(self.top, value)
        shares, shrunk = (logits - top[..., None]).exp(), (self.top - top).exp()
        self.top, self.weight = top, self.weight * shrunk + shares.sum(-1)
        place = self._next - first
        inside = (place >= 0) & (place < logits.shape[-1])
        chosen = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        self.following = torch.where(inside, chosen, self.following)
        return shares, shrunk

    @property
    def normaliser(self) -> Tensor:
        """Logarithm of the sum of all tokens' exponentials: (B, T)."""
        return self.top + self.weight.log()


def _own(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's own forward; its hidden states."""
    return first_of(forward(*args, **kwargs))


def _batches(windows: Sequence[Window]) -> Iterator[Tensor]:
    """Windows of one length together, (B, T), up to TOKENS tokens."""
    for length, alike in groupby(sorted(windows, key=len), key=len):
        yield from torch.tensor(list(alike)).split(max(1, TOKENS // length))

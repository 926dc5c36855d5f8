"""The memory budget of scoring: tokens in a pack, logits at a time, hidden states kept.

Knows: a model's sizes and what is free. Refuses to know: phrases, how a forward is made.
"""

from dataclasses import dataclass, replace

import psutil
import torch

from modules.model.memory import Sizes

# Enough tokens in one pack to keep a processor busy, few enough that attention within it stays cheap.
TOKENS = 1024
FEWEST_TOKENS = 64
# Bytes of logits at a time: on a CPU, few for its caches; elsewhere, enough that the head is seldom read twice.
LOGITS_ON_CPU = 64 << 20
LOGITS_ELSEWHERE = 512 << 20
# Shares of the free memory; the rest is for what these figures do not count.
ACTIVATIONS_SHARE = 1 / 2
LOGITS_SHARE = 1 / 8
CACHE_SHARE = 1 / 4


@dataclass(frozen=True)
class Budget:
    """How much scoring may hold at a time."""

    tokens: int = TOKENS  # in one pack, unless a single pair is longer
    logits: int = LOGITS_ON_CPU  # bytes of them, in float32
    cache: int = 1 << 30  # bytes of hidden states that are kept on the device
    cache_beside: int = 0  # bytes of hidden states that are kept in CPU memory, if the device is another

    def halved(self) -> "Budget":
        """Half of everything on the device."""
        return replace(
            self, tokens=max(1, self.tokens // 2), logits=max(1, self.logits // 2), cache=max(1, self.cache // 2)
        )


@dataclass(frozen=True)
class Packing:
    """What the last digits of scores depend on, beside the weights: sizes and order of joint computations."""

    layout: str
    tokens: int  # in one pack
    logits: int  # bytes at a time
    stacked: bool  # several ratios at a time

    def __str__(self) -> str:
        ratios = "all ratios" if self.stacked else "one ratio"
        return f"{self.layout} of {self.tokens:,} tokens with {ratios} and {self.logits:,} bytes of logits at a time"

    def applied_to(self, budget: Budget) -> Budget:
        """The budget, with these sizes."""
        return replace(budget, tokens=self.tokens, logits=self.logits)


def layer_bytes(sizes: Sizes, dtype: torch.dtype, tokens: int, stack: int) -> int:
    """Bytes of a layer's activations on a pack of so many tokens, for `stack` ratios at once.

    These are: hidden states before and after the norm; then either an MLP's three wide tensors, or queries, keys and
    values with the tensors of their rotation; and the mask.
    """
    features = tokens * (2 * sizes.hidden + max(4 * sizes.hidden, 3 * sizes.widest))
    attention = sizes.heads * tokens**2 if sizes.keeps_attention else 0
    return (stack * (features + attention) + tokens**2) * dtype.itemsize


def logits_bytes(sizes: Sizes, stack: int, columns: int, budget: Budget) -> int:
    """Bytes of float32 logits at a time, for `stack` ratios, if the head is read at so many columns."""
    row = 4 * stack * sizes.vocabulary
    return max(row, min(budget.logits, row * columns))


def budget_of(sizes: Sizes, dtype: torch.dtype, device: torch.device, stack: int, free: int | None) -> Budget:
    """The budget if so many bytes are free on the device beside all weights; None: not known.

    stack: the most ratios at once. The tokens of a pack are a power of two, so that small changes of free memory don't
    change the last digits of a score.
    """
    on_cpu = device.type == "cpu"
    most_logits = LOGITS_ON_CPU if on_cpu else LOGITS_ELSEWHERE
    beside = 0 if on_cpu else int(psutil.virtual_memory().available * CACHE_SHARE)
    if free is None:
        return Budget(logits=most_logits, cache_beside=beside)
    tokens = TOKENS
    free = max(0, free)
    while tokens > FEWEST_TOKENS and layer_bytes(sizes, dtype, tokens, stack) > free * ACTIVATIONS_SHARE:
        tokens //= 2
    return Budget(tokens, max(1, min(most_logits, int(free * LOGITS_SHARE))), int(free * CACHE_SHARE), beside)

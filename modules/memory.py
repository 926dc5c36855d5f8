"""What scoring takes in memory, and how much of it a run allows itself.

Knows: a model's shapes, what its activations take, what is free. Refuses to know: phrases, weights, files.
"""

from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.models import find_layers

# Enough tokens in one pack to fill a processor, few enough that attention within it stays cheap.
TOKENS, FEWEST_TOKENS = 1024, 64
# Bytes of logits at a time: on a CPU what stays near its caches, elsewhere enough that the head is seldom read twice.
LOGITS_ON_CPU, LOGITS_ELSEWHERE = 64 << 20, 512 << 20
# Shares of the free memory; what is left over is for what these figures do not count.
ACTIVATIONS_SHARE, LOGITS_SHARE, CACHE_SHARE = 1 / 2, 1 / 8, 1 / 4


@dataclass(frozen=True)
class Budget:
    """How much scoring may hold at a time."""

    tokens: int = TOKENS  # in one pack, unless a single pair is longer
    logits: int = LOGITS_ON_CPU  # bytes of them, in float32
    cache: int = 1 << 30  # bytes of hidden states that are kept on the device
    cache_beside: int = 0  # bytes of those that are kept in the CPU's memory, if the device is another

    def halved(self) -> "Budget":
        """Half of everything on the device."""
        return replace(
            self, tokens=max(1, self.tokens // 2), logits=max(1, self.logits // 2), cache=max(1, self.cache // 2)
        )


@dataclass(frozen=True)
class Sizes:
    """A base model in numbers. "Weights" are counts of values, not bytes."""

    layers: int
    hidden: int  # features of a hidden state
    widest: int  # the longest side of any matrix in a layer: mostly the MLP's
    heads: int  # of attention in a layer; 0 if there are none
    head_size: int  # features of one head
    vocabulary: int  # rows of the input embedding
    layer_weights: float  # in one layer, the mean over layers
    active_weights: float  # of these, what one token is multiplied with: not all of a mixture of experts
    header_weights: int  # input embedding and output head
    keeps_attention: bool = False  # whether a layer's whole attention matrices are in memory ("eager")


def sizes_of(module: PreTrainedModel) -> Sizes:
    """A model in numbers; it may be without weights."""
    layers, text = find_layers(module)[1], module.config.get_text_config()
    weights = [weight for layer in layers for weight in layer.parameters()]
    heads, chosen = getattr(text, "num_attention_heads", None) or 0, getattr(text, "num_experts_per_tok", None)

    def active(weight: Tensor) -> float:
        """Stacked experts are (experts, ..., ...), of which a token meets a few."""
        share = min(1.0, chosen / weight.shape[0]) if chosen and weight.dim() == 3 else 1.0
        return weight.numel() * share

    return Sizes(
        layers=len(layers),
        hidden=text.hidden_size,
        widest=max(max(weight.shape[-2:], default=1) for weight in weights),
        heads=heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // max(1, heads),
        vocabulary=module.get_input_embeddings().weight.shape[0],
        layer_weights=sum(weight.numel() for weight in weights) / len(layers),
        active_weights=sum(map(active, weights)) / len(layers),
        header_weights=sum(weight.numel() for weight in header_weights(module)),
        keeps_attention=getattr(text, "_attn_implementation", None) == "eager",
    )


def header_weights(module: PreTrainedModel) -> list[Tensor]:
    """The weights of input embedding and output head; where they are tied there is one."""
    parts = [part for part in (module.get_input_embeddings(), module.get_output_embeddings()) if part is not None]
    return list({id(weight): weight for part in parts for weight in part.parameters()}.values())


def layer_bytes(sizes: Sizes, dtype: torch.dtype, tokens: int, stack: int) -> int:
    """Bytes of the activations of a layer at work on a pack of so many tokens, for `stack` ratios at once.

    Hidden states before and after the norm, queries, keys, values, and an MLP's three wide tensors; the mask.
    """
    features = tokens * (5 * sizes.hidden + 3 * sizes.widest)
    attention = sizes.heads * tokens**2 if sizes.keeps_attention else 0
    return (stack * (features + attention) + tokens**2) * dtype.itemsize


def logits_bytes(sizes: Sizes, stack: int, columns: int, budget: Budget) -> int:
    """Bytes of float32 logits at a time, for `stack` ratios, where the head is read at so many columns."""
    row = 4 * stack * sizes.vocabulary
    return max(row, min(budget.logits, row * columns))


def budget_of(sizes: Sizes, dtype: torch.dtype, device: torch.device, stack: int, free: int | None) -> Budget:
    """What scoring may hold if so many bytes are free on the device beside all weights; None: not known.

    stack: the most ratios at once. Packs have a power of two of tokens, so that a few bytes more or less that are free
    don't change the last digits of a score.
    """
    on_cpu = device.type == "cpu"
    most = LOGITS_ON_CPU if on_cpu else LOGITS_ELSEWHERE
    beside = 0 if on_cpu else int(psutil.virtual_memory().available * CACHE_SHARE)
    if free is None:
        return Budget(logits=most, cache_beside=beside)
    tokens, free = TOKENS, max(0, free)
    while tokens > FEWEST_TOKENS and layer_bytes(sizes, dtype, tokens, stack) > free * ACTIVATIONS_SHARE:
        tokens //= 2
    return Budget(tokens, max(1, min(most, int(free * LOGITS_SHARE))), int(free * CACHE_SHARE), beside)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None if it can't be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None

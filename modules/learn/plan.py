"""What learning takes: memory, and how much goes through the model at a time.

Knows: sizes of a model and of an adapter. Refuses to know: weights, how fast anything is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from modules.learn.adapter import linear_layers, parameters_of
from modules.model.arithmetic import Arithmetic
from modules.model.memory import Sizes, sizes_of, weights_of
from modules.scoring.budget import LOGITS_ELSEWHERE, Budget, layer_bytes
from modules.scoring.objective import AT_ONCE
from modules.scoring.packing import build_packs
from modules.scoring.tokenization import WINDOW, Encoded

SHARE = 0.3  # of the base's bytes, that learning adds to them where it can
PACKS = (1024, 512, WINDOW)  # tokens in a pack: the most that leaves it at that
FEWEST_LOGITS = 8 << 20  # bytes at a time
LOGITS_IN_CPU_MEMORY = 256 << 20  # bytes at a time: a head's product with few positions takes twice as long for each
KEPT_OF_FREE = 0.75  # of the memory that is free, at most, where activations are kept
COPIES = 5  # of the adapter, in float32: its weights, two gradients, Adam's two means
LAYERS_KEPT = 3  # times the activations of one layer's forward that its gradient takes


@dataclass(frozen=True)
class LearnPlan:
    """The memory of a run that learns, in bytes, and what goes through the model at a time."""

    base: int
    adapter: int  # with its gradients and Adam's means
    activations: int
    budget: Budget
    parameters: int  # of the adapter
    keeps_activations: bool = False  # for the backward pass, of all layers; else they are computed again

    @property
    def needed(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.activations


def plan_learning(
    module: PreTrainedModel, rank: int, compute: Arithmetic, device: torch.device, free: int | None
) -> LearnPlan:
    """The plan for a base, which may be without weights. free: bytes on the device.

    Activations are kept on a CPU with memory for them: the same results to the bit, in less time. The rest of the plan
    depends on nothing but the base and the kind of device; on a CPU, it has room.
    """
    sizes = sizes_of(module)
    base = weights_of(module, compute.dtype, with_header=False).base
    parameters = parameters_of(linear_layers(module), rank)
    adapter = 4 * COPIES * parameters
    on_cpu = device.type == "cpu"
    for tokens in PACKS:
        hidden = _hidden_bytes(sizes, compute.stream, tokens)
        room = int(SHARE * base) - adapter - hidden
        if on_cpu or room >= FEWEST_LOGITS:
            break
    fitting = 1 << max(room, FEWEST_LOGITS).bit_length() - 1
    logits = LOGITS_IN_CPU_MEMORY if on_cpu else min(LOGITS_ELSEWHERE, fitting)
    of_logits = max(logits, 4 * AT_ONCE * sizes.vocabulary)
    plan = LearnPlan(base, adapter, hidden + of_logits, Budget(tokens=tokens, logits=logits), parameters)
    of_layers = LAYERS_KEPT * sizes.layers * layer_bytes(sizes, compute.stream, tokens, 1)
    of_head = 4 * AT_ONCE * sizes.vocabulary * tokens
    kept = replace(plan, activations=of_layers + of_head, keeps_activations=True)
    fits = on_cpu and free is not None and kept.needed < free * KEPT_OF_FREE
    return kept if fits else plan


def _hidden_bytes(sizes: Sizes, stream: torch.dtype, tokens: int) -> int:
    """Bytes for a pack of so many tokens: what enters each layer, and one layer's gradient."""
    return sizes.layers * tokens * sizes.hidden * stream.itemsize + LAYERS_KEPT * layer_bytes(sizes, stream, tokens, 1)


def tokens_of_a_step(encoded: Sequence[Encoded], pairs: int, of_texts: int, budget: Budget) -> int:
    """About how many tokens go through the model in a step. encoded: of all pairs; of_texts: tokens of texts."""
    return of_texts + sum(pack.tokens for pack in build_packs(encoded[:pairs], "forest", budget.tokens))

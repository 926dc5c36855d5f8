"""The memory that learning takes, and how much goes through the model at a time.

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

SHARE = 0.3  # memory that learning adds, as a share of the base's bytes, if possible
PACKS = (1024, 512, WINDOW)  # tokens in a pack: the largest that keeps to that share
FEWEST_LOGITS = 8 << 20  # bytes at a time
LOGITS_IN_CPU_MEMORY = 256 << 20  # bytes at a time: with few positions, a head's product takes twice as long for each
KEPT_OF_FREE = 0.75  # the plan's largest share of free memory if activations are kept
COPIES = 5  # of the adapter, in float32: its weights, two gradients, Adam's two means
LAYERS_KEPT = 3  # memory of a layer's gradient, in multiples of its forward's activations


@dataclass(frozen=True)
class LearnPlan:
    """The memory of a run that learns, in bytes, and how much goes through the model at a time."""

    base: int
    adapter: int  # with its gradients and Adam's means
    activations: int
    budget: Budget
    parameters: int  # of the adapter
    keeps_activations: bool = False  # of layers and head, for the backward pass; otherwise they are computed again

    @property
    def needed(self) -> int:
        """All bytes of the plan."""
        return self.base + self.adapter + self.activations


def plan_learning(
    module: PreTrainedModel, rank: int, compute: Arithmetic, device: torch.device, free: int | None
) -> LearnPlan:
    """The plan for a base, which may be without weights. free: bytes on the device.

    On a CPU with enough memory, activations are kept: the same results to the bit, in less time. The rest of the plan
    depends on the base and the kind of device alone; on a CPU, it does not keep to SHARE.
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
    keeping_plan = replace(plan, activations=of_layers + of_head, keeps_activations=True)
    fits = on_cpu and free is not None and keeping_plan.needed < free * KEPT_OF_FREE
    return keeping_plan if fits else plan


def _hidden_bytes(sizes: Sizes, stream: torch.dtype, tokens: int) -> int:
    """Bytes for a pack of so many tokens: the inputs of all layers, and one layer's gradient."""
    return sizes.layers * tokens * sizes.hidden * stream.itemsize + LAYERS_KEPT * layer_bytes(sizes, stream, tokens, 1)


def tokens_of_a_step(encoded: Sequence[Encoded], pairs: int, of_texts: int, budget: Budget) -> int:
    """The approximate number of tokens in a step. encoded: of all pairs; of_texts: tokens of texts."""
    return of_texts + sum(pack.tokens for pack in build_packs(encoded[:pairs], "forest", budget.tokens))

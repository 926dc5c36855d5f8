"""A forward whose layers come one after another, each with weights of its own for as long as it is at work.

Knows: the order of layers. Refuses to know: whose weights they are, scores.

It is exact where nothing reaches a layer but hidden states, as tail forwards are.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from modules.model import ResidentModel
from modules.scoring.hidden_states import Inputs, entering, recorded, run_on


@torch.no_grad()
def streamed(
    model: ResidentModel, inputs: Sequence[Inputs], layers: Iterable[AbstractContextManager[None]]
) -> list[Tensor]:
    """The last hidden states of inputs, (B, T, H) each.

    layers: for each of the model's layers, in order, a context within which the model holds what it needs to run it.
    """
    hidden: list[Tensor] = []
    for layer, held in enumerate(layers):
        with held:
            hidden = hidden or [recorded(model, one(), layer, entering) for one in inputs]
            for number, one in enumerate(inputs):
                hidden[number] = recorded(model, one(), layer, run_on(hidden[number]))
    return hidden

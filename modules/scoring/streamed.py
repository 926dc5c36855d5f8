"""A forward whose layers come one after another, each with weights of its own for as long as it is at work.

Knows: hidden states between layers, the model's own forward. Refuses to know: whose weights they are, scores.

It is exact where nothing reaches a layer but hidden states, as tail forwards are.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modules.model import ResidentModel
from modules.scoring.hidden_states import Forward, call_on, entering, first_of, replaced_layers

Arguments = Mapping[str, Tensor]  # what the model's forward takes


def passing(model: ResidentModel, hidden: Tensor) -> dict[int, Forward]:
    """Layer forwards that compute nothing, the last of which returns these hidden states, (B, T, H)."""
    last = len(model.layers) - 1
    return {
        **{layer: partial(_hand_on, model, layer) for layer in range(last)},
        last: lambda *_call, **_kwargs: in_form(model, last, hidden),
    }


def in_form(model: ResidentModel, layer: int, hidden: Tensor) -> Any:
    """Hidden states as this layer returns them."""
    more = model.tuples_returned.get(layer)
    return hidden if more is None else (hidden, *more)


def _hand_on(model: ResidentModel, layer: int, *call: Any, **kwargs: Any) -> Any:
    return in_form(model, layer, entering(*call, **kwargs))


@torch.no_grad()
def streamed(
    model: ResidentModel, inputs: Sequence[Arguments], layers: Iterable[AbstractContextManager[None]]
) -> list[Tensor]:
    """The last hidden states of inputs, (B, T, H) each.

    layers: for each of the model's layers, in order, a context within which the model holds what it needs to run it.
    """
    hidden: list[Tensor] = []
    for layer, held in enumerate(layers):
        with held:
            hidden = hidden or [_recorded(model, one, layer, entering) for one in inputs]
            on_kept = (partial(_run_on, kept) for kept in hidden)
            hidden = [_recorded(model, one, layer, run) for one, run in zip(inputs, on_kept, strict=True)]
    return hidden


def _run_on(hidden: Tensor, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    return first_of(call_on(hidden, forward, args, kwargs))


def _recorded(model: ResidentModel, arguments: Arguments, layer: int, compute: Forward) -> Tensor:
    """What `compute` returns in a layer's place, (B, T, H); the others only hand on what they are given."""
    found: list[Tensor] = []

    def recording(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        found.append(compute(forward, *args, **kwargs))
        return in_form(model, layer, found[0])

    others = {other: partial(_hand_on, model, other) for other in range(len(model.layers)) if other != layer}
    no_columns = torch.zeros(0, dtype=torch.long, device=model.device)
    with replaced_layers(model.layers, {**others, layer: recording}):
        model.logits({**arguments, "use_cache": False}, no_columns)
    return found[0]

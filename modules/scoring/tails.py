"""Tail forwards: a model's forwards that begin at one of its layers, with weights that are tried on it.

Knows: hidden states that are kept for that layer, in which order layers are searched. Refuses to know: what is read
from the last layer's hidden states.

For layer i and R trials on inputs of T tokens (B batch, H hidden, N layers):

    embedding ─ layers 0..i-1 ─ layer i ─────────────── layers i+1..N-1 ─ norm, head
                passed over:    once per trial, on the   once for all       read by others:
                their output    kept (B, T, H), each      trials, as a       (R * B, T, H)
                is kept         with its own weights      batch of R

Everything but the layers stays the model's own forward: embedding, masks, position embeddings, norm and head.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from modules.model.base_model import ResidentModel
from modules.scoring.budget import Budget
from modules.scoring.hidden_states import (
    Forward,
    Inputs,
    call_on,
    entering,
    first_of,
    handing_on,
    in_form,
    recorded,
    run_on,
)

Trial = Callable[[], AbstractContextManager[None]]  # while it is entered, the model holds the trial's weights


class TailForwards:
    """Of fixed inputs, in a model whose layers are searched from the first to the last."""

    def __init__(self, model: ResidentModel, inputs: Sequence[Inputs], budget: Budget) -> None:
        self._model = model
        self._inputs = inputs
        self._budget = budget
        self.layer = 0  # on which trials are made
        # Of all inputs the hidden states, (B, T, H), that enter a layer, None where they are not kept; and that layer.
        self._kept: list[Tensor | None] | None = None
        self._kept_layer = 0

    def restart(self) -> None:
        """Forget what is kept and go to layer 0. Needed after the embedding, or a layer before the present one,
        changed."""
        self.layer = 0
        self._kept = None

    def at_layer(self, layer: int) -> None:
        """Go to a layer: weights are tried for it, and those before it are taken as they are then."""
        self.layer = layer

    def let_go(self) -> None:
        """Free what is kept; it is computed anew when it is needed."""
        self._kept = None

    @torch.no_grad()
    def fill(self) -> list[Tensor | None]:
        """The hidden states that enter the present layer: moved on from an earlier one or, without any, made anew.

        While they are moved they are nobody's: where memory ends halfway, some would enter another layer than others.
        """
        kept = self._kept
        self._kept = None
        if kept is None or self._kept_layer > self.layer:
            kept = None  # the old ones go before there are new ones
            kept = self._entering_first()
            self._kept_layer = 0
        for layer in range(self._kept_layer, self.layer):
            for index, hidden in enumerate(kept):
                if hidden is not None:
                    run = run_on(hidden.to(self._model.device))
                    kept[index] = recorded(self._model, self._inputs[index](), layer, run).to(hidden.device)
        self._kept = kept
        self._kept_layer = self.layer
        return kept

    def _entering_first(self) -> list[Tensor | None]:
        """What enters the first layer: on the device, in the CPU's memory beside it, or None where neither has room."""
        kept = list[Tensor | None]()
        room = [self._budget.cache, self._budget.cache_beside]
        places = [self._model.device, torch.device("cpu")]
        for inputs in self._inputs:
            hidden = recorded(self._model, inputs(), 0, entering)
            chosen = [number for number in range(len(places)) if hidden.nbytes <= room[number]]
            if chosen:
                room[chosen[0]] -= hidden.nbytes
            kept.append(hidden.to(places[chosen[0]]) if chosen else None)
        return kept

    def trying(self, index: int, trials: Sequence[Trial]) -> dict[int, Forward]:
        """Layer forwards, of one input, that begin with the hidden states at the present layer, computed where they are
        not kept, and try each trial's weights on them."""
        hidden = self.fill()[index]
        layer = self.layer
        if hidden is None:
            hidden = recorded(self._model, self._inputs[index](), layer, entering, first=layer)
        hidden = hidden.to(self._model.device)

        def stacked(forward: Forward, *args: Any, **kwargs: Any) -> Any:
            outputs: list[Tensor] = []
            for trial in trials:
                with trial():
                    outputs.append(first_of(call_on(hidden, forward, args, kwargs)))
            return in_form(self._model, layer, torch.cat(outputs))  # (R * B, T, H)

        return {**handing_on(self._model, range(layer)), layer: stacked}

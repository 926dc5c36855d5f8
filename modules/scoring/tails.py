"""Tail forwards: forwards that begin at one of a model's layers and try weights for it.

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

Trial = Callable[[], AbstractContextManager[None]]  # a context in which the model holds the trial's weights


class TailForwards:
    """Tail forwards of fixed inputs, in a model whose layers are searched from the first to the last."""

    def __init__(self, model: ResidentModel, inputs: Sequence[Inputs], budget: Budget) -> None:
        self._model = model
        self._inputs = inputs
        self._budget = budget
        self.layer = 0  # for which trials are made
        # For each input, the hidden states, (B, T, H), that enter a layer, None if not kept; and that layer.
        self._kept: list[Tensor | None] | None = None
        self._kept_layer = 0

    def restart(self) -> None:
        """Forget what is kept and go to layer 0. Needed after the embedding, or a layer before the present one,
        changed."""
        self.layer = 0
        self._kept = None

    def at_layer(self, layer: int) -> None:
        """Go to a layer: weights are tried for it, with the layers before it as they are at that time."""
        self.layer = layer

    def let_go(self) -> None:
        """Free the kept hidden states; they are computed anew when needed."""
        self._kept = None

    @torch.no_grad()
    def fill(self) -> list[Tensor | None]:
        """The hidden states that enter the present layer: run on from an earlier layer or, if none are kept, made anew.

        Meanwhile nothing is kept: if memory ran out halfway, some of them would enter another layer than the rest.
        """
        kept = self._kept
        self._kept = None
        if kept is None or self._kept_layer > self.layer:
            kept = None  # frees the old ones before new ones are made
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
        """The hidden states that enter the first layer: on the device, in CPU memory, or None if neither has room."""
        kept = list[Tensor | None]()
        free_bytes = [self._budget.cache, self._budget.cache_beside]
        devices = [self._model.device, torch.device("cpu")]
        for inputs in self._inputs:
            hidden = recorded(self._model, inputs(), 0, entering)
            fitting = [number for number in range(len(devices)) if hidden.nbytes <= free_bytes[number]]
            if fitting:
                free_bytes[fitting[0]] -= hidden.nbytes
            kept.append(hidden.to(devices[fitting[0]]) if fitting else None)
        return kept

    def trying(self, index: int, trials: Sequence[Trial]) -> dict[int, Forward]:
        """Layer forwards for one input that begin with the hidden states at the present layer and try each trial's
        weights on them. Hidden states that are not kept are computed."""
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

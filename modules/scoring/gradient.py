"""The gradient of the objective on a model's weights, one layer's or one block of the head's rows at a time.

Knows: forwards and their derivatives, hidden states between layers. Refuses to know: what a gradient is for, how
weights change meanwhile.

    begin        all layers run forward; the hidden states that enter them, or some of them, are kept
    head_block   blocks of the head's rows: the gradient on them, and their part of that on the last hidden states
    layer        from the last to the first: the layer runs again for the gradient on its own weights. These may change
                 as soon as the gradient is returned: nothing runs through that layer again
    front        embedding and position tables

Exact if layers take hidden states alone from other layers. Everything but the layers is the model's own forward.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modules.checkpoints.conversion import Tensors
from modules.scoring.budget import Budget
from modules.scoring.hidden_states import (
    Forward,
    call_on,
    entering,
    first_of,
    handing_on,
    in_form,
    logits_with,
    recorded,
)
from modules.scoring.objective import Objective, Penalty, Value

# A smaller gradient on a logit, relative to the largest, is set to 0: processors take ten times as long for tiny ones.
NOTHING = 1e-25
EMBEDDING = "embedding"  # key of its gradient until it gets its tensor's name


@dataclass(frozen=True)
class Outside:
    """Gradients on the tensors outside the layers, without the head."""

    dense: Tensors  # by name: final norm, position tables
    rows: Tensor  # the embedding's rows in `Objective.vocabulary`
    values: Tensor  # their gradients, (rows, H)


class GradientPass:
    """One pass over a model. Call the methods in the order of this class. Every gradient that they return is multiplied
    by `scale`, a power of two that keeps small values from underflowing in any type."""

    def __init__(self, objective: Objective, outside: bool = True) -> None:
        """outside: whether gradients on tensors outside the layers are wanted."""
        self._objective = objective
        self._model = objective.model
        self._wants_outside = outside
        tokens = sum(text.ids.numel() for text in objective.texts)
        self._hidden = ActivationCheckpoints(objective.budget, len(self._model.layers), tokens)
        self._shapes: list[torch.Size] = []  # of every text's hidden states
        self._upstream: list[Tensor] = []  # of every text, d objective / d hidden states, once the head is done
        self._dense: Tensors = {}
        zero = torch.zeros((), dtype=objective.dtype, device=self._model.device)
        self._divergences = {penalty.name: zero.clone() for penalty in objective.penalties}
        self.scale = 1.0

    @torch.no_grad()
    def begin(self) -> None:
        """Run all layers on all texts and score the pairs."""
        final = []
        for number, text in enumerate(self._objective.texts):
            last = self._run(number, len(self._model.layers), keep=True).to(self._model.device)
            self._shapes.append(last.shape)
            final.append(last[text.rows, text.columns])
        self._final = torch.cat(final) if final else torch.zeros(0, 1, device=self._model.device)  # (positions, H)
        self._final_gradient = torch.zeros_like(self._final, dtype=self._objective.dtype)
        self._normaliser, self._log_probabilities = self._objective.scored(self._final)
        self._pair_upstream = self._objective.upstream(self._log_probabilities)
        per_token = [penalty.per_token for penalty in self._objective.penalties]
        largest = max([0.0, *per_token, *self._pair_upstream.derivatives.abs().tolist()])
        self.scale = 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0

    # -- the head -----------------------------------------------------------------------------------------------------

    def head_block(self, first: int, end: int, base: Tensors | None = None, learn: bool = True) -> Tensors:
        """Gradients on the head's rows first..end-1, by their tensors' names in the header's part.

        Call it for every block of `Objective.blocks`. base: the same rows of the base's head, by the head's own names;
        None if the model still holds them. learn: if false, only the value is computed.
        """
        gradients: Tensors = {}
        for start, stop, penalty in self._chunks(end - first):
            self._add_chunk(gradients, start, stop, penalty, first, end, base, learn)
        names = self._model.head_names().values() if self._wants_outside else ()
        for name in gradients.keys() - set(names):
            _add(self._dense, name, gradients.pop(name))
        return gradients

    def value(self) -> Value:
        """This process's part of the objective, once all blocks are done."""
        divergences = {name: float(value) for name, value in self._divergences.items()}
        return self._objective.value(self._log_probabilities, divergences)

    def _chunks(self, rows: int) -> Iterator[tuple[int, int, Penalty | None]]:
        """Ranges of positions that are read at a time by so many rows, each with its penalty, None for pairs."""
        size = self._objective.chunk(rows)
        for begin, end, penalty in self._objective.ranges:
            for start in range(begin, end, size):
                yield start, min(start + size, end), penalty

    def _add_chunk(
        self,
        sums: Tensors,
        start: int,
        stop: int,
        penalty: Penalty | None,
        first: int,
        end: int,
        base: Tensors | None,
        learn: bool,
    ) -> None:
        """Add the part of positions start..stop-1 and rows first..end-1 to gradients and divergences.

        sums: gradients so far on the block's tensors, by name.
        """
        header = self._model.header().tensors
        outside = self._model.outside().tensors
        learned = {name: header[name] for name in self._model.head_names().values()} | outside
        learned = learned if self._wants_outside and learn else {}
        hidden = self._final[start:stop].detach().requires_grad_(learn)
        with _learning(learned.values()), self._model.head_rows(first, end):
            with torch.set_grad_enabled(learn):
                logits = self._objective.logits(hidden)
            with torch.no_grad():
                upstream = self.scale * self._on_logits(logits, start, penalty, first, base)
                upstream = torch.nn.functional.hardshrink(upstream, NOTHING)
            if not learn:
                return
            gradients = torch.autograd.grad(logits, [hidden, *learned.values()], upstream, allow_unused=True)
        self._final_gradient[start:stop] += gradients[0]
        for name, gradient in zip(learned, gradients[1:], strict=True):
            _add(sums, name, gradient)

    def _on_logits(
        self, logits: Tensor, start: int, penalty: Penalty | None, first: int, base: Tensors | None
    ) -> Tensor:
        """d objective / d logits of positions from `start` on, (positions, rows); adds to the penalty's divergence."""
        objective = self._objective
        stop = start + len(logits)
        if penalty is None:
            return self._pair_upstream.on_logits(logits, self._normaliser[start:stop], start, first)
        log_probabilities = logits - self._normaliser[start:stop, None]
        penalty_positions = slice(start - objective.pair_positions, stop - objective.pair_positions)
        base_head = nullcontext() if base is None else self._model.head_holding(base)
        with self._model.outside().holding(objective.outside), base_head:
            base_log_probabilities = (
                objective.logits(objective.base_states[penalty_positions].to(self._model.device))
                - objective.base_normaliser[penalty_positions, None]
            )
        base_probabilities = base_log_probabilities.exp()
        # A token of probability 0 in both adds nothing; its difference would be NaN.
        self._divergences[penalty.name] += torch.where(
            base_probabilities > 0, base_probabilities * (base_log_probabilities - log_probabilities), 0.0
        ).sum()
        return (log_probabilities.exp() - base_probabilities) * penalty.per_token

    # -- layers -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def layer(self, layer: int, wanted: bool = True) -> Tensors:
        """Gradients on a layer's tensors, by name, summed over texts; without tensors that nothing depends on.

        wanted: if false, the gradient passes through the layer and the result is empty.
        """
        self._take_to_texts()
        tensors = self._model.layer(layer).tensors if wanted else {}
        sums = dict[str, Tensor]()
        for number, text in enumerate(self._objective.texts):
            hidden = self._entered(layer, number)

            def run(forward: Forward, *args: Any, hidden: Tensor = hidden, **kwargs: Any) -> Tensor:
                with torch.enable_grad():
                    return first_of(call_on(hidden, forward, args, kwargs))

            with _learning([hidden, *tensors.values()]):
                output = recorded(self._model, text.arguments(), layer, run)
                upstream = self._upstream[number].to(output.device)
                gradients = [*torch.autograd.grad(output, [hidden, *tensors.values()], upstream, allow_unused=True)]
            self._upstream[number] = gradients[0]
            for name in reversed(tensors):
                _add(sums, name, gradients.pop())
            del output, gradients  # a layer's worth
        self._hidden.drop(layer)
        return sums

    def _take_to_texts(self) -> None:
        """Scatter the gradients on last hidden states, (positions, H), into the texts' shapes, (B, T, H)."""
        if self._upstream:
            return
        sizes = [len(text.rows) for text in self._objective.texts]
        for text, shape, text_gradient in zip(
            self._objective.texts, self._shapes, self._final_gradient.split(sizes), strict=True
        ):
            self._upstream.append(torch.zeros(shape, dtype=self._final.dtype, device=self._model.device))
            self._upstream[-1][text.rows, text.columns] = text_gradient.to(self._final.dtype)
        self._final_gradient = self._final = torch.zeros(0)  # not needed any more

    def _entered(self, layer: int, number: int) -> Tensor:
        """The hidden states of a text that enter a layer, (B, T, H), computed from the nearest ones kept before it."""
        start, hidden = self._hidden.last_before(layer, number)
        hidden = None if hidden is None else hidden.to(self._model.device)
        return (hidden if hidden is not None and start == layer else self._run(number, layer, start, hidden)).detach()

    def _run(self, number: int, end: int, start: int = 0, hidden: Tensor | None = None, keep: bool = False) -> Tensor:
        """The hidden states of a text that enter layer `end`, or leave the last one, (B, T, H).

        hidden: those that enter layer `start`; None starts from the embedding. keep: whether to keep those that enter
        the layers on the way.
        """
        arguments = self._objective.texts[number].arguments()
        last_output = list[Tensor]()
        if end == 0:
            return recorded(self._model, arguments, 0, entering)

        def run(layer: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            entered = hidden if layer == start and hidden is not None else entering(forward, *args, **kwargs)
            if keep:
                self._hidden.keep(layer, number, entered)
            output = call_on(entered, forward, args, kwargs)
            last_output[:] = [first_of(output)]
            return output

        passed_over = [layer for layer in range(len(self._model.layers)) if not start <= layer < end]
        forwards = {layer: partial(run, layer) for layer in range(start, end)}
        logits_with(self._model, arguments, {**handing_on(self._model, passed_over), **forwards})
        return last_output[0]

    # -- before the layers --------------------------------------------------------------------------------------------

    def front(self) -> Outside:
        """Gradients on the tensors outside the layers, without the head's blocks."""
        embedding = self._model.module.get_input_embeddings()
        outside = self._model.outside().tensors
        rows = self._objective.vocabulary
        sums = dict[str, Tensor]()
        with _only_rows(embedding, rows.to(self._model.device)), _learning([embedding.weight, *outside.values()]):
            learned = {EMBEDDING: embedding.weight, **outside}
            for text, upstream in zip(self._objective.texts, self._upstream, strict=True):
                entered = self._at_entrance(text.arguments())
                gradients = torch.autograd.grad(
                    entered, [*learned.values()], upstream.to(entered.device), allow_unused=True
                )
                for name, gradient in zip(learned, gradients, strict=True):
                    _add(sums if name == EMBEDDING else self._dense, name, gradient)
            return Outside(self._dense, rows, sums.get(EMBEDDING, torch.zeros_like(embedding.weight.data)))

    def _at_entrance(self, arguments: dict[str, Tensor]) -> Tensor:
        """The hidden states that enter the first layer, (B, T, H), with their graph for autograd."""
        entered_states: list[Tensor] = []

        def capture(forward: Forward, *args: Any, **kwargs: Any) -> Any:
            entered_states.append(entering(forward, *args, **kwargs))
            return in_form(self._model, 0, entered_states[0].detach())

        passed_over = range(1, len(self._model.layers))
        with torch.enable_grad():
            logits_with(self._model, arguments, {**handing_on(self._model, passed_over), 0: capture})
        return entered_states[0]


class ActivationCheckpoints:
    """The hidden states of all texts that enter the layers: every layer or, if memory is short, every second, third,
    ...; on the device, or in the CPU's memory."""

    def __init__(self, budget: Budget, layers: int, tokens: int) -> None:
        """tokens: of all texts."""
        self._budget = budget
        self._layers = layers
        self._tokens = tokens
        self._devices: dict[int, torch.device] | None = None  # by layer, for layers whose hidden states are kept
        self._kept: dict[tuple[int, int], Tensor] = {}  # by layer and text

    def keep(self, layer: int, text: int, hidden: Tensor) -> None:
        """Keep the hidden states of a text that enter a layer, (B, T, H), if that layer is planned."""
        if self._devices is None:
            self._devices = self._planned(hidden[0, 0].nbytes * self._tokens, hidden.device)
        if layer in self._devices:
            target = self._devices[layer]
            self._kept[layer, text] = hidden.detach() if target == hidden.device else hidden.to(target)

    def _planned(self, bytes_each: int, device: torch.device) -> dict[int, torch.device]:
        """The layers to keep, with their devices. bytes_each: of all texts' hidden states at one layer."""
        on_device = self._budget.cache // max(1, bytes_each)
        kept_count = min(self._layers, on_device + self._budget.cache_beside // max(1, bytes_each))
        layers = range(0, self._layers, -(-self._layers // kept_count)) if kept_count else range(0)
        return {layer: device if index < on_device else torch.device("cpu") for index, layer in enumerate(layers)}

    def last_before(self, layer: int, text: int) -> tuple[int, Tensor | None]:
        """The last kept layer up to this one, and the text's hidden states that enter it; (0, None) if none is kept."""
        nearest = max(
            (kept_layer for kept_layer, kept_text in self._kept if kept_text == text and kept_layer <= layer),
            default=None,
        )
        return (0, None) if nearest is None else (nearest, self._kept[nearest, text])

    def drop(self, layer: int) -> None:
        """Free the hidden states that enter a layer."""
        self._kept = {key: hidden for key, hidden in self._kept.items() if key[0] != layer}


@contextmanager
def _learning(tensors: Iterable[Tensor]) -> Iterator[None]:
    """In the block, autograd records computations on these tensors."""
    tensors = list(tensors)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


@contextmanager
def _only_rows(embedding: nn.Module, rows: Tensor) -> Iterator[None]:
    """In the block, an embedding holds these rows alone, ascending, still looked up by token id. So its gradient is
    small."""
    all_rows = embedding.weight.data
    forward = embedding.forward
    instance_forward = embedding.__dict__.get("forward")
    padding = getattr(embedding, "padding_idx", None)
    try:
        # without padding_idx, the padding token's row has a gradient as well
        embedding.weight.data = all_rows[rows]
        embedding.padding_idx = None
        embedding.forward = lambda ids: forward(torch.searchsorted(rows, ids))
        yield
    finally:
        embedding.weight.data = all_rows
        embedding.padding_idx = padding
        embedding.__dict__.pop("forward", None)
        embedding.__dict__.update({} if instance_forward is None else {"forward": instance_forward})


def _add(sums: Tensors, name: str, gradient: Tensor | None) -> None:
    """Add a gradient to sums, in float32 or wider; not in place, since two gradients may be the same tensor."""
    if gradient is not None:
        wide = torch.promote_types(torch.float32, gradient.dtype)
        sums[name] = sums[name].to(wide) + gradient if name in sums else gradient

"""The gradient of the objective on a model's weights, one layer's or one block of the head's rows at a time.

Knows: forwards and their derivatives, hidden states between layers. Refuses to know: what a gradient is for, how
weights change meanwhile.

    begin        all layers forward; what enters each of them is kept, or what enters some of them
    head_block   blocks of the head's rows: their gradient, and what they add to that on the last hidden states
    layer        from the last to the first: the layer runs again, with gradient on its own weights, which may change
                 as soon as that is there: of layers behind it nothing is computed any more
    front        embedding and position tables

Exact where nothing reaches a layer but hidden states. Everything but the layers is the model's own forward.
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

NOTHING = 1e-25  # a smaller gradient on a logit, by the largest, is none: processors take ten times as long for such
EMBEDDING = "embedding"  # its gradient, before it is known by another name


@dataclass(frozen=True)
class Outside:
    """Gradients on what is outside the layers, but for the head's."""

    dense: Tensors  # by name: final norm, position tables
    rows: Tensor  # of the embedding, `Objective.vocabulary`
    values: Tensor  # their gradients, (rows, H)


class GradientPass:
    """One pass over a model. Its methods are called in the order of this class; every gradient that they return is
    multiplied with `scale`, a power of two by which no type loses what is small."""

    def __init__(self, objective: Objective, outside: bool = True) -> None:
        """outside: whether gradients on what is outside the layers are wanted."""
        self._of = objective
        self._model = objective.model
        self._wants_outside = outside
        tokens = sum(text.ids.numel() for text in objective.texts)
        self._hidden = ActivationCheckpoints(objective.budget, len(self._model.layers), tokens)
        self._shapes: list[torch.Size] = []  # of every text's hidden states
        self._upstream: list[Tensor] = []  # of every text, d objective / d hidden states, once the head is through
        self._dense: Tensors = {}
        zero = torch.zeros((), dtype=objective.dtype, device=self._model.device)
        self._divergences = {penalty.name: zero.clone() for penalty in objective.penalties}
        self.scale = 1.0

    @torch.no_grad()
    def begin(self) -> None:
        """Run all layers on all texts, and score the pairs."""
        final = []
        for number, text in enumerate(self._of.texts):
            last = self._run(number, len(self._model.layers), keep=True).to(self._model.device)
            self._shapes.append(last.shape)
            final.append(last[text.rows, text.columns])
        self._final = torch.cat(final) if final else torch.zeros(0, 1, device=self._model.device)  # (positions, H)
        self._final_gradient = torch.zeros_like(self._final, dtype=self._of.dtype)
        self._normaliser, self._log_probabilities = self._of.scored(self._final)
        self._asked = self._of.upstream(self._log_probabilities)
        per_token = [penalty.per_token for penalty in self._of.penalties]
        largest = max([0.0, *per_token, *self._asked.each.abs().tolist()])
        self.scale = 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0

    # -- the head -----------------------------------------------------------------------------------------------------

    def head_block(self, first: int, end: int, base: Tensors | None = None, learn: bool = True) -> Tensors:
        """Gradients on the head's rows first..end-1, by their tensors' names in the header's part.

        To be called for every block of `Objective.blocks`. base: the same rows as the base has them, by the head's own
        names; None: the model holds them. learn: if not, only the value is computed.
        """
        found: Tensors = {}
        for start, stop, penalty in self._chunks(end - first):
            self._add_chunk(found, start, stop, penalty, first, end, base, learn)
        names = self._model.head_names().values() if self._wants_outside else ()
        for name in found.keys() - set(names):
            _add(self._dense, name, found.pop(name))
        return found

    def value(self) -> Value:
        """This process's part of the objective, once all blocks are through."""
        divergences = {name: float(value) for name, value in self._divergences.items()}
        return self._of.value(self._log_probabilities, divergences)

    def _chunks(self, rows: int) -> Iterator[tuple[int, int, Penalty | None]]:
        """Ranges of positions at which so many rows are read at a time, each of one penalty or, None, of pairs."""
        size = self._of.chunk(rows)
        for begin, end, penalty in self._of.ranges:
            for start in range(begin, end, size):
                yield start, min(start + size, end), penalty

    def _add_chunk(
        self,
        found: Tensors,
        start: int,
        stop: int,
        penalty: Penalty | None,
        first: int,
        end: int,
        base: Tensors | None,
        learn: bool,
    ) -> None:
        """Of positions start..stop-1 and rows first..end-1: what they add to gradients and divergences."""
        header = self._model.header().tensors
        outside = self._model.outside().tensors
        own = {name: header[name] for name in self._model.head_names().values()} | outside
        own = own if self._wants_outside and learn else {}
        hidden = self._final[start:stop].detach().requires_grad_(learn)
        with _learning(own.values()), self._model.head_rows(first, end):
            with torch.set_grad_enabled(learn):
                logits = self._of.logits(hidden)
            with torch.no_grad():
                upstream = self.scale * self._on_logits(logits, start, penalty, first, base)
                upstream = torch.nn.functional.hardshrink(upstream, NOTHING)
            if not learn:
                return
            gradients = torch.autograd.grad(logits, [hidden, *own.values()], upstream, allow_unused=True)
        self._final_gradient[start:stop] += gradients[0]
        for name, gradient in zip(own, gradients[1:], strict=True):
            _add(found, name, gradient)

    def _on_logits(
        self, logits: Tensor, start: int, penalty: Penalty | None, first: int, base: Tensors | None
    ) -> Tensor:
        """d objective / d logits of positions from `start` on, (positions, rows); adds to the penalty's divergence."""
        of = self._of
        stop = start + len(logits)
        if penalty is None:
            return self._asked.on_logits(logits, self._normaliser[start:stop], start, first)
        now = logits - self._normaliser[start:stop, None]
        place = slice(start - of.asked, stop - of.asked)
        held = nullcontext() if base is None else self._model.head_holding(base)
        with self._model.outside().holding(of.outside), held:
            was = of.logits(of.before[place].to(self._model.device)) - of.base_normaliser[place, None]
        shares = was.exp()
        # A token that neither can say has no share; its difference is no number.
        self._divergences[penalty.name] += torch.where(shares > 0, shares * (was - now), 0.0).sum()
        return (now.exp() - shares) * penalty.per_token

    # -- layers -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def layer(self, layer: int, wanted: bool = True) -> Tensors:
        """Gradients on a layer's tensors, by name, summed over texts; those on which nothing depends are absent.

        wanted: if not, the layer is only gone through, and there are none.
        """
        self._take_to_texts()
        own = self._model.layer(layer).tensors if wanted else {}
        sums = dict[str, Tensor]()
        for number, text in enumerate(self._of.texts):
            hidden = self._entered(layer, number)

            def run(forward: Forward, *args: Any, hidden: Tensor = hidden, **kwargs: Any) -> Tensor:
                with torch.enable_grad():
                    return first_of(call_on(hidden, forward, args, kwargs))

            with _learning([hidden, *own.values()]):
                output = recorded(self._model, text.arguments(), layer, run)
                upstream = self._upstream[number].to(output.device)
                gradients = [*torch.autograd.grad(output, [hidden, *own.values()], upstream, allow_unused=True)]
            self._upstream[number] = gradients[0]
            for name in reversed(own):
                _add(sums, name, gradients.pop())
            del output, gradients  # a layer's worth
        self._hidden.drop(layer)
        return sums

    def _take_to_texts(self) -> None:
        """Bring the gradients on last hidden states, (positions, H), to their places in the texts, (B, T, H)."""
        if self._upstream:
            return
        sizes = [len(text.rows) for text in self._of.texts]
        for text, shape, part in zip(self._of.texts, self._shapes, self._final_gradient.split(sizes), strict=True):
            self._upstream.append(torch.zeros(shape, dtype=self._final.dtype, device=self._model.device))
            self._upstream[-1][text.rows, text.columns] = part.to(self._final.dtype)
        self._final_gradient = self._final = torch.zeros(0)  # not needed any more

    def _entered(self, layer: int, number: int) -> Tensor:
        """The hidden states of a text that enter a layer, (B, T, H), computed from the last that are kept before it."""
        start, hidden = self._hidden.last_before(layer, number)
        hidden = None if hidden is None else hidden.to(self._model.device)
        return (hidden if hidden is not None and start == layer else self._run(number, layer, start, hidden)).detach()

    def _run(self, number: int, end: int, start: int = 0, hidden: Tensor | None = None, keep: bool = False) -> Tensor:
        """The hidden states of a text that enter layer `end`, or leave the last one, (B, T, H). hidden: those that
        enter layer `start`, if it is not the text's beginning. keep: those that enter layers meanwhile."""
        arguments = self._of.texts[number].arguments()
        found = list[Tensor]()
        if end == 0:
            return recorded(self._model, arguments, 0, entering)

        def run(layer: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            entered = hidden if layer == start and hidden is not None else entering(forward, *args, **kwargs)
            if keep:
                self._hidden.keep(layer, number, entered)
            output = call_on(entered, forward, args, kwargs)
            found[:] = [first_of(output)]
            return output

        others = [layer for layer in range(len(self._model.layers)) if not start <= layer < end]
        forwards = {layer: partial(run, layer) for layer in range(start, end)}
        logits_with(self._model, arguments, {**handing_on(self._model, others), **forwards})
        return found[0]

    # -- before the layers --------------------------------------------------------------------------------------------

    def front(self) -> Outside:
        """Gradients on what is outside the layers; the head's blocks are not among them."""
        embedding = self._model.module.get_input_embeddings()
        outside = self._model.outside().tensors
        rows = self._of.vocabulary
        sums = dict[str, Tensor]()
        with _only_rows(embedding, rows.to(self._model.device)), _learning([embedding.weight, *outside.values()]):
            own = {EMBEDDING: embedding.weight, **outside}
            for text, upstream in zip(self._of.texts, self._upstream, strict=True):
                entered = self._at_entrance(text.arguments())
                gradients = torch.autograd.grad(
                    entered, [*own.values()], upstream.to(entered.device), allow_unused=True
                )
                for name, gradient in zip(own, gradients, strict=True):
                    _add(sums if name == EMBEDDING else self._dense, name, gradient)
            return Outside(self._dense, rows, sums.get(EMBEDDING, torch.zeros_like(embedding.weight.data)))

    def _at_entrance(self, arguments: dict[str, Tensor]) -> Tensor:
        """The hidden states that enter the first layer, (B, T, H), with the way that they came by."""
        found: list[Tensor] = []

        def capture(forward: Forward, *args: Any, **kwargs: Any) -> Any:
            found.append(entering(forward, *args, **kwargs))
            return in_form(self._model, 0, found[0].detach())

        others = range(1, len(self._model.layers))
        with torch.enable_grad():
            logits_with(self._model, arguments, {**handing_on(self._model, others), 0: capture})
        return found[0]


class ActivationCheckpoints:
    """The hidden states of all texts that enter the layers: of all of them or, where there is no room for that, of
    every second, third, ...; on the device, or in the CPU's memory beside it."""

    def __init__(self, budget: Budget, layers: int, tokens: int) -> None:
        """tokens: of all texts."""
        self._budget = budget
        self._layers = layers
        self._tokens = tokens
        self._places: dict[int, torch.device] | None = None  # of the layers whose hidden states are kept
        self._kept: dict[tuple[int, int], Tensor] = {}  # by layer and text

    def keep(self, layer: int, text: int, hidden: Tensor) -> None:
        """Of a text, what enters a layer: (B, T, H)."""
        if self._places is None:
            self._places = self._planned(hidden[0, 0].nbytes * self._tokens, hidden.device)
        if layer in self._places:
            place = self._places[layer]
            self._kept[layer, text] = hidden.detach() if place == hidden.device else hidden.to(place)

    def _planned(self, size: int, device: torch.device) -> dict[int, torch.device]:
        """size: bytes of what enters one layer."""
        here = self._budget.cache // max(1, size)
        room = min(self._layers, here + self._budget.cache_beside // max(1, size))
        layers = range(0, self._layers, -(-self._layers // room)) if room else range(0)
        return {layer: device if place < here else torch.device("cpu") for place, layer in enumerate(layers)}

    def last_before(self, layer: int, text: int) -> tuple[int, Tensor | None]:
        """The layer itself, or the last one before it, whose hidden states are kept, and these; (0, None) if none."""
        found = max((one for one, number in self._kept if number == text and one <= layer), default=None)
        return (0, None) if found is None else (found, self._kept[found, text])

    def drop(self, layer: int) -> None:
        """What enters a layer is not needed any more."""
        self._kept = {key: hidden for key, hidden in self._kept.items() if key[0] != layer}


@contextmanager
def _learning(tensors: Iterable[Tensor]) -> Iterator[None]:
    """What is computed in the block remembers how it came from these tensors."""
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
    """An embedding has no rows but these, ascending, and finds them by their old numbers: its gradient is as small."""
    whole = embedding.weight.data
    run = embedding.forward
    own = embedding.__dict__.get("forward")
    padding = getattr(embedding, "padding_idx", None)
    try:
        # the row that pads has a gradient as well
        embedding.weight.data = whole[rows]
        embedding.padding_idx = None
        embedding.forward = lambda ids: run(torch.searchsorted(rows, ids))
        yield
    finally:
        embedding.weight.data = whole
        embedding.padding_idx = padding
        embedding.__dict__.pop("forward", None)
        embedding.__dict__.update({} if own is None else {"forward": own})


def _add(sums: Tensors, name: str, gradient: Tensor | None) -> None:
    """Sums are made in float32 or wider, and not in place: two gradients may be one tensor."""
    if gradient is not None:
        wide = torch.promote_types(torch.float32, gradient.dtype)
        sums[name] = sums[name].to(wide) + gradient if name in sums else gradient

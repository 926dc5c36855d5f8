"""Hidden states between two layers: handed on, put in a layer's place.

Knows: how a layer is called and what it returns. Refuses to know: packs, scores, which layers are passed over.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modules.model.base_model import ResidentModel

# A layer's forward while a tail forward runs: the layer's own forward, then the arguments it was called with.
Forward = Callable[..., Any]

# Makes what the model's forward takes. Made anew each time: masks of all packs would take more than everything else.
Inputs = Callable[[], Mapping[str, Tensor]]


@contextmanager
def replaced_layers(layers: nn.ModuleList, forwards: Mapping[int, Forward]) -> Iterator[None]:
    """Some layers run another forward; it is given the layer's own one as its first argument."""
    before = {layer: layers[layer].__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layers[layer].forward = partial(forward, layers[layer].forward)
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                layers[layer].__dict__.pop("forward", None)
            else:
                layers[layer].forward = own


def call_on(hidden: Tensor, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a layer with other hidden states than it was given."""
    if args:
        return forward(hidden, *args[1:], **kwargs)
    return forward(**{**kwargs, "hidden_states": hidden})


def entering(_forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """In a layer's place, the hidden states that it is called with, (B, T, H)."""
    return args[0] if args else kwargs["hidden_states"]


def first_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def in_form(model: ResidentModel, layer: int, hidden: Tensor) -> Any:
    """Hidden states as this layer returns them."""
    more = model.tuples_returned.get(layer)
    return hidden if more is None else (hidden, *more)


def handing_on(model: ResidentModel, layers: Iterable[int]) -> dict[int, Forward]:
    """Layer forwards that hand on the hidden states that they are given."""

    def hand_on(layer: int, *call: Any, **kwargs: Any) -> Any:
        return in_form(model, layer, entering(*call, **kwargs))

    return {layer: partial(hand_on, layer) for layer in layers}


def ending_in(model: ResidentModel, hidden: Tensor) -> dict[int, Forward]:
    """Layer forwards that compute nothing, the last of which returns these hidden states, (B, T, H)."""
    last = len(model.layers) - 1
    return {**handing_on(model, range(last)), last: lambda *_call, **_kwargs: in_form(model, last, hidden)}


def run_on(hidden: Tensor) -> Forward:
    """A layer's own forward on other hidden states than it is given; what it makes of them, (B, T, H)."""

    def run(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        return first_of(call_on(hidden, forward, args, kwargs))

    return run


def logits_with(
    model: ResidentModel,
    arguments: Mapping[str, Tensor],
    forwards: Mapping[int, Forward],
    columns: Tensor | None = None,
) -> Tensor:
    """What the model's own forward makes of its arguments with some layers' forwards replaced, read at the given
    columns, at none if none are given: (B, columns, V)."""
    columns = torch.zeros(0, dtype=torch.long, device=model.device) if columns is None else columns
    with replaced_layers(model.layers, forwards):
        return model.logits({**arguments, "use_cache": False}, columns)


def logits_of(model: ResidentModel, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of last hidden states, (positions, H), with the rows that its head holds:
    (positions, rows). Each is a text of its own, so that no table of positions is too short."""
    states = hidden[:, None]
    # Any tokens that every block of the head has a row for; nothing comes of them.
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
    return logits_with(model, {"input_ids": ids}, ending_in(model, states), ids[0])[:, 0]


def last_states(model: ResidentModel, arguments: Mapping[str, Tensor], forwards: Mapping[int, Forward]) -> Tensor:
    """The last layer's hidden states, with some layers' forwards replaced: (B, T, H), or of a stack (R * B, T, H)."""
    last = len(model.layers) - 1
    others = {layer: forward for layer, forward in forwards.items() if layer != last}

    def compute(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        return first_of(forwards[last](forward, *args, **kwargs) if last in forwards else forward(*args, **kwargs))

    with replaced_layers(model.layers, others):
        return recorded(model, arguments, last, compute, first=last)


def recorded(
    model: ResidentModel, arguments: Mapping[str, Tensor], layer: int, compute: Forward, first: int = 0
) -> Tensor:
    """What `compute` returns in place of one layer's forward, (B, T, H); of the other layers only those before `first`
    run, the rest are passed over."""
    found: list[Tensor] = []

    def recording(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        found.append(compute(forward, *args, **kwargs))
        return in_form(model, layer, found[0])

    passed = handing_on(model, range(first, len(model.layers)))
    logits_with(model, arguments, {**passed, layer: recording})
    return found[0]


@torch.no_grad()
def streamed(
    model: ResidentModel, inputs: Sequence[Inputs], layers: Iterable[AbstractContextManager[None]]
) -> list[Tensor]:
    """The last hidden states of inputs, (B, T, H) each, by layers that have weights of their own while they run.

    layers: for each of the model's layers, in order, a context within which the model holds what it needs to run it.
    Exact where nothing reaches a layer but hidden states, as tail forwards are.
    """
    hidden: list[Tensor] = []
    for layer, held in enumerate(layers):
        with held:
            hidden = hidden or [recorded(model, arguments(), layer, entering) for arguments in inputs]
            for number, arguments in enumerate(inputs):
                hidden[number] = recorded(model, arguments(), layer, run_on(hidden[number]))
    return hidden

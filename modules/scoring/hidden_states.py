"""Hidden states between two layers: passed on, recorded, or put in place of a layer's output.

Knows: how a layer is called and what it returns. Refuses to know: packs, scores, which layers are passed over.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modules.model.base_model import ResidentModel

# A replacement for a layer's forward: it takes the layer's own forward, then the arguments of the call.
Forward = Callable[..., Any]

# Makes the arguments of the model's forward. Made anew each time: masks of all packs would take most of the memory.
Inputs = Callable[[], Mapping[str, Tensor]]


@contextmanager
def replaced_layers(layers: nn.ModuleList, forwards: Mapping[int, Forward]) -> Iterator[None]:
    """In the block, some layers run another forward, which takes the layer's own one as its first argument."""
    instance_forwards = {layer: layers[layer].__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layers[layer].forward = partial(forward, layers[layer].forward)
        yield
    finally:
        for layer, instance_forward in instance_forwards.items():
            if instance_forward is None:
                layers[layer].__dict__.pop("forward", None)
            else:
                layers[layer].forward = instance_forward


def call_on(hidden: Tensor, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a layer's forward with its arguments, but with other hidden states."""
    if args:
        return forward(hidden, *args[1:], **kwargs)
    return forward(**{**kwargs, "hidden_states": hidden})


def entering(_forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a layer's forward: the hidden states that the layer is called with, (B, T, H)."""
    return args[0] if args else kwargs["hidden_states"]


def first_of(output: Any) -> Tensor:
    """The hidden states in a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def in_form(model: ResidentModel, layer: int, hidden: Tensor) -> Any:
    """Hidden states in the form of this layer's output: alone, or first in a tuple."""
    rest = model.tuples_returned.get(layer)
    return hidden if rest is None else (hidden, *rest)


def handing_on(model: ResidentModel, layers: Iterable[int]) -> dict[int, Forward]:
    """Layer forwards that return the hidden states that they are called with."""

    def hand_on(layer: int, *call: Any, **kwargs: Any) -> Any:
        return in_form(model, layer, entering(*call, **kwargs))

    return {layer: partial(hand_on, layer) for layer in layers}


def ending_in(model: ResidentModel, hidden: Tensor) -> dict[int, Forward]:
    """Layer forwards that compute nothing, the last of which returns these hidden states, (B, T, H)."""
    last = len(model.layers) - 1
    return {**handing_on(model, range(last)), last: lambda *_call, **_kwargs: in_form(model, last, hidden)}


def run_on(hidden: Tensor) -> Forward:
    """A layer forward that runs the layer on these hidden states; it returns hidden states, (B, T, H)."""

    def run(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        return first_of(call_on(hidden, forward, args, kwargs))

    return run


def logits_with(
    model: ResidentModel,
    arguments: Mapping[str, Tensor],
    forwards: Mapping[int, Forward],
    columns: Tensor | None = None,
) -> Tensor:
    """The logits of the model's own forward with some layers' forwards replaced, at the given columns: (B, columns, V).
    Without columns, there are no logits."""
    columns = torch.zeros(0, dtype=torch.long, device=model.device) if columns is None else columns
    with replaced_layers(model.layers, forwards):
        return model.logits({**arguments, "use_cache": False}, columns)


def logits_of(model: ResidentModel, hidden: Tensor) -> Tensor:
    """The logits of last hidden states, (positions, H), by the model's own forward and the rows that its head holds:
    (positions, rows). Each position is a text of its own, so that no table of positions is too short."""
    states = hidden[:, None]
    # Any tokens that every block of the head has a row for; their hidden states are not used.
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
    return logits_with(model, {"input_ids": ids}, ending_in(model, states), ids[0])[:, 0]


def last_states(model: ResidentModel, arguments: Mapping[str, Tensor], forwards: Mapping[int, Forward]) -> Tensor:
    """The last layer's hidden states, with some layers' forwards replaced: (B, T, H), or of a stack (R * B, T, H)."""
    last = len(model.layers) - 1
    earlier_forwards = {layer: forward for layer, forward in forwards.items() if layer != last}

    def compute(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        return first_of(forwards[last](forward, *args, **kwargs) if last in forwards else forward(*args, **kwargs))

    with replaced_layers(model.layers, earlier_forwards):
        return recorded(model, arguments, last, compute, first=last)


def recorded(
    model: ResidentModel, arguments: Mapping[str, Tensor], layer: int, compute: Forward, first: int = 0
) -> Tensor:
    """What `compute` returns in place of one layer's forward, (B, T, H). Of the other layers, those before `first` run
    and the rest are passed over."""
    outputs: list[Tensor] = []

    def recording(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        outputs.append(compute(forward, *args, **kwargs))
        return in_form(model, layer, outputs[0])

    passed = handing_on(model, range(first, len(model.layers)))
    logits_with(model, arguments, {**passed, layer: recording})
    return outputs[0]


@torch.no_grad()
def streamed(
    model: ResidentModel, inputs: Sequence[Inputs], layers: Iterable[AbstractContextManager[None]]
) -> list[Tensor]:
    """The last hidden states of inputs, (B, T, H) each, by layers that get their weights one at a time.

    layers: for each of the model's layers, in order, a context in which the model holds that layer's weights. Exact, as
    tail forwards are, if layers take hidden states alone from other layers.
    """
    hidden: list[Tensor] = []
    for layer, layer_weights in enumerate(layers):
        with layer_weights:
            hidden = hidden or [recorded(model, arguments(), layer, entering) for arguments in inputs]
            for number, arguments in enumerate(inputs):
                hidden[number] = recorded(model, arguments(), layer, run_on(hidden[number]))
    return hidden

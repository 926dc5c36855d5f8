"""A candidate's part: read, merged with the base's, tried on the model.

Knows: methods, parts. Refuses to know: scores, strategies, the order of trials.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.conversion import Tensors
from modules.checkpoints.readers import Buffer, new_buffer
from modules.merging.methods import merge
from modules.model.part import Part


def read_part(candidate: Candidate, part: Part, buffer: Buffer = new_buffer) -> Tensors:
    """A candidate's tensors for a part of the base. buffer: what they are read into.

    Raises as `Part.adopt` and reading do.
    """
    return part.adopt(candidate.stream(part.tensors, buffer), candidate.name)


def read_outside(candidate: Candidate, part: Part) -> Tensors:
    """The same of the part outside layers and header; where the candidate has no such tensor, a copy of the base's."""
    conversion = candidate.conversion
    names = [
        name
        for name, own in part.tensors.items()
        if name in conversion and tuple(conversion.shape(name)) == tuple(own.shape)
    ]
    stored = candidate.read(names)
    return part.adopt(((name, stored.get(name, own.clone())) for name, own in part.tensors.items()), candidate.name)


def merged(
    part: Part, method: str, theirs: Tensors, ratio: float, out: Tensors, inexact: list[Tensor] | None = None
) -> Tensors:
    """A part merged with a candidate's tensors, in `out`, with the values that saving will keep.

    inexact: gets, of each tensor, how many of these values the type that is computed in does not have.
    """
    for name, ours in part.tensors.items():
        saved = part.saved_dtypes[name]
        # Rounded to what is saved first: one half type has bits that the other one lacks.
        both_half = saved != ours.dtype and saved.itemsize == ours.dtype.itemsize
        made = torch.empty_like(ours, dtype=saved) if both_half else out[name]
        tensors = ours, theirs[name], made
        if name.endswith("bias"):  # a vector, even where a stack of experts has one each
            tensors = tuple(tensor.flatten() for tensor in tensors)
        merge(method, *tensors[:2], ratio, name=name, input_axis=part.input_axes[name], out=tensors[2])
        if saved != ours.dtype:
            out[name].copy_(made.to(saved))
        if both_half and inexact is not None:
            inexact.append((out[name].to(saved) != made).sum())
    return out


@contextmanager
def trying(part: Part, method: str, theirs: Tensors, ratio: float, out: Tensors) -> Iterator[None]:
    """The model works with the merged part for a moment; the merge is made in `out`."""
    with part.holding(merged(part, method, theirs, ratio, out)):
        yield

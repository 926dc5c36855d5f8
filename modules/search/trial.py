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
    """A candidate's tensors for a part of the base. buffer: gives the memory that they are read into.

    Raises as `Part.adopt` and reading do.
    """
    return part.adopt(candidate.stream(part.tensors, buffer), candidate.name)


def read_outside(candidate: Candidate, part: Part) -> Tensors:
    """A candidate's tensors for the part outside layers and header; a copy of the base's where it has none that fits.

    Raises as `read_part`.
    """
    conversion = candidate.conversion
    names = [
        name
        for name, base_tensor in part.tensors.items()
        if name in conversion and tuple(conversion.shape(name)) == tuple(base_tensor.shape)
    ]
    candidate_tensors = candidate.read(names)
    return part.adopt(
        ((name, candidate_tensors.get(name, base_tensor.clone())) for name, base_tensor in part.tensors.items()),
        candidate.name,
    )


def merged(
    part: Part, method: str, candidate_tensors: Tensors, ratio: float, out: Tensors, inexact: list[Tensor] | None = None
) -> Tensors:
    """A part merged with a candidate's tensors, in `out`, with the values that saving will keep.

    inexact: a list that is given a count for each tensor: its values that the compute type cannot represent.
    """
    for name, base_tensor in part.tensors.items():
        saved_dtype = part.saved_dtypes[name]
        # Rounded to what is saved first: one half type has bits that the other one lacks.
        both_half = saved_dtype != base_tensor.dtype and saved_dtype.itemsize == base_tensor.dtype.itemsize
        rounded = torch.empty_like(base_tensor, dtype=saved_dtype) if both_half else out[name]
        tensors = base_tensor, candidate_tensors[name], rounded
        if name.endswith("bias"):  # a vector, also where each of several experts has one
            tensors = tuple(tensor.flatten() for tensor in tensors)
        merge(method, *tensors[:2], ratio, name=name, input_axis=part.input_axes[name], out=tensors[2])
        if saved_dtype != base_tensor.dtype:
            out[name].copy_(rounded.to(saved_dtype))
        if both_half and inexact is not None:
            inexact.append((out[name].to(saved_dtype) != rounded).sum())
    return out


@contextmanager
def trying(part: Part, method: str, candidate_tensors: Tensors, ratio: float, out: Tensors) -> Iterator[None]:
    """Within it, the model has the merged part; the merge is made in `out`."""
    with part.holding(merged(part, method, candidate_tensors, ratio, out)):
        yield

"""A candidate's part mixed with the base's: tried on the model, or installed for good.

Knows: methods, parts. Refuses to know: scores, strategies, the order of trials.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.conversion import Tensors
from modules.merging.methods import merge
from modules.model.base_model import ResidentModel
from modules.model.embeddings import HeaderSkipped, aligned_header
from modules.model.part import Part
from modules.runtime.errors import BrokenWeights, ConfigError
from modules.search.decision import Decision, Result


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


class Merger:
    """A model into which decisions are carried out, without any forward."""

    def __init__(self, model: ResidentModel, tokenizer: Any) -> None:
        """tokenizer: the model's, with which candidates' vocabularies are matched."""
        self.model, self.tokenizer = model, tokenizer
        self.repeated = 0  # decisions that were carried out again, of all candidates
        self.inexact = 0  # numbers of all merges so far that the type that is computed in does not have
        self._space: Tensors = {}  # where merges are made, one part's worth

    def repeat(self, candidate: Candidate, done: Sequence[Decision]) -> None:
        """Carry out decisions that were taken on a candidate.

        Raises ConfigError if the models are not such that they could have been taken, CheckpointError if a file can't
        be read.
        """
        try:
            for decision in done:
                if decision.ratio is not None:
                    part, theirs = self.in_memory(partial(self._found, candidate, decision.layer))
                    self._install(part, theirs, decision.method, decision.ratio)
                self.repeated += 1
        except (BrokenWeights, HeaderSkipped, IndexError) as error:
            raise ConfigError(f"what was decided on {candidate.name} can't be carried out: {error}") from None

    def _found(self, candidate: Candidate, layer: int | None) -> tuple[Part, Tensors]:
        """A part of the model, and the candidate's tensors for it."""
        if layer is None:
            theirs, _ = aligned_header(self.model, self.tokenizer, candidate)
            return self.model.header(), theirs
        part = self.model.layer(layer)
        return part, part.adopt(candidate.stream(part.tensors), candidate.name)

    def _install(self, part: Part, theirs: Tensors, method: str, ratio: float) -> None:
        """Merge for good. All that takes memory, and may be done again, comes before anything changes."""
        part.install(self.in_memory(partial(self._merged, part, theirs, method, ratio)))
        if part.tensors.keys() == self.model.header().tensors.keys():
            self.model.has_base_header = False

    def _merged(self, part: Part, theirs: Tensors, method: str, ratio: float) -> Tensors:
        """What a merge makes of the part's tensors for good."""
        inexact: list[Tensor] = []
        found = merged(part, method, theirs, ratio, self._room(part), inexact)
        part.changes_in(found)  # by which what is equal stays as it is, the sign of a zero included
        self.inexact += sum(int(count) for count in inexact)
        return found

    def _room(self, part: Part) -> Tensors:
        """Where the part is merged."""
        self._space = part.fitting(self._space)  # one that does not serve goes before there is a new one
        self._space = self._space or part.space()
        return self._space

    def in_memory(self, work: Callable[[], Result]) -> Result:
        """Do work that needs memory."""
        return work()

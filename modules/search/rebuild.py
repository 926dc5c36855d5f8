"""Merges that were decided on, carried out without a model in memory: tensor by tensor, from the sources' files to the
output's.

Knows: which merges a tensor takes part in and in which order, what of the base is copied. Refuses to know: recipes,
scores, how tensors are mixed.

    the base's file > own type to the one computed in > merge after merge, each rounded > the output's file

What comes out is what a search has scored, to the bit: the same functions merge, on one tensor instead of a layer's.
Tensors of the header, which is mixed element by element, come by ranges of their rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import copy_companions
from modules.checkpoints.conversion import Tensors
from modules.checkpoints.readers import TensorInfo
from modules.checkpoints.writing import NewWeights, written_name
from modules.model.base_model import ResidentModel, is_finite
from modules.model.embeddings import HeaderSkipped, matched_header
from modules.model.part import Part, row_ranges
from modules.runtime.errors import BrokenWeights, CheckpointError, ConfigError
from modules.search.decision import Decision
from modules.search.mixing import mixed_into
from modules.search.trial import merged, read_outside, read_part

ROOM = 4 << 20  # bytes of a range of rows, in float32

Theirs = Callable[[Part, int], Tensors]  # a part of the base and its first row -> a candidate's tensors for it
Step = Callable[[Part, int], Tensor]  # the same -> which of its tensors it has changed


class Rebuild:
    """A base, and what is to be merged into it."""

    def __init__(
        self, layout: ResidentModel, devices: Mapping[str, torch.device], tokenizer: Callable[[], Any]
    ) -> None:
        """layout: the base, without weights. devices: where each of its tensors is merged. tokenizer: loads the base's,
        if headers are to be matched."""
        self._layout = layout
        self._devices = devices
        self._load_tokenizer = tokenizer
        self._base = layout.as_candidate()
        self._header = layout.header()
        self._steps: dict[int, list[tuple[Part, Step]]] = {}  # by tensor

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load_tokenizer()

    # -- what is merged into a tensor ----------------------------------------------------------------------------------

    def repeat(self, candidate: Candidate, decisions: Iterable[Decision]) -> None:
        """Merge what was accepted of a candidate, behind what was noted before. Raises ConfigError if the models are
        not such that it could have been, CheckpointError if a file can't be read."""
        try:
            for decision in decisions:
                if decision.layer is None:
                    part = self._header
                    theirs = self._theirs_of_header(candidate)
                else:
                    part = self._layout.layer(decision.layer)
                    theirs = partial(_as_whole, read_part, candidate)
                self._note(part, partial(_merged, decision.method, decision.ratio, theirs))
        except (HeaderSkipped, IndexError) as error:
            raise ConfigError(f"the merges of {candidate.name} can't be repeated: {error}") from None

    def mix(self, candidates: Sequence[Candidate], weights: Sequence[Sequence[float]]) -> None:
        """Mix base and candidates. weights: a row for each layer and, perhaps, one for all else, with a weight for each
        candidate. Raises as `repeat`."""
        layers = len(self._layout.layers)
        if len(weights) not in (layers, layers + 1):
            raise ConfigError(f"the recipe has weights for {len(weights)} layers, but the base has {layers}")
        for number, row in enumerate(weights[:layers]):
            self._mix(self._layout.layer(number), row, [partial(_as_whole, read_part, one) for one in candidates])
        for row in weights[layers:]:
            self._mix(self._layout.outside(), row, [partial(_as_whole, read_outside, one) for one in candidates])
            matched = list[tuple[float, Theirs]]()
            for weight, candidate in zip(row, candidates, strict=True):
                if weight:
                    with suppress(HeaderSkipped):
                        matched.append((weight, self._theirs_of_header(candidate)))
            self._mix(self._header, *zip(*matched, strict=True))

    def _theirs_of_header(self, candidate: Candidate) -> Theirs:
        return matched_header(self._layout, self._tokenizer, candidate).adopted

    def _mix(self, part: Part, row: Sequence[float] = (), theirs: Sequence[Theirs] = ()) -> None:
        """Mix a part with the weights of a row. Tensors that two layers have in common are what the last makes them."""
        taken = [(weight, one) for weight, one in zip(row, theirs, strict=True) if weight]
        for tensor in part.tensors.values():
            self._steps.pop(id(tensor), None)
        if taken:
            self._note(part, partial(_mixed, taken))

    def _note(self, part: Part, step: Step) -> None:
        for name, tensor in part.tensors.items():
            self._steps.setdefault(id(tensor), []).append((replace(part, tensors={name: tensor}), step))

    def _steps_of(self, name: str) -> list[tuple[Part, Step]]:
        return self._steps.get(id(self._layout.tensors[name]), [])

    # -- tensor by tensor ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the model: weights in the base's own shards and names, and all that lies beside them.

        Raises ConfigError if weights are no numbers, CheckpointError if a file can't be read or written.
        """
        copy_companions(self._base.checkpoint, folder, self._layout.saved_dtype)
        weights = NewWeights(folder, self._stored)
        try:
            with torch.no_grad():
                for stored, names in self._base.conversion.groups:
                    for name, tensor, first in self._made(stored, names):
                        if names and not is_finite(tensor):
                            raise CheckpointError(
                                f"the merge has NaN or infinite values in {name}; no output was written"
                            )
                        weights.write(name, tensor, first)
        except BrokenWeights as error:
            raise ConfigError(f"the merge can't be written: {error}") from None
        weights.finish()

    @cached_property
    def _stored(self) -> dict[str, TensorInfo]:
        """All tensors of the output, as they are stored there."""
        saved = self._layout.saved_dtype
        return {
            name: replace(
                info,
                file=written_name(info.file),
                dtype=saved if saved and info.dtype.is_floating_point else info.dtype,
            )
            for name, info in self._base.checkpoint.tensors.items()
        }

    def _made(self, stored: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, Tensor, int]]:
        """The stored tensors that make these of the model together, or rows of one from a first one on, to be written.
        What no merge has changed, and what the model has no use for, comes from the base's file as it is."""
        base = self._base.checkpoint
        copied = [name for name in stored if not names or self._stored[name].dtype == base.tensors[name].dtype]
        is_changed = False
        if len(copied) < len(stored) or any(map(self._steps_of, names)):
            for first, own in self._arriving(names):
                is_changed |= self._merge(own, first)
                made = self._base.conversion.store(own, own)
                for name in stored:
                    yield name, made.pop(name).to("cpu", self._stored[name].dtype), first
        if not is_changed:
            for name, tensor in base.stream(copied):
                yield name, tensor, 0

    def _arriving(self, names: Sequence[str]) -> Iterator[tuple[int, Tensors]]:
        """The base's tensors on their device, in the type that is computed in, with the number of their first row."""
        part = self._layout.part_of(names)
        places = {
            name: torch.empty((), dtype=own.dtype, device=self._devices[name]) for name, own in part.tensors.items()
        }
        arriving = replace(part, tensors=places)
        (name, own) = next(iter(part.tensors.items()))
        in_header = any(own is one for one in self._header.tensors.values())
        if in_header and self._base.conversion.stored_alone(name):
            for first, end in row_ranges(own, ROOM):
                rows = self._base.rows(name, torch.arange(first, end))
                yield first, arriving.adopt([(name, rows)], self._base.name)
        else:
            yield 0, arriving.adopt(self._base.stream(names), self._base.name)

    def _merge(self, own: Tensors, first: int) -> bool:
        """Merge all that is to be merged into tensors, or their rows from the first on; whether it has changed any."""
        changed = []
        for name, tensor in own.items():
            for part, step in self._steps_of(name):
                (called,) = part.tensors
                changed.append(step(replace(part, tensors={called: tensor}), first))
        return any(bool(flags.any()) for flags in changed)


def _merged(method: str, ratio: float, theirs: Theirs, part: Part, first: int) -> Tensor:
    """A step of a greedy search."""
    found = merged(part, method, theirs(part, first), ratio, part.space())
    changed = part.changes_in(found)
    part.install(found)
    return changed


def _mixed(taken: Sequence[tuple[float, Theirs]], part: Part, first: int) -> Tensor:
    """The step of a joint search."""
    return mixed_into(part, dict(part.tensors), ((weight, theirs(part, first)) for weight, theirs in taken), exact=True)


def _as_whole(read: Callable[[Candidate, Part], Tensors], candidate: Candidate, part: Part, _first: int) -> Tensors:
    """A candidate's tensors for a part that does not come by ranges of rows."""
    return read(candidate, part)

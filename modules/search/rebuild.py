"""Merges that were decided on, carried out without a model in memory: tensor by tensor, from the sources' files to the
output's.

Knows: which merges a tensor takes part in and in which order, what of the base is copied. Refuses to know: recipes,
scores, how tensors are mixed.

    the base's file > stored type to compute type > merge after merge, each rounded > the output's file

The output equals the model that a search has scored, to the bit: the same functions merge, on one tensor instead of a
layer's. The header is mixed element by element, so its tensors come by ranges of their rows.
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

CandidateReader = Callable[[Part, int], Tensors]  # a part of the base, its first row -> a candidate's tensors for it
Step = Callable[[Part, int], Tensor]  # merges into a part; the same arguments -> which tensors it has changed


class Rebuild:
    """A base, and the merges that are to be made into it."""

    def __init__(
        self, layout: ResidentModel, devices: Mapping[str, torch.device], tokenizer: Callable[[], Any]
    ) -> None:
        """layout: the base, without weights. devices: where each of its tensors is merged. tokenizer: loads the base's
        tokenizer; called if headers are to be matched."""
        self._layout = layout
        self._devices = devices
        self._load_tokenizer = tokenizer
        self._base = layout.as_candidate()
        self._header = layout.header()
        self._steps: dict[int, list[tuple[Part, Step]]] = {}  # by the id of the base's tensor

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load_tokenizer()

    # -- the merges of each tensor -------------------------------------------------------------------------------------

    def repeat(self, candidate: Candidate, decisions: Iterable[Decision]) -> None:
        """Add the accepted merges of a candidate after those added before. Raises ConfigError if these models can't
        have led to the decisions, CheckpointError if a file can't be read."""
        try:
            for decision in decisions:
                if decision.layer is None:
                    part = self._header
                    reader = self._header_reader(candidate)
                else:
                    part = self._layout.layer(decision.layer)
                    reader = partial(_read_whole, read_part, candidate)
                self._add_step(part, partial(_merged, decision.method, decision.ratio, reader))
        except (HeaderSkipped, IndexError) as error:
            raise ConfigError(f"the merges of {candidate.name} can't be repeated: {error}") from None

    def mix(self, candidates: Sequence[Candidate], weights: Sequence[Sequence[float]]) -> None:
        """Mix base and candidates. weights: a row for each layer and, if mixed, one for all else; each has a weight
        for each candidate. Raises as `repeat`."""
        layers = len(self._layout.layers)
        if len(weights) not in (layers, layers + 1):
            raise ConfigError(f"the recipe has weights for {len(weights)} layers, but the base has {layers}")
        for number, row in enumerate(weights[:layers]):
            self._mix(
                self._layout.layer(number),
                row,
                [partial(_read_whole, read_part, candidate) for candidate in candidates],
            )
        for row in weights[layers:]:
            self._mix(
                self._layout.outside(), row, [partial(_read_whole, read_outside, candidate) for candidate in candidates]
            )
            matched = list[tuple[float, CandidateReader]]()
            for weight, candidate in zip(row, candidates, strict=True):
                if weight:
                    with suppress(HeaderSkipped):
                        matched.append((weight, self._header_reader(candidate)))
            self._mix(self._header, *zip(*matched, strict=True))

    def _header_reader(self, candidate: Candidate) -> CandidateReader:
        return matched_header(self._layout, self._tokenizer, candidate).adopted

    def _mix(self, part: Part, row: Sequence[float] = (), readers: Sequence[CandidateReader] = ()) -> None:
        """Mix a part with the weights of a row. A tensor that two layers share is mixed as the later one says."""
        weighted_readers = [(weight, reader) for weight, reader in zip(row, readers, strict=True) if weight]
        for tensor in part.tensors.values():
            self._steps.pop(id(tensor), None)
        if weighted_readers:
            self._add_step(part, partial(_mixed, weighted_readers))

    def _add_step(self, part: Part, step: Step) -> None:
        for name, tensor in part.tensors.items():
            self._steps.setdefault(id(tensor), []).append((replace(part, tensors={name: tensor}), step))

    def _steps_of(self, name: str) -> list[tuple[Part, Step]]:
        return self._steps.get(id(self._layout.tensors[name]), [])

    # -- tensor by tensor ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the model: weights in the base's shards and under its names, and the files that lie beside them.

        Raises ConfigError if a candidate's weights are NaN or infinite, CheckpointError if the merged ones are or a
        file can't be read or written.
        """
        copy_companions(self._base.checkpoint, folder, self._layout.saved_dtype)
        weights = NewWeights(folder, self._output_infos)
        try:
            with torch.no_grad():
                for stored_names, names in self._base.conversion.groups:
                    for name, tensor, first in self._output_tensors(stored_names, names):
                        if names and not is_finite(tensor):
                            raise CheckpointError(
                                f"the merge has NaN or infinite values in {name}; no output was written"
                            )
                        weights.write(name, tensor, first)
        except BrokenWeights as error:
            raise ConfigError(f"the merge can't be written: {error}") from None
        weights.finish()

    @cached_property
    def _output_infos(self) -> dict[str, TensorInfo]:
        """File, dtype and shape of all tensors of the output."""
        dtype = self._layout.saved_dtype
        return {
            name: replace(
                info,
                file=written_name(info.file),
                dtype=dtype if dtype and info.dtype.is_floating_point else info.dtype,
            )
            for name, info in self._base.checkpoint.tensors.items()
        }

    def _output_tensors(self, stored_names: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, Tensor, int]]:
        """The tensors to write for one group of a conversion: (stored name, tensor or some of its rows, first row).

        stored_names: the group's tensors in the files. names: those of the model that they make up; empty if the model
        does not use them. Unused and unchanged tensors come from the base's file as they are.
        """
        base = self._base.checkpoint
        copied = [
            name for name in stored_names if not names or self._output_infos[name].dtype == base.tensors[name].dtype
        ]
        is_changed = False
        if len(copied) < len(stored_names) or any(map(self._steps_of, names)):
            for first, tensors in self._base_tensors(names):
                is_changed |= self._merge(tensors, first)
                stored_tensors = self._base.conversion.store(tensors, tensors)
                for name in stored_names:
                    yield name, stored_tensors.pop(name).to("cpu", self._output_infos[name].dtype), first
        if not is_changed:
            for name, tensor in base.stream(copied):
                yield name, tensor, 0

    def _base_tensors(self, names: Sequence[str]) -> Iterator[tuple[int, Tensors]]:
        """The base's tensors, whole or by ranges of rows, on their device in the compute type: (first row, tensors)."""
        part = self._layout.part_of(names)
        placeholders = {
            name: torch.empty((), dtype=tensor.dtype, device=self._devices[name])
            for name, tensor in part.tensors.items()
        }
        arriving = replace(part, tensors=placeholders)
        (name, tensor) = next(iter(part.tensors.items()))
        in_header = any(tensor is header_tensor for header_tensor in self._header.tensors.values())
        if in_header and self._base.conversion.stored_alone(name):
            for first, end in row_ranges(tensor, ROOM):
                rows = self._base.rows(name, torch.arange(first, end))
                yield first, arriving.adopt([(name, rows)], self._base.name)
        else:
            yield 0, arriving.adopt(self._base.stream(names), self._base.name)

    def _merge(self, tensors: Tensors, first: int) -> bool:
        """Make all merges of these tensors, or of their rows from `first` on; whether any tensor has changed."""
        changed = []
        for name, tensor in tensors.items():
            for part, step in self._steps_of(name):
                (part_name,) = part.tensors
                changed.append(step(replace(part, tensors={part_name: tensor}), first))
        return any(bool(flags.any()) for flags in changed)


def _merged(method: str, ratio: float, reader: CandidateReader, part: Part, first: int) -> Tensor:
    """A step of a greedy search."""
    merged_tensors = merged(part, method, reader(part, first), ratio, part.space())
    changed = part.changes_in(merged_tensors)
    part.install(merged_tensors)
    return changed


def _mixed(weighted_readers: Sequence[tuple[float, CandidateReader]], part: Part, first: int) -> Tensor:
    """The step of a joint search."""
    return mixed_into(
        part, dict(part.tensors), ((weight, reader(part, first)) for weight, reader in weighted_readers), exact=True
    )


def _read_whole(read: Callable[[Candidate, Part], Tensors], candidate: Candidate, part: Part, _first: int) -> Tensors:
    """A candidate's tensors for a part that is not read by ranges of rows."""
    return read(candidate, part)

"""A recipe's merges carried out without a model in memory: tensor by tensor, from the sources' files to the output's.

Knows: which merges a tensor takes part in, in which order. Refuses to know: recipes, scores, how tensors are mixed.

    the base's file > own type to the one computed in > merge after merge, each rounded > the output's file

What comes out is what a search installs, to the bit: the same functions merge, on one tensor instead of a layer's.
Tensors of the header, which is mixed element by element, come by ranges of their rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints import Candidate, Checkpoint, Tensors
from modules.model import HeaderRows, HeaderSkipped, Part, ResidentModel, Saving, matched_header, row_ranges
from modules.runtime import BrokenWeights, ConfigError
from modules.search.decision import Decision
from modules.search.mixing import mixed_into
from modules.search.trial import merged
from modules.search.whole import outside_of

ROOM = 4 << 20  # bytes of a range of rows, in float32

Theirs = Callable[[Part, int], Tensors]  # a part of the base and its first row -> a candidate's tensors for it
Step = Callable[[Part, int], Tensor]  # the same -> which of its tensors it has changed


class Rebuild:
    """A base, and what is to be merged into it."""

    def __init__(self, layout: ResidentModel, device: torch.device, tokenizer: Callable[[], Any]) -> None:
        """layout: the base, without weights. tokenizer: loads the base's, if headers are to be matched."""
        self._layout, self._device, self._load_tokenizer = layout, device, tokenizer
        self._steps: dict[int, list[tuple[Part, Step]]] = {}  # by tensor
        self._header = layout.header()

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's files."""
        return self._layout.checkpoint

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load_tokenizer()

    def repeat(self, candidate: Candidate, decisions: Iterable[Decision]) -> None:
        """Merge what was decided on a candidate, behind what was noted before. Raises ConfigError if the models are not
        such that it could have been decided, CheckpointError if a file can't be read."""
        try:
            for decision in decisions:
                if decision.layer is None:
                    part, theirs = self._header, self._theirs_of_header(candidate)
                else:
                    part, theirs = self._layer(decision.layer), partial(_theirs, candidate)
                self._note(part, partial(_merged, decision.method, decision.ratio, theirs))
        except (HeaderSkipped, IndexError) as error:
            raise ConfigError(f"what was decided on {candidate.name} can't be carried out: {error}") from None

    def mix(self, candidates: Sequence[Candidate], shares: Sequence[Sequence[float]]) -> None:
        """Mix base and candidates. shares: a row for each layer and, perhaps, one for all else, with a share for each
        candidate. Raises as `repeat`."""
        layers = len(self._layout.layers)
        if len(shares) not in (layers, layers + 1):
            raise ConfigError(f"the shares can't be taken: they are of {len(shares)} layers, the base has {layers}")
        for number, row in enumerate(shares[:layers]):
            self._mix(self._layout.layer(number), row, [partial(_theirs, one) for one in candidates])
        for row in shares[layers:]:
            self._mix(self._layout.outside(), row, [partial(_theirs_outside, one) for one in candidates])
            matched = list[tuple[float, Theirs]]()
            for share, candidate in zip(row, candidates, strict=True):
                with suppress(HeaderSkipped):
                    matched.append((share, self._theirs_of_header(candidate)))
            self._mix(self._header, *zip(*matched, strict=True))

    def save(self, folder: Path) -> None:
        """Write the model. Raises ConfigError if weights are no numbers, CheckpointError if a file can't be read or
        written."""
        saving = self._layout.begin_saving(folder)
        try:
            with torch.no_grad():
                for stored, names in self._layout.groups:
                    self._save(saving, stored, names)
        except BrokenWeights as error:
            raise ConfigError(f"what was decided can't be carried out: {error}") from None
        saving.finish()

    # -- what is merged into a tensor ----------------------------------------------------------------------------------

    def _layer(self, number: int) -> Part:
        if number >= len(self._layout.layers):
            raise IndexError(f"the base has layers 0 to {len(self._layout.layers) - 1}, and no layer {number}")
        return self._layout.layer(number)

    def _theirs_of_header(self, candidate: Candidate) -> Theirs:
        return partial(_theirs_by_rows, matched_header(self._layout, self._tokenizer, candidate))

    def _mix(self, part: Part, row: Sequence[float] = (), theirs: Sequence[Theirs] = ()) -> None:
        """Mix a part with the shares of a row. Tensors that two layers have in common are what the last makes them."""
        taken = [(share, one) for share, one in zip(row, theirs, strict=True) if share]
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

    def _save(self, saving: Saving, stored: Sequence[str], names: Sequence[str]) -> None:
        """Write the stored tensors that make these of the model together."""
        copied, is_touched = saving.copied(stored, names), False
        if len(copied) < len(stored) or any(map(self._steps_of, names)):
            for first, own in self._base(names):
                is_touched |= self._merge(own, first)
                saving.write(stored, own, first)
        if not is_touched:
            saving.copy(copied)

    def _base(self, names: Sequence[str]) -> Iterator[tuple[int, Tensors]]:
        """The base's tensors on the device, in the type that is computed in, with the number of their first row."""
        base, part = self._layout.as_candidate(), self._layout.part_of(names)
        places = {name: torch.empty((), dtype=own.dtype, device=self._device) for name, own in part.tensors.items()}
        arriving, (name, own) = replace(part, tensors=places), next(iter(part.tensors.items()))
        in_header = any(own is one for one in self._header.tensors.values())
        if in_header and base.conversion.stored_alone(name):
            for first, end in row_ranges(own, ROOM):
                yield first, arriving.adopt([(name, base.rows(name, torch.arange(first, end)))], base.name)
        else:
            yield 0, arriving.adopt(base.stream(names), base.name)

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
    part.install(found, changed)
    return changed


def _mixed(taken: Sequence[tuple[float, Theirs]], part: Part, first: int) -> Tensor:
    """The step of a joint search."""
    return mixed_into(part, dict(part.tensors), ((share, theirs(part, first)) for share, theirs in taken), exact=True)


def _theirs(candidate: Candidate, part: Part, _first: int) -> Tensors:
    return part.adopt(candidate.stream(part.tensors), candidate.name)


def _theirs_outside(candidate: Candidate, part: Part, _first: int) -> Tensors:
    return outside_of(candidate, part)


def _theirs_by_rows(header: HeaderRows, part: Part, first: int) -> Tensors:
    read = (
        (name, header.read(name, torch.arange(first, first + len(own)), own.cpu)) for name, own in part.tensors.items()
    )
    return part.adopt(read, header.candidate.name)

"""A model mixed from the base and all candidates by weights, and the gradient on these weights.

Knows: the base's and the candidates' files, read side by side, a layer or a range of rows at a time. Refuses to know:
how weights follow from gradients, scores.

    W(a) = B + sum over j of a_j (C_j - B)      computed as (1 - sum a_j) B + sum a_j C_j
    d objective / d a_j = sum over tensors of <d objective / d W, C_j - B>

The model on the device holds the mix; B comes from the base's files again. Every layer has a row of weights, one for
each candidate, and another row is for all that is outside the layers. With a weight of 1 a tensor is the candidate's to
the last bit, with weights of 0 the base's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.conversion import Tensors
from modules.model.base_model import ResidentModel
from modules.model.embeddings import HeaderRows, HeaderSkipped, matched_header, own_header
from modules.model.part import Part, row_ranges
from modules.runtime.errors import BrokenWeights
from modules.scoring.gradient import GradientPass
from modules.scoring.objective import Objective, Value
from modules.search.prefetch import ReadAhead, two_memories
from modules.search.trial import read_outside

Row = Sequence[float]  # for each candidate its weight, or the gradient on that
Update = Callable[[int, Row], Row]  # row number, gradient on the row's weights -> its new weights
Arriving = ReadAhead[int, Tensors]


class Mix:
    """The resident model, with the base and the candidates that it is mixed from. Made while the model is the base."""

    def __init__(
        self,
        model: ResidentModel,
        tokenizer: Any,
        candidates: Sequence[Candidate],
        outside: bool = True,
        streams: Sequence[torch.Stream] = (),
        ahead: bool = True,
        layers: Sequence[int] | None = None,
    ) -> None:
        """tokenizer: the base's. outside: whether tensors outside the layers are mixed, too. streams: for the copies
        to the devices. ahead: whether a thread reads the next tensors in advance. layers: those that are mixed; None:
        all.

        Raises BrokenWeights if a tensor holds NaN or infinity, CheckpointError if a file can't be read.
        """
        self.model = model
        self.candidates = candidates
        self.mixes_outside = outside
        self.layers = tuple(range(len(model.layers))) if layers is None else tuple(layers)
        self.notes: list[str] = []  # about headers that are not simply matched row by row
        self._sources = [model.as_candidate(), *candidates]
        self._streams = streams
        self.ahead = ahead
        self._memories = two_memories(streams), two_memories(streams)  # for the base, and for candidates
        self._headers: list[HeaderRows | None] = []  # of the base and of each candidate; None: it can't be matched
        self._outside: list[Tensors] = []  # of the same, the small tensors in neither layer nor header
        if outside:
            self._headers = [own_header(model), *(self._header_of(tokenizer, candidate) for candidate in candidates)]
            self._outside = [read_outside(source, model.outside()) for source in self._sources]

    @property
    def rows(self) -> int:
        """Number of rows of weights: one for each layer and, if it is mixed, one for all else."""
        return len(self.model.layers) + int(self.mixes_outside)

    @property
    def moving(self) -> list[int]:
        """Numbers of the rows that are mixed. The others belong to layers that stay the base's; their weights are 0."""
        return [*self.layers, *range(len(self.model.layers), self.rows)]

    @property
    def is_restricted(self) -> bool:
        """Whether there are parts that are not mixed."""
        return len(self.moving) < len(self.model.layers) + 1

    def limited(self, weights: Sequence[Row]) -> tuple[tuple[float, ...], ...]:
        """The weights with those of rows that are not mixed set to 0."""
        return tuple(tuple(row) if number in self.moving else (0.0,) * len(row) for number, row in enumerate(weights))

    def header_weights(self, weights: Sequence[Row]) -> Row:
        """The header's weight for each candidate: 0 if its header can't be matched. Empty if no header is mixed."""
        row = weights[-1] if self.mixes_outside else ()
        return [weight if number in self._with_header else 0.0 for number, weight in enumerate(row, start=1)]

    @torch.no_grad()
    def compose(self, weights: Sequence[Row], exact: bool = False) -> None:
        """Make the model W(weights), whatever it was, in the compute type.

        weights: `rows` rows. exact: for good, with the values that saving will keep; a tensor without a weight is left
        as the base has it, and copied from the base's file when the model is saved. Raises as `Part.adopt` and reading
        do.
        """
        layers = self.layers
        jobs = [
            job for layer in layers for job in (self._layer_job(0, layer), *self._candidate_jobs(layer, weights[layer]))
        ]
        jobs += self._header_jobs(weights[-1]) if self.mixes_outside else []
        with self._reading(jobs) as arriving:
            for layer in layers:
                weighted_tensors = _weighted_arrivals(weights[layer], arriving, all_arrive=False)
                mixed_into(self.model.layer(layer), arriving.take_next(keep=True), weighted_tensors, exact)
            if self.mixes_outside:
                self._compose_outside(arriving, weights[-1], exact, all_arrive=False)

    @torch.no_grad()
    def value(self, objective: Objective) -> Value:
        """The objective of the model as it is; with several processes, this one's part."""
        gradient_pass = GradientPass(objective, outside=False)
        gradient_pass.begin()
        reads_base_head = self.mixes_outside and len(objective.base_states) > 0  # its head is not the model's
        jobs = [self._rows_job(0, self._head, *block) for block in objective.blocks if reads_base_head]
        with self._reading(jobs) as arriving:
            for block in objective.blocks:
                base_rows = self._by_head_names(arriving.take_next()) if reads_base_head else None
                gradient_pass.head_block(*block, base_rows, learn=False)
        return gradient_pass.value()

    @torch.no_grad()
    def descend(self, objective: Objective, update: Update) -> Value:
        """One pass over the model that updates the weights of every moving row: layers from last to first, then the
        rest. As soon as a row's gradient is there, `update` gives its new weights and its tensors are composed.

        Returns the objective before the pass; with several processes this one's part. `update` is given this process's
        part of the gradient, too. Raises as `compose`, and BrokenWeights if a gradient is NaN or infinite.
        """
        gradient_pass = GradientPass(objective, self.mixes_outside)
        gradient_pass.begin()
        with self._reading(self._descent_jobs(objective)) as arriving:
            outside = self._head_gradient(gradient_pass, objective, arriving)
            value = gradient_pass.value()
            for layer in reversed(range(self._lowest, len(self.model.layers))):
                if layer not in self.layers:
                    gradient_pass.layer(layer, wanted=False)
                    continue
                gradients = gradient_pass.layer(layer)
                base_tensors = arriving.take_next(keep=True)
                inner_products = [
                    _inner_product(gradients, base_tensors, arriving.take_next()) for _ in self.candidates
                ]
                del gradients
                weights = update(layer, self._fetched_gradients(inner_products, gradient_pass.scale))
                mixed_into(
                    self.model.layer(layer),
                    base_tensors,
                    _weighted_arrivals(weights, arriving, all_arrive=True),
                    exact=False,
                )
                del base_tensors
                arriving.release()
            if self.mixes_outside:
                self._add_front(gradient_pass, arriving, outside)
                weights = update(len(self.model.layers), self._fetched_gradients(outside, gradient_pass.scale))
                self._compose_outside(arriving, weights, exact=False, all_arrive=True)
        return value

    # -- reading, in the order of use ---------------------------------------------------------------------------------

    def _reading(self, jobs: Iterable[Callable[[], Tensors]]) -> Arriving:
        return ReadAhead(dict(enumerate(jobs)), self._streams, self.ahead)

    def _descent_jobs(self, objective: Objective) -> Iterator[Callable[[], Any]]:
        all_weights = [1.0] * len(self.candidates)
        if self.mixes_outside:
            for block in objective.blocks:
                yield from (self._rows_job(number, self._head, *block) for number in self._with_header)
        for layer in reversed(self.layers):
            yield self._layer_job(0, layer)
            yield from self._candidate_jobs(layer, all_weights)
            # Read twice: the new weights are known only in between. The system's memory still holds the files' pages.
            yield from self._candidate_jobs(layer, all_weights)
        if self.mixes_outside:
            rows = objective.vocabulary
            names = [self.model.embedding_name]
            yield from (partial(self._read_rows, number, names, rows) for number in self._with_header)
            yield from self._header_jobs(all_weights)

    @property
    def _lowest(self) -> int:
        """The layer with which a pass ends. The gradient reaches what comes before the layers through all of them."""
        return 0 if self.mixes_outside else self.layers[0]

    def _header_jobs(self, weights: Row) -> Iterator[Callable[[], Any]]:
        for name, tensor in self.model.header().tensors.items():
            for block in row_ranges(tensor):
                numbers = [number for number in self._with_header if number == 0 or weights[number - 1]]
                yield from (self._rows_job(number, [name], *block) for number in numbers)

    @property
    def _with_header(self) -> list[int]:
        """Numbers of the sources whose header can be read; the base is 0."""
        return [number for number, header in enumerate(self._headers) if header is not None]

    @property
    def _head(self) -> list[str]:
        return list(self.model.head_names().values())

    def _candidate_jobs(self, layer: int, weights: Row) -> list[Callable[[], Tensors]]:
        return [self._layer_job(number, layer) for number, weight in enumerate(weights, 1) if weight]

    def _layer_job(self, number: int, layer: int) -> Callable[[], Tensors]:
        memory = next(self._memories[min(number, 1)])
        return partial(memory.read, self._sources[number], self.model.layer(layer))

    def _rows_job(self, number: int, names: Sequence[str], first: int, end: int) -> Callable[[], Tensors]:
        return partial(self._read_rows, number, names, torch.arange(first, end))

    def _read_rows(self, number: int, names: Sequence[str], rows: Tensor) -> Tensors:
        """Some rows of a source's header in the base's order, (rows, ...) for each name, on the device."""
        part = self.model.header()
        header = self._headers[number]
        base = self._headers[0]
        part = replace(part, tensors={name: part.tensors[name] for name in names})
        read = ((name, header.read(name, rows, partial(base.read, name, rows))) for name in names)
        if not len(rows):
            return {name: part.tensors[name][:0] for name in names}
        return part.adopt(read, self._sources[number].name)

    def _header_of(self, tokenizer: Any, candidate: Candidate) -> HeaderRows | None:
        try:
            header = matched_header(self.model, tokenizer, candidate)
        except HeaderSkipped as error:
            self.notes.append(f"{error}; its embedding and LM head are not merged")
            return None
        self.notes += [header.note] if header.note else []
        return header

    # -- gradients on weights ------------------------------------------------------------------------------------------

    def _head_gradient(self, gradient_pass: GradientPass, objective: Objective, arriving: Arriving) -> list[Tensor]:
        """Take the head's blocks through a pass; returns the head's part of the gradient on each candidate's weight."""
        sums = [torch.zeros((), dtype=objective.dtype, device=self.model.device) for _ in self.candidates]
        for block in objective.blocks:
            base_rows = arriving.take_next(keep=True) if self.mixes_outside else None
            gradients = gradient_pass.head_block(*block, None if base_rows is None else self._by_head_names(base_rows))
            for number in self._with_header[1:]:
                sums[number - 1] += _inner_product(gradients, base_rows, arriving.take_next())
        return sums

    def _by_head_names(self, rows: Tensors) -> Tensors:
        return {short_name: rows[full_name] for short_name, full_name in self.model.head_names().items()}

    def _add_front(self, gradient_pass: GradientPass, arriving: Arriving, sums: list[Tensor]) -> None:
        """Add the gradient on each candidate's weight by the embedding, the final norm and position tables."""
        front_gradients = gradient_pass.front()
        base_rows = arriving.take_next(keep=True)
        gradients = dict.fromkeys(base_rows, front_gradients.values)
        for number in self._with_header[1:]:
            sums[number - 1] += _inner_product(gradients, base_rows, arriving.take_next())
        for number, candidate_tensors in enumerate(self._outside[1:]):
            sums[number] += _inner_product(front_gradients.dense, self._outside[0], candidate_tensors)

    def _fetched_gradients(self, sums: Sequence[Tensor], scale: float) -> list[float]:
        """A row of gradients on the host. This is the only wait for the device."""
        gradients = [value / scale for value in torch.stack(list(sums)).tolist()]
        for candidate, value in zip(self.candidates, gradients, strict=True):
            # Where another type may be taken, every process sees the overflow in the sum over all processes.
            if not math.isfinite(value) and not self.model.may_widen:
                raise BrokenWeights(f"{candidate.name}: the gradient of its weight is NaN or infinite")
        return gradients

    # -- the mix ------------------------------------------------------------------------------------------------------

    def _compose_outside(self, arriving: Arriving, weights: Row, exact: bool, all_arrive: bool) -> None:
        """Mix the tensors outside the layers: small ones whole, the header by ranges of its rows."""
        part = self.model.outside()
        header = self.model.header()
        self.model.has_base_header = not any(self.header_weights([weights]))
        mixed_into(part, self._outside[0], zip(weights, self._outside[1:], strict=True), exact)
        weights = [weights[number - 1] for number in self._with_header[1:]]
        for name, tensor in header.tensors.items():
            for first, end in row_ranges(tensor):
                rows = replace(header, tensors={name: tensor.data[first:end]})
                mixed_into(
                    rows, arriving.take_next(keep=True), _weighted_arrivals(weights, arriving, all_arrive), exact
                )


def _weighted_arrivals(weights: Row, arriving: Arriving, all_arrive: bool) -> Iterator[tuple[float, Tensors]]:
    """Each candidate's weight and tensors, for those with a weight. all_arrive: every candidate's tensors are read, if
    its weight is 0, too."""
    return ((weight, arriving.take_next()) for weight in weights if weight or all_arrive)


def mixed_into(part: Part, base: Tensors, weighted_tensors: Iterator[tuple[float, Tensors]], exact: bool) -> Tensor:
    """Make a part's tensors the mix of the base's and the candidates', each with its weight.

    Sums are in float32 or wider; they are rounded to the saved type if exact, else to the compute type. Returns, if
    exact, which tensors are not the base's: (tensors,), boolean; else nothing, (0,).
    """
    sums = {name: torch.zeros_like(tensor, dtype=_sum_dtype(tensor)) for name, tensor in base.items()}
    weights = []
    for weight, tensors in weighted_tensors:
        if weight:
            weights.append(weight)
            for name, tensor in sums.items():
                tensor.add_(tensors[name], alpha=weight)
    flags = []
    for name, model_tensor in part.tensors.items():
        mixed = base[name]
        if weights:
            mixed = sums[name].add_(base[name], alpha=1 - math.fsum(weights))
            mixed = mixed.to(part.saved_dtypes[name] if exact else model_tensor.dtype).to(model_tensor.dtype)
        if exact:
            differs = mixed != base[name]
            flags.append(differs.any())
            mixed = torch.where(differs, mixed, base[name])  # equal elements take the base's sign of zero
        model_tensor.data.copy_(mixed)
    return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool)


def _inner_product(gradients: Tensors, base_tensors: Tensors, candidate_tensors: Tensors) -> Tensor:
    """Sum of <gradient, candidate - base> over the tensors that have a gradient, in float32 or wider."""
    sample = next(iter(base_tensors.values()))
    product = torch.zeros((), dtype=_sum_dtype(sample), device=sample.device)
    for name, gradient in gradients.items():
        tensors = [
            tensor.view(-1, *tensor.shape[1:]) for tensor in (candidate_tensors[name], base_tensors[name], gradient)
        ]
        for first, end in row_ranges(tensors[0]):
            candidate_rows, base_rows, gradient_rows = (tensor[first:end].to(product.dtype) for tensor in tensors)
            product = product + torch.dot((candidate_rows - base_rows).flatten(), gradient_rows.flatten())
    return product


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)

"""A candidate taken whole, scored though only a layer of it is in memory at a time.

Knows: which tensors make a candidate, how they are read. Refuses to know: what the scores are compared with.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch

from modules.checkpoints import Candidate, Tensors
from modules.model import HeaderSkipped, Part, ResidentModel, aligned_header
from modules.scoring import Drift, DriftMeter, Scorer, of_pairs, streamed
from modules.search.prefetch import ReadAhead


@torch.no_grad()
def score_whole(
    model: ResidentModel,
    tokenizer: Any,
    candidate: Candidate,
    scorers: Sequence[Scorer],
    meters: Sequence[DriftMeter | None],
    streams: Sequence[torch.Stream] = (),
) -> tuple[list[list[float]], list[Drift | None]]:
    """Joint log-probabilities by each scorer, and the drift by each meter, of a model with every tensor that the
    candidate has: its header with its rows in the base's order, or the resident one where they can't be matched.

    tokenizer: the base's. Raises BrokenWeights if a tensor is no number, CheckpointError if a file can't be read,
    torch.OutOfMemoryError if there is no room.
    """
    outside, header = model.outside(), model.header()
    theirs = [(outside, outside_of(candidate, outside))]
    with suppress(HeaderSkipped):
        theirs.append((header, aligned_header(model, tokenizer, candidate)[0]))

    @contextmanager
    def held(*more: tuple[Part, dict[str, torch.Tensor]]) -> Iterator[None]:
        with ExitStack() as stack:
            for part, tensors in (*theirs, *more):
                stack.enter_context(part.holding(tensors))
            yield

    parts = {layer: model.layer(layer) for layer in range(len(model.layers))}
    measures = [one for one in (*scorers, *meters) if one]
    inputs = [inputs for one in measures for inputs in one.inputs]
    with ReadAhead(candidate, parts, None, streams) as ahead:

        def layers() -> Iterator[AbstractContextManager[None]]:
            for layer, part in parts.items():
                yield held((part, ahead.take(layer)))

        hidden = iter(streamed(model, inputs, layers()))
    with held():
        found = [scorer.score_on([next(hidden) for _ in scorer.inputs]) for scorer in scorers]
    scores = [of_pairs(one, scorer.encoded) for one, scorer in zip(found, scorers, strict=True)]
    same_header, drifts = len(theirs) == 1, list[Drift | None]()
    for meter in meters:
        states = [next(hidden) for _ in meter.inputs] if meter else []
        drifts.append(meter.measure_on(states, held, same_header)[0] if meter else None)
    return scores, drifts


def outside_of(candidate: Candidate, part: Part) -> Tensors:
    """A candidate's tensors outside layers and header, or copies of the base's own where it has none of their form.

    part: the base's. Raises as `Part.adopt` and reading do.
    """
    stored = candidate.read([name for name, own in part.tensors.items() if _has(candidate, name, own)])
    return part.adopt(((name, stored.get(name, own.clone())) for name, own in part.tensors.items()), candidate.name)


def _has(candidate: Candidate, name: str, own: torch.Tensor) -> bool:
    """Whether a candidate has a tensor in the base's form."""
    return name in candidate.conversion and tuple(candidate.conversion.shape(name)) == tuple(own.shape)

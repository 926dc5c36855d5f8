"""A candidate taken whole, scored though only a layer of it is in memory at a time.

Knows: which tensors make a candidate, how they are read. Refuses to know: what the scores are compared with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.conversion import Tensors
from modules.model.base_model import ResidentModel
from modules.model.embeddings import HeaderSkipped, untied_header
from modules.model.part import Part
from modules.model.settings import Settings
from modules.scoring.hidden_states import Inputs, streamed
from modules.scoring.scorer import Scorer, of_pairs
from modules.search.prefetch import ReadAhead, layer_jobs
from modules.search.trial import read_outside


class Measure:
    """Measures the resident model, and models that are read one layer at a time."""

    # What goes through the layers of a model that is read one at a time; none: no value of it is known.
    inputs: Sequence[Inputs] = ()

    def measure(self) -> dict[str, float]:
        """The values by now, by their columns' names. If one is no number, none of them counts."""
        raise NotImplementedError

    def measure_base(self) -> dict[str, float]:
        """The same, while the resident model is the base with which this was made."""
        return self.measure()

    def measure_on(
        self, hidden: Sequence[Tensor], held: Callable[[], AbstractContextManager[None]], same_header: bool
    ) -> dict[str, float]:
        """The values of a candidate.

        hidden: the last hidden states of each input, (B, T, H). held: within it, the resident model has the candidate's
        norm and head. same_header: whether these are the resident ones anyway.
        """
        raise NotImplementedError


@torch.no_grad()
def score_whole(
    model: ResidentModel,
    tokenizer: Any,
    candidate: Candidate,
    scorers: Sequence[Scorer],
    measures: Sequence[Measure],
    streams: Sequence[torch.Stream] = (),
    own: Settings | None = None,
) -> tuple[list[list[float]], list[Any]]:
    """Joint log-probabilities by each scorer, and what each measure finds, of a model with every tensor that the
    candidate has: its header with its rows in the base's order, or the resident one where they can't be matched.

    tokenizer: the base's. own: if it is scored as it is, not as a merge takes it: the settings that it computes by, and
    a head that is not its embedding though a tied base could not take over both. Raises BrokenWeights if a tensor is no
    number, CheckpointError if a file can't be read, torch.OutOfMemoryError if there is no room.
    """
    outside = model.outside()
    header = model.header()
    front = [(outside, read_outside(candidate, outside))]  # what is there while the layers run, and behind them
    end = front.copy()
    with suppress(HeaderSkipped):
        embedding, head = untied_header(model, tokenizer, candidate)
        front.append((header, embedding))
        end.append((header, embedding if own is None else head))

    @contextmanager
    def held(parts: Sequence[tuple[Part, Tensors]]) -> Iterator[None]:
        with ExitStack() as stack:
            if own:
                stack.enter_context(own.taken())
            for part, tensors in parts:
                stack.enter_context(part.holding(tensors))
            yield

    parts = {layer: model.layer(layer) for layer in range(len(model.layers))}
    inputs = [inputs for one in (*scorers, *measures) for inputs in one.inputs]
    with ReadAhead(layer_jobs(candidate, parts, streams), streams) as ahead:

        def layers() -> Iterator[AbstractContextManager[None]]:
            for layer, part in parts.items():
                yield held([*front, (part, ahead.take(layer))])

        hidden = iter(streamed(model, inputs, layers()))
    with held(end):
        scores = []
        for scorer in scorers:
            states = [next(hidden) for _ in scorer.inputs]
            scores.append(of_pairs(scorer.score_on(states), scorer.encoded))
    same_header = len(end) == 1
    values = []
    for measure in measures:
        states = [next(hidden) for _ in measure.inputs]
        values.append(measure.measure_on(states, partial(held, end), same_header))
    return scores, values

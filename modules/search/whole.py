"""A whole candidate scored, with only a layer of it in memory at a time.

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
    """A measure of the resident model, and of models that are read one layer at a time."""

    # Inputs that are run through a model read one layer at a time; empty: such a model can't be measured.
    inputs: Sequence[Inputs] = ()

    def measure(self) -> dict[str, float]:
        """The present values by their columns' names. If one is NaN or infinite, none of them counts."""
        raise NotImplementedError

    def measure_base(self) -> dict[str, float]:
        """The same while the resident model is the base that this was made with."""
        return self.measure()

    def measure_on(
        self, hidden: Sequence[Tensor], held: Callable[[], AbstractContextManager[None]], same_header: bool
    ) -> dict[str, float]:
        """The values of a candidate.

        hidden: the last hidden states of each input, (B, T, H). held: makes a context within which the resident model
        has the candidate's norm and head. same_header: whether the head is the resident one anyway.
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
    settings: Settings | None = None,
) -> tuple[list[list[float]], list[Any]]:
    """Joint log-probabilities by each scorer, and the values of each measure, of a model with all the candidate's
    tensors. Its header has its rows in the base's order; where they can't be matched the resident header is used.

    tokenizer: the base's. settings: None scores the candidate as a merge takes it; else it is scored as it is, by these
    settings and with its own head, even if a tied base could not take over both embedding and head. Raises
    BrokenWeights if a tensor holds NaN or infinity, CheckpointError if a file can't be read, torch.OutOfMemoryError if
    there is no room.
    """
    outside = model.outside()
    header = model.header()
    front = [
        (outside, read_outside(candidate, outside))
    ]  # tensors that are held while the layers run; `end`: after them
    end = front.copy()
    with suppress(HeaderSkipped):
        embedding, head = untied_header(model, tokenizer, candidate)
        front.append((header, embedding))
        end.append((header, embedding if settings is None else head))

    @contextmanager
    def held(parts: Sequence[tuple[Part, Tensors]]) -> Iterator[None]:
        with ExitStack() as stack:
            if settings:
                stack.enter_context(settings.taken())
            for part, tensors in parts:
                stack.enter_context(part.holding(tensors))
            yield

    parts = {layer: model.layer(layer) for layer in range(len(model.layers))}
    inputs = [inputs for source in (*scorers, *measures) for inputs in source.inputs]
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

"""Whether float16 is wide enough for a model: what it says of all that a run scores, beside what it says in bfloat16
with a float32 residual stream.

Knows: scorers, windows of neutral text, two arithmetics. Refuses to know: what is done where float16 is too narrow.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modules.model.arithmetic import FALLBACK
from modules.model.base_model import ResidentModel
from modules.scoring.drift import DriftMeter, Passage
from modules.scoring.exactness import ROUNDING
from modules.scoring.hidden_states import last_states
from modules.scoring.scorer import Scorer

# How much further apart the two may be than the wide one's own rounding puts it: float16's error is an eighth of that.
MARGIN = 4.0


@torch.no_grad()
def check_float16(scorer: Scorer, passages: Sequence[Passage]) -> list[str]:
    """A line about how well float16 serves a model that computes in it because nobody asked for another type.

    Raises what `ResidentModel.too_narrow` says if it overflows on a phrase of this process or on neutral text, or says
    something else there than in FALLBACK. To be called while the model is the base. Of a model that computes in
    anything else, nothing is looked at.
    """
    model = scorer.model
    if model.arithmetic.name != "float16":
        return []
    apart = _check_phrases(model, scorer)
    if not model.may_widen:
        return []
    if passages:
        _check_text(model, passages)
    return [f"Computing in float16: phrase scores differ by {apart:.2g} nats per token from {FALLBACK.name}"]


def _check_phrases(model: ResidentModel, scorer: Scorer) -> float:
    """How far phrases are apart in both arithmetics, root mean square in nats a token."""
    scores = scorer.token_scores()
    for item, row in zip(scorer.encoded, scores, strict=True):
        if not bool(row.isfinite().all()):
            raise model.no_numbers(f"the scores of {item.pair}")
    if not model.may_widen:
        return 0.0
    with model.computing_in(FALLBACK):
        wide = scorer.token_scores()
        with model.embeddings_moved():
            moved = scorer.token_scores()
    apart = _size(scores - wide)
    limit = MARGIN * max(_size(moved - wide), ROUNDING[FALLBACK.dtype])
    if not apart <= limit:
        raise model.too_narrow(f"phrase scores are off by {apart:.3g} nats per token")
    return apart


def _check_text(model: ResidentModel, passages: Sequence[Passage]) -> None:
    try:
        meter = DriftMeter(model, passages)
    except ValueError:  # of a head without numbers or, which others say, of a model whose drift can't be measured
        texts = [torch.tensor([passage.tokens], device=model.device) for passage in passages]
        _check_finite(model, [last_states(model, {"input_ids": text}, {}) for text in texts])
        return
    _check_finite(model, meter.before)
    with model.computing_in(FALLBACK):
        apart = meter.measure().divergence
        with model.embeddings_moved():
            own = meter.measure().divergence
    # A divergence grows with the square of what it comes from.
    limit = MARGIN**2 * max(own, ROUNDING[FALLBACK.dtype] ** 2)
    if not apart <= limit:
        raise model.too_narrow(f"scores of neutral text are off by {apart:.3g} nats per token")


def _check_finite(model: ResidentModel, hidden: Sequence[Tensor]) -> None:
    if not all(bool(states.isfinite().all()) for states in hidden):
        raise model.no_numbers("the scores of neutral text")


def _size(differences: Tensor) -> float:
    """Root mean square of differences between tokens' log-probabilities, (pairs, tokens); zeros stand for no token."""
    counted = differences[differences != 0]
    return math.sqrt(float(counted.double().square().mean())) if len(counted) else 0.0

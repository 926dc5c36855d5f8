"""Whether float16 is wide enough for a model: compares all scores of a run with those in bfloat16 with a float32
residual stream.

Knows: scorers, windows of neutral text, two arithmetics. Refuses to know: what is done if float16 is too narrow.
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

# Allowed difference, as a multiple of the wide arithmetic's own rounding: float16's error is an eighth of that.
MARGIN = 4.0


@torch.no_grad()
def check_float16(scorer: Scorer, passages: Sequence[Passage]) -> list[str]:
    """A line about the difference that float16 makes, for a model that computes in it because no type was asked for.

    Raises the error of `ResidentModel.too_narrow` if the model overflows on a phrase of this process or on neutral
    text, or if its scores there differ from those in FALLBACK. Call it while the model is the base. It does nothing for
    a model that computes in another type.
    """
    model = scorer.model
    if model.arithmetic.name != "float16":
        return []
    deviation = _check_phrases(model, scorer)
    if not model.may_widen:
        return []
    if passages:
        _check_text(model, passages)
    return [f"Computing in float16: phrase scores differ by {deviation:.2g} nats per token from {FALLBACK.name}"]


def _check_phrases(model: ResidentModel, scorer: Scorer) -> float:
    """The difference of phrase scores between both arithmetics, root mean square in nats per token."""
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
    deviation = _size(scores - wide)
    limit = MARGIN * max(_size(moved - wide), ROUNDING[FALLBACK.dtype])
    if not deviation <= limit:
        raise model.too_narrow(f"phrase scores are off by {deviation:.3g} nats per token")
    return deviation


def _check_text(model: ResidentModel, passages: Sequence[Passage]) -> None:
    try:
        meter = DriftMeter(model, passages)
    except (
        ValueError
    ):  # the head's logits are NaN; or drift can't be measured on this model, which is reported elsewhere
        texts = [torch.tensor([passage.tokens], device=model.device) for passage in passages]
        _check_finite(model, [last_states(model, {"input_ids": text}, {}) for text in texts])
        return
    _check_finite(model, meter.base_states)
    with model.computing_in(FALLBACK):
        divergence = meter.measure().divergence
        with model.embeddings_moved():
            rounding = meter.measure().divergence
    # A divergence grows with the square of the logits' differences.
    limit = MARGIN**2 * max(rounding, ROUNDING[FALLBACK.dtype] ** 2)
    if not divergence <= limit:
        raise model.too_narrow(f"scores of neutral text are off by {divergence:.3g} nats per token")


def _check_finite(model: ResidentModel, hidden: Sequence[Tensor]) -> None:
    if not all(bool(states.isfinite().all()) for states in hidden):
        raise model.no_numbers("the scores of neutral text")


def _size(differences: Tensor) -> float:
    """Root mean square of differences between tokens' log-probabilities, (pairs, tokens); zeros are padding."""
    counted = differences[differences != 0]
    return math.sqrt(float(counted.double().square().mean())) if len(counted) else 0.0

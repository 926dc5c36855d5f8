"""The fastest layout whose scores are those of plain forwards.

Knows: layouts, tolerances, how exactness is tested. Refuses to know: search, phrases' weights.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from modules.checkpoints.config_diff import layer_settings
from modules.model.base_model import ResidentModel
from modules.runtime.distributed import Rank
from modules.runtime.errors import ConfigError
from modules.runtime.oom import is_out_of_memory, retry_on_oom
from modules.scoring.budget import Budget
from modules.scoring.exactness import Plain
from modules.scoring.packing import LAYOUTS
from modules.scoring.scorer import DEFAULT, ONLY, Scorer, Trial, of_pairs
from modules.scoring.tokenization import Encoded, spread

# What an architecture raises if it does not support these inputs.
NOT_TAKEN = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError)

TRIED = 4  # pairs on which trials are compared with plain forwards: the shortest and the longest among them


def build_scorer(
    model: ResidentModel, encoded: Sequence[Encoded], budget: Budget = DEFAULT, tails: bool = True, rank: Rank = ONLY
) -> Scorer:
    """A scorer in the fastest layout that is exact for this model, with a budget halved until it fits into memory.

    tails: whether it will score trials; rank: see Scorer. Raises ConfigError if the model's scores are not finite or
    don't repeat, torch.OutOfMemoryError if not even one pair fits.
    """
    plain = Plain(model)
    stacked = True

    def build() -> Scorer:
        scorer = _exact_scorer(model, encoded, plain, budget, rank)
        if tails:
            scorer._stacked, scorer.has_tails = _exact_trials(scorer, plain, stacked)
        return scorer if rank.world_size == 1 else Scorer(model, encoded, *scorer.settings, rank)

    def take_less() -> bool:
        nonlocal budget, stacked
        can_shrink = stacked or budget.tokens > 1
        stacked = budget.tokens > 1
        budget = budget.halved()
        return can_shrink

    return retry_on_oom(build, take_less)


def score_once(model: ResidentModel, encoded: Sequence[Encoded]) -> tuple[Scorer, list[float]]:
    """The joint log-probabilities of pairs under a model that does not change, and the scorer.

    Raises ConfigError if any is NaN.
    """
    scorer = build_scorer(model, encoded, tails=False)
    log_probabilities = scorer.verified_scores
    if any(map(math.isnan, log_probabilities)):
        raise model.no_numbers()
    return scorer, of_pairs(log_probabilities, encoded)


def _exact_scorer(model: ResidentModel, encoded: Sequence[Encoded], plain: Plain, budget: Budget, rank: Rank) -> Scorer:
    """A scorer of all packs, of all processes, in the first layout whose scores are those of plain forwards."""
    longest = max(encoded, key=lambda item: len(item.tokens))
    plain.measure_rounding(longest, budget)
    # A 4-D mask is used as given: a forest would ignore the attention window.
    for layout in LAYOUTS if attention_window(model) >= len(longest.tokens) else LAYOUTS[1:]:
        shared = budget if rank.world_size == 1 else Scorer(model, encoded, layout, budget, rank=rank).budget
        scorer = Scorer(model, encoded, layout, shared, plain.tolerance)
        if is_taken(partial(_is_exact, scorer, plain)):
            return scorer
    check_numbers(model, list(plain.known), [float(scores.sum()) for scores in plain.known.values()])
    raise ConfigError(f"{type(model.module).__name__}: scoring the same text twice gives different results")


def _is_exact(scorer: Scorer, plain: Plain) -> bool:
    scores = scorer.token_scores()
    scorer.verified_scores = scores.sum(-1).tolist()
    return scorer.agrees(plain, scores)


def check_numbers(model: ResidentModel, encoded: Sequence[Encoded], log_probabilities: Sequence[float]) -> None:
    """Raise `no_numbers`'s error, with the phrase, if the base's scores of these pairs are not finite."""
    wrong = [(item, value) for item, value in zip(encoded, log_probabilities, strict=True) if not math.isfinite(value)]
    for item, value in wrong:
        if value != -math.inf or model.dtype == torch.float16:
            raise model.no_numbers(f"the scores of {item.pair}")
    if wrong:
        raise ConfigError(
            f"{model.checkpoint.path}: {len(wrong)} of {len(log_probabilities)} phrases have a probability of exactly "
            f"0 in {model.arithmetic.name}; remove phrases that the model can't say"
        )


def _exact_trials(scorer: Scorer, plain: Plain, stacked: bool) -> tuple[bool, bool]:
    """The first exact way to score trials, as (stacked, tails); whole forwards always are exact.

    It is tested on packs of few pairs, where layers take the same inputs. These pairs' plain scores are already known.
    """
    pairs = spread(scorer.compared(), TRIED)
    sample_scorer = Scorer(scorer.model, [scorer.encoded[pair] for pair in pairs], *scorer.settings)
    for stacks in (True, False) if stacked and scorer.stacks else (False,):
        sample_scorer._stacked = stacks
        sample_scorer.restart()
        if is_taken(partial(_tails_agree, sample_scorer, plain)):
            return stacks, True
    return False, False


def _tails_agree(scorer: Scorer, plain: Plain) -> bool:
    """Whether a trial without changes scores as plain forwards do, beside a trial that alters a layer.

    With trials at the first layer, all others run on several trials at once. With trials at the last layer, each
    layer before it has run alone, to move the cache: the scores agree if layers take hidden states alone from others.
    """
    if not scorer.agrees(plain, scorer.trial_token_scores([_altered(scorer), nullcontext])[1]):
        return False
    scorer.at_layer(len(scorer.model.layers) - 1)
    return scorer.agrees(plain, scorer.trial_token_scores([nullcontext, _altered(scorer)])[0])


def is_taken(agrees: Callable[[], bool]) -> bool:
    """Whether a way to score is exact; False if the architecture does not support it."""
    try:
        return agrees()
    except NOT_TAKEN as error:
        if is_out_of_memory(error):
            raise
        return False


def _altered(scorer: Scorer) -> Trial:
    """A trial of the scorer's present layer with other weights."""
    part = scorer.model.layer(scorer._layer)
    tensors = {name: tensor / 2 for name, tensor in part.tensors.items()}
    return lambda: part.holding(tensors)


def attention_window(model: ResidentModel) -> float:
    """The number of tokens that attention reaches back in this model."""
    windows = layer_settings(model.module.config, "sliding_window")
    return min((window for window in windows if window), default=float("inf"))

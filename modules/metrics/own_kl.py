"""KL to the base on the base's own answers: how much the model has changed in use.

Knows: that these answers are one of two texts on which drift is measured. Refuses to know: how answers are sampled, how
a divergence is computed.
"""

from modules.metrics.kl import Drifted, TrialKL, meter_or_warning
from modules.metrics.metric import Column, Context, Metric
from modules.scoring.drift import Drift

SHOWN = "own_kl"
IN_TRIALS = "trial_own_kl"


def _shown(drift: Drift) -> dict[str, float]:
    return {SHOWN: drift.divergence}


def prepare(context: Context) -> Drifted | None:
    """None without answers, or if this model's drift can't be measured."""
    meter = meter_or_warning(context, context.texts.own_answers, "Own answers")
    return Drifted(meter, _shown) if meter else None


def weigh(context: Context) -> TrialKL | None:
    """None if trials are not judged by drift, or there are no answers."""
    if not (context.config.is_guarded and context.texts.own_for_trials):
        return None
    return TrialKL(context, IN_TRIALS, context.texts.own_for_trials)


METRIC = Metric(
    columns=(
        Column(SHOWN, "KL on own answers"),
        Column(IN_TRIALS, "KL in trials, own answers", shown_as=SHOWN, limit_key="max_drift"),
    ),
    prepare=prepare,
    weigh=weigh,
)

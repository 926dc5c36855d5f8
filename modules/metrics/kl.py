"""KL to the base, top-1 agreement and perplexity on neutral text: how much everything else has changed. They are shown
on text that takes no part in the search. If drift_weight or max_drift is set, every trial is also measured, on other
text; the classes for drift in trials work on any text.

Knows: which figures of a drift are shown, tail forwards, several processes, the keys. Refuses to know: how a divergence
is computed, what is decided.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from modules.metrics.metric import Column, Context, Metric
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.oom import is_out_of_memory
from modules.runtime.text import pluralize
from modules.scoring.drift import Drift, DriftMeter, Passage, compared_tokens
from modules.scoring.hidden_states import last_states
from modules.scoring.layout import NOT_TAKEN
from modules.scoring.tails import TailForwards, Trial
from modules.search.strategies import total
from modules.search.whole import Measure

NAME = "trial_kl"
NATS = 0.05  # nats of KL that count as much as all phrases, if the weight is automatic


class Drifted(Measure):
    """Measures how far the model is from the base on some text."""

    def __init__(self, meter: DriftMeter, values: Callable[[Drift], dict[str, float]]) -> None:
        self._meter = meter
        self._values = values
        self.inputs = meter.inputs

    def measure(self) -> dict[str, float]:
        """See `Measure`."""
        return self._values(self._meter.model.in_range(self._meter.measure, lambda drift: drift.is_finite))

    def measure_base(self) -> dict[str, float]:
        """See `Measure`."""
        return self._values(self._meter.model.in_range(self._meter.measure_base, lambda drift: drift.is_finite))

    def measure_on(
        self, hidden: Sequence[Tensor], held: Callable[[], AbstractContextManager[None]], same_header: bool
    ) -> dict[str, float]:
        """See `Measure`."""
        (drift,) = self._meter.measure_on(hidden, held, same_header)
        return self._values(drift)


def _shown(drift: Drift) -> dict[str, float]:
    return {"kl": drift.divergence, "top1": drift.agreement, "perplexity": drift.perplexity}


def prepare(context: Context) -> Drifted | None:
    """None without neutral text, or if this model's drift can't be measured."""
    meter = meter_or_warning(context, context.texts.neutral, "Neutral text")
    return Drifted(meter, _shown) if meter else None


def meter_or_warning(context: Context, passages: Sequence[Passage], label: str) -> DriftMeter | None:
    """A meter of drift on passages; None without any, or with a warning if this model's drift can't be measured."""
    if not passages:
        return None
    try:
        meter = DriftMeter(context.model, passages)
    except NOT_TAKEN as error:
        context.console.warning(f"KL can't be measured on this model: {first_line(error)}")
        return None
    context.console.line(f"{label}: {pluralize(meter.tokens, 'token')}")
    return meter


def weigh(context: Context) -> "TrialKL | None":
    """The metric for trials on neutral text; None if neither key is set, or without such text if there is other text.

    Raises ConfigError if drift can't be measured on this model, or on these texts.
    """
    if not context.config.is_guarded:
        return None
    if not context.texts.neutral_for_trials:
        if context.texts.own_for_trials:
            return None
        raise ConfigError("neutral_texts: too little text for drift_weight and max_drift; add more")
    try:
        return TrialKL(context, NAME, context.texts.neutral_for_trials)
    except NOT_TAKEN as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise ConfigError(f"drift_weight, max_drift: drift can't be measured on this model ({reason})") from None


class TrialKL:
    """Mean KL(base, model) on some text, of the present model and under trials; see `search.WeighedMetric`.

    With several texts, each has an equal share of the weight per nat, and each must keep within the limit.
    """

    def __init__(self, context: Context, name: str, passages: Sequence[Passage]) -> None:
        """passages: the text, of which every process measures a part. Raises as DriftMeter does."""
        config = context.config
        rank = context.rank
        self.name = name
        self._model = context.model
        self._config = config
        self._texts = context.texts.for_trials
        self.limit = math.inf if config.max_drift is None else config.max_drift
        local_passages = passages[rank.number :: rank.world_size]
        self._meter = DriftMeter(context.model, local_passages, keeps_head=True) if local_passages else None
        self._share = compared_tokens(local_passages) / max(1, compared_tokens(passages))
        self._inputs = self._meter.inputs if self._meter else []
        self.tails = TailForwards(context.model, self._inputs, context.budget)
        is_joint = config.search == "joint"
        self.meter = self._meter
        if rank.world_size > 1:
            measures_whole = is_joint or (rank.is_main_process and config.baselines)
            self.meter = DriftMeter(context.model, passages, keeps_head=is_joint) if measures_whole else None
        self.whole = Drifted(self.meter, self._in_trials) if self.meter else None  # of candidates on their own

    def weight(self, base_scores: Sequence[float]) -> float:
        """What a nat on this text adds to the total."""
        weight = self._config.weight_of_drift
        total_weight = total([abs(value) for value in base_scores]) / NATS if weight == "auto" else weight
        return total_weight / len(self._texts)

    def describe(self, weight: float) -> dict[str, str]:
        """The lines about drift in a run's summary."""
        tokens = f"checked on {sum(map(compared_tokens, self._texts)):,} tokens in every trial"
        source = " (auto)" if self._config.weight_of_drift == "auto" else ""
        lines = {"KL penalty": f"{weight * len(self._texts):.5g} per nat{source}, {tokens}"} if weight else {}
        return lines | ({"KL limit": f"{self.limit:g} nats per token, {tokens}"} if self.limit < math.inf else {})

    def value(self) -> float:
        """This process's part of the present model's drift, by whole forwards."""
        return self._share * self._meter.measure().divergence if self._meter else 0.0

    @torch.no_grad()
    def under_trials(self, trials: Sequence[Trial], by_tails: bool) -> list[float]:
        """This process's part of the drift under each trial's weights for the present layer.

        by_tails: by tail forwards, otherwise by whole ones.
        Trials run one at a time: the masks of a batch of windows do not fit a stack of trials.
        """
        if self._meter is None:
            return [0.0] * len(trials)
        hidden = []
        for index, inputs in enumerate(self._inputs):
            states = []
            for trial in trials:
                if by_tails:
                    states.append(last_states(self._model, inputs(), self.tails.trying(index, [trial])))
                else:
                    with trial():
                        states.append(last_states(self._model, inputs(), {}))
            hidden.append(torch.cat(states))
        drifts = self._meter.measure_on(hidden, same_header=True, stack=len(trials))
        return [self._share * drift.divergence for drift in drifts]

    def _in_trials(self, drift: Drift) -> dict[str, float]:
        return {self.name: drift.divergence}

    @torch.no_grad()
    def under_header_trials(self, trials: Sequence[Trial]) -> list[float]:
        """This process's part of the drift under each trial's weights for the header, by whole forwards."""
        if self._meter is None:
            return [0.0] * len(trials)
        drifts = []
        for trial in trials:
            with trial():
                hidden = [last_states(self._model, inputs(), {}) for inputs in self._inputs]
            drifts += self._meter.measure_on(hidden, trial, same_header=True)
        return [self._share * drift.divergence for drift in drifts]


METRIC = Metric(
    columns=(
        Column("kl", "KL to base"),
        Column("top1", "Top-1 agreement", ".1%"),
        Column("perplexity", "Perplexity", ",.2f"),
        Column(NAME, "KL in trials", shown_as="kl", limit_key="max_drift"),
    ),
    prepare=prepare,
    weigh=weigh,
)

"""KL, top-1 agreement and perplexity on neutral text that takes no part in the search: how much all else has changed.

Knows: which figures of a drift are shown. Refuses to know: how a divergence is computed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from modules.metrics.kl_penalty import NAME, weigh
from modules.metrics.metric import Column, Context, Metric
from modules.runtime.errors import first_line
from modules.runtime.text import pluralize
from modules.scoring.drift import Drift, DriftMeter
from modules.scoring.layout import NOT_TAKEN
from modules.search.whole import Measure


class NeutralText(Measure):
    """How far the model is from the base, and how well it predicts neutral text."""

    def __init__(self, meter: DriftMeter) -> None:
        self._meter, self.inputs = meter, meter.inputs

    def measure(self) -> dict[str, float]:
        """See `Measure`."""
        drift = self._meter.model.in_range(self._meter.measure, lambda drift: drift.is_finite)
        return _values(drift)

    def measure_on(
        self, hidden: Sequence[Tensor], held: Callable[[], AbstractContextManager[None]], same_header: bool
    ) -> dict[str, float]:
        """See `Measure`."""
        (drift,) = self._meter.measure_on(hidden, held, same_header)
        return _values(drift)


def _values(drift: Drift) -> dict[str, float]:
    return {"kl": drift.divergence, "top1": drift.agreement, "perplexity": drift.perplexity}


def prepare(context: Context) -> NeutralText | None:
    """None without neutral text, or if this model's drift can't be measured: then a warning says so."""
    if not context.neutral:
        return None
    try:
        meter = DriftMeter(context.model, context.neutral)
    except NOT_TAKEN as error:
        context.console.warning(f"KL can't be measured on this model: {first_line(error)}")
        return None
    context.console.line(f"Neutral text: {pluralize(meter.tokens, 'token')}")
    return NeutralText(meter)


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

"""The totals of the searched pairs and of the held-out pairs.

Knows: how held-out pairs are scored and weighed. Refuses to know: how the search scores its pairs.
"""

import math
from collections.abc import Sequence

from modules.metrics.metric import Column, Context, Metric
from modules.runtime.oom import retry_on_oom
from modules.scoring.layout import build_scorer
from modules.scoring.scorer import Scorer, of_pairs
from modules.scoring.tokenization import doubtful_phrases, encode_pairs
from modules.search.search import signed_weights
from modules.search.strategies import scores, total
from modules.search.whole import Measure


class PhraseTotals(Measure):
    """Totals of the searched pairs, by the search's scores, and of the held-out ones, which are scored here."""

    def __init__(self, context: Context) -> None:
        """Raises ConfigError for pairs that the model can't take."""
        self._search = context.search
        self._console = context.console
        self._model = context.model
        self._auto_weights = context.config.auto_weights
        self.pairs = context.config.held_out_pairs
        self.weights: list[float] | None = (
            None  # of the held-out pairs, signed; set by the first model measured, the base
        )
        self.held_out: tuple[float, ...] = ()  # their joint log-probabilities, by the last measurement
        self._scorer: Scorer | None = None
        if self.pairs:
            self._console.warnings(doubtful_phrases(self.pairs))
            encoded = encode_pairs(context.tokenizer, self.pairs, self._model.vocabulary, self._model.max_tokens)
            self._scorer = build_scorer(self._model, encoded, context.budget, tails=False)

    def measure(self) -> dict[str, float]:
        """See `Measure`."""
        if self._scorer:
            log_probabilities = self._model.in_range(self._score, lambda values: all(map(math.isfinite, values)))
            self.held_out = tuple(of_pairs(log_probabilities, self._scorer.encoded))
        if self.weights is None:
            self.weights, warnings = signed_weights(self.pairs, self._auto_weights, self.held_out)
            self._console.warnings(warnings)
        return self.totals(self._search.log_probabilities, self.held_out)

    def totals(self, searched: Sequence[float], held_out: Sequence[float]) -> dict[str, float]:
        """A model's totals from joint log-probabilities."""
        values = {"total": total(scores(searched, self._search.weights))}
        if self.pairs:
            values["held_out"] = total(scores(held_out, self.weights))
        return values

    def scorers(self, singly: bool = False) -> list[Scorer]:
        """The scorers of the searched pairs and, if there are any, of the held-out ones, in this process alone. singly:
        one pair at a time, which is exact with any settings of a model."""
        all_scorers = [self._search.scorer.alone(), *([self._scorer] if self._scorer else [])]
        return [scorer.singly() for scorer in all_scorers] if singly else all_scorers

    def _score(self) -> list[float]:
        return retry_on_oom(self._scorer.score, lambda: self._scorer.take_less_memory() is not None)


METRIC = Metric(
    columns=(Column("total", "Total", ".3f"), Column("held_out", "Held out", ".3f")),
    prepare=PhraseTotals,
    every_step=True,
)

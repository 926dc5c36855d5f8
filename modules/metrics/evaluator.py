"""Evaluates models by all metrics: the base at the beginning, the merge at intervals, candidates on their own.

Knows: when they are measured, how long that takes. Refuses to know: what is measured, what is decided.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from modules.checkpoints.candidate import Candidate
from modules.metrics.metric import Context
from modules.metrics.phrases import PhraseTotals
from modules.metrics.registry import METRICS
from modules.model.settings import Settings
from modules.runtime.oom import is_out_of_memory, retry_on_oom
from modules.search.whole import score_whole

Scores = tuple[list[list[float]], list[dict[str, Any]]]  # scores by scorer and pair; values by measure and name


@dataclass(frozen=True)
class Evaluation:
    """The metrics and scores of one model."""

    metrics: dict[str, float]  # by name; without those that can't be measured, or are NaN or infinite
    searched: tuple[float, ...]  # joint log-probabilities of the searched pairs
    held_out: tuple[float, ...]  # joint log-probabilities of the held-out pairs


class Evaluator:
    """Measures all metrics. No decision depends on their values."""

    def __init__(self, context: Context) -> None:
        """Evaluate the base. context: with a search. Raises ConfigError for held-out pairs that don't fit the model."""
        self._search = context.search
        self._console = context.console
        self.seconds = 0.0
        with self._timed():
            self._console.timed("Evaluating the base")
            prepared = [(metric, metric.prepare(context)) for metric in METRICS if metric.prepare]
            self._measures = [measure for _, measure in prepared if measure is not None]
            self._step_measures = [measure for metric, measure in prepared if measure is not None and metric.every_step]
            (self.phrases,) = [measure for measure in self._measures if isinstance(measure, PhraseTotals)]
            self.start = self.now = self._evaluated([measure.measure_base() for measure in self._measures])

    def take_noted_scores(self) -> None:
        """Take the base's scores from the search, which continues from those of an earlier run."""
        searched = tuple(self._search.log_probabilities)
        totals = self.phrases.totals(searched, self.start.held_out)
        self.start = replace(self.start, searched=searched, metrics=self.start.metrics | _numbers(totals))

    def evaluate(self, what: str = "merge") -> Evaluation:
        """Evaluate the present model; the result is `now` from here on. what: the model's name in messages."""
        with self._timed():
            self._console.timed(f"Evaluating the {what}")
            self.now = self._evaluated([measure.measure() for measure in self._measures])
        return self.now

    def add(self, base_metrics: dict[str, float], present_metrics: dict[str, float]) -> None:
        """Add metrics of the base, and of the present model, that were measured elsewhere."""
        self.start = replace(self.start, metrics=self.start.metrics | base_metrics)
        self.now = replace(self.now, metrics=self.now.metrics | present_metrics)

    def evaluate_step(self) -> dict[str, float]:
        """The metrics that are measured before every step of a joint search."""
        metrics: dict[str, float] = {}
        with self._timed():
            for measure in self._step_measures:
                metrics |= _numbers(measure.measure())
        return metrics

    def evaluate_alone(self, candidate: Candidate, own_settings: Settings | None = None) -> Evaluation | None:
        """Evaluate a candidate on its own; None if memory is too short. own_settings: see `score_whole`.

        Raises BrokenWeights and CheckpointError as reading does.
        """
        search = self._search
        weighed = [metric.whole for metric in search.weighed if metric.whole]
        measures = [measure for measure in (*self._measures, *weighed) if measure.inputs]

        def score() -> Scores:
            scorers = self.phrases.scorers(singly=bool(own_settings and own_settings.values))
            return score_whole(
                search.model, search.tokenizer, candidate, scorers, measures, search.streams, own_settings
            )

        try:
            with self._timed():
                scores_and_values = retry_on_oom(lambda: search.model.in_range(score, _are_numbers))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        (searched, *other_scores), values = scores_and_values
        held_out = tuple(other_scores[0]) if other_scores else ()
        metrics = _numbers(self.phrases.totals(searched, held_out))
        for value in values:
            metrics |= _numbers(value)
        return Evaluation(metrics, tuple(searched), held_out)

    def _evaluated(self, measured: Sequence[dict[str, float]]) -> Evaluation:
        """The evaluation of the present model. measured: the values of each measure."""
        metrics: dict[str, float] = {}
        for values in measured:
            metrics |= _numbers(values)
        metrics |= self._search.metrics
        return Evaluation(metrics, tuple(self._search.log_probabilities), self.phrases.held_out)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began


def _numbers(values: dict[str, float]) -> dict[str, float]:
    """The values of a measure, or none if any is NaN or infinite: journals can't hold these."""
    return values if all(map(math.isfinite, values.values())) else {}


def _are_numbers(scores_and_values: Scores) -> bool:
    """Whether all scores and values of a model are finite."""
    scores, values = scores_and_values
    numbers = [number for row in scores for number in row]
    numbers += [number for row in values for number in row.values()]
    return all(map(math.isfinite, numbers))

"""What a metric is: values of a model by name, how tables show them, how they are measured.

Knows: what a metric may measure with. Refuses to know: which metrics there are, files, where a table goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.config.schema import Config
from modules.metrics.own_answers import NO_ANSWERS, Answers
from modules.metrics.texts import Texts
from modules.model.base_model import ResidentModel
from modules.runtime.console import Console
from modules.runtime.distributed import Rank
from modules.scoring.budget import Budget
from modules.search.search import Search, WeighedMetric
from modules.search.whole import Measure

WIDTH = 14  # characters of a value in a table


@dataclass(frozen=True)
class Column:
    """One value of a metric, and how it is shown."""

    name: str  # in journal, recipe and JSON
    label: str
    format: str = ".4f"
    # For a metric that trials are judged by: the same metric on texts without a part in the search, and the
    # configuration's key of its limit.
    shown_as: str = ""
    limit_key: str = ""

    def text(self, value: float | None) -> str:
        """A value as a table shows it; a huge one with few digits."""
        if value is None:
            return "-"
        text = format(value, self.format)
        return text if len(text) <= WIDTH else f"{value:.4g}"


@dataclass(frozen=True)
class Context:
    """What metrics need for their measurements. While they are prepared, the model is the base."""

    config: Config
    console: Console
    model: ResidentModel
    tokenizer: Any
    budget: Budget
    rank: Rank
    texts: Texts
    answers: Answers = NO_ANSWERS  # of the base
    search: Search | None = None  # None while the metrics that it weighs are prepared


@dataclass(frozen=True)
class Metric:
    """Values that are measured together, in one pass."""

    columns: tuple[Column, ...]
    # It returns None if the metric is not wanted, or can't be measured on this model. If it is None itself, the metric
    # is measured where models answer prompts.
    prepare: Callable[[Context], Measure | None] | None = None
    every_step: bool = False  # whether it is also measured before every step of a joint search
    weigh: Callable[[Context], WeighedMetric | None] | None = None  # makes the metric that judges trials, if configured

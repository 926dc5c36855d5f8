"""All metrics.

Knows: their order in tables. Refuses to know: what they measure.
"""

from collections.abc import Mapping

from modules.metrics.answers import METRIC as ANSWERS
from modules.metrics.kl import METRIC as KL
from modules.metrics.metric import Column, Metric
from modules.metrics.own_kl import METRIC as OWN_KL
from modules.metrics.phrases import METRIC as PHRASES

METRICS: list[Metric] = [PHRASES, KL, OWN_KL, ANSWERS]


def all_columns() -> list[Column]:
    """The columns of all metrics, in the order of tables."""
    return [column for metric in METRICS for column in metric.columns]


def columns_of(*values: Mapping[str, object]) -> list[Column]:
    """The columns of these values, by name, in the order of tables; an unknown one is shown by its name in plain
    digits."""
    names = dict.fromkeys(name for mapping in values for name in mapping)
    known = all_columns()
    unknown = names.keys() - {column.name for column in known}
    return [
        *(column for column in known if column.name in names),
        *(Column(name, name) for name in names if name in unknown),
    ]

"""A metric that the program has never heard of: in one object, and it is in journal, recipe, tables and card."""

import json

import pytest
from broken_runs import JOURNAL, RECIPE
from runs import log_of, make_models, merge

from modules.metrics import registry
from modules.metrics.metric import Column, Measure, Metric


class PositiveRows(Measure):
    """The share of the head's rows whose first weight is positive."""

    def __init__(self, context):
        self._model = context.model

    def measure(self):
        head = self._model.header().tensors[self._model.head_names()["weight"]]
        return {"positive": float((head[:, 0] > 0).double().mean())}


METRIC = Metric((Column("positive", "Positive rows", ".2%"),), PositiveRows)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def registered():
    registry.METRICS.append(METRIC)
    yield
    registry.METRICS.remove(METRIC)


@pytest.mark.usefixtures("registered")
def test_a_metric_is_one_object(place, models):
    assert merge(place, models, baselines=True) == 0
    recipe = json.loads((place / "out" / RECIPE).read_text(encoding="utf-8"))
    before, after = (recipe["metrics"][model]["positive"] for model in ("base", "merge"))
    assert 0.1 < before < 0.9 and before != after
    lines = map(json.loads, (place / "out" / JOURNAL).read_text(encoding="utf-8").splitlines())
    ends = [line for line in lines if line["kind"] == "candidate"]
    assert ends[-1]["metrics"]["positive"] == after and len(ends) == 2
    log = log_of(place)
    assert f"Positive rows {before:.2%} -> {after:.2%}\n" in log
    # A candidate that is read one layer at a time has no value of it.
    column = [line.strip("| ").split(" | ")[-1].strip() for line in log.splitlines() if line.startswith("| ")][-5:]
    assert column == ["Positive rows", f"{before:.2%}", "-", "-", f"{after:.2%}"]
    card = (place / "out/README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| Positive rows |"))
    # The best candidate, which is measured as little, has none.
    assert [cell.strip() for cell in row.strip("| ").split("|")] == [
        "Positive rows",
        f"{before:.2%}",
        "-",
        f"{after:.2%}",
    ]

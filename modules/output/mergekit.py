"""A recipe's merges as mergekit's configurations: linear, a slice for each layer, with a weight for every model.

Knows: mergekit's YAML, which decisions are weighted sums. Refuses to know: weights, how a decision was taken.

Every accepted merge was rounded before the next one on its layer. So there is a configuration for the first merge of
every layer, one for the second, and so on, each from what the one before has written. Shares are of one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from modules.output.recipe import Recipe
from modules.runtime.errors import ConfigError

DIGITS = 6  # of a weight, behind the point

Row = Sequence[float]  # a weight for each candidate; the base has what is left of 1

_HOW = {
    False: "mergekit-yaml THIS_FILE OUTPUT",
    True: "mergekit-multi THIS_FILE --out-path OUTPUT --intermediate-dir FOLDER",
}


@dataclass(frozen=True)
class Names:
    """What mergekit has to be told of models."""

    base: str  # a folder, or an id of the hub
    candidates: Mapping[int, str]  # by number, all that are needed
    layers: int
    layer: str  # what stands before a layer's number, in its tensors' names
    header: Sequence[str]  # its tensors
    dtype: str  # to be written

    @property
    def places(self) -> int:
        """How many rows of weights there are: the layers, the header, and what is neither."""
        return self.layers + 2


def mergekit_text(recipe: Recipe, names: Names) -> str:
    """A recipe as a file for mergekit. Raises ConfigError, naming the layers, for what is no weighted sum."""
    steps = list(_shares(recipe, names) if recipe.joint else _merges(recipe, names))
    documents, base = [], names.base
    for number, rows in enumerate(steps, start=1):
        document = _document(names, base, rows)
        if number < len(steps):
            base = f"step-{number}"
            document = {"name": base, **document}
        documents.append(document)
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"# {_HOW[len(documents) > 1]}\n{text}"


def about_digits(recipe: Recipe) -> list[str]:
    """A line if weights are written with fewer digits than the recipe has."""
    ratios = sorted({line.ratio for line in recipe.decisions if line.ratio is not None})
    longer = [f"{ratio:g}" for ratio in ratios if round(ratio, DIGITS) != ratio]
    return [f"ratios are written with {DIGITS} digits: {', '.join(longer)} lose some"] if longer else []


def check_sums(recipe: Recipe) -> None:
    """Raise ConfigError, naming the layers, if something was merged that is no weighted sum."""
    others: dict[str, list[str]] = {}
    for line in recipe.decisions:
        if line.ratio is not None and line.method != "lerp":
            place = "the header" if line.layer is None else f"layer {line.layer}"
            found = others.setdefault(line.method, [])
            found += [] if place in found else [place]
    if others:
        what = "; ".join(f"{method} on {', '.join(places)}" for method, places in others.items())
        raise ConfigError(f"only lerp and the shares of a joint search can be exported; this recipe has {what}")


def _shares(recipe: Recipe, names: Names) -> Iterator[list[Row]]:
    """The one step of a joint search."""
    columns = [column for column, source in enumerate(recipe.sources[1:]) if source.number in names.candidates]
    rows = [[row[column] for column in columns] for row in recipe.joint.shares]
    outside = rows[names.layers :] or [[0.0] * len(columns)]
    yield rows[: names.layers] + outside * 2


def _merges(recipe: Recipe, names: Names) -> Iterator[list[Row]]:
    """The first merge of every layer and of the header, then the second, and so on; one step, if there are none."""
    order = list(names.candidates)
    taken: list[list[Row]] = [[] for _ in range(names.places)]
    for line in recipe.decisions:
        if line.ratio is not None:
            place = names.layers if line.layer is None else line.layer
            taken[place].append([line.ratio * (number == line.candidate) for number in order])
    for step in range(max(1, *map(len, taken))):
        yield [rows[step] if step < len(rows) else [0.0] * len(order) for rows in taken]


def _document(names: Names, base: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One configuration: from a base, with those candidates of which it takes something."""
    rows = [[round(weight, DIGITS) for weight in row] for row in rows]
    used = [column for column in range(len(names.candidates)) if any(row[column] for row in rows)]
    weights = {base: [round(1.0 - math.fsum(row), DIGITS) for row in rows]}
    weights |= {list(names.candidates.values())[column]: [row[column] for row in rows] for column in used}
    return {
        "merge_method": "linear",
        "base_model": base,
        "dtype": "float32",
        "out_dtype": names.dtype,
        "parameters": {"normalize": False},
        "slices": [
            {
                "sources": [
                    {
                        "model": model,
                        "layer_range": [layer, layer + 1],
                        "parameters": {"weight": _weight(names, layer, column)},
                    }
                    for model, column in weights.items()
                ]
            }
            for layer in range(names.layers)
        ],
    }


def _weight(names: Names, layer: int, weights: Row) -> Any:
    """A model's weight in a slice. weights: in all places. To the first and the last slice belongs what is before and
    behind the layers, too: it is told apart by names."""
    own, header, outside = weights[layer], *weights[names.layers :]
    if layer not in (0, names.layers - 1) or own == header == outside:
        return own
    named = [{"filter": name, "value": header} for name in names.header]
    return [*named, {"filter": f"{names.layer}.{layer}.", "value": own}, {"value": outside}]

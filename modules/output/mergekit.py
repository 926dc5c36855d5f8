"""Writes a recipe's merges as mergekit's configurations: linear, a slice for each layer, with a weight for every model;
or task_arithmetic, which adds differences to the base, if the base's weight in a linear merge would be negative.

Knows: mergekit's YAML, which decisions are weighted sums. Refuses to know: weights, how a decision was taken.

Every accepted merge was rounded before the next one on its layer. So there is a configuration for the first merge of
every layer, one for the second, and so on. Each starts from the output of the previous one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from modules.output.recipe import Recipe
from modules.runtime.errors import ConfigError

EXACT = 1e-9  # by which a base's weight may be below 0, from rounding
DIGITS = 12  # of a weight, after the point: more than the largest dtype of a sum has; they make 1 - 0.7 be 0.3

Row = Sequence[float]  # a weight for each needed candidate; the base's weight is the rest of 1
Rows = Sequence[Row]  # for each layer, for the header, and for the rest


@dataclass(frozen=True)
class Names:
    """Names and numbers of the models that mergekit's file needs."""

    base: str  # a folder, or an id of the hub
    candidates: Mapping[int, str]  # the needed ones, by number
    layers: int  # their number
    layer: str  # the part before a layer's number in its tensors' names
    header: Sequence[str]  # its tensors
    dtype: str  # of the output


def check_sums(recipe: Recipe) -> None:
    """Raise ConfigError, naming the methods, if a merge is no weighted sum."""
    methods = {line.method for line in recipe.decisions if line.ratio is not None} - {"lerp"}
    if methods:
        raise ConfigError(f"only merge_method lerp and search: joint can be exported, not {', '.join(sorted(methods))}")


def mergekit_text(recipe: Recipe, names: Names) -> str:
    """A recipe as a file for mergekit. recipe: one that passes `check_sums`."""
    steps = [_joint_step(recipe, names)] if recipe.joint else _greedy_steps(recipe, names)
    documents = [_document(names, names.base, steps[0])]
    for number, rows in enumerate(steps[1:], start=1):
        documents[-1] = {"name": f"step-{number}", **documents[-1]}
        documents.append(_document(names, f"step-{number}", rows))
    command = "mergekit-yaml THIS_FILE OUTPUT"
    if len(documents) > 1:
        command = "mergekit-multi THIS_FILE --out-path OUTPUT --intermediate-dir FOLDER"
    return f"# {command}\n{yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, default_flow_style=None)}"


def _joint_step(recipe: Recipe, names: Names) -> Rows:
    rows = recipe.needed_weights
    outside_row = rows[names.layers] if len(rows) > names.layers else [0.0] * len(names.candidates)
    return [*rows[: names.layers], outside_row, outside_row]


def _greedy_steps(recipe: Recipe, names: Names) -> list[Rows]:
    """The rows of the first merge of every layer and of the header, then of the second, and so on; one step if there
    are no merges."""
    nothing = [0.0] * len(names.candidates)
    merges: list[list[Row]] = [[] for _ in range(names.layers + 2)]
    for line in recipe.decisions:
        if line.ratio is not None:
            part = names.layers if line.layer is None else line.layer
            merges[part].append([line.ratio if number == line.candidate else 0.0 for number in names.candidates])
    steps = []
    for step in range(max(1, *map(len, merges))):
        steps.append([rows[step] if step < len(rows) else nothing for rows in merges])
    return steps


def _document(names: Names, base: str, rows: Rows) -> dict[str, Any]:
    """One configuration: a base, and the candidates with a weight in it."""
    weights = {base: [1.0 - math.fsum(row) for row in rows]}
    is_linear = min(weights[base]) >= -EXACT
    for column, model in enumerate(names.candidates.values()):
        if any(row[column] for row in rows):
            weights[model] = [row[column] for row in rows]
    slices = []
    for layer in range(names.layers):
        sources = []
        for model, column in weights.items():
            source = {"model": model, "layer_range": [layer, layer + 1]}
            if is_linear or model != base:
                weight = _weight(names, layer, [round(value, DIGITS) for value in column])
                source["parameters"] = {"weight": weight}
            sources.append(source)
        slices.append({"sources": sources})
    return {
        "merge_method": "linear" if is_linear else "task_arithmetic",
        "base_model": base,
        "dtype": "float32",
        "out_dtype": names.dtype,
        "parameters": {"normalize": False},
        "slices": slices,
    }


def _weight(names: Names, layer: int, weights: Row) -> Any:
    """A model's weight in a slice. weights: in the layers, the header and the rest. The first and the last slice also
    contain the tensors before and after the layers: filters by name separate them."""
    *layers, header, outside_weight = weights
    if layer not in (0, names.layers - 1) or layers[layer] == header == outside_weight:
        return layers[layer]
    header_filters = [{"filter": name, "value": header} for name in names.header]
    return [*header_filters, {"filter": f"{names.layer}.{layer}.", "value": layers[layer]}, {"value": outside_weight}]

"""A recipe's merges as mergekit's configurations: linear, a slice for each layer, with a weight for every model; or
task_arithmetic, which adds differences to the base, where a linear merge would need less than nothing of the base.

Knows: mergekit's YAML, which decisions are weighted sums. Refuses to know: weights, how a decision was taken.

Every accepted merge was rounded before the next one on its layer. So there is a configuration for the first merge of
every layer, one for the second, and so on, each from what the one before has written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from modules.output.recipe import Recipe
from modules.runtime.errors import ConfigError

EXACT = 1e-9  # by which a base's weight may be below 0, from rounding
DIGITS = 12  # of a weight, behind the point: more than the largest type of a sum has, so that 1 - 0.7 is 0.3

Row = Sequence[float]  # a weight for each needed candidate; the base has what is left of 1
Rows = Sequence[Row]  # for each layer, for the header, and for what is neither


@dataclass(frozen=True)
class Names:
    """What mergekit has to be told of models."""

    base: str  # a folder, or an id of the hub
    candidates: Mapping[int, str]  # by number, all that are needed
    layers: int
    layer: str  # what stands before a layer's number, in its tensors' names
    header: Sequence[str]  # its tensors
    dtype: str  # to be written


def check_sums(recipe: Recipe) -> None:
    """Raise ConfigError, naming the methods, if something was merged that is no weighted sum."""
    methods = {line.method for line in recipe.decisions if line.ratio is not None} - {"lerp"}
    if methods:
        raise ConfigError(f"only merge_method lerp and search: joint can be exported, not {', '.join(sorted(methods))}")


def mergekit_text(recipe: Recipe, names: Names) -> str:
    """A recipe as a file for mergekit, for which `check_sums` has nothing to say."""
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
    outside = rows[names.layers] if len(rows) > names.layers else [0.0] * len(names.candidates)
    return [*rows[: names.layers], outside, outside]


def _greedy_steps(recipe: Recipe, names: Names) -> list[Rows]:
    """The first merge of every layer and of the header, then the second, and so on; one step, if there are none."""
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
    """One configuration: from a base, with those candidates of which it takes something."""
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
    """A model's weight in a slice. weights: in the layers, the header and the rest. To the first and the last slice
    belongs what is before and behind the layers, too: it is told apart by names."""
    *layers, header, outside = weights
    if layer not in (0, names.layers - 1) or layers[layer] == header == outside:
        return layers[layer]
    named = [{"filter": name, "value": header} for name in names.header]
    return [*named, {"filter": f"{names.layer}.{layer}.", "value": layers[layer]}, {"value": outside}]

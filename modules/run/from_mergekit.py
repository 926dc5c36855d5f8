"""Converts a mergekit configuration to one of ours: its models, and its weights, from which joint search starts.

Knows: mergekit's YAML for linear, task_arithmetic, ties and dare merges, where mergekit looks a parameter up.
Refuses to know: tensors, how a search goes on.

mergekit looks a parameter up in the source, its slice and the whole file, in this order, for each tensor by its name
(https://github.com/arcee-ai/mergekit#parameter-specification). A list of numbers is a gradient over the slice's layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modules.checkpoints.architecture import empty_module, find_layers, header_names
from modules.checkpoints.checkpoint import read_configuration
from modules.checkpoints.config_file import MOST_LAYERS
from modules.checkpoints.hub import find, local
from modules.config.fields import is_number
from modules.config.inputs import check_apart
from modules.config.locations import missing_folder, parse_location
from modules.config.schema import StartWeight
from modules.config.yaml_file import read_yaml, shown
from modules.output.text_files import check_file, write_text
from modules.runtime.console import say, visible
from modules.runtime.errors import ConfigError
from modules.runtime.text import listed, ranges
from modules.search.joint import start_of

METHODS = {"linear": "lerp", "task_arithmetic": "lerp", "ties": "ties", "dare_linear": "dare", "dare_ties": "dare"}
NORMALIZED = ("linear", "ties")  # methods that divide weights by their sum unless normalize is false
TAKEN = ("weight", "density", "normalize", "lambda")  # parameters that are taken over
DECIMALS = 4  # of a weight
SAME = 1e-6  # weights that differ by less are the same
PHRASES = "example_phrases/fiction-cliches.yaml"


class Part(BaseModel):
    """A part of mergekit's YAML that has parameters."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    parameters: dict[str, Any] = {}


class Source(Part):
    """A model, or some of its layers."""

    model: str
    layer_range: tuple[int, int] | None = None


class Slice(Part):
    """Layers, and the models that they are merged from."""

    sources: list[Source] = Field(min_length=1)
    base_model: str | None = None


class Merge(Part):
    """The whole file."""

    merge_method: str
    base_model: str | None = None
    models: list[Source] = []
    slices: list[Slice] = []


@dataclass(frozen=True)
class Position:
    """A tensor, its slice, and the depth of its layer within the slice: 0 is the first layer, 1 the last."""

    tensor: str
    slice: Slice
    depth: float


@dataclass(frozen=True)
class Names:
    """Names of a base's tensors; empty where no list or filter needs them."""

    layers: Sequence[Sequence[str]] = ()  # the matrices of each layer
    embedding: str = ""
    head: str = ""


def convert(file: Path, output: Path | None, overwrite: bool = False) -> None:
    """Write a mergekit configuration as one of ours, to the output or, if that is None, to standard output.

    Raises ConfigError for a file that is no mergekit configuration or can't be taken over; CheckpointError if the
    base can't be read (its number of layers may be needed).
    """
    if output:
        check_file("--output", output, overwrite)
        check_apart([output], [file])
    text, notes = converted(file)
    comments = [f"# {visible(note)}" for note in notes]
    lines = [f"# From {visible(str(file))}, a mergekit configuration.", *comments, *text.splitlines()]
    if output is None:
        for line in lines:
            say(line)
        return
    write_text(output, "\n".join(lines) + "\n")
    for note in notes:
        say(visible(note))
    say(visible(f"Wrote {output}; set your phrases, then run: python merge_monster.py --config {output}"))


def converted(file: Path) -> tuple[str, list[str]]:
    """The configuration as YAML, and a note for each setting that was changed or ignored."""
    merge = _read_merge(file)
    slices = merge.slices or [Slice(sources=merge.models)]
    base, notes = _base_of(file, merge, slices)
    models = dict.fromkeys(source.model for layer_slice in slices for source in layer_slice.sources)
    candidates = [model for model in models if model != base]
    if not candidates:
        raise ConfigError(f"{file}: no model besides the base {base}")
    layer_positions = _positions(file, merge, slices, base)
    try:
        weights = _Weights(merge, base, candidates)
        rows = [weights.row(row) for row in layer_positions]
        densities = weights.densities([position for row in layer_positions for position in row])
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    notes += [*weights.notes, *_note_of_ignored_keys(merge, slices)]
    start = [_yaml_entry(entry) for entry in start_of(rows, mixes_outside=True)]
    settings: dict[str, Any] = {
        "directories": {"model_path1": base, "output_directory": "merged"},
        "models_to_merge": candidates,
        "search": "joint",
        "joint": {"start": start},
        "phrase_files": [PHRASES],
    }
    method = METHODS[merge.merge_method]
    if method != "lerp":
        density = min(1.0, max(0.01, round(fmean(densities), 2)))
        ratios = {round(fmean(column), DECIMALS) for column in zip(*rows, strict=True)}
        settings |= {"search": "greedy", "merge_method": {"name": method, "density": density}}
        settings["merge_ratios"] = sorted(ratios - {0.0}) or [0.0]
        notes.append(f"{merge.merge_method}: only a greedy search supports {method}; it merges candidates in turn.")
        if max(densities) - min(densities) > SAME:
            notes.append(f"density: {method} has one for all models and layers; using the mean, {density:g}.")
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110), notes


def _read_merge(file: Path) -> Merge:
    """Raises ConfigError."""
    document = read_yaml(file, "name a mergekit configuration").value
    if not isinstance(document, Mapping) or "merge_method" not in document:
        raise ConfigError(f"{file}: not a mergekit configuration (merge_method is missing)")
    if document["merge_method"] not in [*METHODS]:
        method = shown(document["merge_method"])
        raise ConfigError(f"{file}: merge_method {method} is not supported; use one of {', '.join(METHODS)}")
    try:
        merge = Merge.model_validate(document)
    except ValidationError as error:
        first_error = error.errors()[0]
        raise ConfigError(f"{file}: {'.'.join(map(str, first_error['loc']))}: {first_error['msg']}") from None
    if bool(merge.models) == bool(merge.slices):
        raise ConfigError(f"{file}: expected either models or slices")
    return merge


def _base_of(file: Path, merge: Merge, slices: Sequence[Slice]) -> tuple[str, list[str]]:
    """The base, and a note if the file does not name it. Raises ConfigError."""
    bases = {merge.base_model, *(layer_slice.base_model for layer_slice in slices)} - {None}
    if len(bases) > 1:
        raise ConfigError(f"{file}: more than one base model: {', '.join(sorted(bases))}")
    if bases:
        return bases.pop(), []
    if merge.merge_method != "linear":
        raise ConfigError(f"{file}: base_model is missing, which {merge.merge_method} needs")
    base = slices[0].sources[0].model
    return base, [f"base_model is missing; using the first model, {base}."]


def _positions(file: Path, merge: Merge, slices: Sequence[Slice], base: str) -> list[list[Position]]:
    """The positions of each layer's tensors and, last, of those outside; no layer if one number holds for all.

    Raises ConfigError if the slices are not the base's layers in order.
    """
    parts = [merge, *slices, *(source for layer_slice in slices for source in layer_slice.sources)]
    is_plain = all(is_number(part.parameters.get(key, 0)) for part in parts for key in TAKEN[:2])
    names = Names() if is_plain else _names_of(file, base)
    spans = [range(len(names.layers))] if merge.models else []
    for number, layer_slice in enumerate(merge.slices):
        begin = spans[-1].stop if spans else 0
        first_range, *other_ranges = [source.layer_range for source in layer_slice.sources]
        layer_limit = MOST_LAYERS if is_plain else len(names.layers)
        if (
            first_range is None
            or first_range[0] != begin
            or not begin < first_range[1] <= layer_limit
            or {*other_ranges} - {first_range}
        ):
            raise ConfigError(
                f"{file}: slices[{number}]: expected layer_range [{begin}, END] for all its sources; layers "
                "can't be reordered or repeated"
            )
        spans.append(range(*first_range))
    positions = []
    for layer_slice, span in zip(slices, spans, strict=True):
        for layer in span:
            depth = (layer - span.start) / (len(span) - 1) if len(span) > 1 else 1.0
            tensors = [""] if is_plain else names.layers[layer]
            positions.append([Position(name, layer_slice, depth) for name in tensors])
    return [*positions, [Position(names.embedding, slices[0], 0.0), Position(names.head, slices[-1], 1.0)]]


def _names_of(file: Path, base: str) -> Names:
    """The base's tensors. Raises ConfigError or CheckpointError."""
    location = parse_location(base)
    if location is None:
        raise ConfigError(f"{file}: {base}: {missing_folder(base)}; lists and filters need the base's layers")
    repository = find(location) if location.folder is None else local(location, location.folder)
    module = empty_module(read_configuration(repository, trusted=False))
    prefix, layers = find_layers(module)
    matrices = []
    for number, layer in enumerate(layers):
        matrix_names = [name for name, parameter in layer.named_parameters() if parameter.ndim > 1]
        matrices.append([f"{prefix}.{number}.{name}" for name in matrix_names])
    embedding, head = header_names(module)
    return Names(matrices, embedding, head or embedding)


class _Weights:
    """The candidates' weights, tensor by tensor. `notes` names what joint search can't express."""

    def __init__(self, merge: Merge, base: str, candidates: Sequence[str]) -> None:
        self.merge = merge
        self.base = base
        self.candidates = candidates
        self.notes: dict[str, None] = {}  # a line for each thing that was changed

    def row(self, positions: Sequence[Position]) -> list[float]:
        """One weight for each candidate: its mean over these tensors. Raises ValueError for a wrong parameter."""
        row = []
        tensor_weights = [self._weights_at(position) for position in positions]
        for candidate in self.candidates:
            weights = [model_weights.get(candidate, 0.0) for model_weights in tensor_weights]
            mean = fmean(weights)
            if max(weights) - min(weights) > SAME:
                self.notes[f"{candidate}: a layer has one weight, so filters within a layer became their mean."] = None
            if not 0 <= mean <= 1:
                self.notes[f"{candidate}: weights below 0 or above 1 were clipped."] = None
            row.append(round(min(1.0, max(0.0, mean)), DECIMALS))
        return row

    def densities(self, positions: Sequence[Position]) -> list[float]:
        """The density of each tensor in each model but the base. Raises ValueError for a wrong parameter."""
        all_densities = []
        for position in positions:
            for source in position.slice.sources:
                density = self.parameter("density", position, source)
                all_densities += [] if source.model == self.base else [1.0 if density is None else density]
        return all_densities or [1.0]

    def _weights_at(self, position: Position) -> dict[str, float]:
        """Each model's weight in a tensor, by the method's rule."""
        method = self.merge.merge_method
        weights: dict[str, float] = {}
        for source in position.slice.sources:
            if source.model == self.base and method != "linear":
                continue
            weight = self.parameter("weight", position, source)
            if weight is None and source.model != self.base:
                raise ValueError(f"weight of {source.model}: missing")
            weights[source.model] = weights.get(source.model, 0.0) + (weight or 0.0)
        total = sum(weights.values())
        factor = 1.0
        if self.merge.parameters.get("normalize", method in NORMALIZED) and abs(total) > SAME:
            factor = 1 / total
        if method == "linear" and abs(total * factor - 1) > SAME:
            self.notes["weights don't add up to 1; the base gets the rest."] = None
        if method != "linear":
            lambda_factor = self.parameter("lambda", position)
            factor *= 1.0 if lambda_factor is None else lambda_factor
        return {model: weight * factor for model, weight in weights.items()}

    def parameter(self, name: str, position: Position, source: Source | None = None) -> float | None:
        """A tensor's value of a parameter; None if the file gives none. Raises ValueError if it is no number."""
        for part in filter(None, (source, position.slice, self.merge)):
            value = _value(name, part.parameters.get(name), position)
            if value is not None:
                return value
        return None


def _value(name: str, setting: Any, position: Position) -> float | None:
    """A parameter's value for a tensor: a number, a gradient, or the value of the first filter that fits its name."""
    conditions = setting if isinstance(setting, list) else [setting]
    if isinstance(setting, Mapping) or any(isinstance(condition, Mapping) for condition in conditions):
        for condition in conditions:
            text = condition.get("filter", "*") if isinstance(condition, Mapping) else None
            if text == "*" or (isinstance(text, str) and text in position.tensor):
                return _gradient(name, condition.get("value"), position.depth)
        return None
    return None if setting is None else _gradient(name, setting, position.depth)


def _gradient(name: str, value: Any, depth: float) -> float:
    """A number as it is, or a list's value interpolated at a depth. Raises ValueError if it is neither."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(map(is_number, numbers)):
        raise ValueError(f"{name}: {shown(value)}: expected a number, a list of numbers, or filters with such values")
    position = depth * (len(numbers) - 1)
    low = min(int(position), len(numbers) - 1)
    high = min(low + 1, len(numbers) - 1)
    return numbers[low] + (position - low) * (numbers[high] - numbers[low])


def _yaml_entry(entry: StartWeight) -> dict[str, Any]:
    """An entry of joint.start as plain values for YAML."""
    fields: dict[str, Any] = {"candidate": entry.candidate, "weight": entry.weight}
    if entry.layers is not None:
        parts = [int(part) if part.isdecimal() else part for part in ranges(entry.layers)]
        fields["layers"] = parts if len(parts) > 1 else parts[0]
    return fields


def _note_of_ignored_keys(merge: Merge, slices: Sequence[Slice]) -> list[str]:
    """A note that names the keys that are not taken over, if the file has any."""
    parts = [merge, *slices, *(source for layer_slice in slices for source in layer_slice.sources)]
    names: dict[str, None] = {}
    for part in parts:
        names |= dict.fromkeys([*(part.model_extra or {}), *(key for key in part.parameters if key not in TAKEN)])
    return [f"Ignored: {listed([*names], 20)}."] if names else []

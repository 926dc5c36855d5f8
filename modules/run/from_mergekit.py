"""A mergekit configuration as a configuration of ours: its models, and its weights, from which joint search starts.

Knows: what mergekit's YAML says of linear, task_arithmetic, ties and dare merges, where it looks a parameter up.
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
NORMALIZED = ("linear", "ties")  # methods that divide weights by their sum unless they are told otherwise
TAKEN = ("weight", "density", "normalize", "lambda")  # parameters
DECIMALS = 4  # of a weight
SAME = 1e-6  # weights that differ by less are the same
PHRASES = "example_phrases/fiction-cliches.yaml"


class Part(BaseModel):
    """What has parameters in mergekit's YAML."""

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
class Place:
    """A tensor, the slice that it is in, and how far its layer is from the slice's first, 0, to its last, 1."""

    tensor: str
    slice: Slice
    depth: float


@dataclass(frozen=True)
class Names:
    """Of a base's tensors; empty where no filter asks for them."""

    layers: Sequence[Sequence[str]] = ()  # the matrices of each layer
    embedding: str = ""
    head: str = ""


def convert(file: Path, output: Path | None, overwrite: bool = False) -> None:
    """Write a mergekit configuration as one of ours, to the output or, without one, to standard output.

    Raises ConfigError for what is no such configuration, or can't be taken over; CheckpointError if the base, whose
    number of layers may be needed, can't be read.
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
    """The configuration as YAML, and a line for each thing that could not be taken over as it is."""
    merge = _read(file)
    slices = merge.slices or [Slice(sources=merge.models)]
    base, notes = _base_of(file, merge, slices)
    models = dict.fromkeys(source.model for one in slices for source in one.sources)
    candidates = [model for model in models if model != base]
    if not candidates:
        raise ConfigError(f"{file}: no model beside the base {base}")
    places = _places(file, merge, slices, base)
    try:
        weights = _Weights(merge, base, candidates)
        rows = [weights.row(row) for row in places]
        densities = weights.densities([place for row in places for place in row])
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    notes += [*weights.notes, *_left_out(merge, slices)]
    start = [_written(entry) for entry in start_of(rows, mixes_outside=True)]
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
        notes.append(f"{merge.merge_method}: only greedy search has {method}; it merges one candidate after another.")
        if max(densities) - min(densities) > SAME:
            notes.append(f"density: {method} has one for all models and layers; {density:g} is the mean.")
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110), notes


def _read(file: Path) -> Merge:
    """Raises ConfigError."""
    document = read_yaml(file, "name a mergekit configuration").value
    if not isinstance(document, Mapping) or "merge_method" not in document:
        raise ConfigError(f"{file}: not a mergekit configuration (merge_method is missing)")
    if document["merge_method"] not in [*METHODS]:
        method = shown(document["merge_method"])
        raise ConfigError(f"{file}: merge_method {method} can't be taken over; supported: {', '.join(METHODS)}")
    try:
        merge = Merge.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if bool(merge.models) == bool(merge.slices):
        raise ConfigError(f"{file}: expected either models or slices")
    return merge


def _base_of(file: Path, merge: Merge, slices: Sequence[Slice]) -> tuple[str, list[str]]:
    """The base and, if the file does not name it, a line about that. Raises ConfigError."""
    bases = {merge.base_model, *(one.base_model for one in slices)} - {None}
    if len(bases) > 1:
        raise ConfigError(f"{file}: more than one base model: {', '.join(sorted(bases))}")
    if bases:
        return bases.pop(), []
    if merge.merge_method != "linear":
        raise ConfigError(f"{file}: base_model is missing, which {merge.merge_method} needs")
    base = slices[0].sources[0].model
    return base, [f"base_model is missing; the first model, {base}, is the base."]


def _places(file: Path, merge: Merge, slices: Sequence[Slice], base: str) -> list[list[Place]]:
    """Each layer's tensors and, last, those outside the layers; no layer where one number holds for all.

    Raises ConfigError if the slices are not those of one model, layer by layer.
    """
    parts = [merge, *slices, *(source for one in slices for source in one.sources)]
    is_plain = all(is_number(part.parameters.get(key, 0)) for part in parts for key in TAKEN[:2])
    names = Names() if is_plain else _names_of(file, base)
    spans = [range(len(names.layers))] if merge.models else []
    for number, one in enumerate(merge.slices):
        begin = spans[-1].stop if spans else 0
        first, *others = [source.layer_range for source in one.sources]
        most = MOST_LAYERS if is_plain else len(names.layers)
        if first is None or first[0] != begin or not begin < first[1] <= most or {*others} - {first}:
            raise ConfigError(
                f"{file}: slices[{number}]: expected layer_range [{begin}, END] for all its sources, since the base's "
                "layers keep their order"
            )
        spans.append(range(*first))
    places = []
    for one, span in zip(slices, spans, strict=True):
        for layer in span:
            depth = (layer - span.start) / (len(span) - 1) if len(span) > 1 else 1.0
            tensors = [""] if is_plain else names.layers[layer]
            places.append([Place(name, one, depth) for name in tensors])
    return [*places, [Place(names.embedding, slices[0], 0.0), Place(names.head, slices[-1], 1.0)]]


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
        inside = [name for name, parameter in layer.named_parameters() if parameter.ndim > 1]
        matrices.append([f"{prefix}.{number}.{name}" for name in inside])
    embedding, head = header_names(module)
    return Names(matrices, embedding, head or embedding)


class _Weights:
    """The candidates' weights, tensor by tensor; what joint search can't have is noted."""

    def __init__(self, merge: Merge, base: str, candidates: Sequence[str]) -> None:
        self.merge = merge
        self.base = base
        self.candidates = candidates
        self.notes: dict[str, None] = {}  # a line for each thing that was changed

    def row(self, places: Sequence[Place]) -> list[float]:
        """One weight for each candidate: the mean of some tensors. Raises ValueError for a wrong parameter."""
        row = []
        found = [self._at(place) for place in places]
        for candidate in self.candidates:
            weights = [one.get(candidate, 0.0) for one in found]
            mean = fmean(weights)
            if max(weights) - min(weights) > SAME:
                self.notes[f"{candidate}: a layer has one weight, the mean of what filters say of its tensors."] = None
            if not 0 <= mean <= 1:
                self.notes[f"{candidate}: a weight is between 0 and 1; others are cut off there."] = None
            row.append(round(min(1.0, max(0.0, mean)), DECIMALS))
        return row

    def densities(self, places: Sequence[Place]) -> list[float]:
        """Of each tensor and each model beside the base. Raises ValueError for a wrong parameter."""
        found = []
        for place in places:
            for source in place.slice.sources:
                density = self.parameter("density", place, source)
                found += [] if source.model == self.base else [1.0 if density is None else density]
        return found or [1.0]

    def _at(self, place: Place) -> dict[str, float]:
        """What a tensor has of each model, by the method's rule."""
        method = self.merge.merge_method
        weights: dict[str, float] = {}
        for source in place.slice.sources:
            if source.model == self.base and method != "linear":
                continue
            weight = self.parameter("weight", place, source)
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
            lambda_factor = self.parameter("lambda", place)
            factor *= 1.0 if lambda_factor is None else lambda_factor
        return {model: weight * factor for model, weight in weights.items()}

    def parameter(self, name: str, place: Place, source: Source | None = None) -> float | None:
        """What the file says of a tensor; None if nothing. Raises ValueError for what is no number."""
        for part in filter(None, (source, place.slice, self.merge)):
            value = _value(name, part.parameters.get(name), place)
            if value is not None:
                return value
        return None


def _value(name: str, setting: Any, place: Place) -> float | None:
    """A parameter's value for a tensor: a number, a gradient, or what the first filter says that fits its name."""
    conditions = setting if isinstance(setting, list) else [setting]
    if isinstance(setting, Mapping) or any(isinstance(one, Mapping) for one in conditions):
        for one in conditions:
            text = one.get("filter", "*") if isinstance(one, Mapping) else None
            if text == "*" or (isinstance(text, str) and text in place.tensor):
                return _gradient(name, one.get("value"), place.depth)
        return None
    return None if setting is None else _gradient(name, setting, place.depth)


def _gradient(name: str, value: Any, depth: float) -> float:
    """A number, or what lies at a depth between the numbers of a list. Raises ValueError if it is neither."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(map(is_number, numbers)):
        raise ValueError(f"{name}: {shown(value)}: expected a number, a list of numbers, or filters with such values")
    position = depth * (len(numbers) - 1)
    low = min(int(position), len(numbers) - 1)
    high = min(low + 1, len(numbers) - 1)
    return numbers[low] + (position - low) * (numbers[high] - numbers[low])


def _written(entry: StartWeight) -> dict[str, Any]:
    """An entry of joint.start as YAML has it."""
    written: dict[str, Any] = {"candidate": entry.candidate, "weight": entry.weight}
    if entry.layers is not None:
        parts = [int(part) if part.isdecimal() else part for part in ranges(entry.layers)]
        written["layers"] = parts if len(parts) > 1 else parts[0]
    return written


def _left_out(merge: Merge, slices: Sequence[Slice]) -> list[str]:
    """A line that names the keys that are not taken over, if the file has any."""
    parts = [merge, *slices, *(source for one in slices for source in one.sources)]
    names: dict[str, None] = {}
    for part in parts:
        names |= dict.fromkeys([*(part.model_extra or {}), *(key for key in part.parameters if key not in TAKEN)])
    return [f"Not taken over: {listed([*names], 20)}."] if names else []

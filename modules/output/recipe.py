"""The recipe: all data that building a model again needs, in one file beside it.

Knows: the recipe's fields, how it is read, where its sources are searched. Refuses to know: how a model is built.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from modules.config.fields import DTYPES
from modules.config.locations import names_folder
from modules.config.schema import Config
from modules.output.changes import changes_between, rendered_in, run_of
from modules.output.records import (
    FORMAT,
    ComputeDtype,
    Decided,
    Metrics,
    Mixed,
    Number,
    Phrase,
    Record,
    Sample,
    Settings,
    Source,
)
from modules.runtime.errors import ConfigError, first_line, naming
from modules.runtime.input_files import open_input
from modules.scoring.chats import with_texts
from modules.search.strategies import improved

RECIPE_FILE = "merge_monster_recipe.json"


class Recipe(Record):
    """A recipe. docs/output.md explains each key."""

    format: Literal[FORMAT]
    program: str
    libraries: dict[str, str]
    settings: Settings
    device: str
    dtype: ComputeDtype
    saved_dtype: Literal[DTYPES[1:]] | None
    sources: list[Source]
    decisions: list[Decided]
    failures: dict[str, str]
    phrases: list[Phrase]
    held_out: list[Phrase]
    metrics: dict[Literal["base", "merge"], Metrics]
    metrics_after: dict[str, Metrics]
    baselines: dict[str, Metrics]
    rounding: Number = 0.0
    joint: Mixed | None = None
    samples: list[Sample]
    composition: dict[str, Number]
    seconds: dict[str, Number]

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        # A number is missing if a candidate was given up before it could be opened.
        numbers = [source.number for source in self.sources]
        if numbers[:1] != [0] or numbers != sorted(set(numbers)):
            raise ValueError("its sources are not numbered from 0")
        if any(decision.candidate not in numbers[1:] for decision in self.decisions):
            raise ValueError("a decision is on an unknown source")
        if set(self.metrics) != {"base", "merge"}:
            raise ValueError("metrics of base or merge are missing")
        if self.joint:
            rows = [self.joint.start, *self.joint.slopes.values()]
            form = [len(row) for row in self.joint.weights]
            if any(count != len(numbers) - 1 for count in form) or any([*map(len, row)] != form for row in rows):
                raise ValueError("weights are on unknown sources, or slopes on unknown weights")
        return self

    def accepted_of(self, number: int) -> list[Decided]:
        """A candidate's accepted decisions."""
        return [line for line in self.decisions if line.candidate == number and line.ratio is not None]

    @property
    def needed_sources(self) -> list[Source]:
        """The base and the candidates with accepted merges or weights."""
        used_numbers = {line.candidate for line in self.decisions if line.ratio is not None}
        for row in self.joint.weights if self.joint else ():
            used_numbers |= {source.number for source, weight in zip(self.sources[1:], row, strict=True) if weight}
        return [source for source in self.sources if source.number in (0, *used_numbers)]

    @property
    def needed_weights(self) -> list[list[float]]:
        """The weights of a joint search, for each layer those of the needed candidates, in their order."""
        needed = self.needed_sources
        is_needed = [source in needed for source in self.sources[1:]]
        return [list(compress(row, is_needed)) for row in self.joint.weights]

    @property
    def improved(self) -> int:
        """How many phrases score better in the output than in the base."""
        return improved([p.before * p.weight for p in self.phrases], [p.after * p.weight for p in self.phrases])


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write a recipe into an output. Raises OSError if it can't be written."""
    text = json.dumps(recipe.written(), ensure_ascii=False, indent=1, allow_nan=False)
    with naming(folder / RECIPE_FILE):
        (folder / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe of this format. path: the recipe, or the output that contains it. Raises ConfigError if it is
    none."""
    path = path / RECIPE_FILE if os.path.isdir(path) else path
    try:
        with naming(path), open_input(path, "utf-8") as file:
            recipe = Recipe.model_validate(json.load(file))
        json.dumps(recipe.written(), ensure_ascii=False, allow_nan=False).encode()  # as it will be written
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; use the {RECIPE_FILE} of an output") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        if isinstance(error, ValidationError):
            first_error = error.errors()[0]
            reason = f"{'.'.join(map(str, first_error['loc']))}: {first_error['msg']}"
        finding = f"not a recipe of format {FORMAT} ({reason})"
        raise ConfigError(f"{path}: {finding}; use the {RECIPE_FILE} of an output") from None
    return recipe


def folders_of(path: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """The folders in which a recipe's local sources are searched: the given ones, its own and its parent, the current.

    path: of the recipe, or of the output that contains it.
    """
    output = Path(os.path.abspath(path if os.path.isdir(path) else path.parent))
    return [*folders, output, output.parent, Path(os.path.abspath(""))]


def folders_near(folders: Sequence[Path]) -> list[Path]:
    """The folders inside and beside these folders: models are often kept together in one."""
    nearby: list[Path] = []
    for folder in dict.fromkeys(folders):
        for parent in (folder, folder.parent):
            with suppress(OSError):  # an unreadable folder offers no models
                nearby += sorted(path for path in parent.iterdir() if path.is_dir())
    return nearby


def find_source(where: str, folders: Sequence[Path]) -> str | None:
    """A recipe's source as a configuration names it: an id of the hub, or a path with its name in one of the folders.
    An adapter is the two parts around a plus. None if it is not found."""
    splits = [[where]]
    for plus in re.finditer(r"\+", where):
        splits.append([where[: plus.start()], where[plus.end() :]])
    for names in splits:
        paths = [_find(name, folders) for name in names]
        if None not in paths:
            return "+".join(paths)
    return None


def _find(name: str, folders: Sequence[Path]) -> str | None:
    if name and not names_folder(name):
        return name
    paths = [os.path.join(folder, name) for folder in folders if name]
    return next((path for path in paths if os.path.exists(path)), None)


def is_finished(config: Config, output: Path) -> bool:
    """Whether a run of this configuration has written the output."""
    try:
        recipe = read_recipe(output / RECIPE_FILE)
        current_run = run_of(with_texts(config, rendered_in(recipe.settings)), recipe.dtype)
    except (ConfigError, ValueError):
        return False
    # The arithmetic that auto chooses is not known before the models are opened.
    recorded_fields = {"settings": recipe.settings, "device": recipe.device.partition(":")[0], "computed": None}
    return not changes_between(current_run.model_copy(update=recorded_fields), current_run)


def read_outputs(outputs: Iterable[Path]) -> dict[str, Recipe]:
    """Read the recipes of finished outputs, by the outputs' names. outputs: folders or recipes.

    Raises ConfigError for the first that is no output.
    """
    recipes = {}
    for output in outputs:
        folder = output.parent if output.name == RECIPE_FILE else output
        recipes[str(folder)] = read_recipe(output)
    return recipes

"""The recipe: all that is needed to build a model again, in one file beside it.

Knows: what the recipe holds and how it is read back. Refuses to know: how a model is built.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from modules.config import COMPUTE_DTYPES, DTYPES, Config, parts_of
from modules.output.changes import changes_between, run_of
from modules.output.public import Public, found_again, relative
from modules.output.records import (
    FORMAT,
    Baseline,
    Decided,
    Drifted,
    HeldOut,
    Joint,
    Number,
    Phrase,
    Record,
    Sample,
    Settings,
    Source,
    Total,
    rendered_in,
)
from modules.runtime import ConfigError, naming, open_input
from modules.scoring import with_texts
from modules.search import improved

RECIPE_FILE = "merge_monster_recipe.json"

ComputeDtype = Literal[COMPUTE_DTYPES[1:]]
Dtype = Literal[DTYPES[1:]]


class Recipe(Record):
    """What docs/recipe.md explains, key by key."""

    format: Literal[FORMAT]
    program: str
    libraries: dict[str, Any] | None = None
    settings: Settings
    folder: str = ""  # where relative paths began, from the output on; younger than recipes are
    config: str
    device: str
    dtype: ComputeDtype
    saved_dtype: Dtype | None = None
    sources: list[Source]
    decisions: list[Decided]
    failures: dict[str, str]
    phrases: list[Phrase]
    total: Total
    baselines: list[Baseline] | None = None
    held_out: HeldOut | None = None
    joint: Joint | None = None
    drift: Drifted | None = None
    drift_after: dict[str, Drifted] | None = None
    samples: list[Sample] | None = None
    composition: dict[str, Number]
    seconds: dict[str, Number]

    @model_validator(mode="after")
    def _sources_are_known(self) -> Self:
        # A number is missing where a candidate was given up before it could be opened.
        numbers = [source.number for source in self.sources]
        if numbers[:1] != [0] or numbers != sorted(set(numbers)):
            raise ValueError("its sources are not numbered from 0")
        if any(decision.candidate not in numbers[1:] for decision in self.decisions):
            raise ValueError("a decision is on no source")
        if self.joint and any(len(row) != len(numbers) - 1 for row in self.joint.shares):
            raise ValueError("shares are on no source")
        if self.joint and not self.joint.is_even:
            raise ValueError("shares and slopes are not of the same layers")
        return self

    def accepted_of(self, number: int) -> list[Decided]:
        """The decisions that merged something of a candidate."""
        return [line for line in self.decisions if line.candidate == number and line.ratio is not None]

    @property
    def needed_sources(self) -> list[Source]:
        """The base and those candidates of which something was accepted."""
        taken = {line.candidate for line in self.decisions if line.ratio is not None}
        for row in self.joint.shares if self.joint else ():
            taken |= {source.number for source, share in zip(self.sources[1:], row, strict=True) if share}
        return [source for source in self.sources if source.number in (0, *taken)]

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
    """A recipe of this version, named itself or as the output that holds it. Raises ConfigError if it is none."""
    path = path / RECIPE_FILE if os.path.isdir(path) else path
    try:
        with naming(path), open_input(path, "utf-8") as file:
            recipe = Recipe.model_validate(json.load(file))
        json.dumps(recipe.written(), ensure_ascii=False, allow_nan=False).encode()  # as it will be written
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a recipe is the {RECIPE_FILE} of an output") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_refusal(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: {_NONE}") from None
    return recipe


_NONE = f"not a recipe; it is the {RECIPE_FILE} of an output"


def _refusal(error: ValidationError) -> str:
    """What pydantic found first in a recipe, in words: it is none, or of another format, or damaged."""
    first = error.errors(include_url=False)[0]
    place, words = first["loc"], first["msg"].removeprefix("Value error, ")
    if place == ("format",) and first["type"] != "missing":
        return f"a recipe of format {first['input']}, this program reads format {FORMAT}"
    if len(place) < 2 and first["type"] != "value_error":
        return _NONE
    what = ": ".join(filter(None, [".".join(map(str, place)), words]))
    return f"damaged ({what}); take the {RECIPE_FILE} of the output once more"


def located(recipe: Recipe, path: Path, folders: Sequence[Path] = ()) -> Recipe:
    """A recipe that was read from a path, with its sources where they lie from here; see `found_again`."""
    start = path if path.is_dir() else path.parent
    folder = found_again(recipe.folder, start)
    return _with_places(recipe, folder, {one.number: found_again(one.where, start, folders) for one in recipe.sources})


def rebuilt(recipe: Recipe, config: Config, places: Mapping[int, str]) -> Recipe:
    """A recipe as it is written beside a model that was built from it. config: with which it was; places: where its
    sources were found, by their numbers.

    Of whole paths that stood in it, which an older version has written, the last name is left.
    """
    public, settings = Public.of(config), recipe.settings
    for text in [*vars(settings.directories).values(), *settings.models_to_merge, *(s.where for s in recipe.sources)]:
        for part in parts_of(text or ""):
            if os.path.isabs(part):
                public.know(part, os.path.basename(os.path.normpath(part)))
    folder = relative(recipe.folder, config.directories.output_directory) if recipe.folder else ""
    return public.record(_with_places(recipe, folder, places))


def _with_places(recipe: Recipe, folder: str, places: Mapping[int, str]) -> Recipe:
    sources = [one.model_copy(update={"where": places.get(one.number, one.where)}) for one in recipe.sources]
    return recipe.model_copy(update={"sources": sources, **({"folder": folder} if folder else {})})


def is_finished(config: Config, output: Path) -> bool:
    """Whether an output is what a run of this configuration has written."""
    try:
        recipe = read_recipe(output / RECIPE_FILE)
        now = run_of(with_texts(config, rendered_in(recipe.settings)))
        begun = {"settings": recipe.settings, "device": recipe.device.partition(":")[0]}
        begun |= {"folder": recipe.folder} if recipe.folder else {}
        return not changes_between(now.model_copy(update=begun), now)
    except (ConfigError, ValueError):
        return False


def read_outputs(outputs: Iterable[Path]) -> dict[str, Recipe]:
    """The recipes of finished outputs by the outputs' names; each is given as its folder or as its recipe.

    Raises ConfigError, naming all that are no finished output.
    """
    recipes, problems = {}, []
    for output in outputs:
        try:
            recipe = read_recipe(output)
        except ConfigError as error:
            problems.append(f"  {error}")
            continue
        recipes[str(output.parent if output.name == RECIPE_FILE else output)] = recipe
    if problems:
        raise ConfigError("not all of these are finished outputs:", *problems)
    return recipes

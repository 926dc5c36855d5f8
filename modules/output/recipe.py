"""The recipe: all that is needed to build a model again, in one file beside it.

Knows: what the recipe holds and how it is read back. Refuses to know: how a model is built.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from modules.config import DTYPES, METHODS, STRATEGIES, Config, is_number
from modules.output.changes import NOT_SETTINGS, changes_between
from modules.output.journal import Record, naming
from modules.output.record_fields import FORMAT, is_a, is_count, is_sound, settings_of
from modules.runtime import ConfigError
from modules.search import improved

RECIPE_FILE = "merge_monster_recipe.json"


def write_recipe(folder: Path, recipe: Record) -> None:
    """Write a recipe into an output. Raises OSError if it can't be written."""
    text = json.dumps(recipe, ensure_ascii=False, indent=1, allow_nan=False)
    with naming(folder / RECIPE_FILE):
        (folder / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")


def read_recipe(path: Path) -> Record:
    """A recipe of this version, named itself or as the output that holds it. Raises ConfigError if it is none."""
    path = path / RECIPE_FILE if os.path.isdir(path) else path
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(recipe, ensure_ascii=False, allow_nan=False).encode()  # as it will be written into the output
        sound = all(isinstance(recipe[key], kind) for key, kind in _PARTS.items())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a recipe is the {RECIPE_FILE} of an output") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ConfigError(f"{path}: not a recipe; it is the {RECIPE_FILE} of an output")
    if recipe["format"] != FORMAT:
        raise ConfigError(f"{path}: a recipe of format {recipe['format']}, this program reads format {FORMAT}")
    problem = _recipe_problem(recipe)
    if problem:
        raise ConfigError(f"{path}: damaged, {problem}; take the {RECIPE_FILE} of the output once more")
    return recipe


def is_finished(config: Config, output: Path) -> bool:
    """Whether an output is what a run of this configuration has written."""
    try:
        recipe = read_recipe(output / RECIPE_FILE)
        begun = {"settings": recipe["settings"], "device": recipe["device"].partition(":")[0]}
        return not changes_between(begun, {"settings": settings_of(config)})
    except (ConfigError, *NOT_SETTINGS):
        return False


def read_outputs(outputs: Iterable[Path]) -> dict[str, Record]:
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


_PARTS = {
    "format": int,
    "program": str,
    "settings": dict,
    "sources": list,
    "decisions": list,
    "failures": dict,
    "phrases": list,
    "total": dict,
    "composition": dict,
    "seconds": dict,
    "dtype": str,
    "device": str,
}

# ---------------------------------------------------------------------------------------------------------------------
# What a recipe says
# ---------------------------------------------------------------------------------------------------------------------


def accepted_of(recipe: Record, number: int) -> list[Record]:
    """The decisions of a recipe that merged something of a candidate."""
    return [record for record in recipe["decisions"] if record["candidate"] == number and record["ratio"] is not None]


def needed_sources(recipe: Record) -> list[Record]:
    """The base and those candidates of which something was accepted."""
    return [s for s in recipe["sources"] if s["number"] == 0 or accepted_of(recipe, s["number"])]


def improved_phrases(recipe: Record) -> int:
    """How many phrases score better in the output than in the base."""
    before, after = ([phrase[key] * phrase["weight"] for phrase in recipe["phrases"]] for key in ("before", "after"))
    return improved(before, after)


# Of a recipe's settings, those that are read again.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "merge_method": lambda value: isinstance(value, list) and all(method in METHODS for method in value),
    "strategy": lambda value: value in STRATEGIES,
    "strategy_threshold": is_number,
    "random_seed": is_count,
    "trust_remote_code": is_a(bool),
}


def _recipe_problem(recipe: Mapping[str, Any]) -> str | None:
    """What keeps a recipe from being carried out, if anything does."""
    dtypes = DTYPES[1:]
    for kind in ("source", "decision", "phrase"):
        for number, record in enumerate(recipe[f"{kind}s"], start=1):
            if not is_sound(kind, record):
                return f"its {kind} {number} is none"
    # A number is missing where a candidate was given up before it could be opened.
    numbers = [source["number"] for source in recipe["sources"]]
    if numbers[:1] != [0] or numbers != sorted(set(numbers)):
        return "its sources are not numbered from 0"
    if any(decision["candidate"] not in numbers[1:] for decision in recipe["decisions"]):
        return "a decision is on no source"
    if recipe["dtype"] not in dtypes or recipe.get("saved_dtype") not in (None, *dtypes):
        return "its dtypes are none"
    if not all(key in recipe["settings"] and check(recipe["settings"][key]) for key, check in _SETTINGS.items()):
        return "its settings are none"
    if not {"before", "after"} <= recipe["total"].keys():
        return "its total is none"
    for part in ("total", "composition", "seconds"):
        if not all(map(is_number, recipe[part].values())):
            return f"its {part} has a value that is no number"
    return None if isinstance(recipe.get("config"), str) else "its config is missing"

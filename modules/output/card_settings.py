"""A recipe's settings as a YAML file that others can use: models by their ids or names, phrases in place of files.

Knows: which keys are useful to others, how phrases are written as lists. Refuses to know: Markdown.
"""

from itertools import groupby
from typing import Any

import yaml

from modules.config.locations import names_folder
from modules.config.phrase_lists import Pair
from modules.config.schema import Config, Directories
from modules.output.recipe import Recipe
from modules.output.records import Phrase, Source
from modules.runtime.text import ranges

# Written in another form, or of no use to others.
_LEFT_OUT = (
    *("directories", "models_to_merge", "bad_phrases", "good_phrases", "phrase_files", "held_out_files", "held_out"),
    *("held_out_pairs", "system", "on_error", "keep_downloads", "mapper"),
)
_DEFAULTS = Config(Directories("", "")).dumped()


def settings_yaml(recipe: Recipe, output: str) -> str:
    """The models, and all settings that are not the default. output: the name of its folder."""
    base, *candidates = map(_model, recipe.sources)
    settings: dict[str, Any] = {
        "directories": {"model_path1": base, "output_directory": output},
        "models_to_merge": candidates,
    }
    for key, value in recipe.settings.dumped().items():
        if key not in _LEFT_OUT and value != _DEFAULTS[key]:
            settings[key] = value
    if recipe.settings.layers:
        settings["layers"] = [int(span) if span.isdigit() else span for span in ranges(recipe.settings.layers)]
    return _yaml(settings)


def settings_file(recipe: Recipe, output: str) -> str:
    """Settings and phrase lists as a file that can be run again. output: the name of its folder."""
    return f"# Replace the models' names with their paths.\n{settings_yaml(recipe, output)}{_phrases_yaml(recipe)}"


def _model(source: Source) -> str:
    """A model's name in a file: its ids if all of it is on the hub, else its name."""
    return source.name if names_folder(source.where) else source.where


def _phrases_yaml(recipe: Recipe) -> str:
    """All phrases as lists, in the recipe's order. Held-out ones are marked."""
    has_weights = not recipe.settings.auto_weights

    def head(phrase: Phrase) -> dict[str, Any]:
        text = list(phrase.variants) or phrase.phrase
        return {"phrase": text, "weight": abs(phrase.weight)} if has_weights else {"phrase": text}

    lists: dict[str, list[dict[str, Any]]] = {"bad_phrases": [], "good_phrases": []}
    for phrases, mark in ((recipe.phrases, {}), (recipe.held_out, {"held_out": True})):
        for (kind, entry), group in groupby(phrases, lambda phrase: (phrase.kind, head(phrase))):
            pairs = [Pair(kind, phrase.phrase, phrase.context, chat=phrase.chat) for phrase in group]
            contexts = [pair.as_context(**mark) for pair in pairs]
            lists[f"{kind.lower()}_phrases"].append({**entry, "contexts": contexts})
    return _yaml(lists)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)

"""A recipe's settings as a YAML file that others can use: models by their ids or names, phrases in place of files.

Knows: which keys are for everybody, how phrases are written as lists. Refuses to know: Markdown.
"""

from typing import Any

import yaml

from modules.config.locations import names_folder
from modules.config.schema import Config, Directories
from modules.output.recipe import Recipe
from modules.output.records import Phrase, Source
from modules.runtime.text import ranges

# Paths, what the lists of phrases say instead, and what makes no difference to the model.
_NOT_TOLD = (
    *("directories", "models_to_merge", "bad_phrases", "good_phrases", "phrase_files", "held_out_files", "held_out"),
    *("held_out_pairs", "system", "on_error", "keep_downloads", "mapper"),
)
_DEFAULTS = Config(Directories("", "")).dumped()
_WIDTH = 110  # of a line


def settings_yaml(recipe: Recipe, output: str = "") -> str:
    """The models, and all settings that are not the default. output: the name of its folder, if that is told."""
    base, *candidates = map(_said, recipe.sources)
    directories = {"model_path1": base, **({"output_directory": output} if output else {})}
    told: dict[str, Any] = {"directories": directories, "models_to_merge": candidates}
    for key, value in recipe.settings.dumped().items():
        if key not in _NOT_TOLD and value != _DEFAULTS[key]:
            told[key] = value
    if recipe.settings.layers:
        told["layers"] = [int(span) if span.isdigit() else span for span in ranges(recipe.settings.layers)]
    return _written(told)


def settings_file(recipe: Recipe, output: str) -> str:
    """Settings and phrase lists as a file that can be run again. output: the name of its folder."""
    return f"# Models go by their names: write where they lie.\n{settings_yaml(recipe, output)}{phrases_yaml(recipe)}"


def _said(source: Source) -> str:
    """What a file calls a model: its name, unless all of it is on the hub."""
    return source.name if names_folder(source.where) else source.where


def phrases_yaml(recipe: Recipe) -> str:
    """All phrases as lists, those that are held out marked as such."""
    lists: dict[str, list[dict[str, Any]]] = {}
    weighed = not recipe.settings.auto_weights
    for phrases, more in ((recipe.phrases, {}), (recipe.held_out, {"held_out": True})):
        for phrase in phrases:
            entries = lists.setdefault(f"{phrase.kind.lower()}_phrases", [])
            weight = abs(phrase.weight) if weighed else 1
            head = {"phrase": list(phrase.variants) or phrase.phrase, **({"weight": weight} if weight != 1 else {})}
            if not entries or head != {key: value for key, value in entries[-1].items() if key != "contexts"}:
                entries.append({**head, "contexts": []})
            entries[-1]["contexts"].append(_context(phrase, more))
    return _written(lists)


def _context(phrase: Phrase, more: dict[str, Any]) -> Any:
    if phrase.chat is None:
        return {"context": phrase.context, **more} if more else phrase.context
    answer = {"continue": phrase.chat.answer} if phrase.chat.answer else {}
    messages = [{"role": turn.role, "content": turn.content} for turn in phrase.chat.messages]
    return {"messages": messages, **answer, **more}


def _written(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=_WIDTH)

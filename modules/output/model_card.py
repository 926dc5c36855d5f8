"""The model card: an output's README.md, which the hub shows and reads its front matter.

Knows: the hub's front matter, Markdown, what of a recipe is for everybody's eyes. Refuses to know: how a recipe came to
be, which metrics there are, how pictures are drawn, the network.
"""

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCardData

from modules.config.locations import names_folder, repositories_in
from modules.metrics.registry import columns_of
from modules.output.card_settings import settings_yaml
from modules.output.recipe import RECIPE_FILE, Recipe
from modules.output.records import Phrase, Source
from modules.output.tables import sample_lines
from modules.runtime.console import visible
from modules.runtime.text import brief_percent, pluralize, shortened

CARD_FILE = "README.md"
MOST_PHRASES = 60  # in the table
MOST_COLUMNS = 160  # of a phrase or a context in the table; of a longer one the end is shown

CARD = """\
---
${front_matter}
---

# $name

A merge of $taken of $candidates into $base, made with Merge Monster $program. $how $improved of $phrases improved.

## Composition

$composition

$unused

$merge_map

## Metrics

$metrics

## Phrases

Probability of each phrase after its context, in the base and in this model. Bad phrases should become less probable, \
good ones more. Of more than $most pairs, those that changed most.

$phrase_table

$phrase_chart

$samples

## Licence

Check the licences of all source models and add `license:` to this page. The base's licence files, if any, are included.

## Settings

Non-default settings; `merge_monster.yaml` has them with all phrases:

$settings

## Reproduce

Merge Monster rebuilds this model from `$recipe_file` without a search. PATH: where the model is.

$command
"""

GREEDY = "Each layer's merge was kept only if it scored better (strategy: $strategy; merge method: $methods)."
JOINT = (
    "Per-layer merge weights were optimised jointly by gradient to make unwanted phrases less likely and wanted ones "
    "more likely."
)


def write_card(folder: Path, recipe: Recipe, name: str, pictures: tuple[str, str]) -> None:
    """Write the model card of an output, in the folder in which it is being written.

    name: the output's. pictures: see `model_card`; one that could not be made is left out. Raises OSError if it can't
    be written.
    """
    made = tuple(picture if (folder / picture).is_file() else None for picture in pictures)
    (folder / CARD_FILE).write_text(model_card(recipe, name, made), encoding="utf-8", newline="\n")


def model_card(recipe: Recipe, name: str, pictures: Sequence[str | None]) -> str:
    """The text of a model card. pictures: the names of the merge map's file and of the phrase chart's, beside the card;
    None for one that is not."""
    settings = recipe.settings
    needed = recipe.needed_sources
    unused = [_link(source) for source in recipe.sources if source not in needed]
    merge_map, phrase_chart = pictures
    values = card_values(recipe, name) | {
        "front_matter": front_matter(recipe, "transformers", "merge"),
        "taken": len(needed) - 1,
        "candidates": pluralize(len(recipe.sources) - 1, "candidate"),
        "strategy": settings.strategy,
        "methods": ", ".join(settings.merge_method),
        "composition": _composition(recipe),
        "unused": f"Candidates not used: {', '.join(unused)}." if unused else "",
        "merge_map": f"![What each layer is made of]({merge_map})" if merge_map else "",
        "phrase_chart": f"![Every phrase before and after the merge]({phrase_chart})" if phrase_chart else "",
        "recipe_file": RECIPE_FILE,
        "command": fenced("sh", _command(recipe)),
    }
    return filled(CARD.replace("$how", JOINT if recipe.joint else GREEDY), values)


def card_values(recipe: Recipe, name: str, who: str = "merge") -> dict[str, object]:
    """What the cards of all outputs say, by its name in their templates. who: has answered the samples."""
    return {
        "name": _escaped(name),
        "base": _link(recipe.sources[0]),
        "program": _escaped(recipe.program),
        "improved": recipe.improved,
        "phrases": pluralize(len(recipe.phrases), "phrase"),
        "metrics": _metrics(recipe),
        "most": MOST_PHRASES,
        "phrase_table": _phrases(recipe.phrases),
        "samples": _samples(recipe, who) if recipe.samples else "",
        "settings": fenced("yaml", settings_yaml(recipe, name)),
    }


def filled(template: str, values: Mapping[str, object]) -> str:
    """A card from its template. A paragraph of which nothing is left is left out."""
    paragraphs = [Template(paragraph).substitute(values) for paragraph in template.split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def front_matter(recipe: Recipe, library: str, relation: str) -> str:
    """For the hub, which takes nothing but its own ids as base models: folders are named in the text only.

    library: that opens the output. relation: of the output to its base models.
    """
    repositories = [repo for source in recipe.needed_sources for repo, _ in repositories_in(source.where)]
    data = ModelCardData(
        base_model=list(dict.fromkeys(repositories)) or None,
        # With one base model the hub would take the output for a fine-tune.
        base_model_relation=relation if repositories else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[relation, "mergemonster"],
    )
    return data.to_yaml()


def _composition(recipe: Recipe) -> str:
    models = {source.name: _link(source) for source in recipe.sources}
    rows = [(models.get(name) or _escaped(name), f"{weight:.1%}") for name, weight in recipe.composition.items()]
    return _table(("model", "weight"), rows)


def _metrics(recipe: Recipe) -> str:
    base = recipe.metrics["base"]
    merge = recipe.metrics["merge"]
    rows = []
    for column in columns_of(base, merge):
        if not column.shown_as:  # else it is shown as measured again, on text that took no part in the search
            values = [column.text(metrics.get(column.name)) for metrics in (base, merge)]
            rows.append((_escaped(column.label), *values))
    return _table(("metric", "base", "this model"), rows)


def _phrases(phrases: Sequence[Phrase]) -> str:
    """Those whose weighted probability moved furthest, in their own order."""
    changes = [abs((phrase.after - phrase.before) * phrase.weight) for phrase in phrases]
    changed_most = sorted(range(len(phrases)), key=changes.__getitem__, reverse=True)[:MOST_PHRASES]
    rows = []
    for phrase in [phrases[number] for number in sorted(changed_most)]:
        texts = [_escaped(shortened(text, MOST_COLUMNS)) for text in (phrase.phrase, phrase.shown)]
        figures = [brief_percent(value, phrase.rounding) for value in (phrase.before, phrase.after)]
        rows.append((phrase.kind.lower(), *texts, f"{abs(phrase.weight):g}", *figures))
    return _table(("", "phrase", "context", "weight", "before", "after"), rows)


def _samples(recipe: Recipe, who: str) -> str:
    lines = [textwrap.fill(line, 100, subsequent_indent=" " * 9) for line in sample_lines(recipe.samples, who)]
    return "## Samples\n\n" + fenced("text", "\n".join(lines))


def _command(recipe: Recipe) -> str:
    command = ["python", "merge_monster.py", "--replay", RECIPE_FILE, "--output", "rebuilt"]
    if recipe.settings.trust_remote_code:
        command.append("--trust-remote-code")
    for source in recipe.needed_sources:
        if names_folder(source.where):
            command += ["--source", f"{visible(source.name)}=PATH"]
    return shlex.join(command)


def _link(source: Source) -> str:
    """A model within a sentence: links, if all of it is on the hub."""
    if names_folder(source.where):
        return _escaped(source.name)
    repositories = [repo for repo, _ in repositories_in(source.where)]
    return " with ".join(f"[{_escaped(repo)}](https://huggingface.co/{repo})" for repo in repositories)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def fenced(language: str, text: str) -> str:
    """A block of text to the letter, whatever fences are in it; what can't be seen is escaped."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *map(visible, text.rstrip().split("\n")), fence])


# What means something in Markdown. A backslash, where it escapes itself, may begin a formula on the hub.
_MARKS = str.maketrans({"\\": "&#92;", **{mark: f"\\{mark}" for mark in "`*_[]<>|~&$#"}})


def _escaped(text: str) -> str:
    """Markdown that shows a text on one line and within one cell of a table; what can't be seen is escaped."""
    return visible(text).strip().translate(_MARKS)

"""The model card: an output's README.md, which the hub shows and reads its front matter.

Knows: the hub's front matter, Markdown, what of a recipe is for everybody's eyes. Refuses to know: how a recipe came to
be, which metrics there are, how pictures are drawn, the network.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCardData

from modules.config.locations import names_folder, repositories_in
from modules.metrics.registry import columns_of
from modules.output.card_settings import settings_yaml
from modules.output.recipe import RECIPE_FILE, Recipe
from modules.output.records import Phrase, Sample, Source
from modules.runtime.console import visible
from modules.runtime.text import ended, percent, pluralize, shortened

CARD_FILE = "README.md"
MOST_PHRASES = 60  # in the table; of more, those that changed most
MOST_COLUMNS = 160  # of a phrase or a context in the table; of a longer one the end is shown
MOST_ANSWER = 2000  # columns of a prompt or an answer; of a longer one the beginning is shown
MOST_SETTINGS = 50_000  # characters of YAML that are shown; they all are in the recipe too

# A paragraph of which nothing is left is left out.
CARD = """\
---
${front_matter}---

# $name

A merge of $taken of $candidates into $base, made with Merge Monster $program. $how Strategy: $strategy; merge \
methods: $methods. $improved of $phrases improved.

## Composition

$composition

$unused

$merge_map

## Metrics

$metrics

## Phrases

How probable the phrase is after the context, in the base and in this model. Bad phrases should be less probable, good \
ones more. $selection

$phrase_table

$phrase_chart

$samples

## Licence

Check the licences of all source models and add `license:` to this page. The base's licence files, if it has any, lie \
beside it.

## Settings

Non-default settings; `merge_monster.yaml` beside this page has them with all phrases:

$settings

## Reproduce

`$recipe_file` has every $decision. Merge Monster builds the same model from it without a search$where:

$command
"""

GREEDY = "A merge of a layer was kept only if it scored better by the strategy."
JOINT = (
    "Per-layer merge weights were optimised jointly ($steps by gradient) to make unwanted phrases less likely and "
    "wanted ones more likely."
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
    settings, joint = recipe.settings, recipe.joint
    needed = recipe.needed_sources
    unused = [_named(source) for source in recipe.sources if source not in needed]
    folders = [visible(source.name) for source in needed if names_folder(source.where)]
    shown = _changed_most(recipe.phrases)
    all_settings = settings_yaml(recipe)
    merge_map, phrase_chart = pictures
    values = {
        "front_matter": _front_matter(recipe),
        "name": _plain(name),
        "taken": len(needed) - 1,
        "candidates": pluralize(len(recipe.sources) - 1, "candidate"),
        "base": _named(recipe.sources[0]),
        "program": _plain(recipe.program),
        "how": Template(JOINT).substitute(steps=pluralize(len(joint.steps), "step")) if joint else GREEDY,
        "strategy": "joint" if joint else settings.strategy,
        "methods": ", ".join(settings.merge_method),
        "improved": recipe.improved,
        "phrases": pluralize(len(recipe.phrases), "phrase"),
        "composition": _composition(recipe),
        "unused": f"Candidates not used: {', '.join(unused)}." if unused else "",
        "merge_map": f"![What each layer is made of]({merge_map})" if merge_map else "",
        "metrics": _metrics(recipe),
        "selection": f"The {len(shown)} that changed most:" if len(shown) < len(recipe.phrases) else "",
        "phrase_table": _phrases(shown),
        "phrase_chart": f"![Every phrase before and after the merge]({phrase_chart})" if phrase_chart else "",
        "samples": "\n\n".join(["## Samples", *map(_sample, recipe.samples)]) if recipe.samples else "",
        "settings": _fenced("yaml", all_settings) if len(all_settings) <= MOST_SETTINGS else "Too long for this page.",
        "recipe_file": RECIPE_FILE,
        "decision": "merge weight" if joint else "decision",
        "where": ", PATH being where the model lies" if folders else "",
        "command": _fenced("sh", _command(folders, settings.trust_remote_code)),
    }
    paragraphs = [Template(paragraph).substitute(values).strip(" ") for paragraph in CARD.split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _front_matter(recipe: Recipe) -> str:
    """For the hub, which takes nothing but its own ids as base models: folders are named in the text only."""
    repositories = [repo for source in recipe.needed_sources for repo, _ in repositories_in(source.where)]
    data = ModelCardData(
        base_model=list(dict.fromkeys(repositories)) or None,
        # With one base model the hub would take the output for a fine-tune.
        base_model_relation="merge" if repositories else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "mergemonster"],
    )
    return f"{data.to_yaml()}\n"


def _composition(recipe: Recipe) -> str:
    models = {source.name: _named(source) for source in recipe.sources}
    shares = recipe.composition.items()
    return _table(("model", "share"), [(models.get(name) or _plain(name), f"{share:.2%}") for name, share in shares])


def _metrics(recipe: Recipe) -> str:
    base, merge = recipe.metrics["base"], recipe.metrics["merge"]
    better = {True: "lower", False: "higher", None: ""}
    rows = []
    for column in columns_of(base, merge):
        if column.shown_as:  # measured again, on text that took no part in the search
            continue
        texts = [column.text(values.get(column.name)) for values in (base, merge)]
        rows.append((_plain(column.label), *texts, better[column.lower_is_better]))
    return _table(("metric", "base", "this model", "better"), rows)


def _phrases(phrases: Sequence[Phrase]) -> str:
    rows = []
    for phrase in phrases:
        context = _excerpt(phrase.shown) or "*the beginning of a text*"
        figures = [percent(value, rounding=phrase.rounding) for value in (phrase.before, phrase.after)]
        rows.append((phrase.kind.lower(), _excerpt(phrase.phrase), context, f"{abs(phrase.weight):g}", *figures))
    return _table(("", "phrase", "context", "weight", "before", "after"), rows)


def _changed_most(phrases: Sequence[Phrase]) -> list[Phrase]:
    """As many as a card shows, in their own order: those whose weighted probability moved furthest."""
    changes = [abs((phrase.after - phrase.before) * phrase.weight) for phrase in phrases]
    chosen = sorted(range(len(phrases)), key=changes.__getitem__, reverse=True)[:MOST_PHRASES]
    return [phrases[number] for number in sorted(chosen)]


def _sample(sample: Sample) -> str:
    """A quoted block of three paragraphs. Each is one line that begins with a word of ours: no text begins a block."""
    texts = ("Prompt", sample.prompt), ("Base", ended(sample.base)), ("Merge", ended(sample.merge))
    return "\n>\n".join(f"> **{name}:** {_paragraph(text)}" for name, text in texts)


def _paragraph(text: str) -> str:
    lines = shortened(text.strip(), MOST_ANSWER, "start").splitlines()
    return "<br>".join(map(_plain, lines)) or "*nothing*"


def _command(folders: Sequence[str], trusts_code: bool) -> str:
    command = ["python", "merge_monster.py", "--replay", RECIPE_FILE, "--output", "rebuilt"]
    if trusts_code:
        command.append("--trust-remote-code")
    for name in folders:
        command += ["--source", f"{name}=PATH"]
    return shlex.join(command)


def _named(source: Source) -> str:
    """A model within a sentence: links, if all of it is on the hub."""
    if names_folder(source.where):
        return _plain(source.name)
    return " with ".join(_link(repo) for repo, _ in repositories_in(source.where))


def _link(repo: str) -> str:
    return f"[{_plain(repo)}](https://huggingface.co/{repo})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _fenced(language: str, text: str) -> str:
    """A block of text to the letter, whatever fences are in it; what can't be seen is escaped, save tabs."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    shown = ("\t".join(map(visible, line.split("\t"))) for line in lines)
    return "\n".join([f"{fence}{language}", *shown, fence])


def _excerpt(text: str) -> str:
    return _plain(shortened(text, MOST_COLUMNS))


# What means something in Markdown. A backslash, where it escapes itself, may begin a formula on the hub.
_MARKS = str.maketrans({"\\": "&#92;", **{mark: f"\\{mark}" for mark in "`*_[]<>|~&$#"}})
# What the hub makes a link of wherever it stands. A backtick or a bar ends it: neither can stand in code in a table.
_LINK = re.compile(
    r"""((?:[a-z][a-z\d+.-]*://|www\.|(?:mailto|xmpp):|[\w.+-]+@[\w-]+\.)[^\s`|]*[^\s`|.,;:!?'"()\[\]{}<>*_~])""",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """Markdown that shows a text on one line and within one cell of a table; what can't be seen is escaped, and what
    would become a link is code."""
    parts = _LINK.split(visible(text).strip())
    return "".join(f"`{part}`" if number % 2 else part.translate(_MARKS) for number, part in enumerate(parts))

"""The model card: an output's README.md, which the hub shows and reads its front matter.

Knows: the hub's front matter, Markdown, what of a recipe is for everybody's eyes. Refuses to know: how a recipe came to
be, how pictures are drawn, the network.
"""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from modules.checkpoints import is_licence, local_files
from modules.config import GGUF, names_folder, repositories_in
from modules.output.card_settings import phrases_yaml, settings_yaml
from modules.output.recipe import RECIPE_FILE, Recipe
from modules.output.records import Phrase, Sample, Source, Total
from modules.runtime import counted, ended, percent, shortened, spans, visible

CARD_FILE = "README.md"
MOST_PHRASES = 60  # in the table; of more, those that changed most
MOST_COLUMNS = 160  # of a phrase or a context in the table; of a longer one the end is shown
MOST_ANSWER = 2000  # columns of a prompt or an answer; of a longer one the beginning is shown
MOST_SETTINGS = 50_000  # characters of YAML that are shown; they all are in the recipe too

_LARGEST_CARD = 100_000  # characters of the base's card that are looked at for its licence


@dataclass(frozen=True)
class Licence:
    """What there is about the licence of a base."""

    files: tuple[str, ...] = ()  # its texts, by the names that they have in the output too
    stated: tuple[str, ...] = ()  # in the front matter of the base's card


def write_card(folder: Path, recipe: Recipe, name: str, base_path: Path, pictures: tuple[str, str]) -> None:
    """Write the model card of an output, in the folder in which it is being written.

    name: the output's. base_path: the base model's folder. pictures: see `model_card`; one that could not be made is
    left out. Raises OSError if it can't be written.
    """
    made = tuple(picture if (folder / picture).is_file() else None for picture in pictures)
    card = model_card(recipe, name, licence_of(base_path, folder), made)
    (folder / CARD_FILE).write_text(card, encoding="utf-8", newline="\n")


def model_card(recipe: Recipe, name: str, licence: Licence, pictures: Sequence[str | None]) -> str:
    """The text of a model card. licence: the base's.

    pictures: the names of the merge map's file and of the phrase chart's, beside the card; None for one that is not.
    """
    merge_map, phrase_chart = pictures
    mapped = "The share of every model in each layer" if recipe.joint else "The models that every layer is made of"
    sections = [
        _front_matter(recipe),
        f"# {_plain(name)}",
        _introduction(recipe),
        "## Composition",
        _composition(recipe),
        merge_map and f"![{mapped}]({merge_map})",
        "## Phrases",
        _about_phrases(recipe),
        _phrases(recipe),
        phrase_chart and f"![Every phrase's probability before and after the merge]({phrase_chart})",
        *_samples(recipe),
        "## Licence",
        _about_licence(recipe, licence),
        "## Settings",
        *_settings(recipe),
        "## Building it again",
        _rebuilding(recipe),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def licence_of(base: Path, folder: Path) -> Licence:
    """What there is about the licence of a base; folder: to which its files were copied."""
    files = tuple(file for file in local_files(folder) if is_licence(file))
    with suppress(OSError, ValueError):  # what can't be read, or is no text, states nothing here
        if (base / CARD_FILE).is_file():
            with (base / CARD_FILE).open(encoding="utf-8-sig") as card:
                return Licence(files, _stated_in(card.read(_LARGEST_CARD)))
    return Licence(files)


def _stated_in(card: str) -> tuple[str, ...]:
    """The licences in a card's front matter, which may be hostile: its YAML is looked at, and nothing is made of it."""
    front_matter = re.match(r"\s*---\n(.*?)\n---", card, re.DOTALL)
    try:
        root = yaml.compose(front_matter[1], Loader=yaml.SafeLoader) if front_matter else None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):  # of a wrong escape, too deep a nesting
        return ()
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    values = [value for key, value in pairs if key.value in ("license", "license_name")]
    items = [item for value in values for item in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    return tuple(item.value for item in items if isinstance(item, yaml.ScalarNode) and item.value)


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
    return f"---\n{data.to_yaml()}\n---"


def _introduction(recipe: Recipe) -> str:
    settings, base = recipe.settings, recipe.sources[0]
    taken, candidates = len(recipe.needed_sources) - 1, counted(len(recipe.sources) - 1, "candidate")
    improved, phrases = recipe.improved, counted(len(recipe.phrases), "phrase")
    before, after = _percents(recipe.total)
    way, strategy = ("all at once", "joint") if recipe.joint else ("layer by layer", settings.strategy)
    return (
        f"A merge of {taken} of {candidates} into {_named(base)}, made {way} with Merge Monster "
        f"{_plain(recipe.program)}. {_about_search(recipe)} {improved} of {phrases} improved; the total score (lower "
        f"is better) went from {before} to {after}. Strategy: {strategy}; merge methods: "
        f"{', '.join(settings.merge_method)}; {_about_layers(recipe)}computed in {recipe.dtype}."
        f"{_about_held_out(recipe)}"
    )


def _about_layers(recipe: Recipe) -> str:
    layers = recipe.settings.layers
    return f"layers searched: {', '.join(spans(layers))}, counted from 0; " if layers else ""


def _about_search(recipe: Recipe) -> str:
    """How the merge was found, in a sentence."""
    if recipe.joint is None:
        return (
            "Every merge of a layer was tried, and kept only where it made unwanted phrases less probable or wanted "
            "ones more so."
        )
    steps = counted(len(recipe.joint.steps), "step")
    layers = f"{'some' if recipe.settings.layers else 'all'} layers"
    return (
        f"The shares of all candidates in {layers} were sought together, by gradient, in {steps} towards unwanted "
        f"phrases less probable and wanted ones more so."
    )


def _about_held_out(recipe: Recipe) -> str:
    if recipe.held_out is None:
        return ""
    count, (before, after) = counted(len(recipe.held_out.phrases), "phrase"), _percents(recipe.held_out.total)
    return f" {count} more, which the search never saw, went from a total of {before} to {after}."


def _composition(recipe: Recipe) -> str:
    sources = {source.name: source for source in recipe.sources}
    rows = [("model", "share", "from")]
    for name, share in recipe.composition.items():
        rows.append((_plain(name), f"{share * 100.0:.2f}%", _origin(sources[name].where) if name in sources else ""))
    negative = min(recipe.composition.values(), default=0) < 0
    lines = ["The base's share is negative where those of the candidates add up to more than 1."] if negative else []
    return "\n\n".join([_table(rows), *lines, *_about_candidates(recipe)])


def _about_candidates(recipe: Recipe) -> list[str]:
    """Lines about candidates that a reader might look for in the composition, or think to be there as a whole."""
    needed, failed = recipe.needed_sources, recipe.failures
    untaken = [_named(source) for source in recipe.sources if source not in needed]
    broken = [_named(source) for source in recipe.sources if str(source.number) in failed]
    lines = [f"Tried, but nothing of it was kept: {', '.join(untaken)}."] if untaken else []
    return lines + ([f"Could not be read to the end: {', '.join(broken)}."] if broken else [])


def _about_phrases(recipe: Recipe) -> str:
    text = (
        "How probable it is that the model goes on with the phrase after the context, in the base and in this model. "
        "Bad phrases should be less probable, good ones more."
    )
    count = len(recipe.phrases)
    return text if count <= MOST_PHRASES else f"{text} Of {count:,} phrases, the {MOST_PHRASES} that changed most."


def _phrases(recipe: Recipe) -> str:
    rows = [("", "phrase", "context", "weight", "before", "after")]
    for phrase in _changed_most(recipe.phrases):
        texts = _excerpt(phrase.phrase), _excerpt(phrase.shown) or "*the beginning of a text*"
        rows.append((phrase.kind.lower(), *texts, f"{abs(phrase.weight):g}", *_percents(phrase)))
    return _table([*rows, ("", "**all phrases: bad - good, times weight**", "", "", *_percents(recipe.total))])


def _percents(figures: Phrase | Total) -> tuple[str, str]:
    """Before and after."""
    return percent(figures.before, rounding=figures.rounding), percent(figures.after, rounding=figures.rounding)


def _changed_most(phrases: Sequence[Phrase]) -> list[Phrase]:
    """As many as a card shows, in their own order: those whose weighted probability moved furthest."""
    changes = [abs((phrase.after - phrase.before) * phrase.weight) for phrase in phrases]
    chosen = sorted(range(len(phrases)), key=changes.__getitem__, reverse=True)[:MOST_PHRASES]
    return [phrases[number] for number in sorted(chosen)]


def _samples(recipe: Recipe) -> list[str]:
    """What base and merge have answered; nothing where nobody asked."""
    if not recipe.samples:
        return []
    about = "What the base and this model answer to the same prompts, drawn with the same seed."
    return ["## Samples", about, *map(_sample, recipe.samples)]


def _sample(sample: Sample) -> str:
    """A quoted block of three paragraphs. Each is one line that begins with a word of ours: no text begins a block."""
    texts = ("Prompt", sample.prompt), ("Base", ended(sample.base)), ("Merge", ended(sample.merge))
    return "\n>\n".join(f"> **{name}:** {_paragraph(text)}" for name, text in texts)


def _paragraph(text: str) -> str:
    lines = shortened(text.strip(), MOST_ANSWER, "start").splitlines()
    return "<br>".join(map(_plain, lines)) or "*nothing*"


def _about_licence(recipe: Recipe, licence: Licence) -> str:
    repositories = repositories_in(recipe.sources[0].where)
    lines = [f"The base is {_link(repo)}; its licence is stated there." for repo, _ in repositories]
    if licence.stated:
        lines.append(f"The base's card states its licence as {_excerpt(', '.join(licence.stated))}.")
    if licence.files:
        lines.append(f"The base's licence files lie beside this page: {', '.join(map(_plain, licence.files))}.")
    lines.append("Merge Monster states no licence for this model: look at those of all models in the composition.")
    return " ".join(lines)


def _settings(recipe: Recipe) -> list[str]:
    """What another search needs to find the same, with the phrases folded away."""
    pairs = counted(len(recipe.phrases) + len(recipe.held_out.phrases if recipe.held_out else ()), "pair")
    summary = f"<details>\n<summary>The phrase lists: {pairs} of a phrase and a context</summary>"
    lists = [summary, _yaml(phrases_yaml(recipe)), "</details>"]
    return ["The models, and all that is not the default:", _yaml(settings_yaml(recipe)), *lists]


def _yaml(text: str) -> str:
    return (
        _fenced("yaml", text) if len(text) <= MOST_SETTINGS else f"It is too long for this page: see `{RECIPE_FILE}`."
    )


def _rebuilding(recipe: Recipe) -> str:
    folders = [visible(source.name) for source in recipe.needed_sources if names_folder(source.where)]
    command = ["python", "merge_monster.py", "--replay", RECIPE_FILE, "--output", "rebuilt"]
    command += ["--trust-remote-code"] if recipe.settings.trust_remote_code else []
    command += [word for name in folders for word in ("--source", f"{name}=PATH")]
    held = "share" if recipe.joint else "decision"
    text = f"`{RECIPE_FILE}` has every {held}. Merge Monster builds the same model from it without a search"
    where = ", PATH being where the model lies:" if folders else ":"
    return f"{text}{where}\n\n{_fenced('sh', shlex.join(command))}"


def _named(source: Source) -> str:
    """A model within a sentence: links, if all of it is on the hub."""
    return (
        _plain(source.name)
        if names_folder(source.where)
        else " with ".join(_link(repo) for repo, _ in repositories_in(source.where))
    )


def _origin(where: str) -> str:
    """Where a model comes from; of a folder no more than that it is one, since its path is nobody's business."""
    places = [f"{_link(repo)} at `{commit}`" for repo, commit in repositories_in(where)]
    here = "a local GGUF file" if where.lower().endswith(GGUF) else "a local folder"
    return " and ".join([*places, here] if names_folder(where) else places)


def _link(repo: str) -> str:
    return f"[{_plain(repo)}](https://huggingface.co/{repo})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that are Markdown already; the first is the header."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body))


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

"""The model card: an output's README.md. The hub shows it and reads its front matter.

Knows: the hub's front matter, Markdown, which parts of a recipe are public. Refuses to know: how a recipe was made,
which metrics exist, how pictures are drawn, the network.
"""

import math
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from string import Template

from huggingface_hub import ModelCardData

from modules.config.locations import names_folder, repositories_in
from modules.metrics.kl import NATS
from modules.metrics.registry import columns_of
from modules.output.card_settings import settings_yaml
from modules.output.front import best_candidate
from modules.output.recipe import RECIPE_FILE, Recipe
from modules.output.records import Phrase, Source
from modules.output.tables import sample_lines
from modules.runtime.console import visible
from modules.runtime.text import brief_percent, pluralize, shortened, whole_sentences
from modules.search.strategies import total

CARD_FILE = "README.md"
DRIFTS = ("kl", "own_kl")
MOST_PHRASES = 60  # in the table
MOST_COLUMNS = 160  # of a phrase or a context in the table; a longer one is cut to its end

CARD = """\
---
${front_matter}
---

# $name

A merge of $taken of $candidates into $base, made with Merge Monster $program. $how $improved of $phrases improved.

$summary

## Composition

$composition

$unused

$merge_map

## Metrics

Totals are sums of probability times weight, bad phrases minus good ones. KL is in nats per token.

$metrics

## Phrases

Probability of each phrase after its context, in the base and in this model. Bad phrases should become less probable, \
good ones more. Of more than $most pairs, those that changed most.

$phrase_table

$phrase_chart

$samples

## Use

PATH: this folder, or its id on the hub.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto", device_map="auto"$trusted)
tokenizer = AutoTokenizer.from_pretrained("PATH"$trusted)
inputs = tokenizer("It was a quiet evening, and", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

## Licence

$licence The base's licence files, if any, are included.

## Settings

Non-default settings; `merge_monster.yaml` has them with all phrases:

$settings

## Reproduce

Merge Monster rebuilds this model from `$recipe_file` without a search. PATH: where the model is.

$command

$export
"""

EXPORT = """\
<details>
<summary>The same merge for mergekit</summary>

Replace the names of local models with their paths.

$yaml

</details>"""

GREEDY = "Each layer's merge was kept only if it scored better (strategy: $strategy; merge method: $methods)."
JOINT = (
    "Per-layer merge weights were optimized jointly by gradient to make unwanted phrases less likely and wanted ones "
    "more likely."
)
UNKNOWN_LICENCE = "Check the licences of all source models and add `license:` to this page."


def model_card(
    recipe: Recipe, name: str, pictures: Sequence[str | None], licence: str | None = None, export: str = ""
) -> str:
    """The text of a model card. name: the output's. pictures: the names of the files of merge map and phrase chart;
    None for a missing one. licence: the one that all models state. export: the recipe as a file for mergekit; empty if
    there is none."""
    settings = recipe.settings
    needed = recipe.needed_sources
    unused = [_link(source) for source in recipe.sources if source not in needed]
    merge_map, phrase_chart = pictures
    values = card_values(recipe, name, licence) | {
        "front_matter": front_matter(recipe, "transformers", "merge", licence),
        "taken": len(needed) - 1,
        "candidates": pluralize(len(recipe.sources) - 1, "candidate"),
        "strategy": settings.strategy,
        "methods": ", ".join(settings.merge_method),
        "composition": _composition(recipe),
        "unused": f"Candidates not used: {', '.join(unused)}." if unused else "",
        "merge_map": f"![What each layer is made of]({merge_map})" if merge_map else "",
        "phrase_chart": f"![Every phrase before and after the merge]({phrase_chart})" if phrase_chart else "",
        "trusted": ", trust_remote_code=True" if settings.trust_remote_code else "",
        "recipe_file": RECIPE_FILE,
        "command": fenced("sh", _command(recipe)),
        "export": filled(EXPORT, {"yaml": fenced("yaml", export)}) if export else "",
    }
    return filled(CARD.replace("$how", JOINT if recipe.joint else GREEDY), values)


def card_values(recipe: Recipe, name: str, licence: str | None, answerer: str = "merge") -> dict[str, object]:
    """The values that the cards of all outputs contain, by their names in the templates. answerer: the name of the
    model that answered the samples beside the base."""
    return {
        "name": _escaped(name),
        "base": _link(recipe.sources[0]),
        "program": _escaped(recipe.program),
        "improved": recipe.improved,
        "phrases": pluralize(len(recipe.phrases), "pair"),
        "summary": _summary(recipe),
        "metrics": _metrics(recipe),
        "most": MOST_PHRASES,
        "phrase_table": _phrases(recipe.phrases),
        "samples": _samples(recipe, answerer) if recipe.samples else "",
        "licence": f"All source models state `{licence}`." if licence else UNKNOWN_LICENCE,
        "settings": fenced("yaml", settings_yaml(recipe, name)),
    }


def filled(template: str, values: Mapping[str, object]) -> str:
    """A card from its template. Empty paragraphs are left out."""
    paragraphs = [Template(paragraph).substitute(values) for paragraph in template.split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def front_matter(recipe: Recipe, library: str, relation: str, licence: str | None) -> str:
    """The front matter. The hub accepts only its own ids as base models: folders are named in the text only.

    library: the one that opens the output. relation: of the output to its base models. licence: the output's, if known.
    """
    repositories = [repo for source in recipe.needed_sources for repo, _ in repositories_in(source.where)]
    data = ModelCardData(
        base_model=list(dict.fromkeys(repositories)) or None,
        # With one base model the hub would take the output for a fine-tune.
        base_model_relation=relation if repositories else None,
        library_name=library,
        license=licence,
        pipeline_tag="text-generation",
        tags=[relation, "mergemonster"],
    )
    return data.to_yaml()


def _composition(recipe: Recipe) -> str:
    models = {source.name: _link(source) for source in recipe.sources}
    rows = [(models.get(name) or _escaped(name), f"{weight:.1%}") for name, weight in recipe.composition.items()]
    return _table(("model", "weight"), rows)


def _summary(recipe: Recipe) -> str:
    """A sentence on how phrases and drift changed; empty without any."""
    parts = []
    for adjective, kind in (("unwanted", "BAD"), ("wanted", "GOOD")):
        for noun, pairs in (("phrases", recipe.phrases), ("held-out phrases", recipe.held_out)):
            phrases = [pair for pair in pairs if pair.kind == kind]
            if phrases:
                base_total = abs(total([pair.before * pair.weight for pair in phrases]))
                merge_total = abs(total([pair.after * pair.weight for pair in phrases]))
                change = f" ({merge_total / base_total - 1:+.0%})" if 0 < base_total < math.inf else ""
                (column,) = columns_of({"total": base_total})
                parts.append(f"{adjective} {noun} {column.text(base_total)} → {column.text(merge_total)}{change}")
    metrics = recipe.metrics["merge"]
    for column in columns_of(metrics):
        if column.name in DRIFTS:
            parts.append(f"{column.label} {column.text(metrics[column.name])}")
    text = ", ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if parts else ""


def _metrics(recipe: Recipe) -> str:
    """The metrics of the base, of the candidate that is best alone (if any was scored alone) and of the output."""
    models = {"base": recipe.metrics["base"]}
    weight = recipe.settings.weight_of_drift
    if weight == "auto":
        weight = total([abs(pair.before * pair.weight) for pair in recipe.phrases]) / NATS
    baseline_names = {source.number: source.name for source in recipe.sources if str(source.number) in recipe.baselines}
    for number in best_candidate(recipe, [*baseline_names], weight):
        models[f"{_escaped(baseline_names[number])} alone"] = recipe.baselines[str(number)]
    models["this model"] = recipe.metrics["merge"]
    rows = []
    for column in columns_of(models["base"], models["this model"]):
        if not column.shown_as:  # else another column shows the same metric on held-out text
            values = [column.text(metrics.get(column.name)) for metrics in models.values()]
            rows.append((_escaped(column.label), *values))
    return _table(("metric", *models), rows)


def _phrases(phrases: Sequence[Phrase]) -> str:
    """The table of the phrases whose weighted probability changed most, in their order."""
    changes = [abs((phrase.after - phrase.before) * phrase.weight) for phrase in phrases]
    changed_most = sorted(range(len(phrases)), key=changes.__getitem__, reverse=True)[:MOST_PHRASES]
    rows = []
    for phrase in [phrases[number] for number in sorted(changed_most)]:
        texts = [_escaped(shortened(text, MOST_COLUMNS)) for text in (phrase.phrase, phrase.shown)]
        figures = [brief_percent(value, phrase.rounding) for value in (phrase.before, phrase.after)]
        rows.append((phrase.kind.lower(), *texts, f"{abs(phrase.weight):g}", *figures))
    return _table(("", "phrase", "context", "weight", "before", "after"), rows)


def _samples(recipe: Recipe, answerer: str) -> str:
    """The section with the samples. Answers that were broken off end with their last whole sentence."""
    samples = []
    for sample in recipe.samples:
        cut_answers = {model: whole_sentences(getattr(sample, model)) for model in sample.broken_off}
        samples.append(sample.model_copy(update=cut_answers))
    lines = [textwrap.fill(line, 100, subsequent_indent=" " * 9) for line in sample_lines(samples, answerer)]
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
    """A model's name in a sentence, as links if all of it is on the hub."""
    if names_folder(source.where):
        return _escaped(source.name)
    repositories = [repo for repo, _ in repositories_in(source.where)]
    return " with ".join(f"[{_escaped(repo)}](https://huggingface.co/{repo})" for repo in repositories)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown. rows: their cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def fenced(language: str, text: str) -> str:
    """A fenced block that shows a text verbatim, even if it has fences; invisible characters are escaped."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *map(visible, text.rstrip().split("\n")), fence])


# Characters with a meaning in Markdown. An escaped backslash may begin a formula on the hub, so it is an entity.
_MARKS = str.maketrans({"\\": "&#92;", **{mark: f"\\{mark}" for mark in "`*_[]<>|~&$#"}})


def _escaped(text: str) -> str:
    """Markdown that shows a text on one line, in one cell of a table; invisible characters are escaped."""
    return visible(text).strip().translate(_MARKS)

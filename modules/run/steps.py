"""Steps that runs have in common.

Knows: libraries, saving, the files beside the weights. Refuses to know: searching.
"""

import os
import re
import shlex
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch
import transformers

from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.downloads import remove_downloads
from modules.checkpoints.open_models import Models
from modules.config.phrase_lists import Chat
from modules.config.schema import Config
from modules.metrics.own_answers import prompts_of
from modules.model.base_model import ResidentModel
from modules.model.loading import ModelLoader
from modules.output.card_settings import settings_file
from modules.output.changes import compare_fingerprints, rendered_in
from modules.output.export import Needed, exported
from modules.output.folder import SETTINGS_FILE, Unfinished
from modules.output.licence import common_licence
from modules.output.model_card import CARD_FILE, model_card
from modules.output.plots import MERGE_MAP_FILE, PHRASE_CHART_FILE, merge_map, phrase_chart
from modules.output.recipe import Recipe, write_recipe
from modules.output.run_record import RunRecord
from modules.runtime.console import Console
from modules.runtime.distributed import Group
from modules.runtime.errors import CheckpointError, ConfigError, first_line, naming
from modules.runtime.program import postponed
from modules.runtime.text import pluralize
from modules.scoring.chats import (
    CONTEXTS,
    Asked,
    Rendered,
    asked_of,
    chat_of,
    chats_of,
    check_refusals,
    has_template,
    render,
    with_texts,
    within_thoughts,
)
from modules.search.rebuild import Rebuild

LARGEST_LOOKED_AT = 1_000_000  # bytes of a file searched for paths; vocabularies are larger, and have none


def with_chats_rendered(loader: ModelLoader, models: Models, earlier_config: Config | None = None) -> ModelLoader:
    """A loader whose configuration has the chats as the base's template renders them. Otherwise as `ask`."""
    return ask(loader, models, earlier_config, with_prompts=False)[0]


def ask(
    loader: ModelLoader,
    models: Models,
    earlier_config: Config | None = None,
    with_prompts: bool = True,
    extra_prompts: Sequence[str] = (),
) -> tuple[ModelLoader, Asked]:
    """A loader whose configuration has the chats as the base's template renders them; the prompts as it reads them.

    earlier_config: that of a resumed run. Chats that it rendered are kept: a template may print today's date.
    extra_prompts: in addition to the configuration's. Raises ConfigError for a chat that can't be rendered. A prompt
    that can't be rendered is no reason to lose a merge: a warning names it, and it is left out.
    """
    base = models.base
    config = loader.config
    earlier_texts = rendered_in(earlier_config) if earlier_config else {}
    new_chats = [chat for chat in chats_of(config) if chat not in earlier_texts]
    if not new_chats and not with_prompts:
        return replace(loader, config=with_texts(config, earlier_texts)), Asked()
    tokenizer = load_tokenizer(base.path, base.companions)
    prompts = dict.fromkeys(
        [*(prompts_of(config, has_template(tokenizer)).all if with_prompts else ()), *extra_prompts]
    )
    chats = dict.fromkeys(new_chats, CONTEXTS)
    for prompt in prompts if has_template(tokenizer) else ():
        chats[chat_of(prompt)] = "samples" if prompt in (config.samples or ()) else "own_texts"
    rendered = render(tokenizer, config.directories.model_path1, chats, config.template, config.system)
    check_refusals([rendered.refusals[chat] for chat in new_chats if chat in rendered.refusals], "contexts")
    for refusal in list(rendered.refusals.values())[:1]:  # the others mostly have the same reason
        count = pluralize(len(rendered.refusals), "prompt")
        loader.console.warning(f"skipping {count}: {refusal}")
    loader.console.warnings(_scored_in_thoughts(rendered, new_chats))
    texts = earlier_texts | {chat: rendered.texts[chat] for chat in new_chats}
    return replace(loader, config=with_texts(config, texts)), asked_of(tokenizer, rendered, prompts)


def _scored_in_thoughts(rendered: Rendered, contexts: Sequence[Chat]) -> list[str]:
    """A warning if the template opens a thought, so that phrases are scored inside it."""
    chats_within = [chat for chat in within_thoughts(rendered) if chat in contexts]
    if not chats_within:
        return []
    switch = rendered.thoughts.switch
    closing = rendered.thoughts.closing(rendered.texts[chats_within[0]].removesuffix(chats_within[0].answer)).strip()
    remedies = [f"template: {{{switch}: false}}"] * bool(switch) + [f"continue: {closing}..."] * bool(closing)
    instead = f"; to score them in the answer, set {' or '.join(remedies)}" if remedies else ""
    count = pluralize(len(chats_within), "chat context")
    return [f"the chat template opens a thinking block, so the phrases of {count} are scored inside it{instead}"]


def save(console: Console, rebuild: Rebuild, base: Checkpoint, unfinished: Unfinished, output: str) -> None:
    """Write a model. output: its final folder."""
    console.timed(f"Saving to {output}")
    with naming(unfinished.folder):
        rebuild.save(unfinished.folder)
    console.lines(base.companions.describe())


def finish(
    console: Console,
    unfinished: Unfinished,
    recipe: Recipe,
    output: Path,
    layout: ResidentModel,
    needed: Needed,
    overwrite: bool,
) -> None:
    """Write the recipe, the settings as a file to run again, two pictures and a model card; then commit the output.

    layout: the base, without weights.
    """
    base = layout.checkpoint
    folder = unfinished.folder
    console.timed("Writing recipe, pictures and model card")
    write_recipe(folder, recipe)
    with naming(folder / SETTINGS_FILE):
        (folder / SETTINGS_FILE).write_text(settings_file(recipe, output.name), encoding="utf-8", newline="\n")
    writers = {
        MERGE_MAP_FILE: lambda: merge_map(recipe, folder / MERGE_MAP_FILE),
        PHRASE_CHART_FILE: lambda: phrase_chart(recipe, folder / PHRASE_CHART_FILE),
        CARD_FILE: lambda: write_card(folder, recipe, output.name, layout, needed),
    }
    for file, write in writers.items():
        try:
            with naming(folder / file):
                write()
        except Exception as error:  # no reason to lose a merge
            (folder / file).unlink(missing_ok=True)
            console.warning(f"could not make {file} ({first_line(error)})")
    console.warnings(_paths_of_the_base(folder, base))
    with postponed(lambda: None):  # it takes a moment, in which Ctrl-C is not heard unless it comes twice
        console.warnings(unfinished.commit(overwrite))


def write_card(folder: Path, recipe: Recipe, name: str, layout: ResidentModel, needed: Needed) -> None:
    """Write the card of an output. It omits pictures that could not be made, and mergekit's file if mergekit can't
    reproduce the merge."""
    base = layout.checkpoint
    repositories = [base.repository]
    for _, candidate in needed:
        repositories += candidate.repositories
    licence = common_licence(repository.folder for repository in repositories)
    names = {source.number: source.where for source in recipe.sources}
    export = ""
    with suppress(CheckpointError, ConfigError):
        export = exported(recipe, base, needed, layout, names) if needed else ""
    pictures = [file if (folder / file).is_file() else None for file in (MERGE_MAP_FILE, PHRASE_CHART_FILE)]
    text = model_card(recipe, name, pictures, licence, export)
    (folder / CARD_FILE).write_text(text, encoding="utf-8", newline="\n")


def _paths_of_the_base(folder: Path, base: Checkpoint) -> list[str]:
    """A warning for each copied file of the base that contains a path of this machine."""
    machine_paths = {os.path.expanduser("~"), os.getcwd(), str(base.path.resolve().parent)} - {os.sep}
    pattern = rf"(?<![\w.~/-])(?:{'|'.join(map(re.escape, machine_paths))})(?![\w-])[^\s\"',;:]*"
    lines = []
    for name in (name for name, size in base.companions.published.items() if size <= LARGEST_LOOKED_AT):
        with naming(folder / name):
            path = re.search(pattern, (folder / name).read_text(encoding="utf-8", errors="replace"))
        if path:
            lines.append(
                f"{name}, copied from the base, contains the path {path[0]}; check it before you publish the output"
            )
    return lines


def end(console: Console, config: Config, models: Models, output: str = "") -> None:
    """Remove the downloads that are not to be kept, and print the last lines. output: a folder to publish."""
    if not config.keep_downloads:
        candidates = [repository for candidate in models.candidates for repository in candidate.repositories]
        remove_downloads(console, [models.base.repository, *candidates])
    if output:
        console.line(f"To publish it: {shlex.join(['hf', 'upload', 'ORG/NAME', output, '--private'])}")
    console.final(f"Done. The log is {console.log_path}")


def prepare_libraries(seed: int) -> None:
    """Make results reproducible, and silence the libraries."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("ignore", category=FutureWarning)  # from the libraries, about their later versions
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()


def note_source(record: RunRecord, group: Group, number: int, where: str, checkpoint: Checkpoint) -> None:
    """Note a model's source by its number. Raises ConfigError if an earlier run or another process has another one."""
    noted = group.broadcast(group.on_all_ranks(lambda: record.source(number, where, checkpoint)))
    difference = f"differs between process {group.rank.number} and process 0"

    def compare() -> None:
        if not group.rank.is_main_process:
            compare_fingerprints(noted, checkpoint, difference)

    group.on_all_ranks(compare)

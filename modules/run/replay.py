"""Builds a model again from a recipe: the sources, the decisions, and no search.

Knows: the order of the steps. Refuses to know: phrases, scores, how a decision was taken.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.downloads import Prefetcher, check_space, fetching
from modules.checkpoints.open_models import Models
from modules.config.inputs import check_apart, input_paths
from modules.config.locations import parse_source
from modules.config.schema import Config, Directories
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import ResidentModel
from modules.model.devices import present_devices, resolve_device
from modules.model.loading import ModelLoader
from modules.output.changes import compare_fingerprints
from modules.output.folder import OutputFolder, check_output, locked_output, unfinished_output, written_paths
from modules.output.recipe import Recipe, find_source, folders_near, folders_of, read_recipe
from modules.output.records import Source
from modules.run.steps import end, finish, prepare_libraries, save
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError
from modules.search.rebuild import Rebuild


@dataclass(frozen=True)
class Replay:
    """What the command line requests."""

    recipe: Path
    output: Path
    device: str | None  # None: the recipe's, if this machine has it
    elsewhere: Mapping[str, str]  # a source's name in the recipe -> its present location
    folders: Sequence[Path] = ()  # that contain sources under their own names
    overwrite: bool = False
    trust_remote_code: bool = False  # whether code that comes with the recipe's models may run


def replay_recipe(request: Replay, console: Console) -> None:
    """Carry out a recipe's decisions on its sources and save the result.

    Raises ConfigError for what can't be used, found before any work; CheckpointError or OSError if a file fails.
    """
    recipe = recipe_of(request)
    config = opened_with(request, recipe)
    prepare_libraries(config.random_seed)
    check_apart(written_paths(request.output), [request.recipe, *input_paths(config)])
    with locked_output(request.output, console) as target:
        check_output(target, request.overwrite)
        loader = ModelLoader(config, console, compute=Arithmetic.named(recipe.dtype))
        models = loader.open()
        check_space(models.jobs)
        _rebuild(request, recipe, loader, target, models)
    end(console, config, models, str(request.output))


def recipe_of(request: Replay) -> Recipe:
    """Read the recipe. Raises ConfigError if it is none, or if it runs code and the request does not trust it."""
    recipe = read_recipe(request.recipe)
    if recipe.settings.trust_remote_code and not request.trust_remote_code:
        raise ConfigError(
            f"{request.recipe}: this recipe runs Python code that comes with its models; add --trust-remote-code if "
            "you trust it"
        )
    return recipe


def candidates_of(recipe: Recipe, models: Models) -> list[tuple[Source, Candidate]]:
    """The candidates with accepted merges, and their sources. Raises ConfigError if not all were found."""
    _, *sources = recipe.needed_sources
    if len(models.candidates) != len(sources):
        raise ConfigError(f"the recipe needs {len(sources)} candidates, but {len(models.candidates)} were found")
    return list(zip(sources, models.candidates, strict=True))


def check_source(source: Source, checkpoint: Checkpoint) -> None:
    """Raise ConfigError if a model's files, once they are all here, are not those that the recipe was made of."""
    if not checkpoint.job.absent:
        compare_fingerprints(source, checkpoint, "has changed since the recipe was written")


def _rebuild(request: Replay, recipe: Recipe, loader: ModelLoader, target: OutputFolder, models: Models) -> None:
    """Merge what the recipe accepted, and move the result to the output."""
    console = loader.console
    base = models.base
    candidates = candidates_of(recipe, models)
    with (
        unfinished_output(target, searching=False) as unfinished,
        fetching(console, models.jobs) as prefetcher,
    ):
        prefetcher.wait(0)
        check_source(recipe.sources[0], base)
        if loader.device != recipe.device:
            console.line(f"The recipe was made on {recipe.device}; the last digits may differ on {loader.device}")
        tokenizer = partial(load_tokenizer, base.path, base.companions)
        layout = loader.layout(models)
        devices = dict.fromkeys(layout.tensors, resolve_device(loader.device))
        rebuild = rebuild_of(recipe, layout, devices, tokenizer, _fetched(console, prefetcher, candidates))
        save(console, rebuild, base, unfinished, str(request.output))
        finish(console, unfinished, recipe, target.output, layout, candidates, request.overwrite)


def _fetched(
    console: Console, prefetcher: Prefetcher, candidates: Sequence[tuple[Source, Candidate]]
) -> Iterator[tuple[Source, Candidate]]:
    """Yield each candidate and its source once it is fetched. Raises ConfigError if it is not the recipe's."""
    for number, (source, candidate) in enumerate(candidates, start=1):
        prefetcher.wait(number)
        check_source(source, candidate.checkpoint)
        console.timed(f"Candidate {number}/{len(candidates)}: {source.name}")
        yield source, candidate


def rebuild_of(
    recipe: Recipe,
    layout: ResidentModel,
    devices: Mapping[str, torch.device],
    tokenizer: Callable[[], Any],
    candidates: Iterable[tuple[Source, Candidate]],
) -> Rebuild:
    """Build the object that writes a recipe's model. candidates: those with accepted merges; the others: see `Rebuild`.

    Raises as `Rebuild.repeat`.
    """
    rebuild = Rebuild(layout, devices, tokenizer)
    if recipe.joint is None:
        for source, candidate in candidates:
            rebuild.repeat(candidate, [line.decision for line in recipe.accepted_of(source.number)])
        return rebuild
    rebuild.mix([candidate for _, candidate in candidates], recipe.needed_weights)
    return rebuild


def opened_with(request: Replay, recipe: Recipe) -> Config:
    """The configuration to open the models with. Raises ConfigError for a source that the recipe does not have."""
    sources = recipe.needed_sources
    folders = folders_of(request.recipe, request.folders)
    unknown = sorted(request.elsewhere.keys() - {source.name for source in recipe.sources})
    if unknown:
        names = ", ".join(source.name for source in sources)
        raise ConfigError(f"--source {unknown[0]}: the recipe has no such model; it has {names}")

    def find_folder(where: str) -> str | None:
        # Nearby folders are listed only if needed: there may be very many.
        return find_source(where, folders) or find_source(where, [*folders, *folders_near(folders)])

    texts = []
    missing = []
    for source in sources:
        text = request.elsewhere.get(source.name) or find_folder(source.where)
        texts.append(text)
        if text is None or parse_source(text) is None:
            missing.append(f"{source.name} ({text})" if text else source.name)
    tokenizer = recipe.settings.tokenizer and find_folder(recipe.settings.tokenizer)
    if recipe.settings.tokenizer and not tokenizer:
        missing.append(f"the tokenizer {recipe.settings.tokenizer}")
    if missing:
        searched_folders = ", ".join(map(str, dict.fromkeys(folders)))
        remedies = "add --source DIR for a folder that contains them, or --source NAME=PATH for each"
        raise ConfigError(f"not found in or near {searched_folders}: {', '.join(missing)}; {remedies}")
    device = request.device or (recipe.device if recipe.device in present_devices() else "auto")
    return Config(
        directories=Directories(texts[0], str(request.output)),
        models_to_merge=tuple(texts[1:]),
        tokenizer=tokenizer,
        device=device,
        dtype=recipe.saved_dtype or "auto",
        random_seed=recipe.settings.random_seed,
        trust_remote_code=recipe.settings.trust_remote_code,
    )

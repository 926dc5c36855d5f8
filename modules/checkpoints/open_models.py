"""The models of a run: found, opened, and checked as far as this needs no weights.

Knows: which models a configuration names, where their files are, that they must fit. Refuses to know: devices, scores,
printing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from modules.checkpoints.architecture import settle_attention, without_weights
from modules.checkpoints.candidate import Candidate, adapt, check_base, check_configuration, open_candidate
from modules.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_configuration
from modules.checkpoints.companions import ADAPTER_SETTINGS
from modules.checkpoints.downloads import Job
from modules.checkpoints.gguf_files import open_gguf
from modules.checkpoints.hub import Repository, find, local
from modules.checkpoints.lora import WEIGHTS as ADAPTER_WEIGHTS
from modules.checkpoints.lora import open_adapter, read_settings
from modules.checkpoints.sniff_format import found_instead
from modules.checkpoints.weight_files import LARGEST_SETTINGS, holds_weights, local_files, weight_files
from modules.config.locations import Location, Source, names_of, parse_location, parse_source, partial_of
from modules.config.schema import Config
from modules.runtime.errors import ConfigError

Fetch = Callable[[Job], None]  # returns when a job's files are downloaded
Tell = Callable[[Sequence[str]], None]  # prints lines while models are opened


@dataclass(frozen=True)
class Models:
    """A base and the candidates that fit it; weights of the hub may still be missing."""

    base: Checkpoint
    module: PreTrainedModel  # the base's, without weights
    candidates: list[Candidate]
    notes: list[str]  # lines for the person at the terminal
    warnings: list[str]  # lines about what may spoil the merge

    @property
    def base_where(self) -> str:
        """See Repository.where."""
        return self.base.repository.where

    @property
    def written(self) -> list[str]:
        """A line for each model about the files that opening it has written to the disk."""
        repositories = [self.base.repository]
        for candidate in self.candidates:
            repositories += candidate.repositories
        return list(dict.fromkeys(line for repository in repositories for line in repository.written))

    @property
    def jobs(self) -> list[Job]:
        """The downloads: the base's first, then each candidate's, in merge order."""
        return [self.base.job, *(candidate.checkpoint.job for candidate in self.candidates)]


def open_models(config: Config, fetch: Fetch, tell: Tell = lambda lines: None) -> Models:
    """The base and the candidates of a configuration, opened and checked against each other.

    Raises ConfigError with all models that can't be used.
    """
    sources, notes = candidate_sources(config)
    asks_for_candidates = config.models_to_merge or config.directories.model_directory
    base_location = _base_location(config)
    locations = list(dict.fromkeys([base_location, *(location for source in sources for location in source.places)]))
    _tell_of_the_hub(locations, tell)
    repositories = _find_all(locations, config, tell)
    for repository in repositories.values():
        notes += repository.notes
    base_repository = repositories[base_location]
    for source in list(sources):
        if source.adapter is None and repositories[source.model].same_as(base_repository):
            sources.remove(source)
            notes.append(f"{source.text} is the base model; skipped")
    if asks_for_candidates and not sources:
        raise ConfigError(
            "no candidates to merge: " + ("; ".join(notes) or "directories.model_directory has no sub-folders")
        )
    base_name, *names = names_of([Source(base_location.text, base_location), *sources])
    opened = _open_base(base_repository, base_name, config, fetch)
    base = opened.base
    if base.companions.lacking:
        name = base.companions.lacking[0]
        raise ConfigError(
            f"{base.text}: {name} is a link out of this folder, so it would not be copied to the output; replace it "
            f"with a copy, or name the model's own folder ({(base.path / name).resolve().parent})"
        )
    candidates: list[Candidate] = []
    problems: list[str] = []
    for name, source in zip(names, sources, strict=True):
        source_repositories = [repositories[location] for location in source.places]
        try:
            candidates.append(_open_candidate(name, source, source_repositories, opened, config, fetch))
        except ConfigError as error:
            problems += error.args
    if problems:
        raise ConfigError(*problems)
    notes += [*opened.notes, *base.companions.notes]
    warnings = list(opened.warnings)
    for repository in repositories.values():
        warnings += repository.warnings
    for candidate in candidates:
        notes += candidate.notes
        warnings += candidate.warnings
    return Models(base, opened.module, candidates, notes, warnings)


def open_base(config: Config, fetch: Fetch, tell: Tell) -> Models:
    """The base without candidates, its weights downloaded; for runs that write no model.

    Raises ConfigError if it can't be used.
    """
    location = _base_location(config)
    _tell_of_the_hub([location], tell)
    repository = _find(location, config, tell)
    tell(repository.notes)
    opened = _open_base(repository, location.name, config, fetch)
    fetch(opened.base.job)
    return replace(opened, notes=[], warnings=[*opened.warnings, *repository.warnings])


def _open_base(repository: Repository, name: str, config: Config, fetch: Fetch) -> Models:
    """A model as the base, without candidates; its weights are not read. Raises ConfigError if it can't be a base."""
    if ADAPTER_SETTINGS in repository.sizes:
        if holds_weights(repository.sizes):
            advice = f"contains both a model and an adapter; move {ADAPTER_SETTINGS} away"
        else:
            advice = "this is an adapter; name it as a candidate, and its model as the base"
        raise ConfigError(f"{repository.text}: {advice}")
    base = _open_model(repository, name, config.trust_remote_code, fetch)
    warnings = settle_attention(base)
    module = without_weights(base)
    return Models(base, module, candidates=[], notes=check_base(base, module), warnings=warnings)


def _tell_of_the_hub(locations: Iterable[Location], tell: Tell) -> None:
    """Print a line for each location that may be meant as a folder, but is looked up on the hub."""
    meant = [location.text for location in locations if location.folder is None and location.revision is None]
    tell([f"{text} is not a local folder; looking on the hub" for text in meant])


def candidate_sources(config: Config) -> tuple[list[Source], list[str]]:
    """The candidates in merge order, and a line about each folder that is left out.

    models_to_merge overrides model_directory. The visible sub-folders of model_directory are taken in alphabetical
    order; the output directory is left out by resolved path. If neither is set, there are no candidates.
    """
    if config.models_to_merge or config.directories.model_directory is None:
        return [source for source in map(parse_source, config.models_to_merge) if source], []
    entries = Path(config.directories.model_directory).iterdir()
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    output = Path(config.directories.output_directory).resolve()
    sources = []
    notes = []
    for path in sorted(folders, key=lambda entry: (entry.name.casefold(), entry.name)):
        names = local_files(path)
        if path.resolve() in (output, partial_of(output)):
            notes.append(f"{path} is the output directory; skipped")
        elif "config.json" not in names and ADAPTER_SETTINGS not in names:
            notes.append(f"{path} contains no model (config.json is missing{found_instead(names)}); skipped")
        elif any("\ud800" <= character <= "\udfff" for character in path.name):
            notes.append(f"{path.name!r} in {path.parent} has a name that is not valid UTF-8; skipped")
        else:
            sources.append(Source(str(path), Location(str(path), path)))
    return sources, notes


def _base_location(config: Config) -> Location:
    """The base model's location. Raises ConfigError if its folder no longer exists."""
    location = parse_location(config.directories.model_path1)
    if location is None:
        raise ConfigError(f"{config.directories.model_path1}: no such folder")
    return location


def _find_all(locations: Sequence[Location], config: Config, tell: Tell) -> dict[Location, Repository]:
    """The files of each location. Raises ConfigError with all locations that can't be found."""
    repositories: dict[Location, Repository] = {}
    by_folder: dict[Path, Repository] = {}
    problems: list[str] = []
    for location in locations:
        try:
            repository = _find(location, config, tell)
        except ConfigError as error:
            problems += error.args
            continue
        # Two locations may be one commit of the hub: they share the record of what was fetched.
        first_repository = by_folder.setdefault(repository.folder, repository)
        repositories[location] = replace(
            repository, was_cached=first_repository.was_cached, fetched=first_repository.fetched
        )
    if problems:
        raise ConfigError(*problems)
    return repositories


def _find(location: Location, config: Config, tell: Tell) -> Repository:
    """The files of a location. Downloads the small files of a hub model; converts a GGUF file to a folder.

    Raises ConfigError.
    """
    if location.is_gguf:
        return open_gguf(location, config.tokenizer, tell)
    if location.folder is not None:
        return local(location, location.folder)
    repository = find(location)
    for name in ("config.json", ADAPTER_SETTINGS):
        size = repository.sizes.get(name, 0)
        if size > LARGEST_SETTINGS:
            raise ConfigError(f"{location.text}: {name} is {size:,} bytes long, which is too large")
    return repository


def _open_model(
    repository: Repository, name: str, trusted: bool, fetch: Fetch, base: Checkpoint | None = None
) -> Checkpoint:
    """A model; a candidate's if a base is given. The hub does not tell the shapes in .bin files: such files are
    downloaded here, once the configuration fits."""
    try:
        if repository.commit and holds_weights(repository.sizes):
            configuration = read_configuration(repository, trusted)
            if base is not None:
                check_configuration(repository.text, configuration, base)
            files = weight_files(repository.folder, repository.sizes)
            if files[0].endswith(".bin"):
                fetch(Job(name, repository, files))
        return open_checkpoint(repository, name, trusted)
    except ConfigError as error:
        if repository.trouble:
            raise ConfigError(f"{error}; only the cache was searched, because {repository.trouble}") from None
        raise


def _open_candidate(
    name: str, source: Source, repositories: Sequence[Repository], base: Models, config: Config, fetch: Fetch
) -> Candidate:
    """A model, an adapter for the base, or a model with its adapter. Raises ConfigError if it does not fit.

    repositories: one, or the model's and the adapter's.
    """
    repository = repositories[-1]
    brings_adapter = ADAPTER_SETTINGS in repository.sizes
    notes: list[str] = []
    if source.adapter is None and (holds_weights(repository.sizes) or not brings_adapter):
        checkpoint = _open_model(repository, name, config.trust_remote_code, fetch, base.base)
        if brings_adapter:
            notes = [f"{source.text} also contains an adapter, which is not applied; write model+adapter to apply it"]
    elif not brings_adapter:
        raise ConfigError(f"{repository.text}: not an adapter: {ADAPTER_SETTINGS} is missing")
    else:
        checkpoint, notes = _with_adapter(name, repositories, base, config, fetch)
    candidate = open_candidate(checkpoint, base.base, base.module)
    return replace(candidate, notes=[*notes, *candidate.notes], repositories=repositories, text=source.text)


def _with_adapter(
    name: str, repositories: Sequence[Repository], base: Models, config: Config, fetch: Fetch
) -> tuple[Checkpoint, list[str]]:
    """A model with an adapter applied; a line if, judging by names, the adapter was trained on another model."""
    trusted = config.trust_remote_code
    *models, repository = repositories
    read_settings(repository.folder)  # fails before anything is downloaded
    weights = [file for file in ADAPTER_WEIGHTS if file in repository.sizes]
    fetch(Job(name, repository, weights[:1]))
    adapter = open_adapter(repository.folder, name, trusted)
    plain = _open_model(models[0], name.split("+")[0], trusted, fetch, base.base) if models else base.base
    adapted = adapt(plain, adapter, base.base, base.module)
    trained_on = adapter.trained_on.rstrip("/").rsplit("/")[-1]
    applied_to = plain.repository.location.repo.split("/")[-1] or plain.path.resolve().name
    if not trained_on or trained_on.casefold() == applied_to.casefold():
        return adapted, []
    return adapted, [f"{name}: the adapter was trained on {adapter.trained_on}, but is applied to {plain.name}"]

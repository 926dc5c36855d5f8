"""The models of a run, found and opened: all that can be checked without their weights is.

Knows: which models a configuration names, where they come from, that they must fit. Refuses to know: devices, scores,
printing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from modules.checkpoints.architecture import settle_attention, without_weights
from modules.checkpoints.bin_files import is_pickled
from modules.checkpoints.candidate import Candidate, adapt, check_base, check_configuration, open_candidate
from modules.checkpoints.causes import found_instead
from modules.checkpoints.checkpoint import (
    ADAPTER_SETTINGS,
    Checkpoint,
    check_quantisation,
    file_names,
    licence_files,
    open_checkpoint,
    read_configuration,
    small_files,
)
from modules.checkpoints.gguf_files import about, as_folder, warnings_of
from modules.checkpoints.hub import Job, Repository, find
from modules.checkpoints.lora import WEIGHTS as ADAPTER_WEIGHTS
from modules.checkpoints.lora import Adapter, open_adapter, read_settings
from modules.checkpoints.weight_files import LARGEST_SETTINGS, holds_weights, local_files, weight_files
from modules.config import Config, Location, Source, names_of, parse_location, parse_source, partial_of
from modules.runtime import ConfigError, counted

Fetch = Callable[[Job], None]  # returns when a job's files are there
Tell = Callable[[Sequence[str]], None]  # gives the person at the terminal some lines while models are opened
In, Out = TypeVar("In"), TypeVar("Out")


@dataclass(frozen=True)
class Models:
    """A base and the candidates that fit it; weights of the hub may still be missing."""

    base: Checkpoint
    base_where: str  # see Found.where
    module: PreTrainedModel  # the base's, without weights
    candidates: list[Candidate]
    notes: list[str]  # lines for the person at the terminal
    warnings: list[str]  # the same, of what may spoil the merge
    unpacked: tuple[Path, ...] = ()  # folders that GGUF files have become on this occasion

    @property
    def written(self) -> list[str]:
        """What opening them has put on the disk."""
        every = [self.base.repository, *(one for candidate in self.candidates for one in candidate.repositories)]
        fetched = {one.location.text: len(one.fetched) for one in every if one and one.fetched}
        files = [f"{counted(count, 'file')} of {text} in the hub's cache" for text, count in fetched.items()]
        return [*(f"{folder}, unpacked from GGUF" for folder in self.unpacked), *files]

    @property
    def jobs(self) -> list[Job]:
        """What must be fetched before the base can be loaded, then before each candidate can be searched."""
        return [self.base.job, *(candidate.checkpoint.job for candidate in self.candidates)]


@dataclass(frozen=True)
class Found:
    """A location of which it is known what files it has."""

    location: Location
    folder: Path
    repository: Repository | None  # None for a local folder
    names: frozenset[str]  # of all its files, those included that are still to be fetched
    trusted: bool  # whether code that is among them may be run
    note: str = ""  # about what its files were made from
    is_new: bool = False  # whether they were made on this occasion

    def same_as(self, other: "Found") -> bool:
        """Whether both are the same files: one folder, or one commit under two ids of the hub."""
        both_on_hub = self.repository is not None and other.repository is not None
        one, two = (found.folder.name if both_on_hub else found.folder.resolve() for found in (self, other))
        return one == two

    @property
    def where(self) -> str:
        """Where exactly these files are, from wherever one looks."""
        if self.repository:
            return f"{self.location.repo}@{self.folder.name}"
        return str((self.location.folder or self.folder).resolve())

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, be it beside a model's weights."""
        return ADAPTER_SETTINGS in self.names

    @property
    def is_adapter(self) -> bool:
        """Whether there is an adapter and nothing else."""
        return self.has_adapter and not holds_weights(self.names)

    def warnings(self) -> list[str]:
        """What may be otherwise in the files than in what they were made from."""
        return [f"{self.location.text}: {line}" for line in warnings_of(self.folder)]

    def notes(self) -> list[str]:
        """What should be known about where the files come from."""
        if self.repository is None:
            return [self.note] if self.note else []
        trouble = f"; the cache's copy is used, since {self.repository.trouble}" if self.repository.trouble else ""
        return [f"{self.location.text} is at commit {self.folder.name}{trouble}"]


def open_models(config: Config, fetch: Fetch, tell: Tell = lambda lines: None) -> Models:
    """The base and the candidates of a configuration, opened and checked against each other.

    Raises ConfigError, for all models that can't be used together.
    """
    sources, notes = candidate_sources(config)
    base_location, names_some = _base_of(config), config.models_to_merge or config.directories.model_directory
    locations = list(dict.fromkeys([base_location, *(place for source in sources for place in source.places)]))
    tell(_looked_up(locations))
    found = _one_repository_each(_all_or_problems(partial(_find, config=config, tell=tell), locations))
    notes += [note for one in found.values() for note in one.notes()]
    for source in [s for s in sources if s.adapter is None and found[s.model].same_as(found[base_location])]:
        sources.remove(source)
        notes.append(f"{source.text} is the base model itself: skipped")
    if names_some and not sources:
        raise ConfigError("no candidates to merge: " + ("; ".join(notes) or "the model directory has no sub-folders"))
    base_name, *names = names_of([Source(base_location.text, base_location), *sources])
    base = _as_base(found[base_location], base_name, fetch)
    _refuse_links(base)
    module, left_out, warnings = _module_of(base)

    def open_one(named: tuple[str, Source]) -> Candidate:
        try:
            candidate = _open_candidate(*named, found, base, module, fetch)
        except ConfigError as error:
            raise ConfigError(*(_by_files(line, found, named[1]) for line in error.args)) from None
        where = "+".join(found[place].where for place in named[1].places)
        return replace(candidate, text=named[1].text, where=where)

    candidates = _all_or_problems(open_one, zip(names, sources, strict=True))
    notes += base.notes + left_out + base.companions.notes
    warnings += [warning for one in found.values() for warning in one.warnings()]
    for candidate in candidates:
        notes += [*candidate.notes, *candidate.checkpoint.notes]
        warnings += candidate.warnings
    unpacked = tuple(one.folder for one in found.values() if one.is_new)
    return Models(base, found[base_location].where, module, candidates, notes, warnings, unpacked)


def open_base(config: Config, fetch: Fetch, tell: Tell) -> Models:
    """The base alone, its weights fetched, to be read and not to be copied. Raises ConfigError if it can't be used."""
    location = _base_of(config)
    tell(_looked_up([location]))
    found = _find(location, config, tell)
    tell(found.notes())
    base = _as_base(found, location.name, fetch)
    fetch(base.job)
    module, _, warnings = _module_of(base)
    return Models(base, found.where, module, candidates=[], notes=[], warnings=[*warnings, *found.warnings()])


def _by_files(line: str, found: dict[Location, Found], source: Source) -> str:
    """A message that names a candidate's GGUF file, not the folder that was made of it."""
    for place in source.places:
        if place.is_gguf:
            line = line.replace(str(found[place].folder), place.text)
    return line


def _looked_up(locations: Iterable[Location]) -> list[str]:
    """A line for each location that could be meant as a folder, and will be looked for on the hub."""
    return [
        f"{one.text} is no folder here: looking on the hub" for one in locations if not (one.folder or one.revision)
    ]


def candidate_sources(config: Config) -> tuple[list[Source], list[str]]:
    """The candidates in merge order, and a line about each folder that is left out.

    models_to_merge overrides model_directory, whose visible sub-folders are taken alphabetically; the output directory
    is left out by resolved path. A configuration that names neither asks for none.
    """
    if config.models_to_merge or config.directories.model_directory is None:
        return [source for source in map(parse_source, config.models_to_merge) if source], []
    entries = Path(config.directories.model_directory).iterdir()
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    output = Path(config.directories.output_directory).resolve()
    sources, notes = [], []
    for path in sorted(folders, key=lambda entry: (entry.name.casefold(), entry.name)):
        if path.resolve() in (output, partial_of(output)):
            notes.append(f"{path} is the output directory: skipped")
        elif not {"config.json", ADAPTER_SETTINGS}.intersection(local_files(path)):
            instead = found_instead(path, local_files(path), ["config.json"])
            notes.append(f"{path} holds no model (no config.json{instead}): skipped")
        elif any("\ud800" <= character <= "\udfff" for character in path.name):
            notes.append(f"{path.name!r} in {path.parent} is no text in UTF-8, so no report could name it: skipped")
        else:
            sources.append(Source(str(path), Location(str(path), path)))
    return sources, notes


def _base_of(config: Config) -> Location:
    """Where the base model lies. Raises ConfigError if its folder has gone."""
    location = parse_location(config.directories.model_path1)
    if location is None:
        raise ConfigError(f"{config.directories.model_path1}: no such folder")
    return location


def _find(location: Location, config: Config, tell: Tell) -> Found:
    """What a location has; of the hub's models, the small files are fetched; of a GGUF file, a folder is made.

    Raises ConfigError.
    """
    trusted = config.trust_remote_code
    if location.is_gguf:
        announced: list[str] = []

        def announce(lines: Sequence[str]) -> None:
            announced.extend(lines)
            tell(lines)

        folder, kind = as_folder(location.folder, config.tokenizer, announce)
        note = about(location.text, kind, config.tokenizer)
        return Found(location, folder, None, frozenset(file_names(folder)), trusted, note, bool(announced))
    repository = find(location, small_files, licence_files) if location.folder is None else None
    folder = location.folder if repository is None else repository.folder
    assert folder is not None  # a location without a folder has a repository
    for name in ("config.json", ADAPTER_SETTINGS):
        if repository is not None and repository.sizes.get(name, 0) > LARGEST_SETTINGS:
            raise ConfigError(f"{location.text}: {name} is {repository.sizes[name]:,} bytes long, which is no model's")
    return Found(location, folder, repository, frozenset(file_names(folder, repository)), trusted)


def _as_base(found: Found, name: str, fetch: Fetch) -> Checkpoint:
    """A location as the base model, its weights not read. Raises ConfigError if it can't be one."""
    if found.is_adapter:
        raise ConfigError(f"{found.location.text}: this is an adapter; name its model as the base, it as a candidate")
    if found.has_adapter:
        raise ConfigError(
            f"{found.location.text}: holds an adapter beside a model's weights; move {ADAPTER_SETTINGS} away"
        )
    return _open_model(found, name, fetch)


def _refuse_links(base: Checkpoint) -> None:
    """Raise ConfigError if what is copied of a base could not be opened."""
    lacking = base.companions.lacking
    if lacking:
        links = f"{', '.join(lacking)} {'is a link' if len(lacking) == 1 else 'are links'} out of this folder"
        raise ConfigError(
            f"{base.path}: {links}, which is not followed when the output is written; put a copy in its place, or name "
            f"the model's own folder ({(base.path / lacking[0]).resolve().parent})"
        )


def _module_of(base: Checkpoint) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The base's module without weights, lines about what it stores beside weights, and warnings.

    Raises ConfigError if its tensors are not the module's.
    """
    warnings = settle_attention(base)
    module = without_weights(base)
    notes, doubts = check_base(base, module)
    return module, notes, [*warnings, *doubts]


def _one_repository_each(found: Iterable[Found]) -> dict[Location, Found]:
    """The same by location, but two that are one commit share their repository, which knows what was fetched of it."""
    first: dict[Path, Repository | None] = {}
    return {one.location: replace(one, repository=first.setdefault(one.folder, one.repository)) for one in found}


def _open_model(found: Found, name: str, fetch: Fetch, base: Checkpoint | None = None) -> Checkpoint:
    """A location's model, that of a candidate if there is a base. The shapes in .bin files can't be seen from afar:
    those are fetched here, once the configuration fits."""
    try:
        if found.repository is not None and holds_weights(found.names):
            config = read_configuration(found.folder, found.names, found.trusted)
            if base is not None:
                check_configuration(found.folder, config, base)
            files = weight_files(found.folder, found.names)
            if any(is_pickled(file) for file in files):
                check_quantisation(found.folder)
                fetch(Job(name, found.repository, tuple(files)))
        return open_checkpoint(found.folder, name, found.trusted, found.repository)
    except ConfigError as error:
        if found.repository is not None and found.repository.trouble:
            raise ConfigError(f"{error}; only the cache could be asked, since {found.repository.trouble}") from None
        raise


def _open_candidate(
    name: str, source: Source, found: dict[Location, Found], base: Checkpoint, module: PreTrainedModel, fetch: Fetch
) -> Candidate:
    """A model, an adapter for the base, or a model with its adapter. Raises ConfigError if it does not fit the base."""
    model = found[source.model]
    if source.adapter is None and not model.is_adapter:
        checkpoint = _open_model(model, name, fetch, base)
        note = f"{source.text} also holds an adapter, which is not applied; to apply it, name it behind a plus"
        return open_candidate(checkpoint, base, module, notes=[note] if model.has_adapter else [])
    where = found[source.adapter] if source.adapter else model
    if not where.has_adapter:
        raise ConfigError(f"{where.location.text}: no adapter here ({ADAPTER_SETTINGS} is missing)")
    if where.repository is not None:
        read_settings(where.folder)  # before anything is fetched in vain
        weights = [file for file in ADAPTER_WEIGHTS if file in where.names][:1]
        fetch(Job(name, where.repository, tuple(weights)))
    adapter = open_adapter(where.folder, name, where.trusted)
    underlying = _open_model(model, name.split("+")[0], fetch, base) if source.adapter else base
    repositories = [where.repository] if where.repository else []
    adapted = adapt(underlying, adapter, base, module)
    return open_candidate(adapted, base, module, notes=_about_adapter(adapter, underlying), repositories=repositories)


def _about_adapter(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """A line if an adapter was trained on something else than it is applied to, as far as names tell."""
    trained_on = adapter.trained_on.rstrip("/").rsplit("/")[-1]
    repository = checkpoint.repository
    applied_to = repository.location.repo.split("/")[-1] if repository else checkpoint.path.resolve().name
    if not trained_on or trained_on.casefold() == applied_to.casefold():
        return []
    return [f"{adapter.name}: the adapter was trained on {adapter.trained_on}, and is applied to {checkpoint.name}"]


def _all_or_problems(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """What the function makes of each item. Raises ConfigError with all that it could make nothing of."""
    results, problems = [], []
    for item in items:
        try:
            results.append(function(item))
        except ConfigError as error:
            problems += error.args
    if problems:
        raise ConfigError(*problems)
    return results

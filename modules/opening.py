"""The models of a run, found and opened: all that can be checked without their weights is.

Knows: which models a configuration names, where they come from, that they must fit. Refuses to know: devices, scores,
printing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from modules.adapters import WEIGHTS as ADAPTER_WEIGHTS
from modules.adapters import open_adapter
from modules.candidates import Candidate, adapt, open_candidate
from modules.checkpoints import (
    ADAPTER_SETTINGS,
    Checkpoint,
    candidate_sources,
    check_output,
    file_names,
    find_repository,
    open_checkpoint,
)
from modules.config import Config, ConfigError
from modules.hub import Job, Repository
from modules.models import without_weights
from modules.sources import Location, Source, names_of, parse_location
from modules.weights import holds_weights, is_pickled, weight_files

Fetch = Callable[[Job], None]  # returns when a job's files are there
In, Out = TypeVar("In"), TypeVar("Out")


@dataclass(frozen=True)
class Models:
    """A base and the candidates that fit it; weights of the hub may still be missing."""

    base: Checkpoint
    candidates: list[Candidate]
    notes: list[str]  # lines for the person at the terminal


@dataclass(frozen=True)
class Found:
    """A location of which it is known what files it has."""

    location: Location
    folder: Path
    repository: Repository | None  # None for a local folder
    names: frozenset[str]  # of all its files, those included that are still to be fetched

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, be it beside a model's weights."""
        return ADAPTER_SETTINGS in self.names

    @property
    def is_adapter(self) -> bool:
        """Whether there is an adapter and nothing else."""
        return self.has_adapter and not holds_weights(self.names)

    def notes(self) -> list[str]:
        """What should be known about where the files come from."""
        if self.repository is None:
            return []
        trouble = f"; the cache's copy is used, since {self.repository.trouble}" if self.repository.trouble else ""
        return [f"{self.location.text} is at commit {self.folder.name}{trouble}"]


def open_models(config: Config, overwrite: bool, fetch: Fetch) -> Models:
    """The base and the candidates of a configuration, opened and checked against each other.

    Raises ConfigError, for all models that can't be used together.
    """
    sources, notes = candidate_sources(config)
    base_location = base_of(config)
    locations = [base_location, *(place for s in sources for place in (s.model, s.adapter) if place)]
    output = Path(config.directories.output_directory)
    check_output(output, [location.folder for location in locations if location.folder], overwrite)
    locations = list(dict.fromkeys(locations))
    found = dict(zip(locations, _all_or_problems(find_location, locations), strict=True))
    notes += [note for one in found.values() for note in one.notes()]
    base_folder = found[base_location].folder.resolve()
    for source in [s for s in sources if s.adapter is None and found[s.model].folder.resolve() == base_folder]:
        sources.remove(source)
        notes.append(f"{source.text} is the base model itself: skipped")
    if not sources:
        raise ConfigError("no candidates to merge: " + ("; ".join(notes) or "the model directory has no sub-folders"))
    base_name, *names = names_of([Source(base_location.text, base_location), *sources])
    base = open_base(found[base_location], base_name, config.trust_remote_code, fetch)
    module = without_weights(base, config.trust_remote_code)

    def open_one(named: tuple[str, Source]) -> Candidate:
        return _open_candidate(*named, found, base, module, config.trust_remote_code, fetch)

    candidates = _all_or_problems(open_one, zip(names, sources, strict=True))
    return Models(base, candidates, notes + [note for candidate in candidates for note in candidate.notes])


def base_of(config: Config) -> Location:
    """Where the base model lies. Raises ConfigError if its folder has gone."""
    location = parse_location(config.directories.model_path1)
    if location is None:
        raise ConfigError(f"{config.directories.model_path1}: no such folder")
    return location


def find_location(location: Location) -> Found:
    """What a location has; of the hub's models, the small files are fetched. Raises ConfigError."""
    repository = find_repository(location)
    folder = location.folder if repository is None else repository.folder
    assert folder is not None  # a location without a folder has a repository
    return Found(location, folder, repository, frozenset(file_names(folder, repository)))


def open_base(found: Found, name: str, trust_remote_code: bool, fetch: Fetch) -> Checkpoint:
    """A location as the base model, its weights not read. Raises ConfigError if it can't be one."""
    if found.is_adapter:
        raise ConfigError(f"{found.location.text}: this is an adapter; name its model as the base, it as a candidate")
    if found.has_adapter:
        raise ConfigError(
            f"{found.location.text}: holds an adapter beside a model's weights; move {ADAPTER_SETTINGS} away"
        )
    return _open_model(found, name, trust_remote_code, fetch)


def _open_model(found: Found, name: str, trust_remote_code: bool, fetch: Fetch) -> Checkpoint:
    """A location's model. The shapes in .bin files can't be seen from afar: those are fetched here."""
    try:
        if found.repository is not None and holds_weights(found.names):
            files = weight_files(found.folder, found.names)
            if any(is_pickled(file) for file in files):
                fetch(Job(name, found.repository, tuple(files)))
        return open_checkpoint(found.folder, name, trust_remote_code, found.repository)
    except ConfigError as error:
        if found.repository is not None and found.repository.trouble:
            raise ConfigError(f"{error}; only the cache could be asked, since {found.repository.trouble}") from None
        raise


def _open_candidate(
    name: str,
    source: Source,
    found: dict[Location, Found],
    base: Checkpoint,
    module: PreTrainedModel,
    trust_remote_code: bool,
    fetch: Fetch,
) -> Candidate:
    """A model, an adapter for the base, or a model with its adapter. Raises ConfigError if it does not fit the base."""
    model = found[source.model]
    if source.adapter is None and not model.is_adapter:
        checkpoint = _open_model(model, name, trust_remote_code, fetch)
        note = f"{source.text} also holds an adapter, which is not applied; to apply it, name it behind a plus"
        return open_candidate(checkpoint, base, module, notes=[note] if model.has_adapter else [])
    where = found[source.adapter] if source.adapter else model
    if not where.has_adapter:
        raise ConfigError(f"{where.location.text}: no adapter here ({ADAPTER_SETTINGS} is missing)")
    if where.repository is not None:
        weights = [file for file in ADAPTER_WEIGHTS if file in where.names][:1]
        fetch(Job(name, where.repository, tuple(weights)))
    adapter = open_adapter(where.folder, name)
    underlying = _open_model(model, name.split("+")[0], trust_remote_code, fetch) if source.adapter else base
    checkpoint = adapt(underlying, adapter, base, module)
    trained_on, applied_to = Path(adapter.trained_on).name, underlying.path.name
    differs = trained_on and where.repository is None and trained_on.casefold() != applied_to.casefold()
    note = f"{name}: the adapter was trained on {adapter.trained_on}, and is applied to {underlying.name}"
    repositories = [where.repository] if where.repository else []
    return open_candidate(checkpoint, base, module, notes=[note] if differs else [], repositories=repositories)


def _all_or_problems(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """What the function makes of each item. Raises ConfigError with all that it could make nothing of."""
    results, problems = [], []
    for item in items:
        try:
            results.append(function(item))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return results

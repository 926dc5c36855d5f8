"""A YAML file to a configuration, or to all that is wrong with it.

Knows: which phrase files a file names, what must be there together. Refuses to know: what a single value may be.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from modules.config.command_line import with_given
from modules.config.excerpts import shown
from modules.config.fields import AnyPath, Output, keys_of
from modules.config.findings import Finding, findings_in
from modules.config.held_out import set_aside
from modules.config.phrase_lists import MOST_PAIRS, PHRASES, Pair, PhraseLists, count_pairs
from modules.config.schema import CONFIG_KEYS, Config, Settings
from modules.config.yaml_file import YamlFile, read_yaml
from modules.merging.methods import seeded
from modules.runtime import ConfigError, counted

_MOST_ERRORS = 50  # of a file that are told one by one
_NO_PHRASES = [key for key in CONFIG_KEYS if key not in (*PHRASES, "system")]  # are passed over in a phrase file


def load_config(
    path: str | Path,
    device: str | None = None,
    output: str | None = None,
    model: str | None = None,
    mapping: bool = False,
    discovering: bool = False,
    model_option: str = "--model",
    sets: Sequence[str] = (),
    scored: Sequence[str] = (),
) -> Config:
    """Read and check a YAML file; `device`, `output` and `model`, the base, replace the file's own values.

    mapping: for the mapper, which needs neither candidates nor an output directory, and holds no phrase out;
    discovering: nor phrases. model_option: with which the command line names the model. sets: more that is replaced,
    each KEY=VALUE. scored: models that take the place of the file's candidates, to be scored and not merged: that
    needs no output directory either.
    Raises ConfigError with one line for every error found.
    """
    options = {
        ("directories", "model_path1"): (model_option, model),
        ("directories", "output_directory"): ("--output", output),
        ("device",): ("--device", device),
        ("models_to_merge",): ("--score", list(scored) or None),
    }
    main, found = with_given(read_yaml(Path(path), "Name a YAML file with --config."), sets, options)
    files, more_found = _phrase_files(main, "phrase_files")
    held_out, even_more = _phrase_files(main, "held_out_files")
    found += more_found + even_more
    count = sum(count_pairs(file.value) for file in (main, *files))
    in_all = count + sum(count_pairs(file.value) for file in held_out)
    if in_all > MOST_PAIRS:
        problem = f"{in_all:,} pairs of a phrase and a context; at most {MOST_PAIRS:,} are taken"
        found.append(Finding(main, ("phrase lists",), problem))
        main, files, held_out = _without(main, PHRASES), [], []
    settings = _checked(Settings, main, found, _not_read(mapping, bool(scored)))
    lists, aside = (
        [_checked(PhraseLists, _without(file, _NO_PHRASES), found) for file in some] for some in (files, held_out)
    )
    if (
        not discovering
        and not count
        and not any(finding.file.name or "phrase" in str(finding.place[:1]) for finding in found)
    ):
        found.append(Finding(main, ("bad_phrases, good_phrases",), "both are empty; there is nothing to score"))
    found += [] if mapping or scored else _missing_for_a_merge(main)
    found += _exclude_each_other(settings, main) if settings else []
    if found:
        more = [f"and {len(found) - _MOST_ERRORS} more"] if len(found) > _MOST_ERRORS else []
        lines = [f"  {line}" for line in [*found[:_MOST_ERRORS], *more]]
        raise ConfigError(f"{path} has {counted(len(found), 'error')}:", *lines)
    values, pairs = dict(vars(settings)), [_pairs_of((settings, *lists), key) for key in PHRASES]
    if mapping:
        for key, some in zip(PHRASES, pairs, strict=True):
            values[key] = tuple(Pair(**vars(pair)) for pair in some)
        return Config(**values, text=main.text)
    (bad, no_bad), (good, no_good) = (set_aside(some, settings.held_out, settings.random_seed) for some in pairs)
    if not bad and not good:
        raise ConfigError(f"{path}: every phrase is held out; there is nothing to search with")
    others = [pair for key in PHRASES for pair in _pairs_of(aside, key)]
    methods = tuple(seeded(method, settings.random_seed) for method in settings.merge_method)
    values = {**values, "merge_method": methods, "bad_phrases": tuple(bad), "good_phrases": tuple(good)}
    return Config(**values, text=main.text, held_out_pairs=(*no_bad, *no_good, *others))


def _exclude_each_other(settings: Settings, main: YamlFile) -> list[Finding]:
    """Settings of which each alone is right."""
    found = []
    if settings.is_guarded and settings.neutral_texts == ():
        joint = " (search: joint weighs it, unless drift_weight is 0)" if settings.drift_weight is None else ""
        problem = f"empty, but drift_weight and max_drift measure drift on such texts{joint}"
        found.append(Finding(main, ("neutral_texts",), problem))
    if settings.search == "joint" and (settings.strategy, *settings.merge_method) != ("cumulative", "lerp"):
        problem = "joint knows only strategy: cumulative and merge_method: lerp"
        found.append(Finding(main, ("search",), problem))
    return found


def _pairs_of(parts: Iterable[Any], key: str) -> tuple[Pair, ...]:
    return tuple(pair.under(part.system) for part in parts for pair in getattr(part, key))


def output_directory(name: str, value: str) -> Path:
    """An output as an option called `name` gives it. Raises ConfigError if none can be written there."""
    try:
        return Path(TypeAdapter(Output).validate_python(value))
    except ValidationError as error:
        raise ConfigError(*map(str, findings_in(error, YamlFile("", value, None, name)))) from None


def _without(file: YamlFile, keys: Collection[str]) -> YamlFile:
    if not isinstance(file.value, Mapping):
        return file
    return replace(file, value={key: value for key, value in file.value.items() if key not in keys})


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(Annotated[kind, keys_of(kind)])


def _not_read(mapping: bool, scoring: bool) -> tuple[str, ...]:
    """Which of the keys that name candidates are not read, so that there may be nothing where they lead."""
    if mapping:
        return "models_to_merge", "model_directory"
    return ("model_directory",) if scoring else ()


def _checked(kind: type, file: YamlFile, found: list[Finding], not_read: Collection[str] = ()) -> Any:
    """A file's values as a dataclass; None, and what is wrong is added to what was found, if they are none."""
    try:
        return _adapter(kind).validate_python(file.value, context=not_read)
    except ValidationError as error:
        found += findings_in(error, file)
        return None


def _phrase_files(main: YamlFile, key: str) -> tuple[list[YamlFile], list[Finding]]:
    """The phrase files that a key names and that hold keys, and what is wrong with them as files."""
    named = main.value.get(key) if isinstance(main.value, Mapping) else None
    files, found = list[YamlFile](), list[Finding]()
    for number, item in enumerate(named if isinstance(named, list) else []):
        place = (key, number)
        try:
            path = Path(TypeAdapter(AnyPath).validate_python(item))
            hint = "A relative path begins in the folder you start the program in."
            file = read_yaml(path, hint, f"{main.name_of(place)} ({item})")
        except ValidationError:  # found where phrase_files itself is checked
            continue
        except ConfigError as error:
            found.append(Finding(main, place, str(error)))
            continue
        if file.value is None:
            found.append(Finding(file, (), "the file is empty"))
        elif isinstance(file.value, list):
            found.append(Finding(file, (), "a bare list; bad_phrases: or good_phrases: is missing above it"))
        else:
            files.append(file)
        others = file.value.get("phrase_files") if isinstance(file.value, Mapping) else None
        if others:
            problem = f"{shown(others)}: a phrase file can't name others; name them all in the first file"
            found.append(Finding(file, ("phrase_files",), problem))
    return files, found


def _missing_for_a_merge(main: YamlFile) -> list[Finding]:
    """What the merge alone can't do without. Of what is no mapping, that has been said."""
    if not isinstance(main.value, Mapping):
        return []
    directories, found = main.value["directories"], []
    if not isinstance(directories, Mapping):
        directories = {"output_directory": ""}
    if directories.get("output_directory") is None:
        found.append(Finding(main, ("directories", "output_directory"), "missing"))
    if not main.value.get("models_to_merge") and not directories.get("model_directory"):
        problem = "no candidates; list models here or set directories.model_directory"
        found.append(Finding(main, ("models_to_merge",), problem))
    return found

"""A YAML file to a configuration, or to all that is wrong with it.

Knows: what the command line puts in place of a file's values, which phrase files a file names, what must be there
together. Refuses to know: what a single value may be.
"""

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from modules.config.errors import ConfigError, shown
from modules.config.fields import AnyPath, Output, keys_of
from modules.config.findings import Finding, findings_in
from modules.config.phrase_lists import MOST_PAIRS, PhraseLists, count_pairs
from modules.config.schema import CONFIG_KEYS, Config, Settings
from modules.config.yaml_file import Place, YamlFile, read_yaml

_MOST_ERRORS = 50  # of a file that are told one by one

_OPTIONS: dict[Place, str] = {
    ("device",): "--device",
    ("directories", "output_directory"): "--output",
    ("directories", "model_path1"): "--model",
}
_PHRASES = ("bad_phrases", "good_phrases")
_NO_PHRASES = [key for key in CONFIG_KEYS if key not in _PHRASES]  # are passed over in a phrase file


def load_config(
    path: str | Path,
    device: str | None = None,
    output: str | None = None,
    model: str | None = None,
    mapping: bool = False,
) -> Config:
    """Read and check a YAML file; `device`, `output` and `model`, the base, replace the file's own values.

    mapping: for the mapper, which needs neither candidates nor an output directory.
    Raises ConfigError with one line for every error found.
    """
    main = read_yaml(Path(path), "Name a YAML file with --config.")
    given = zip(_OPTIONS, (device, output, model), strict=True)
    asked = {place: value for place, value in given if value is not None}
    values = _with_options({} if main.value is None else main.value, asked)
    files, found = _phrase_files(main, values)
    count = sum(count_pairs(file.value) for file in (main, *files))
    if count > MOST_PAIRS:
        problem = f"{count:,} pairs of a phrase and a context; at most {MOST_PAIRS:,} are taken"
        found.append(Finding(main, ("phrase lists",), problem))
        values, files = _without(values, _PHRASES), []
    settings = _checked(Settings, values, main, found, {place: _OPTIONS[place] for place in asked}, mapping)
    lists = [_checked(PhraseLists, _without(file.value, _NO_PHRASES), file, found) for file in files]
    if isinstance(values, Mapping):
        wrong_phrases = any(finding.file is not main or "phrase" in str(finding.place[:1]) for finding in found)
        found += _missing_together(main, values, mapping, bool(count) or wrong_phrases)
    if found:
        noun = "error" if len(found) == 1 else "errors"
        more = [f"and {len(found) - _MOST_ERRORS} more"] if len(found) > _MOST_ERRORS else []
        lines = [f"  {line}" for line in [*found[:_MOST_ERRORS], *more]]
        raise ConfigError(f"{path} has {len(found)} {noun}:", *lines)
    bad, good = (sum((getattr(part, key) for part in (settings, *lists)), ()) for key in _PHRASES)
    return Config(**{**vars(settings), "bad_phrases": bad, "good_phrases": good}, text=main.text)


def output_directory(name: str, value: str) -> Path:
    """An output as an option called `name` gives it. Raises ConfigError if none can be written there."""
    try:
        return Path(TypeAdapter(Output).validate_python(value))
    except ValidationError as error:
        raise ConfigError(*map(str, findings_in(error, YamlFile("", value, None), {(): name}))) from None


def _with_options(document: Any, asked: Mapping[Place, str]) -> Any:
    """A file's values with those of the command line in their places, if there are mappings for them."""
    if not isinstance(document, Mapping):
        return document
    values = {"directories": {}, **document}
    for place, value in asked.items():
        if len(place) == 1:
            values[place[0]] = value
        elif isinstance(values[place[0]], Mapping):
            values[place[0]] = {**values[place[0]], place[1]: value}
    return values


def _without(values: Any, keys: Collection[str]) -> Any:
    return {key: value for key, value in values.items() if key not in keys} if isinstance(values, Mapping) else values


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(Annotated[kind, keys_of(kind)])


def _checked(
    kind: type,
    values: Any,
    file: YamlFile,
    found: list[Finding],
    options: Mapping[Place, str] | None = None,
    mapping: bool = False,
) -> Any:
    """Values as a dataclass; None, and what is wrong is added to what was found, if they are none."""
    try:
        return _adapter(kind).validate_python(values, context=mapping)
    except ValidationError as error:
        found += findings_in(error, file, options or {})
        return None


def _phrase_files(main: YamlFile, values: Any) -> tuple[list[YamlFile], list[Finding]]:
    """The phrase files that hold keys, and what is wrong with them as files."""
    named = values.get("phrase_files") if isinstance(values, Mapping) else None
    files, found = list[YamlFile](), list[Finding]()
    for number, item in enumerate(named if isinstance(named, list) else []):
        place = ("phrase_files", number)
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


def _missing_together(main: YamlFile, values: Mapping, mapping: bool, has_phrases: bool) -> list[Finding]:
    """What must be there in one place or another, or for one program but not for the other, and is not."""
    directories = values["directories"] if isinstance(values["directories"], Mapping) else {"output_directory": ""}
    found = []
    if directories.get("output_directory") is None and not mapping:
        found.append(Finding(main, ("directories", "output_directory"), "missing"))
    if not values.get("models_to_merge") and not directories.get("model_directory") and not mapping:
        problem = "no candidates; list models here or set directories.model_directory"
        found.append(Finding(main, ("models_to_merge",), problem))
    if not has_phrases:
        place = ("bad_phrases, good_phrases",)
        found.append(Finding(main, place, "both are empty; there is nothing to score"))
    return found

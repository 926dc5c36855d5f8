"""Loads a configuration from a YAML file, or reports all its errors.

Knows: which phrase files a file names, which keys need or exclude each other, messages for pydantic's errors.
Refuses to know: what a single value may be.
"""

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from modules.config.fields import MAP, MERGE, SCORE, Output
from modules.config.phrase_lists import MOST_PAIRS, PHRASES, Pair, PhraseLists, pairs_of, set_aside
from modules.config.schema import CONFIG_KEYS, Config, Settings, known_keys
from modules.config.yaml_file import KeyPath, YamlFile, parse_yaml, read_yaml, shown, with_value
from modules.merging.methods import seeded
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize

_NO_PHRASES = {*CONFIG_KEYS} - {*PHRASES, "system"}  # keys that are ignored in a phrase file
_MOST_ERRORS = 50  # of a file that are listed

# Messages that replace pydantic's, by the type of error.
_WORDS = {
    "missing": "missing",
    "dataclass_type": "expected a mapping of keys to values",
    "tuple_type": "expected a list",
    "bool_type": "expected true or false",
    "string_type": "expected text (put it in quotes)",
    "string_pattern_mismatch": "expected text",
}


@dataclass(frozen=True)
class _Problem:
    """An error at a key of a file. Its message is made only when it is printed: a file can have very many errors."""

    file: YamlFile
    key_path: KeyPath
    problem: str
    kind: str = "absent"  # pydantic's type of error; "absent" has no value to show
    value: Any = None

    def __str__(self) -> str:
        name, line = self.file.where(self.key_path)
        return f"{name}: {self._words()}{line}"

    def _words(self) -> str:
        words = _WORDS.get(self.kind, self.problem)
        if self.kind == "unexpected_keyword_argument":
            known = known_keys(self.key_path[:-1])
            guess = difflib.get_close_matches(str(self.key_path[-1]), known, 1)
            hint = f"did you mean '{guess[0]}'?" if guess else f"known keys: {', '.join(known)}"
            return f"unknown key; {hint}"
        return words if self.kind in ("absent", "missing") else f"{shown(self.value)}: {words}"


def load_config(
    path: str | Path | None,
    device: str | None = None,
    output: str | None = None,
    model: str | None = None,
    mapping: bool = False,
    discovering: bool = False,
    model_option: str = "--model",
    sets: Sequence[str] = (),
    scored: Sequence[str] | None = None,
    learning: bool = False,
) -> Config:
    """Read and check a YAML file. `device`, `output` and `model` (the base) replace the file's values.

    path: None if there is no file. mapping: for the mapper, which needs neither candidates nor an output directory, and
    holds no phrase out. discovering: it needs no phrases either. model_option: the option that names the model. sets:
    further replacements, each KEY=VALUE. scored: models that replace the file's candidates, if there are any, for
    --score and --unslop, which need no output directory. learning: for --learn, which needs neither candidates nor an
    output directory. Raises ConfigError with a line for every error.
    """
    problems: list[Any] = []
    file = path or "the command line"
    main = read_yaml(Path(path), "name a configuration file with --config") if path else YamlFile({}, None)
    if isinstance(main.value, Mapping | None):
        main = replace(main, value={"directories": {}, **(main.value or {})})
        for text in sets:
            try:
                main = with_value(main, *_parsed_set(text))
            except ConfigError as error:
                problems.append(f"--set {text.partition('=')[0]}: {error}")
        for key_path, value, option in (
            (("directories", "model_path1"), model, model_option),
            (("directories", "output_directory"), output, "--output"),
            (("device",), device, "--device"),
            (("models_to_merge",), list(scored or ()) or None, model_option if model else "--score"),
        ):
            if value is not None:
                with suppress(ConfigError):  # the validation reports what is in the way of the value
                    main = with_value(main, key_path, value, option)
    settings = _checked(Settings, main, problems, MAP if mapping or learning else MERGE if scored is None else SCORE)
    lists = _phrase_lists(main, "phrase_files", problems)
    held_out = _phrase_lists(main, "held_out_files", problems)
    if settings:
        problems += _exclude_each_other(settings, main)
    searched = (settings, *lists)
    if not problems and not discovering and not any(part.bad_phrases or part.good_phrases for part in searched):
        problems.append(_Problem(main, ("bad_phrases, good_phrases",), "both are empty; there is nothing to score"))
    if problems:
        remark = [f"and {len(problems) - _MOST_ERRORS} more"] if len(problems) > _MOST_ERRORS else []
        lines = [f"  {line}" for line in [*problems[:_MOST_ERRORS], *remark]]
        raise ConfigError(f"{file} has {pluralize(len(problems), 'error')}:", *lines)
    phrases = [phrase for part in (*searched, *held_out) for key in PHRASES for phrase in getattr(part, key)]
    count = sum(len(phrase.contexts) * len(phrase.phrase) for phrase in phrases)
    if count > MOST_PAIRS:
        raise ConfigError(f"{file}: {count:,} pairs of a phrase and a context, more than the limit of {MOST_PAIRS:,}")
    config = _with_pairs(searched, held_out, mapping)
    if not config.pairs and not discovering:
        raise ConfigError(f"{file}: all pairs are held out; leave some to search with")
    return config


def to_learn(config: Config, output: Path) -> Config:
    """The settings of a run that learns an adapter of the base: no candidates, another output.

    Raises ConfigError if there are no steps, or if drift counts and there are no texts to measure it on.
    """
    if not config.learn.steps:
        raise ConfigError("learn.steps: 0, so --learn would learn nothing; set at least 1")
    directories = replace(config.directories, output_directory=str(output), model_directory=None)
    weight = "auto" if config.drift_weight is None else config.drift_weight
    config = replace(config, directories=directories, models_to_merge=(), drift_weight=weight)
    if config.is_guarded and config.neutral_texts == config.own_texts == ():
        raise ConfigError("neutral_texts, own_texts: empty, but --learn measures drift unless drift_weight is 0")
    return config


def _parsed_set(text: str) -> tuple[KeyPath, Any, str]:
    """Parse --set KEY=VALUE (the key with dots, the value in YAML): key path, value, and the option for messages.
    Raises ConfigError."""
    key, equals, value = text.partition("=")
    key_path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(key_path):
        raise ConfigError("expected KEY=VALUE, such as drift_weight=2 or directories.output_directory=merged")
    return key_path, parse_yaml(value)[0], f"--set {'.'.join(key_path)}"


def _with_pairs(searched: Sequence[Any], held_out_lists: Sequence[PhraseLists], mapping: bool) -> Config:
    """The configuration with the pairs of all files. searched: the settings, then phrase lists. held_out_lists: lists
    that are held out."""
    settings = searched[0]
    values = dict(vars(settings))
    values["merge_method"] = tuple(seeded(method, settings.random_seed) for method in settings.merge_method)
    held_out = []
    for key in PHRASES:
        pairs = _pairs(key, searched)
        if mapping:
            values[key] = tuple(pair for pair, _ in pairs)
            continue
        searched_pairs, drawn_pairs = set_aside(pairs, settings.held_out, settings.random_seed)
        values[key] = tuple(searched_pairs)
        held_out += drawn_pairs
    for key in () if mapping else PHRASES:
        held_out += [pair for pair, _ in _pairs(key, held_out_lists)]
    return Config(**values, held_out_pairs=tuple(held_out))


def _pairs(key: str, parts: Iterable[Settings | PhraseLists]) -> list[tuple[Pair, bool]]:
    kind = key.removesuffix("_phrases").upper()
    return [pair for part in parts for pair in pairs_of(kind, getattr(part, key), part.system)]


def _phrase_lists(main: YamlFile, key: str, problems: list) -> list[PhraseLists]:
    """The phrase lists in the files that a key names. Their errors are added to the problems."""
    file_names = main.value.get(key) if isinstance(main.value, Mapping) else None
    lists = []
    for number, item in enumerate(file_names if isinstance(file_names, list) else []):
        key_path = (key, number)
        try:
            hint = "relative paths start in the current folder"
            file = read_yaml(Path(os.path.expanduser(item)), hint, f"{main.where(key_path)[0]} ({item})")
        except TypeError:  # the item is no text: the check of the key reports that
            continue
        except ConfigError as error:
            problems.append(_Problem(main, key_path, str(error)))
            continue
        if isinstance(file.value, Mapping) and file.value.get("phrase_files"):
            problem = "a phrase file can't include others; list them all in the main file"
            problems.append(_Problem(file, ("phrase_files",), problem))
        if isinstance(file.value, Mapping):  # a whole configuration may be a phrase file
            value = {key: item for key, item in file.value.items() if key not in _NO_PHRASES}
            file = replace(file, value=value)
        checked = _checked(PhraseLists, file, problems)
        lists += [checked] if checked else []
    return lists


def _checked(kind: type, file: YamlFile, problems: list, needs: Collection[str] = ()) -> Any:
    """A file's values as a dataclass. If they are invalid: None, and the errors are added to the problems."""
    try:
        return _adapter(kind).validate_python(file.value, context=needs)
    except ValidationError as error:
        problems += _problems_in(error, file)
        return None


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _problems_in(error: ValidationError, file: YamlFile) -> list[_Problem]:
    problems = []
    for item in error.errors(include_url=False):
        words = str(item.get("ctx", {}).get("error", item["msg"]))
        problems.append(_Problem(file, item["loc"], words, item["type"], item["input"]))
    return problems


def _exclude_each_other(settings: Settings, main: YamlFile) -> list[_Problem]:
    """Errors of settings that are valid alone, but not together."""
    problems = []
    if settings.is_guarded and settings.neutral_texts == () and settings.own_texts == ():
        joint = " (search: joint sets drift_weight unless it is 0)" if settings.drift_weight is None else ""
        problem = f"empty, but drift_weight and max_drift need it or own_texts{joint}"
        problems.append(_Problem(main, ("neutral_texts",), problem))
    if settings.search == "joint" and (settings.strategy, *settings.merge_method) != ("cumulative", "lerp"):
        problem = "joint supports only strategy: cumulative and merge_method: lerp"
        problems.append(_Problem(main, ("search",), problem))
    return problems


def output_directory(name: str, value: str) -> Path:
    """The output that the option `name` gives. Raises ConfigError if none can be written there."""
    try:
        return Path(TypeAdapter(Output).validate_python(value, context=MERGE))
    except ValidationError as error:
        file = YamlFile(value, None, name)
        raise ConfigError(*map(str, _problems_in(error, file))) from None

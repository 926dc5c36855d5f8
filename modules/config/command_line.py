"""What the command line puts in place of a file's values: single keys by --set, and options of their own.

Knows: how a key with dots is walked along, how messages name what was given. Refuses to know: what a value may be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from modules.config.findings import Finding
from modules.config.yaml_file import Place, YamlFile, parse_yaml
from modules.runtime import ConfigError, visible

# What the programs' help says of options that both have, on one line of a screen.
CONFIG = "the YAML file (default: {})"
SET = "in place of a key of the file"
QUIET = "only warnings, errors and the last line"
Options = Mapping[Place, tuple[str, str | list[str] | None]]  # by the place of what it gives: an option and its value


def with_given(file: YamlFile, sets: Sequence[str], options: Options) -> tuple[YamlFile, list[Finding]]:
    """A file with what the command line gives in place of its own values, and what of that can't be done.

    sets: each a KEY=VALUE, the key with dots, the value in YAML. options: come after them; None for those not given.
    The file's text, which is kept for people, gets each of the sets as a comment at its end.
    """
    if not isinstance(file.value, Mapping | None):
        return file, []
    values, names, found = {"directories": {}, **(file.value or {})}, dict[Place, str](), list[Finding]()
    for text in sets:
        try:
            place, value = _parsed(text)
            values = _with_value(values, place, value)
            names |= {place[:count]: f"--set {'.'.join(place[:count])}" for count in _not_in(file.value, place)}
        except ConfigError as error:
            found.append(Finding(YamlFile("", None, None, f"--set {text.partition('=')[0]}"), (), str(error)))
    for place, (option, value) in options.items():
        if value is not None and (len(place) == 1 or isinstance(values[place[0]], Mapping)):
            values, names[place] = _with_value(values, place, value), option
    notes = "".join(f"# --set {visible(text)}\n" for text in sets)
    end = "\n" if notes and file.text and not file.text.endswith("\n") else ""
    return replace(file, value=values, options=names, text=file.text + end + notes), found


def _parsed(text: str) -> tuple[Place, Any]:
    """The place and the value of a KEY=VALUE. Raises ConfigError if it is none."""
    key, equals, value = text.partition("=")
    place = tuple(part.strip() for part in key.split("."))
    if not equals or not all(place):
        raise ConfigError("expected KEY=VALUE, such as drift_weight=2 or directories.output_directory=merged")
    return place, parse_yaml(value)[0]


def _with_value(values: Mapping[str, Any], place: Place, value: Any, before: Place = ()) -> dict[str, Any]:
    """Mappings with a value at a place. Raises ConfigError if there is something else on the way to it."""
    key, *rest = place
    if not rest:
        return {**values, key: value}
    within = values.get(key)
    if not isinstance(within, Mapping | None):
        raise ConfigError(f"{'.'.join((*before, key))} is no mapping of keys to values")
    return {**values, key: _with_value(within or {}, tuple(rest), value, (*before, key))}


def _not_in(value: Any, place: Place) -> list[int]:
    """How many keys of a place lead to what is not a file's own: the value that is set, mappings made to hold it."""
    counts = [len(place)]
    for count, key in enumerate(place[:-1], start=1):
        value = value.get(key) if isinstance(value, Mapping) else None
        counts += [count] if value is None else []
    return counts

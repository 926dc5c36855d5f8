"""One YAML file: its text, its values, the line of each of them, and what the command line gives in their place.

Knows: how large a file may be and what its aliases may stand for; that no key stands twice; how a key with dots is
walked along. Refuses to know: what the keys mean.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from modules.runtime.errors import ConfigError, first_line
from modules.runtime.input_files import open_input
from modules.runtime.text import shortened

_LARGEST = 100_000_000  # bytes of a YAML file; what has more is none, and may have no end (/dev/zero)
_MOST_VALUES = 2_000_000  # in a YAML file: many times as many lists can stand in a short one that refers to itself
_HALF = re.compile("[\ud800-\udfff]")  # of a character: a lone surrogate, which an escape can make
_MERGE_KEY = "tag:yaml.org,2002:merge"

# The beginning of what `repr` would write, in a time that does not grow with the value: the aliases of a short file can
# stand for more than there is memory for.
_EXCERPT = reprlib.Repr()
_EXCERPT.maxlevel = 3
_EXCERPT.maxstring = 100

Place = tuple[str | int, ...]  # keys and numbers of items, from the whole file to a value


@dataclass(frozen=True)
class YamlFile:
    """A file that was read. Its values are plain ones: mappings, lists, text, numbers."""

    value: Any
    node: yaml.Node | None  # what the value was made of; None in an empty file
    name: str = ""  # with which messages begin; that of the main file is empty
    options: Mapping[Place, str] = field(default_factory=dict)  # of the command line, by the place of what they give

    def where(self, place: Place) -> tuple[str, str]:
        """What messages call a place, bad_phrases[0].contexts, say, and " (line 7)" if it is one of the file."""
        line = ""
        for given, option in self.options.items():
            if place[: len(given)] == given:
                name = option
                place = place[len(given) :]
                break
        else:
            name = self.name
            nodes = self._nodes(place)
            if nodes:  # of the place, or the nearest one around it that is there
                line = f" (line {nodes[-1].start_mark.line + 1}{' of that file' if self.name else ''})"
        for part in place:
            name += f"[{part}]" if isinstance(part, int) else f".{part}"
        return name.removeprefix(".") or "the file", line

    def _nodes(self, place: Place) -> list[yaml.Node]:
        """Keys and items on the way to a place, as far as they are there."""
        node = self.node
        nodes = []
        for part in place:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                nodes.append(node)
            elif isinstance(node, yaml.MappingNode) and any(key.value == part for key, _ in node.value):
                # Of a key that was merged (<<) and is there itself, its own comes last.
                key, node = [pair for pair in node.value if pair[0].value == part][-1]
                nodes.append(key)
            else:
                break
        return nodes


def read_yaml(path: Path, if_absent: str, name: str = "") -> YamlFile:
    """Read a file. Raises ConfigError if that can't be done; if_absent: what to do where there is no such file."""
    try:
        with open_input(path) as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ConfigError(f"{path}: larger than {_LARGEST // 1_000_000} MB; this is no configuration file")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {if_absent}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', error)})") from None
    try:
        return YamlFile(*parse_yaml(text), name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The values of a text, and what they were made of. Raises ConfigError, saying where, if it is no YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _size(node, {})
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise ConfigError(f"not valid YAML at {where}: {error.problem or error.context}") from None
    except Exception as error:  # whatever the library makes of a value that its tag does not fit
        raise ConfigError(f"not valid YAML: {first_line(error)}") from None


def with_value(file: YamlFile, place: Place, value: Any, option: str) -> YamlFile:
    """A file, whose value is a mapping, with a value that an option of the command line gives. Raises ConfigError if
    something else is on the way to its place."""
    values = section = dict(file.value)
    for key in place[:-1]:
        if not isinstance(section.get(key), Mapping | None):
            raise ConfigError(f"{key} is not a mapping of keys to values")
        section[key] = dict(section.get(key) or {})
        section = section[key]
    if value is None:  # what holds nothing is as good as absent
        section.pop(place[-1], None)
    else:
        section[place[-1]] = value
    return replace(file, value=values, options={**file.options, place: option})


class _Loader(yaml.SafeLoader):
    """The safe loader, but keys are text, and one that holds nothing is as good as absent."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """A mapping's values."""
        values = super().construct_mapping(node, deep)
        return {str(key): value for key, value in values.items() if value is not None}


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, aliases of aliases included; sizes: those known by the nodes' ids.

    Raises MarkedYAMLError if there are too many, if a key stands twice, since the first would be lost silently, or if a
    text can't be written.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    size = sizes[id(node)] = 1  # for a node that holds itself
    if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
        raise yaml.MarkedYAMLError(problem="this contains half of a character", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_KEY:
                if key.value in seen:
                    problem = f"the key '{key.value}' is listed twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
            size += _size(key, sizes) + _size(value, sizes)
    if size > _MOST_VALUES:
        problem = f"this expands to more than {_MOST_VALUES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size


def shown(value: Any) -> str:
    """A value as the YAML file would write it, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    try:
        return shortened(_EXCERPT.repr(value), 60, "start")
    except ValueError:
        return "a number with too many digits"

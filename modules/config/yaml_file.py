"""One YAML file: its text, its values, the line of each value, and values of the command line that replace them.

Knows: how large a file and its expanded aliases may be; that no key is repeated; how a key path leads to a value.
Refuses to know: what the keys mean.
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

_LARGEST = 100_000_000  # bytes of a YAML file; a larger one is no configuration, and may be endless (/dev/zero)
_MOST_VALUES = 2_000_000  # in a YAML file, aliases expanded: a short one with nested aliases can mean far more
_HALF = re.compile("[\ud800-\udfff]")  # of a character: a lone surrogate, which an escape can make
_MERGE_KEY = "tag:yaml.org,2002:merge"

# The beginning of a value's `repr`, in a time that does not grow with the value: the expanded aliases of a short file
# can exceed the memory.
_EXCERPT = reprlib.Repr()
_EXCERPT.maxlevel = 3
_EXCERPT.maxstring = 100

KeyPath = tuple[str | int, ...]  # keys and numbers of items, from the whole file to a value


@dataclass(frozen=True)
class YamlFile:
    """The content of a file. Its values are plain: mappings, lists, text, numbers."""

    value: Any
    node: yaml.Node | None  # from which the value was made; None in an empty file
    name: str = ""  # with which messages begin; that of the main file is empty
    options: Mapping[KeyPath, str] = field(default_factory=dict)  # of the command line, by the key path of their value

    def where(self, key_path: KeyPath) -> tuple[str, str]:
        """The name of a key path in messages, such as bad_phrases[0].contexts; and " (line 7)" if it is in the file."""
        line = ""
        for option_path, option in self.options.items():
            if key_path[: len(option_path)] == option_path:
                name = option
                key_path = key_path[len(option_path) :]
                break
        else:
            name = self.name
            nodes = self._nodes(key_path)
            if nodes:  # those of the key path, as far as they exist
                line = f" (line {nodes[-1].start_mark.line + 1}{' of that file' if self.name else ''})"
        for part in key_path:
            name += f"[{part}]" if isinstance(part, int) else f".{part}"
        return name.removeprefix(".") or "the file", line

    def _nodes(self, key_path: KeyPath) -> list[yaml.Node]:
        """The keys and items along a key path, as far as they exist."""
        node = self.node
        nodes = []
        for part in key_path:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                nodes.append(node)
            elif isinstance(node, yaml.MappingNode) and any(key.value == part for key, _ in node.value):
                # If a key is merged (<<) and also given, the given one comes last.
                key, node = [pair for pair in node.value if pair[0].value == part][-1]
                nodes.append(key)
            else:
                break
        return nodes


def read_yaml(path: Path, if_absent: str, name: str = "") -> YamlFile:
    """Read a file. if_absent: the advice if there is no such file. Raises ConfigError if it can't be read."""
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
    """The values of a text, and their nodes. Raises ConfigError, with the position, if it is no YAML."""
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


def with_value(file: YamlFile, key_path: KeyPath, value: Any, option: str) -> YamlFile:
    """A file with a value that an option of the command line gives. file: its value is a mapping. Raises ConfigError if
    a key along the key path has no mapping."""
    values = section = dict(file.value)
    for key in key_path[:-1]:
        if not isinstance(section.get(key), Mapping | None):
            raise ConfigError(f"{key} is not a mapping of keys to values")
        section[key] = dict(section.get(key) or {})
        section = section[key]
    if value is None:  # an empty key counts as absent
        section.pop(key_path[-1], None)
    else:
        section[key_path[-1]] = value
    return replace(file, value=values, options={**file.options, key_path: option})


class _Loader(yaml.SafeLoader):
    """The safe loader, but keys are text, and an empty key counts as absent."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """A mapping's values."""
        values = super().construct_mapping(node, deep)
        return {str(key): value for key, value in values.items() if value is not None}


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values in a node, with all aliases expanded. sizes: the known ones by the nodes' ids.

    Raises MarkedYAMLError if there are too many, if a key is repeated (the first would be lost silently), or if a text
    can't be encoded.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    size = sizes[id(node)] = 1  # for a node that holds itself
    if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
        raise yaml.MarkedYAMLError(problem="this contains half of a character", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_KEY:
                if key.value in keys:
                    problem = f"the key '{key.value}' is listed twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(key.value)
            size += _size(key, sizes) + _size(value, sizes)
    if size > _MOST_VALUES:
        problem = f"this expands to more than {_MOST_VALUES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size


def shown(value: Any) -> str:
    """A value as in the YAML file, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    try:
        return shortened(_EXCERPT.repr(value), 60, "start")
    except ValueError:
        return "a number with too many digits"

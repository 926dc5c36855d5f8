"""One YAML file: its text, its values, and the line of each of them.

Knows: how large a file may be and what its aliases may stand for; that no key stands twice.
Refuses to know: what the keys mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modules.runtime import ConfigError, first_line, open_input

_LARGEST = 100_000_000  # bytes of a YAML file; what has more is none, and may have no end (/dev/zero)
_MOST_VALUES = 2_000_000  # in a YAML file: many times as many lists can stand in a short one that refers to itself

Place = tuple[str | int, ...]  # keys and numbers of items, from the whole file to a value


@dataclass(frozen=True)
class YamlFile:
    """A file that was read. Its values are plain ones: mappings, lists, text, numbers."""

    text: str
    value: Any
    node: yaml.Node | None  # what the value was made of; None in an empty file
    name: str = ""  # with which messages begin what they call a place of it; that of the main file is empty
    options: Mapping[Place, str] = field(default_factory=dict)  # of the command line, by the place of what they give

    def name_of(self, place: Place) -> str:
        """What messages call a place: bad_phrases[0].contexts, say."""
        given = self._given(place)
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[given:])
        name = self.options[place[:given]] if given else self.name
        return name + path if name else path.removeprefix(".") or "the file"

    def line_of(self, place: Place) -> int | None:
        """The line where a place begins, or the nearest one around it that is there; None for the whole file."""
        node, line = None if self._given(place) else self.node, None
        for part in place:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                begin = node = node.value[part]
            elif isinstance(node, yaml.MappingNode):
                pairs = [pair for pair in node.value if pair[0].value == part]
                if not pairs:
                    break
                begin, node = pairs[-1]  # of a key that was merged (<<) and is there itself, its own comes last
            else:
                break
            line = begin.start_mark.line + 1
        return line

    def _given(self, place: Place) -> int:
        """How many keys of a place lead to what the command line gives; 0 if it is the file's own."""
        return next((count for count in range(len(place), 0, -1) if place[:count] in self.options), 0)


def read_yaml(path: Path, if_absent: str, name: str = "") -> YamlFile:
    """Read a file. Raises ConfigError if that can't be done; if_absent: what to do where there is no such file."""
    text = _text_of(path, if_absent)
    try:
        return YamlFile(text, *parse_yaml(text), name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The values of a text, and what they were made of. Raises ConfigError, saying where, if it is no YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise ConfigError(f"not valid YAML at {where}: {error.problem or error.context}.") from None
    except Exception as error:  # whatever the library makes of a value that its tag does not fit
        raise ConfigError(f"not valid YAML: {first_line(error)}") from None


def _text_of(path: Path, if_absent: str) -> str:
    try:
        with open_input(path) as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ConfigError(f"{path}: has more than {_LARGEST // 1_000_000} MB; this is no YAML file of settings")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. {if_absent}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}).") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key that stands twice in one mapping is an error, since the first would be lost silently;
    and so are aliases of aliases that stand for more than there is time to look at."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}  # of each node, how many it stands for, itself included; by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node of the file; of an alias, the node that it stands for."""
        node = super().compose_node(parent, index)
        if node is not None and id(node) not in self._sizes:
            size = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(self._size(child) for child in node.value)
            self._sizes[id(node)] = size
            if size > _MOST_VALUES:
                problem = f"this stands for more than {_MOST_VALUES:,} values"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def _size(self, child: Any) -> int:
        """Of an item of a list, or of a key with its value. A node that holds itself has no size yet."""
        return sum(self._sizes.get(id(node), 1) for node in (child if isinstance(child, tuple) else (child,)))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping's values."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    problem = f"the key '{key}' stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<) resolved. A mapping merged twice counts once: mappings of such mappings would grow without
        end."""
        super().flatten_mapping(node)
        node.value = list({id(key): (key, value) for key, value in node.value}.values())

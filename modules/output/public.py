"""What a run writes down as anybody may read it: no path begins at the root of a disk, or names a user's home folder.

Knows: where a run's files lie, how a path is said without that, and how it is found again. Refuses to know: what a
text is about.

Where a recipe's sources lie is said from the output's folder on; all else from the folder in which the run was started,
as paths in a YAML file are. What lies in the home folder, when neither of them does, begins with ~.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from modules.config import Config, input_paths, parts_of, repositories_in
from modules.output.folder import written_paths
from modules.output.records import Record

Kind = TypeVar("Kind", bound=Record)

# Keys of what people have written to be read, or a model: no text of theirs is a path of ours.
_WORDS = ("bad_phrases", "good_phrases", "held_out_pairs", "phrases", "system", "template", "samples")
_SEPARATOR = re.escape(os.sep) if os.sep != "/" else r"/(?:\.?/)*"


def relative(path: str | Path, start: str | Path) -> str:
    """A path from a folder on, with slashes; from another disk it can only be said whole."""
    path, start, home = (_real(os.path.expanduser(one)) for one in (path, start, "~"))
    try:
        if _is_within(path, home) and not _is_within(start, home):
            found = os.path.join("~", os.path.relpath(path, home))
        else:
            found = os.path.relpath(path, start)
    except ValueError:
        found = path
    return found.replace(os.sep, "/")


def _real(path: str | Path) -> str:
    """A path without links in it; one that can be none, as in a recipe that somebody has changed, is left as it is."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def _is_within(path: str, folder: str) -> bool:
    return os.path.dirname(folder) != folder and os.path.commonpath([path, folder]) == folder


def found_again(where: str, start: str | Path, folders: Sequence[Path] = ()) -> str:
    """Where a source is, of which a recipe in the folder `start` says where. Its folders are first looked for, by their
    names, in others."""
    found = []
    for part in parts_of(where):
        place = os.path.normpath(os.path.join(_real(start), part)) if part.startswith("../") else part
        named = (folder / os.path.basename(os.path.normpath(place)) for folder in folders)
        found.append(next((str(model) for model in named if model.exists() and not repositories_in(part)), place))
    return "+".join(found)


class Public:
    """Says the paths of one run, wherever they stand in a text, as anybody may read them."""

    def __init__(self, output: str | Path, known: Iterable[str | Path] = ()) -> None:
        """known: paths that may be named, beside the output's and what lies in the home folder, or where the run was
        started."""
        self._output, self._said = _real(output), dict[str, str]()
        here = os.path.abspath("")
        for path in (*known, *written_paths(Path(output)), here):
            self.know(path, relative(path, here))
        self.know(os.path.expanduser("~"), "~")

    @classmethod
    def of(cls, config: Config) -> "Public":
        """Of a run of this configuration."""
        directories = config.directories
        given = [directories.model_directory] if directories.model_directory else []
        return cls(directories.output_directory, [*input_paths(config), *given])

    def know(self, path: str | Path, said: str) -> None:
        """Say a path, and what begins with it, in these words."""
        for one in (str(path), os.path.abspath(path), _real(path)):
            if os.path.isabs(one) and os.path.dirname(one) != one:
                self._said.setdefault(one, said)
        paths = sorted(self._said, key=len, reverse=True)
        spelt = "|".join(f"({_SEPARATOR.join(map(re.escape, path.split(os.sep)))})" for path in paths)
        self._words = [self._said[path] for path in paths]
        self._pattern = re.compile(rf"(?<![\w.~/-])(?:{spelt})(?![\w-]|\.\w)(?P<more>/(?=[\w.~-]))?")

    def text(self, text: str) -> str:
        """A text with all its paths said so."""

        def said(match: re.Match[str]) -> str:
            word = self._words[next(number for number, found in enumerate(match.groups()) if found is not None)]
            return "" if word == "." and match["more"] else word + (match["more"] or "")

        return self._pattern.sub(said, text)

    def found_in(self, text: str) -> str | None:
        """The first path of this machine in a text."""
        match = self._pattern.search(text)
        return match and match[0] + re.match(r"[^\s\"',;:]*", text[match.end() :])[0]

    def where(self, where: str) -> str:
        """Where a source lies, or a run was started, from the output on."""
        parts = parts_of(where)
        return "+".join(self._from_output(part) if os.path.isabs(part) else part for part in parts)

    def _from_output(self, path: str) -> str:
        """Of a model that is not here, as in a recipe from elsewhere, no more than its name."""
        return relative(path, self._output) if os.path.exists(path) else os.path.basename(os.path.normpath(path))

    def record(self, record: Kind) -> Kind:
        """A line of a journal, or a recipe."""
        return type(record).model_validate(self.value(record.written()))

    def value(self, value: Any, key: str = "") -> Any:
        """What JSON can hold, with all its texts so. key: that it stands under."""
        if key in _WORDS:
            return value
        if isinstance(value, dict):
            return {name: self.value(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, key) for item in value]
        if not isinstance(value, str):
            return value
        return self.where(value) if key in ("where", "folder") else self.text(value)

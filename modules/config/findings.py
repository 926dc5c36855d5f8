"""What is wrong with a file, in words: the one place where pydantic's errors are put into them.

Knows: the words for every kind of error, how a line names its key and its place.
Refuses to know: what is checked, and when.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from modules.config.excerpts import shown
from modules.config.schema import known_keys
from modules.config.yaml_file import Place, YamlFile

_NO_CONTEXTS = 'missing or empty; list at least one context ("" is the empty one)'
_NO_MAPPING = "expected a mapping of keys to values"
# A whole file without `directories` is read as if they were empty: the key is only missing where it holds nothing.
_MISSING = {"contexts": _NO_CONTEXTS, "directories": f"nothing: {_NO_MAPPING}"}


@dataclass(frozen=True)
class Finding:
    """Something wrong at a place of a file. Its words are made when it is told: a file can have very many."""

    file: YamlFile
    place: Place
    problem: str
    kind: str = "told"  # pydantic's type of error, or "told" if the problem says it all
    value: Any = None

    def __str__(self) -> str:
        """The finding as a line of a message."""
        line = self.file.line_of(self.place)
        where = f" (line {line}{' of that file' if self.file.name else ''})" if line else ""
        return f"{self.file.name_of(self.place)}: {self._words()}{where}"

    def _words(self) -> str:
        match self.kind:
            case "told":
                return self.problem
            case "unexpected_keyword_argument":
                return f"unknown key; {_nearest(str(self.place[-1]), known_keys(self.place[:-1]))}"
            case "missing":
                return _MISSING.get(str(self.place[-1]), "missing")
            case "too_short":
                return _NO_CONTEXTS
            case "dataclass_type":
                return f"{shown(self.value)}: {_NO_MAPPING}"
        return f"{shown(self.value)}: {self.problem}"


def findings_in(error: ValidationError, file: YamlFile) -> list[Finding]:
    """All that pydantic found in a file's values, unknown keys first."""
    found = []
    for item in error.errors(include_url=False):
        problem = str(item.get("ctx", {}).get("error", item["msg"]))
        found.append(Finding(file, item["loc"], problem, item["type"], item["input"]))
    return sorted(found, key=lambda finding: finding.kind != "unexpected_keyword_argument")


def _nearest(key: str, known: tuple[str, ...]) -> str:
    guess = difflib.get_close_matches(key, known, 1)
    return f"did you mean '{guess[0]}'?" if guess else f"known keys: {', '.join(known)}"

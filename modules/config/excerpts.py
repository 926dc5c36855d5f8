"""A value as a message shows it.

Knows: what YAML calls things, how much of a value fits on a line. Refuses to know: which key it belongs to.
"""

import reprlib
from typing import Any

from modules.runtime import shortened


class _Excerpt(reprlib.Repr):
    """The beginning of what `repr` would write, in a time that does not grow with the value: the aliases of a short
    file can stand for more than there is memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if abs(value) < 10**60 else "a number of more than 60 digits"


def shown(value: Any) -> str:
    """A value as the YAML file would write it, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    return shortened(_Excerpt().repr(value), 60, "start")

"""The licence that models state in the cards of their folders.

Knows: the hub's front matter, the form of a licence's name. Refuses to know: the rest of a card, the hub.

A card comes from a stranger: a long or odd one is ignored.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from modules.config.yaml_file import parse_yaml
from modules.runtime.errors import ConfigError
from modules.runtime.input_files import open_input

LARGEST_FRONT = 20_000  # bytes of a card in which its front matter must end
FRONT = re.compile(r"---\r?\n(.*?\r?\n)---\s*?(?:\n|$)", re.DOTALL)
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")
NO_NAMES = ("other", "unknown")  # the card's text then states the licence, which may differ between models


def common_licence(folders: Iterable[Path]) -> str | None:
    """The licence that the models in all these folders state; None if they don't state the same one."""
    stated = {stated_licence(folder) for folder in folders}
    return stated.pop() if len(stated) == 1 else None


def stated_licence(folder: Path) -> str | None:
    """The licence that a model's card states; None if there is no card, or no name of a licence in it."""
    try:
        with open_input(folder / "README.md") as file:
            text = file.read(LARGEST_FRONT).decode("utf-8-sig")
        front = FRONT.match(text)
        values = parse_yaml(front[1])[0] if front else None
    except (OSError, ValueError, ConfigError):
        return None
    licence = values.get("license") if isinstance(values, Mapping) else None
    is_name = isinstance(licence, str) and NAME.fullmatch(licence) and licence not in NO_NAMES
    return licence if is_name else None

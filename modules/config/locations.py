"""How the YAML file names a model: as a folder, a GGUF file or an id of the hub; or as one of these and an adapter.

Knows: how names are spelt, which folders and files exist. Refuses to know: the network, what is in a folder.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

GGUF = ".gguf"  # the suffix of such files

# Letters, digits, "_", "-" and "."; neither "-" nor "." at an end, neither doubled: the hub's own rules.
_NAME = r"\w(?:(?!--|\.\.)[\w.-])*(?<![.-])"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)

# How a recipe names a model on the hub: with its commit.
_EXACT = re.compile(rf"(?:^|\+)(?P<repo>{_NAME}/{_NAME})@(?P<commit>[0-9a-f]{{40}})(?=\+|\Z)", re.ASCII)

# The plus between two models: what follows it can't be a part of a folder's name.
_NEXT = re.compile(rf"\+(?=\.\./|~/|/|[A-Za-z]:[\\/]|{_NAME}/{_NAME}@[0-9a-f]{{40}}(?:\+|\Z))", re.ASCII)


def partial_of(output: Path) -> Path:
    """The folder in which an output is written until it is complete."""
    return output.with_name(output.name + ".partial")


@dataclass(frozen=True)
class Location:
    """The location of a model: a folder or, if that is None, a repository of the hub."""

    text: str  # as it was written
    folder: Path | None  # or a GGUF file, which is converted to a folder when it is opened
    repo: str = ""
    revision: str | None = None  # a branch, a tag or a commit; None is the hub's main branch

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the location that distinguish it from others, from the widest to the narrowest."""
        if self.folder is not None:
            return self.folder.resolve().parts
        owner, name = self.repo.split("/")
        return owner, f"{name}@{self.revision}" if self.revision else name

    @property
    def name(self) -> str:
        """Its name without a path: the name of the folder or file, or the id of the hub."""
        return self.text if self.folder is None else self.folder.resolve().name or "model"

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.folder is not None and self.folder.is_file()


@dataclass(frozen=True)
class Source:
    """The parts of a candidate: a model, or an adapter alone, or a model and an adapter for it."""

    text: str  # as it was written
    model: Location
    adapter: Location | None = None  # only if the text names both

    @property
    def places(self) -> list[Location]:
        """The locations of model and adapter."""
        return [self.model, self.adapter] if self.adapter else [self.model]


def parse_location(text: str) -> Location | None:
    """An existing folder or GGUF file; else a text with the form of an id of the hub; else None.

    If there is a folder models, models/one means a folder, not a model of the hub; models/one@main means the hub's.
    """
    path = os.path.expanduser(text)
    if os.path.isdir(path) or (path.lower().endswith(GGUF) and os.path.isfile(path)):
        return Location(text, Path(path))
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None or (hub_id["revision"] is None and os.path.isdir(os.path.dirname(text))):
        return None
    return Location(text, None, hub_id["repo"], hub_id["revision"])


def missing_folder(text: str) -> str:
    """The message for a text that is no model."""
    nothing = "no such file" if text.lower().endswith(GGUF) else "no such folder"
    return f"{nothing}; write a hub model as org/name@main"


def parse_source(text: str) -> Source | None:
    """`location` or `location+location`; None if it is neither. A folder with a plus in its name is a folder."""
    location = parse_location(text)
    if location is not None:
        return Source(text, location)
    for plus in re.finditer(r"\+", text):
        model = parse_location(text[: plus.start()].strip())
        adapter = parse_location(text[plus.end() :].strip())
        if model is not None and adapter is not None:
            return Source(text, model, adapter)
    return None


def names_of(sources: list[Source]) -> list[str]:
    """The sources' names in reports: their last parts, as many as distinguish different locations."""
    all_parts = {location.parts for source in sources for location in source.places}

    def name(location: Location) -> str:
        count = 1
        while any(parts[-count:] == location.parts[-count:] for parts in all_parts if parts != location.parts):
            count += 1
        return "/".join(location.parts[-count:])

    return ["+".join(map(name, source.places)) for source in sources]


def parts_of(where: str) -> list[str]:
    """The locations in a recipe's `where`: one, or a model's and an adapter's. A folder's name may contain a plus."""
    return _NEXT.split(where)


def without_folders(where: str) -> str:
    """A recipe's `where` with names instead of paths of folders."""
    return "+".join(
        part if repositories_in(part) else os.path.basename(os.path.normpath(part)) for part in parts_of(where)
    )


def repositories_in(where: str) -> list[tuple[str, str]]:
    """The repositories of the hub in a recipe's `where`, each with its commit."""
    return [(match["repo"], match["commit"]) for match in _EXACT.finditer(where)]


def names_folder(where: str) -> bool:
    """Whether a recipe's `where` names a folder, perhaps beside a repository of the hub."""
    return bool(_EXACT.sub("", where))

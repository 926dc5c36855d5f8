"""What a model is called in the YAML file: a folder, a GGUF file, an id of the hub; or one and an adapter.

Knows: how names are spelt, which folders and files are there. Refuses to know: the network, what is in a folder.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

GGUF = ".gguf"  # how the names of such files end

# Letters, digits, "_", "-" and "."; neither "-" nor "." at an end, neither doubled: the hub's own rules.
_NAME = r"\w(?:(?!--|\.\.)[\w.-])*(?<![.-])"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)

# As a recipe writes down where a model of the hub is: to the commit.
_EXACT = re.compile(rf"(?:^|\+)(?P<repo>{_NAME}/{_NAME})@(?P<commit>[0-9a-f]{{40}})(?=\+|\Z)", re.ASCII)

# Where one begins behind another: at a plus before what is no more of a folder's name.
_NEXT = re.compile(rf"\+(?=\.\./|~/|/|[A-Za-z]:[\\/]|{_NAME}/{_NAME}@[0-9a-f]{{40}}(?:\+|\Z))", re.ASCII)


def partial_of(output: Path) -> Path:
    """Where an output that can be renamed is written until it is complete."""
    return output.with_name(output.name + ".partial")


@dataclass(frozen=True)
class Location:
    """Where a model lies: in a folder or, if that is None, on the hub."""

    text: str  # as it was written
    folder: Path | None  # or a GGUF file, of which a folder is made when it is opened
    repo: str = ""
    revision: str | None = None  # a branch, a tag or a commit; None is the hub's main branch

    @property
    def parts(self) -> tuple[str, ...]:
        """From the widest to the narrowest, what tells this location from another one."""
        if self.folder is not None:
            return self.folder.resolve().parts
        owner, name = self.repo.split("/")
        return owner, f"{name}@{self.revision}" if self.revision else name

    @property
    def name(self) -> str:
        """What it is called without where it lies: a folder's or a file's own name, an id of the hub."""
        return self.text if self.folder is None else self.folder.resolve().name or "model"

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.folder is not None and self.folder.is_file()


@dataclass(frozen=True)
class Source:
    """What a candidate is made of: a model, or an adapter alone, or a model and an adapter for it."""

    text: str  # as it was written
    model: Location
    adapter: Location | None = None  # only where the text names both

    @property
    def places(self) -> list[Location]:
        """Of one or of both."""
        return [self.model, self.adapter] if self.adapter else [self.model]


def parse_location(text: str) -> Location | None:
    """A folder or a GGUF file that is there or, failing that, a text with the form of an id of the hub; else None.

    models/one means a folder, and not the hub's, where there is a folder models; models/one@main means the hub's.
    """
    path = os.path.expanduser(text)
    if os.path.isdir(path) or (path.lower().endswith(GGUF) and os.path.isfile(path)):
        return Location(text, Path(path))
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None or (hub_id["revision"] is None and os.path.isdir(os.path.dirname(text))):
        return None
    return Location(text, None, hub_id["repo"], hub_id["revision"])


def missing_folder(text: str) -> str:
    """What to say of a text that is no model."""
    nothing = "no such file" if text.lower().endswith(GGUF) else "no such folder"
    return f"{nothing}; write a hub model as org/name@main"


def parse_source(text: str) -> Source | None:
    """`location` or `location+location`; None if it is neither. A folder with a plus in its name is a folder."""
    whole = parse_location(text)
    if whole is not None:
        return Source(text, whole)
    for plus in re.finditer(r"\+", text):
        model = parse_location(text[: plus.start()].strip())
        adapter = parse_location(text[plus.end() :].strip())
        if model is not None and adapter is not None:
            return Source(text, model, adapter)
    return None


def names_of(sources: list[Source]) -> list[str]:
    """What reports call the sources: their last parts, or as many more as tell different locations apart."""
    found = {location.parts for source in sources for location in source.places}

    def name(location: Location) -> str:
        count = 1
        while any(other[-count:] == location.parts[-count:] for other in found if other != location.parts):
            count += 1
        return "/".join(location.parts[-count:])

    return ["+".join(map(name, source.places)) for source in sources]


def parts_of(where: str) -> list[str]:
    """The places that a recipe's `where` names: one, or a model's and an adapter's. A folder may have a plus in it."""
    return _NEXT.split(where)


def without_folders(where: str) -> str:
    """What a recipe's `where` names, of a folder no more than its name."""
    return "+".join(
        part if repositories_in(part) else os.path.basename(os.path.normpath(part)) for part in parts_of(where)
    )


def repositories_in(where: str) -> list[tuple[str, str]]:
    """The hub's repositories, each with its commit, among the places that a recipe's `where` names."""
    return [(place["repo"], place["commit"]) for place in _EXACT.finditer(where)]


def names_folder(where: str) -> bool:
    """Whether a recipe's `where` names a folder, be it beside a repository of the hub."""
    return bool(_EXACT.sub("", where))

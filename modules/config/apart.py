"""What a run reads is never what it writes: one check of paths.

Knows: which folders and files a configuration names. Refuses to know: what is in them, which names an output takes.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from modules.config.locations import parse_location, parse_source, partial_of
from modules.config.schema import Config
from modules.runtime import ConfigError


def input_paths(config: Config) -> list[Path]:
    """The folders and files on this machine that a run of this configuration reads, its YAML file not included."""
    directories = config.directories
    output = real_path(Path(directories.output_directory))
    sources = [parse_source(text) for text in config.models_to_merge]
    places = [parse_location(directories.model_path1), *(place for s in sources if s for place in s.places)]
    folders = [place.folder for place in places if place and place.folder]
    if directories.model_directory and not config.models_to_merge and os.path.isdir(directories.model_directory):
        within = [path for path in Path(directories.model_directory).iterdir() if path.is_dir()]
        visible = [path for path in within if not path.name.startswith(".")]  # no other is a candidate
        folders += [path for path in visible if real_path(path) not in (output, partial_of(output))]
    folders += [Path(config.tokenizer)] if config.tokenizer else []
    return [*folders, *map(Path, [*config.phrase_files, *config.held_out_files, *(config.neutral_texts or ())])]


def check_apart(written: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ConfigError if something that may be made, replaced or deleted is an input, holds one, or lies in one.

    A model's files may be links: what they lead to is an input too.
    """
    inputs = [path for given in inputs for path in (given, *_linked(given))]
    for ours in written:
        for theirs in inputs:
            if _is_in(theirs, ours):
                what = "is" if _is_in(ours, theirs) else "contains"
            elif _is_in(ours, theirs):
                what = "lies in"
            else:
                continue
            raise ConfigError(f"{ours}, which this run would write, {what} the input {theirs}; name another path")


def _linked(folder: Path) -> list[Path]:
    with suppress(OSError):  # no folder, or none that can be read: whoever opens it says so
        return [path for path in folder.iterdir() if path.is_symlink()]
    return []


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another one, or lies in it, however the two are spelt."""
    inner, outer = real_path(inner), real_path(outer)
    return any(place == outer or _is_same(place, outer) for place in (inner, *inner.parents))


def real_path(path: Path) -> Path:
    """Unlike Path.resolve, this raises no error where links lead round in a circle."""
    try:
        return Path(os.path.realpath(path))
    except OSError:
        raise ConfigError("the folder that you are in is gone; go to one that is there") from None


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False

"""What a run reads beside models: text files; and that nothing of all that it reads is what it writes.

Knows: which folders and files a configuration names, how texts and prompts are read, where those of the program lie.
Refuses to know: tokenizers, chat templates, what is in a model's folder, which names an output takes.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from modules.config.locations import parse_location, parse_source, partial_of
from modules.config.schema import Config
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.input_files import open_input

LISTS = Path(__file__).parents[2] / "example_phrases"
SHIPPED = LISTS / "neutral"
PROMPTS = LISTS / "prompts.txt"
OPENINGS = LISTS / "openings.txt"
MOST_CHARACTERS = 2_000_000  # of a file; the measure of drift needs some thousand tokens


def read_neutral_texts(files: Sequence[str] | None) -> list[str]:
    """Ordinary texts on which a merged model should say what the base says; of None those of the program.

    Raises ConfigError, naming every file that can't be read or holds no text.
    """
    texts = []
    problems = []
    for path in sorted(SHIPPED.glob("*.txt")) if files is None else map(Path, files):
        try:
            text = _beginning_of(path)
            if not text.strip():
                raise ConfigError(f"{path}: the file is empty")
            texts.append(text)
        except ConfigError as error:
            problems.append(f"neutral_texts: {error}")
    if problems:
        raise ConfigError(*problems)
    return texts


def read_prompts(files: Sequence[str] | None, for_chats: bool, key: str) -> tuple[str, ...]:
    """A prompt for each line of the files that is not empty and does not begin with a #, each once.

    None: those of the program, questions for chats, else openings of texts. key: that names the files. Raises
    ConfigError if a file can't be read or holds no prompt.
    """
    shipped = PROMPTS if for_chats else OPENINGS
    prompts: dict[str, None] = {}
    for path in [shipped] if files is None else map(Path, files):
        try:
            lines = [line.strip() for line in _beginning_of(path).splitlines()]
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise ConfigError(f"{key}: {path} contains no prompts; write one per line")
        prompts.update(dict.fromkeys(in_file))
    return tuple(prompts)


def _beginning_of(path: Path) -> str:
    try:
        with open_input(path, "utf-8-sig") as file:
            return file.read(MOST_CHARACTERS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from None


def input_paths(config: Config) -> list[Path]:
    """The folders and files on this machine that a run of this configuration reads, its YAML file not included."""
    directories = config.directories
    locations = [parse_location(directories.model_path1)]
    for source in map(parse_source, config.models_to_merge):
        locations += source.places if source else []
    paths = [location.folder for location in locations if location and location.folder]
    if directories.model_directory and not config.models_to_merge and os.path.isdir(directories.model_directory):
        output = real_path(Path(directories.output_directory))
        for path in Path(directories.model_directory).iterdir():
            if path.is_dir() and not path.name.startswith(".") and real_path(path) not in (output, partial_of(output)):
                paths.append(path)
    named = [*config.phrase_files, *config.held_out_files, *(config.neutral_texts or ()), *(config.own_texts or ())]
    named += filter(None, [config.tokenizer, config.learn.texts])
    return paths + [Path(name) for name in named]


def check_apart(written: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ConfigError if something that may be made, replaced or deleted is an input, holds one, or lies in one.

    A model's files may be links: what they lead to is an input too.
    """
    read = []
    for path in inputs:
        read.append(path)
        with suppress(OSError):  # no folder, or none that can be read: whoever opens it says so
            read += [file for file in path.iterdir() if file.is_symlink()]
    for ours in written:
        for theirs in read:
            if _is_in(theirs, ours):
                what = "is" if _is_in(ours, theirs) else "contains"
            elif _is_in(ours, theirs):
                what = "lies in"
            else:
                continue
            raise ConfigError(f"this run would write {ours}, which {what} the input {theirs}; choose another path")


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another one, or lies in it, however the two are spelt."""
    inner = real_path(inner)
    outer = real_path(outer)
    return any(path == outer or _is_same(path, outer) for path in (inner, *inner.parents))


def _is_same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return False


def real_path(path: Path) -> Path:
    """Unlike Path.resolve, this raises no error where links lead round in a circle."""
    try:
        return Path(os.path.realpath(path))
    except OSError:
        raise ConfigError("the current folder no longer exists; change to another one") from None

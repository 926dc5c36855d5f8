"""Reads the text files of a run, and checks that a run does not overwrite its inputs.

Knows: which folders and files a configuration names, how texts and prompts are read, where the program's own are.
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
    """Ordinary texts on which a merged model should predict what the base predicts. files: None: the program's own.

    Raises ConfigError, naming every file that can't be read or is empty.
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
    """The prompts of some files, each once: the lines that are not empty and do not begin with a #.

    files: None: the program's own, questions for chats, else openings of texts. key: the one that names the files.
    Raises ConfigError if a file can't be read or has no prompt.
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
    file_names = [
        *config.phrase_files,
        *config.held_out_files,
        *(config.neutral_texts or ()),
        *(config.own_texts or ()),
    ]
    file_names += filter(None, [config.tokenizer, config.learn.texts])
    return paths + [Path(name) for name in file_names]


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ConfigError if a path that may be made, replaced or deleted is an input, contains one, or lies in one.

    A model's files may be links: their targets are inputs, too.
    """
    input_files = []
    for path in inputs:
        input_files.append(path)
        with suppress(OSError):  # no folder, or an unreadable one: opening it reports that
            input_files += [file for file in path.iterdir() if file.is_symlink()]
    for output in outputs:
        for input_file in input_files:
            if _is_in(input_file, output):
                relation = "is" if _is_in(output, input_file) else "contains"
            elif _is_in(output, input_file):
                relation = "lies in"
            else:
                continue
            raise ConfigError(
                f"this run would write {output}, which {relation} the input {input_file}; choose another path"
            )


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether a path is the same as another one, or lies in it, however the two are spelt."""
    inner = real_path(inner)
    outer = real_path(outer)
    return any(path == outer or _is_same(path, outer) for path in (inner, *inner.parents))


def _is_same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them does not exist
        return False


def real_path(path: Path) -> Path:
    """The path without links. Unlike Path.resolve, this raises no error for links in a circle. Raises ConfigError if
    the current folder is gone."""
    try:
        return Path(os.path.realpath(path))
    except OSError:
        raise ConfigError("the current folder no longer exists; change to another one") from None

"""Neutral texts: ordinary texts on which a merged model should say what the base says.

Knows: where those of the program lie, how a file is read. Refuses to know: tokenizers, what is measured on them.
"""

from collections.abc import Sequence
from pathlib import Path

from modules.runtime import ConfigError, first_line, open_input

SHIPPED = Path(__file__).parents[2] / "example_phrases/neutral"
MOST_CHARACTERS = 2_000_000  # of a file; the measure needs some thousand tokens


def read_neutral_texts(files: Sequence[str] | None) -> list[str]:
    """The texts of the named files; of None those that the program brings along.

    Raises ConfigError, naming every file that can't be read or holds no text.
    """
    paths = sorted(SHIPPED.glob("*.txt")) if files is None else map(Path, files)
    texts, problems = [], []
    for path in paths:
        try:
            with open_input(path, "utf-8-sig") as file:
                text = file.read(MOST_CHARACTERS)
            if not text.strip():
                raise ValueError("the file is empty")
            texts.append(text)
        except (OSError, ValueError) as error:
            problems.append(f"neutral_texts: {path}: {getattr(error, 'strerror', None) or first_line(error)}")
    if problems:
        raise ConfigError(*problems)
    return texts

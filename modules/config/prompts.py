"""Prompts: what models are asked where their own phrases are looked for, and counted.

Knows: where those of the program lie, how a file is read. Refuses to know: chat templates, what is made of the answers.
"""

from pathlib import Path

from modules.runtime import ConfigError, first_line, open_input

LISTS = Path(__file__).parents[2] / "example_phrases"
SHIPPED, OPENINGS = LISTS / "prompts.txt", LISTS / "openings.txt"
LARGEST = 2_000_000  # characters of a file


def read_prompts(file: str | None, for_chats: bool) -> tuple[str, ...]:
    """A prompt for each line of the file that is not empty and does not begin with a #, each once.

    None: those that the program brings along, questions for chats, else openings of texts. Raises ConfigError if the
    file can't be read or holds none.
    """
    path = Path(file) if file else SHIPPED if for_chats else OPENINGS
    try:
        with open_input(path, "utf-8-sig") as opened:
            lines = opened.read(LARGEST).splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"discover.prompts: {path}: {reason}") from None
    prompts = [line.strip() for line in lines]
    kept = tuple(dict.fromkeys(prompt for prompt in prompts if prompt and not prompt.startswith("#")))
    if not kept:
        raise ConfigError(f"discover.prompts: {path}: no prompt in it; write one on each line")
    return kept

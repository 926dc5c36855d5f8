"""What a model has written, kept on the disk: a line of JSON for what was drawn at once, whole or absent.

Knows: the file, and by what it is known again. Refuses to know: how texts are drawn, what is looked for in them.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.runtime import ConfigError


class KeptTexts:
    """The texts of one model, drawn in one way. The same way finds them again; another one has a file of its own."""

    def __init__(self, folder: Path, name: str, drawn: Mapping[str, Any]) -> None:
        """Read what is there. folder: is made if it is missing; name: of the model; drawn: whatever the texts depend on
        beside their prompts.

        Raises ConfigError if the file can't be read or written.
        """
        digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{_slug(name)}-{digest[:12]}.jsonl"
        self._texts: dict[str, tuple[str, ...]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
            if len(whole) < len(lines):  # the last one was being written when a run ended
                os.truncate(self.path, sum(map(len, whole)))
            for line in whole:
                self._texts |= {prompt: tuple(texts) for prompt, texts in json.loads(line).items()}
        except OSError as error:
            raise ConfigError(f"{self.path}: can't be used ({error.strerror})") from None
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"{self.path} is damaged; delete it") from None

    def get(self, prompt: str) -> tuple[str, ...] | None:
        """What was written to a prompt; None if nothing is kept."""
        return self._texts.get(prompt)

    def add(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Keep what was written to prompts, those that were answered together. Raises OSError."""
        self._texts |= {prompt: tuple(written) for prompt, written in texts.items()}
        with self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(json.dumps(texts, ensure_ascii=False) + "\n")


def _slug(name: str) -> str:
    """A model's name as a part of a file's."""
    letters = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name)
    return letters.strip("-.")[-60:] or "model"

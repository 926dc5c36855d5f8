"""What a model has written, kept on the disk: a line of JSON for what was drawn at once, whole or dropped.

Knows: the file, and by what it is known again. Refuses to know: how texts are drawn, what is looked for in them.

Several programs may read and add at the same time: a line is added, and a damaged one removed, under a lock. Where a
file system has no locks, lines of two may run into one another: as with any damaged line, only they are drawn again.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules.output.filesystem import Lock, sync
from modules.output.journal import naming
from modules.output.text_files import write_text
from modules.runtime import ConfigError

PATIENCE = 30.0  # seconds for which a line of another program is waited for
_PAUSE = 0.05


class KeptTexts:
    """The texts of one model, drawn in one way. The same way finds them again; another one has a file of its own."""

    def __init__(self, folder: Path, name: str, drawn: Mapping[str, Any], count: int) -> None:
        """Read what is there. folder: is made if it is missing; name: of the model; drawn: whatever the texts depend on
        beside their prompts; count: texts to a prompt.

        Raises ConfigError if the file can't be read.
        """
        digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{_slug(name)}-{digest[:12]}.jsonl"
        self.damaged = 0  # lines that were dropped
        self._count = count
        self._texts: dict[str, tuple[str, ...]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._read()
        except OSError as error:
            raise ConfigError(f"{error.filename or self.path}: can't be used ({error.strerror})") from None

    def get(self, prompt: str) -> tuple[str, ...] | None:
        """What was written to a prompt; None if nothing is kept."""
        return self._texts.get(prompt)

    def add(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Keep what was written to prompts, those that were answered together: it is on the disk when this returns.
        Prompts that another program has had answered meanwhile keep its texts.

        Raises OSError; ConfigError if another program does not come to the end of its line.
        """
        is_new = not self.path.exists()
        with naming(self.path), _locked(self.path.parent):
            self._mend()
            added = {prompt: written for prompt, written in texts.items() if prompt not in self._texts}
            if not added:
                return
            line = json.dumps(added, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(line + "\n")
            sync(self.path)
            if is_new:
                sync(self.path.parent)
        self._texts |= {prompt: tuple(written) for prompt, written in added.items()}

    def _read(self) -> tuple[bytes, bytes]:
        """Read all texts. Returns what the file holds, and what of it are whole lines."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = [line for line in content.split(b"\n") if line]
        entries = [_texts_in(line, self._count) for line in lines]
        for found in filter(None, reversed(entries)):  # what was added first counts
            self._texts |= found
        # What comes behind the last line end is being written, or was when a run was killed.
        whole_ends = entries if content.endswith(b"\n") else entries[:-1]
        self.damaged = whole_ends.count(None)
        whole = [line + b"\n" for line, found in zip(lines, entries, strict=True) if found is not None]
        return content, b"".join(whole)

    def _mend(self) -> None:
        """Read all texts, and remove from the file what is no whole line."""
        content, whole = self._read()
        if whole != content:
            write_text(self.path, whole.decode())


def _texts_in(line: bytes, count: int) -> dict[str, tuple[str, ...]] | None:
    """The texts of a line, so many of each prompt; None if it is damaged."""
    try:
        entries = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict) or not all(_are_texts(value, count) for value in entries.values()):
        return None
    return {prompt: tuple(texts) for prompt, texts in entries.items()}


def _are_texts(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(text, str) for text in value)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else adds to a file of this folder within the block.

    Raises ConfigError if somebody does for longer than PATIENCE.
    """
    beside, lock, until = folder.resolve(), None, time.monotonic() + PATIENCE
    while lock is None:
        try:
            lock = Lock(beside.with_name(f".{beside.name}.lock"))
        except BlockingIOError:
            if time.monotonic() > until:
                busy = f"{folder}: another program is writing texts there; wait for it, and start this command again"
                raise ConfigError(busy) from None
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        lock.release()


def _slug(name: str) -> str:
    """A model's name as a part of a file's."""
    letters = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name)
    return letters.strip("-.")[-60:] or "model"

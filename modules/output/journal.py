"""The journal of a run: every line is on the disk before the run goes on.

Knows: JSON lines, what survives a crash. Refuses to know: what a line means, models, tensors.

A journal may end in the middle of a line, if a run was killed while it wrote; that line is dropped.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from modules.runtime.errors import ConfigError, naming
from modules.runtime.input_files import check_is_file, open_input

JOURNAL_FILE = "merge_monster_journal.jsonl"

Line = dict[str, Any]  # with its kind under "kind"
_DECISIONS = ("decision", "step", "learned")  # without one of these there is nothing to resume


class Journal:
    """The lines of a run: those from an earlier run, and those that are added."""

    def __init__(self, records: Sequence[Line] = (), path: Path = Path(JOURNAL_FILE), file: IO | None = None) -> None:
        """file: open for appending; None in a process that does not write, because the main process does."""
        self.records = list(records)
        self.path = path
        self._file = file

    @property
    def decisions(self) -> int:
        """The number of lines that are decisions or steps."""
        return sum(record["kind"] in _DECISIONS for record in self.records)

    def append(self, kind: str, **fields: Any) -> None:
        """Add a line; it is on the disk when this returns. Raises OSError if it can't be written."""
        record = {"kind": kind, **fields}
        if self._file:
            with naming(self.path):
                self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
        self.records.append(record)

    def clear(self) -> None:
        """Forget all lines."""
        with naming(self.path):
            self._file.truncate(0)
        self.records = []

    def close(self) -> None:
        """Close the file; appended lines are on the disk already."""
        with suppress(OSError):  # closing tries to write a failed line again; `append` has raised that error already
            self._file.close()


def open_journal(path: Path, afresh: bool = False) -> Journal:
    """Open a journal, or begin one. afresh: ignore its lines. Raises ConfigError if it can't be written, or is
    damaged."""
    try:
        check_is_file(path)
        file = path.open("a+b")
    except OSError as error:
        raise ConfigError(f"{path}: can't be written ({error.strerror})") from None
    try:
        with naming(path):
            records = [] if afresh else _read_lines(path, file)
    except BaseException:
        file.close()
        raise
    return Journal(records, path, file)


def read_journal(path: Path) -> list[Line]:
    """The lines of a journal from which a run can be resumed. Empty if it has no decisions, or can't be read: opening
    it says why."""
    try:
        with open_input(path) as file:
            journal = Journal(_read_lines(path, file))
    except (OSError, ConfigError):
        return []
    return journal.records if journal.decisions else []


def damaged(path: Path, number: int) -> ConfigError:
    """The error for a line that no run can have written."""
    return ConfigError(f"{path}: line {number} is damaged; start over with --restart")


def _read_lines(path: Path, file: IO) -> list[Line]:
    """All lines. An incomplete one at the end is cut off, if the file is writable. Raises ConfigError."""
    file.seek(0)
    content = file.read()
    complete_lines = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(complete_lines.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise damaged(path, number) from None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise damaged(path, number)
        records.append(record)
    if len(complete_lines) < len(content) and file.writable():
        file.truncate(len(complete_lines))
    return records

"""The record of a run: every line is on the disk before the run goes on.

Knows: JSON lines, what survives a crash. Refuses to know: what a record means, models, tensors.

A journal may end in the middle of a line, where a run was killed while it wrote; that line is dropped.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from modules.runtime import ConfigError, check_is_file, naming, open_input

JOURNAL_FILE = "merge_monster_journal.jsonl"

Line = dict[str, Any]  # "kind" says which
_DECISIONS = ("decision", "step")  # without one of these a run begins at its beginning


def begun_with(path: Path) -> Line | None:
    """The first record of a journal from which a run can go on, with what it computes in by now; None if that is not
    so, whoever opens it says why."""
    try:
        with open_input(path) as file:
            first, has_decided = json.loads(file.readline()), False
            for line in file:
                if not line.endswith(b"\n"):  # torn
                    break
                with suppress(ValueError):  # whoever opens it says which line is damaged
                    record = json.loads(line)
                    has_decided = has_decided or record["kind"] in _DECISIONS
                    first["computed"] = record.get("computed") or first.get("computed")
            return first if has_decided else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


class Journal:
    """An open journal: the records that were in it, and those that are added."""

    def __init__(self, path: Path, afresh: bool = False) -> None:
        """Open a journal, or begin one; afresh: whatever is in it. Raises ConfigError if it can't be written, or is
        damaged."""
        self.path = path
        self.records: list[Line] = []
        try:
            check_is_file(path)
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path}: can't be written ({error.strerror})") from None
        try:
            with naming(path):
                self.records = [] if afresh else self._read()
        except BaseException:
            self._file.close()
            raise

    @property
    def decisions(self) -> int:
        """How many of the records are decisions, or steps of a joint search."""
        return sum(record["kind"] in _DECISIONS for record in self.records)

    def append(self, kind: str, **fields: Any) -> None:
        """Add a record; it is on the disk when this returns. Raises OSError if it can't be written."""
        record = {"kind": kind, **fields}
        with naming(self.path):
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.records.append(record)

    def damaged(self, number: int) -> ConfigError:
        """What is said of a line that no run can have written."""
        return ConfigError(f"{self.path}: line {number} is damaged; begin again with --restart")

    def clear(self) -> None:
        """Forget all records."""
        with naming(self.path):
            self._file.truncate(0)
        self.records = []

    def _read(self) -> list[Line]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
                    raise ValueError
            except (ValueError, RecursionError):
                raise self.damaged(number) from None
            records.append(dict(record))
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        return records

    def close(self) -> None:
        """Let go of the journal; what was appended is on the disk already."""
        with suppress(OSError):  # a record that could not be written is tried again, and was told of
            self._file.close()


class JournalCopy(Journal):
    """The same records in a process that does not write them down, since another one does."""

    def __init__(self, records: list[Line]) -> None:
        self.path, self.records = Path(JOURNAL_FILE), list(records)

    def append(self, kind: str, **fields: Any) -> None:
        """Add a record."""
        self.records.append({"kind": kind, **fields})

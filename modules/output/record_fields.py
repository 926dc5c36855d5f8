"""The fields of the journal's records, and whether they are sound.

Knows: names, types. Refuses to know: what becomes of them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from modules.checkpoints import Checkpoint
from modules.config import METHODS, Config, is_number
from modules.output.journal import Record
from modules.runtime import ConfigError
from modules.search import Decision

FORMAT = 1  # of journals and recipes

# ---------------------------------------------------------------------------------------------------------------------
# What was read is not what was written: a disk or an editor may have changed it
# ---------------------------------------------------------------------------------------------------------------------


def is_a(*kinds: type) -> Callable[[Any], bool]:
    """A check for values of these types."""
    return lambda value: isinstance(value, kinds)


def is_count(value: Any) -> bool:
    """Whether it is a whole number that a counter can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _is_packing(value: Any) -> bool:
    """Or none: what a journal says of it is younger than journals are."""
    kinds = {"layout": is_a(str), "tokens": is_count, "logits": is_count, "stacked": is_a(bool)}
    return value is None or (
        isinstance(value, dict) and value.keys() == kinds.keys() and all(kinds[key](value[key]) for key in kinds)
    )


def _are_scores(value: Any) -> bool:
    return isinstance(value, list) and all(item is None or is_number(item) for item in value)


_is_text, _is_text_or_none = is_a(str), is_a(str, type(None))

# By kind of record, each key that is read again, and what its value must be.
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "run": {"settings": is_a(dict), "libraries": is_a(dict), "config": _is_text},
    "source": {"number": is_count, "name": _is_text, "text": _is_text, "where": _is_text, "fingerprint": is_a(dict)},
    "start": {"log_probabilities": _are_scores, "weights": _are_numbers},
    "decision": {
        "candidate": is_count,
        "model": _is_text,
        "layer": lambda value: value is None or is_count(value),
        "method": lambda value: value in METHODS,
        "ratio": lambda value: value is None or (is_number(value) and 0 <= value <= 1),
        "before": is_a(int, float),
        "after": is_a(int, float),
        "log_probabilities": _are_scores,
        "warning": _is_text_or_none,
        "note": _is_text_or_none,
        "seconds": is_number,
    },
    "candidate": {"number": is_count, "log_probabilities": _are_scores, "failure": _is_text_or_none},
    "phrase": {
        "kind": lambda value: value in ("BAD", "GOOD"),
        "phrase": _is_text,
        "context": _is_text,
        "weight": is_number,
        "before": is_number,
        "after": is_number,
    },
}


def is_sound(kind: str, record: Any) -> bool:
    """Whether a record has all that is read of its kind."""
    return isinstance(record, Mapping) and all(
        key in record and check(record[key]) for key, check in _FIELDS.get(kind, {}).items()
    )


def first_damaged(records: Sequence[Record], config: Config) -> int | None:
    """The line of a journal's first record that a run of this configuration can't have written there."""
    methods, pairs = config.merge_method, len(config.pairs)
    sources: set[int] = set()
    counts: dict[int, int] = {}  # decisions of each candidate
    begun = False
    for line, record in enumerate(records, start=1):
        kind = record["kind"]
        sound = is_sound(kind, record) and _is_packing(record.get("packing"))
        sound = sound and all(len(record[key]) == pairs for key in ("log_probabilities", "weights") if key in record)
        if sound and kind == "source":
            sources.add(record["number"])
        elif sound and kind == "decision":
            count = counts[record["candidate"]] = counts.get(record["candidate"], 0) + 1
            due = (count - 1) // len(methods), methods[(count - 1) % len(methods)]
            sound = begun and record["candidate"] in sources
            sound = sound and (record["layer"], record["method"]) in (due, (None, "lerp"))
        begun = begun or kind == "start"
        if not sound:
            return line
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Values to JSON and back
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(config: Config) -> Record:
    """A configuration's values, as JSON has them."""
    values = asdict(config)
    del values["text"]
    return json.loads(json.dumps(values))


def compare_fingerprints(record: Mapping[str, Any], checkpoint: Checkpoint, trouble: str) -> None:
    """Raise ConfigError, naming the first file that differs, if a source is not what was recorded.

    trouble: what that means, to be said of the file.
    """
    now = checkpoint.fingerprint()
    for file in sorted(now.keys() | record["fingerprint"].keys()):
        if now.get(file) != record["fingerprint"].get(file):
            raise ConfigError(f"{checkpoint.path}: {file} {trouble}")


def decision_of(record: Mapping[str, Any]) -> Decision:
    """A decision as it was before it was written down."""
    names = ("model", "layer", "method", "ratio", "before", "after", "warning", "note")
    return Decision(**{name: record[name] for name in names}, log_probabilities=tuple(log_probabilities_of(record)))


def scores_of(log_probabilities: Iterable[float]) -> Record:
    """The pairs' log-probabilities as a record holds them."""
    # JSON has no infinity: a probability of zero, whose logarithm that is, is written as null.
    return {"log_probabilities": [value if math.isfinite(value) else None for value in log_probabilities]}


def log_probabilities_of(record: Mapping[str, Any]) -> list[float]:
    """The pairs' log-probabilities that a record holds."""
    return [-math.inf if value is None else value for value in record["log_probabilities"]]

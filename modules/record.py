"""What a run writes down and reads back: settings, sources, decisions, scores; the journal while it works, the recipe
when it is done.

Knows: what each record holds. Refuses to know: how a decision is taken or carried out, files other than its own.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from modules.checkpoints import Checkpoint
from modules.composition import Shares
from modules.config import VERSION, Config, ConfigError, Pair
from modules.journal import Journal, Record
from modules.search import Decision
from modules.strategies import probability, scores, total

FORMAT = 1  # of journals and recipes
RECIPE_FILE = "merge_monster_recipe.json"


class RunRecord:
    """A run's journal, in terms of what happens in a run. Candidates are numbered from 1; the base is number 0."""

    def __init__(self, journal: Journal, config: Config) -> None:
        """Begin a journal, or go on with one. Raises ConfigError, saying what has changed, if it is another run's."""
        self.journal = journal
        now = {"format": FORMAT, "program": VERSION, "settings": settings_of(config), "config": config.text}
        begun = journal.of_kind("run")
        if begun:
            _refuse_changes(begun[0], now, journal.path)
        else:
            journal.append("run", **now, libraries=_libraries())

    @property
    def count(self) -> int:
        """How many decisions were taken."""
        return len(self.journal.of_kind("decision"))

    def warnings(self) -> list[str]:
        """What may keep the rest of the run from being what it would have been without the break."""
        begun = self.journal.of_kind("run")[0]["libraries"]
        return [
            f"the run began with {name} {begun.get(name)}, this is {version}: the last digits may differ"
            for name, version in _libraries().items()
            if begun.get(name) != version
        ]

    def source(self, number: int, text: str, where: str, checkpoint: Checkpoint) -> None:
        """Note a model, or compare it with what was noted; text: what the configuration calls it, where: exactly.

        Raises ConfigError if it is another one.
        """
        known = [record for record in self.journal.of_kind("source") if record["number"] == number]
        if known:
            compare_fingerprints(known[0], checkpoint, f"since {self.journal.path} was begun; --restart begins again")
        else:
            identity = {"number": number, "name": checkpoint.name, "text": text, "where": where}
            self.journal.append("source", **identity, fingerprint=checkpoint.fingerprint())

    def start(self, log_probabilities: Sequence[float], weights: Sequence[float]) -> tuple[list[float], list[float]]:
        """Note the base's scores, or find what was noted: joint log-probabilities, signed weights."""
        known = self.journal.of_kind("start")
        record = (
            known[0] if known else self.journal.append("start", **_scores(log_probabilities), weights=list(weights))
        )
        return _log_probabilities(record), record["weights"]

    def decided(self, number: int, decision: Decision, seconds: float) -> None:
        """Note a decision."""
        fields = asdict(decision)
        del fields["log_probabilities"]
        self.journal.append(
            "decision", candidate=number, **fields, **_scores(decision.log_probabilities), seconds=round(seconds, 3)
        )

    def decisions(self, number: int | None = None) -> list[Decision]:
        """What was decided, on one candidate or altogether."""
        records = [r for r in self.journal.of_kind("decision") if number is None or r["candidate"] == number]
        return [decision_of(record) for record in records]

    def closed(self, number: int, log_probabilities: Sequence[float], failure: str | None = None) -> None:
        """Note that a candidate has been searched, or given up."""
        self.journal.append("candidate", number=number, **_scores(log_probabilities), failure=failure)

    def end(self, number: int) -> tuple[list[float], str | None] | None:
        """The scores after a candidate and why it was given up, if it was; None if its search is not over."""
        known = [record for record in self.journal.of_kind("candidate") if record["number"] == number]
        return (_log_probabilities(known[0]), known[0]["failure"]) if known else None

    def recipe(
        self,
        pairs: Sequence[Pair],
        weights: Sequence[float],
        scores_now: Sequence[float],
        composition: Shares,
        model: Mapping[str, str | None],
        seconds: Mapping[str, float],
    ) -> Record:
        """Everything that another person needs to build the same model and to see what it is; see the README.

        model: device, compute dtype, saved dtype. seconds: by phase; those of the search are in the journal.
        """
        begun, start = self.journal.of_kind("run")[0], _log_probabilities(self.journal.of_kind("start")[0])
        decisions = self.journal.of_kind("decision")
        phrases = [
            {**asdict(pair), "weight": weight, "before": probability(before), "after": probability(after)}
            for pair, weight, before, after in zip(pairs, weights, start, scores_now, strict=True)
        ]
        return {
            **{key: begun[key] for key in ("format", "program", "libraries", "settings", "config")},
            **model,
            "sources": [_without_kind(record) for record in self.journal.of_kind("source")],
            "decisions": [_without_kind(record) for record in decisions],
            "failures": {r["number"]: r["failure"] for r in self.journal.of_kind("candidate") if r["failure"]},
            "phrases": phrases,
            "total": {"before": total(scores(start, weights)), "after": total(scores(scores_now, weights))},
            "composition": dict(composition),
            "seconds": {**seconds, "search": round(sum(record["seconds"] for record in decisions), 1)},
        }


def write_recipe(folder: Path, recipe: Record) -> None:
    """Write a recipe into an output. Raises OSError if it can't be written."""
    text = json.dumps(recipe, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")


def read_recipe(path: Path) -> Record:
    """A recipe of this version. Raises ConfigError if it is none."""
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        sound = all(isinstance(recipe[key], kind) for key, kind in _PARTS.items())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a recipe is the {RECIPE_FILE} of an output") from None
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ConfigError(f"{path}: not a recipe; it is the {RECIPE_FILE} of an output")
    if recipe["format"] != FORMAT:
        raise ConfigError(f"{path}: a recipe of format {recipe['format']}, this program reads format {FORMAT}")
    return recipe


def is_finished(config: Config, output: Path) -> bool:
    """Whether an output is what a run of this configuration has written."""
    try:
        return read_recipe(output / RECIPE_FILE)["settings"] == settings_of(config)
    except ConfigError:
        return False


_PARTS = {"format": int, "settings": dict, "sources": list, "decisions": list, "dtype": str, "device": str}


# ---------------------------------------------------------------------------------------------------------------------
# Values to JSON and back
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(config: Config) -> Record:
    """A configuration's values, as JSON has them."""
    values = asdict(config)
    del values["text"]
    return json.loads(json.dumps(values))


def compare_fingerprints(record: Mapping[str, Any], checkpoint: Checkpoint, since: str) -> None:
    """Raise ConfigError, naming the first file that differs, if a source is not what was recorded."""
    now = checkpoint.fingerprint()
    for file in sorted(now.keys() | record["fingerprint"].keys()):
        if now.get(file) != record["fingerprint"].get(file):
            raise ConfigError(f"{checkpoint.path}: {file} has changed {since}")


def decision_of(record: Mapping[str, Any]) -> Decision:
    """A decision as it was before it was written down."""
    names = ("model", "layer", "method", "ratio", "before", "after", "warning", "note")
    return Decision(**{name: record[name] for name in names}, log_probabilities=tuple(_log_probabilities(record)))


def _scores(log_probabilities: Iterable[float]) -> Record:
    # JSON has no infinity: a probability of zero, whose logarithm that is, is written as null.
    return {"log_probabilities": [value if math.isfinite(value) else None for value in log_probabilities]}


def _log_probabilities(record: Mapping[str, Any]) -> list[float]:
    return [-math.inf if value is None else value for value in record["log_probabilities"]]


def _without_kind(record: Mapping[str, Any]) -> Record:
    return {key: value for key, value in record.items() if key != "kind"}


def _libraries() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _refuse_changes(begun: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    hint = "use what it was begun with, or begin again with --restart"
    for key, what in (("format", "another version of journals"), ("program", "Merge Monster")):
        if begun.get(key) != now[key]:
            raise ConfigError(f"{path} was begun by {what} {begun.get(key)}, this is {now[key]}; {hint}")
    changed = sorted(key for key in now["settings"] if begun["settings"].get(key) != now["settings"][key])
    if changed:
        details = "; ".join(_change(key, begun["settings"].get(key), now["settings"][key]) for key in changed)
        raise ConfigError(f"the configuration has changed since {path} was begun: {details}; {hint}")


def _change(key: str, before: Any, after: Any) -> str:
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, after)]
    return f"{key} was {texts[0]}, is {texts[1]}" if max(map(len, texts)) <= 60 else f"{key} is not the same"

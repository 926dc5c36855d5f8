"""What a run writes down and reads back: settings, sources, decisions, scores; the journal while it works, the recipe
when it is done.

Knows: what each record holds. Refuses to know: how a decision is taken or carried out, files other than its own.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from modules.checkpoints import Checkpoint
from modules.config import VERSION, Config, Pair
from modules.model import resolve_device
from modules.output.changes import refuse_changes, refuse_other_version
from modules.output.journal import Journal, Record
from modules.output.record_fields import (
    FORMAT,
    compare_fingerprints,
    decision_of,
    first_damaged,
    is_sound,
    log_probabilities_of,
    scores_of,
    settings_of,
)
from modules.runtime import ConfigError
from modules.scoring import Packing
from modules.search import Decision, Shares, probability, scores, total


class RunRecord:
    """A run's journal, in terms of what happens in a run. Candidates are numbered from 1; the base is number 0."""

    def __init__(self, journal: Journal, config: Config, base: Checkpoint | None = None) -> None:
        """Begin a journal, or go on with one. Raises ConfigError, saying what has changed, if it is another run's, or
        naming the line that no run can have written.

        base: the model that the dtype was chosen for; without one, nothing is said of what has changed.
        """
        self.journal, self._device = journal, resolve_device(config.device).type
        now = {"format": FORMAT, "program": VERSION, "settings": settings_of(config), "config": config.text}
        now |= {"device": self._device, "folder": os.path.abspath("")}
        if not journal.records:
            journal.append("run", **now, libraries=_libraries())
            return
        begun = journal.records[0]
        if begun["kind"] == "run":
            refuse_other_version(begun, now, journal.path)
        damaged = 1 if begun["kind"] != "run" or not is_sound("run", begun) else None
        if damaged is None:
            if base is not None:
                refuse_changes(begun, now, base, journal.path)
            damaged = first_damaged(journal.records, config)
        if damaged is not None:
            raise ConfigError(f"{journal.path}: line {damaged} is damaged; begin again with --restart")

    @property
    def count(self) -> int:
        """How many decisions were taken."""
        return len(self.journal.of_kind("decision"))

    @property
    def packing(self) -> Packing | None:
        """How the phrases were packed for the last scores that are noted; None if there are none, or it was not."""
        known = [record["packing"] for record in self.journal.records if record.get("packing")]
        return Packing(**known[-1]) if known else None

    def warnings(self, packing: Packing) -> list[str]:
        """What may keep the rest of the run from being what it would have been without the break.

        packing: that it goes on with.
        """
        run = self.journal.of_kind("run")[0]
        now = {**_libraries(), "device": self._device}
        begun = {**run["libraries"], "device": run.get("device", self._device)}
        changes = [
            f"the run began with {name} {begun.get(name)}, this is {value}"
            for name, value in now.items()
            if begun.get(name) != value
        ]
        if self.packing is None:
            changes.append("how phrases were packed before the break is not in the journal")
        elif self.packing != packing:
            changes.append(f"phrases were scored as {self.packing} before the break, and here as {packing}")
        return [f"{change}: the last digits may differ" for change in changes]

    def compares(self, packing: Packing) -> bool:
        """Whether the base's noted scores, and those with this packing, must be the same to the last digit."""
        return self.journal.of_kind("start")[0].get("packing") in (None, asdict(packing))

    def source(self, number: int, text: str, where: str, checkpoint: Checkpoint) -> Record:
        """Note a model, or compare it with what was noted; text: what the configuration calls it, where: exactly.

        Returns what is noted. Raises ConfigError if it is another one.
        """
        known = [record for record in self.journal.of_kind("source") if record["number"] == number]
        if known:
            since = f"has changed since {self.journal.path} was begun; --restart begins again"
            compare_fingerprints(known[0], checkpoint, since)
            return known[0]
        identity = {"number": number, "name": checkpoint.name, "text": text, "where": where}
        return self.journal.append("source", **identity, fingerprint=checkpoint.fingerprint())

    def start(
        self, log_probabilities: Sequence[float], weights: Sequence[float], packing: Packing
    ) -> tuple[list[float], list[float]]:
        """Note the base's scores, or find what was noted: joint log-probabilities, signed weights."""
        known = self.journal.of_kind("start")
        record = (
            known[0]
            if known
            else self.journal.append(
                "start", **scores_of(log_probabilities), weights=list(weights), packing=asdict(packing)
            )
        )
        return log_probabilities_of(record), record["weights"]

    def decided(self, number: int, decision: Decision, seconds: float, packing: Packing) -> None:
        """Note a decision."""
        fields = {**asdict(decision), **scores_of(decision.log_probabilities), "packing": asdict(packing)}
        self.journal.append("decision", candidate=number, **fields, seconds=round(seconds, 3))

    def decisions(self, number: int | None = None) -> list[Decision]:
        """What was decided, on one candidate or altogether."""
        records = [r for r in self.journal.of_kind("decision") if number is None or r["candidate"] == number]
        return [decision_of(record) for record in records]

    def closed(self, number: int, log_probabilities: Sequence[float], failure: str | None, packing: Packing) -> None:
        """Note that a candidate has been searched, or given up."""
        fields = {**scores_of(log_probabilities), "packing": asdict(packing)}
        self.journal.append("candidate", number=number, **fields, failure=failure)

    def end(self, number: int) -> tuple[list[float], str | None] | None:
        """The scores after a candidate and why it was given up, if it was; None if its search is not over."""
        known = [record for record in self.journal.of_kind("candidate") if record["number"] == number]
        return (log_probabilities_of(known[0]), known[0]["failure"]) if known else None

    def recipe(
        self,
        pairs: Sequence[Pair],
        weights: Sequence[float],
        scores_now: Sequence[float],
        composition: Shares,
        model: Mapping[str, str | None],
        seconds: Mapping[str, float],
    ) -> Record:
        """Everything that another person needs to build the same model and to see what it is; see docs/recipe.md.

        model: device, compute dtype, saved dtype. seconds: by phase; those of the search are in the journal.
        """
        begun, start = self.journal.of_kind("run")[0], log_probabilities_of(self.journal.of_kind("start")[0])
        decisions = self.journal.of_kind("decision")
        phrases = [
            {**asdict(pair), "weight": weight, "before": probability(before), "after": probability(after)}
            for pair, weight, before, after in zip(pairs, weights, start, scores_now, strict=True)
        ]
        return {
            **{key: begun[key] for key in ("format", "program", "libraries", "settings", "config")},
            **model,
            "sources": [_for_others(record) for record in self.journal.of_kind("source")],
            "decisions": [_for_others(record) for record in decisions],
            "failures": {r["number"]: r["failure"] for r in self.journal.of_kind("candidate") if r["failure"]},
            "phrases": phrases,
            "total": {"before": total(scores(start, weights)), "after": total(scores(scores_now, weights))},
            "composition": dict(composition),
            "seconds": {**seconds, "search": round(sum(record["seconds"] for record in decisions), 1)},
        }


def _for_others(record: Mapping[str, Any]) -> Record:
    """A record without what only the journal needs."""
    return {key: value for key, value in record.items() if key not in ("kind", "packing")}


def _libraries() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}

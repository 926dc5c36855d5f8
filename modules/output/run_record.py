"""What a run writes down and reads back: settings, sources, decisions, scores; the journal while it works, the recipe
when it is done.

Knows: what each line holds, which line may follow which. Refuses to know: how a decision is taken or carried out, files
other than its own.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from modules.checkpoints.checkpoint import Checkpoint
from modules.config.locations import parts_of, without_folders
from modules.config.phrase_lists import Pair
from modules.config.schema import Config
from modules.output.changes import compare_fingerprints, named, refuse_changes, run_of
from modules.output.journal import Journal, Line, damaged
from modules.output.recipe import Recipe
from modules.output.records import LINES, Decided, Metrics, Phrase, Record, Rows, Run, Sample, Scored, Source
from modules.scoring.budget import Packing
from modules.search.decision import Decision, Weights
from modules.search.strategies import probability, total_rounding

# Pairs, their signed weights, joint log-probabilities before and after.
ScoredPairs = tuple[Sequence[Pair], Sequence[float], Sequence[float], Sequence[float]]


class RunRecord:
    """A run's journal, in terms of what happens in a run. Candidates are numbered from 1; the base is number 0."""

    packing: Packing | None = None  # how the phrases were packed for the last scores that are noted
    computed: str | None = None  # what is computed in by now

    def __init__(self, journal: Journal, config: Config, computed: str) -> None:
        """Begin a journal, or go on with one. Raises ConfigError, saying what has changed, if it is another run's, or
        naming the line that no run can have written.

        computed: what is computed in.
        """
        self.journal = journal
        self._now = run_of(config, computed)
        self._lines: dict[str, list[Any]] = {kind: [] for kind in LINES}
        self._folders: list[tuple[str, str]] = []  # of the sources, and their names
        if journal.records:
            self._read(config)
        if self.computed != computed:
            self.note("run", **dict(self._now))

    def _read(self, config: Config) -> None:
        """Take over what the journal has."""
        records = self.journal.records
        path = self.journal.path
        begun = begun_run(records)
        if begun is None:
            raise damaged(path, 1)
        refuse_changes(begun, self._now, path)
        for number, record in enumerate(records, start=1):
            kind = record["kind"]
            fields = {key: value for key, value in record.items() if key != "kind"}
            try:
                line = LINES[kind].model_validate(fields)
            except (KeyError, ValidationError):
                raise damaged(path, number) from None
            if not self._may_follow(kind, line, config):
                raise damaged(path, number)
            self._add(kind, line)

    def _may_follow(self, kind: str, line: Record, config: Config) -> bool:
        """Whether a run of this configuration can have written a line behind those that are known. If not, the rest of
        the run would not be what it was."""
        if kind == "step":
            begun = [list(map(len, joint.start)) for joint in self._lines["joint"]]
            forms = [list(map(len, rows)) for rows in (line.weights, line.mean, line.square)]
            return line.step == len(self._lines["step"]) + 1 and forms == begun * 3
        if kind == "learned":
            return line.step == len(self._lines["learned"]) + 1
        if isinstance(line, Scored | Decided) and len(line.log_probabilities) != len(config.pairs):
            return False
        if kind == "start":
            is_of_pairs = len(line.weights) == len(config.pairs) and len(line.rounding) in (0, len(config.pairs))
            return is_of_pairs and bool(self._lines["answers"])
        if isinstance(line, Decided):
            earlier = sum(other.candidate == line.candidate for other in self._lines["decision"])
            turn, method = divmod(earlier, len(config.merge_method))
            layers = dict(enumerate(config.layers)) if config.layers else {turn: turn}
            expected = [(layers.get(turn, -1), config.merge_method[method]), (None, "lerp")]
            begun = self.line("source", line.candidate) and self._lines["start"]
            return bool(begun) and (line.layer, line.method) in expected
        return True

    def _add(self, kind: str, line: Record) -> None:
        self._lines[kind].append(line)
        self.packing = getattr(line, "packing", None) or self.packing
        self.computed = getattr(line, "computed", None) or self.computed

    def note(self, kind: str, **fields: Any) -> Any:
        """Write down a line; it is on the disk when this returns. What it tells of folders, it tells by their names.

        kind, fields: see LINES. Returns the line. Raises OSError if it can't be written.
        """
        for key in ("warning", "note", "failure"):
            if fields.get(key):
                fields[key] = named(fields[key], self._folders)
        line = LINES[kind](**fields)
        self.journal.append(kind, **line.written())
        self._add(kind, line)
        return line

    def lines(self, kind: str) -> list[Any]:
        """All lines of a kind."""
        return self._lines[kind]

    def line(self, kind: str, number: int) -> Any | None:
        """The line of a kind that is about a source; None if there is none yet."""
        return next((line for line in self._lines[kind] if line.number == number), None)

    def decisions(self, number: int) -> list[Decision]:
        """What was decided on a candidate."""
        return [line.decision for line in self._lines["decision"] if line.candidate == number]

    def decided(self, number: int, decision: Decision, **fields: Any) -> None:
        """Note a decision on a candidate; fields: what else there is to say of it."""
        self.note("decision", candidate=number, **asdict(decision), **fields)

    @property
    def was_widened(self) -> bool:
        """Whether the run began in a type that was too narrow."""
        return self.computed != self._lines["run"][0].computed

    def warnings(self, packing: Packing) -> list[str]:
        """What may keep the rest of the run from being what it would have been without the break.

        packing: that it goes on with.
        """
        begun = self._lines["run"][0]
        before = {**begun.libraries, "device": begun.device}
        changes = []
        for name, value in {**self._now.libraries, "device": self._now.device}.items():
            if before.get(name) != value:
                changes.append(f"the run started with {name} {before.get(name)}, but this is {value}")
        if self.packing != packing:
            changes.append(f"phrases were scored as {self.packing} before, but now as {packing}")
        return [f"{change}; the last digits may differ" for change in changes]

    def source(self, number: int, where: str, checkpoint: Checkpoint) -> Source:
        """Note a model, or compare it with what was noted; where: whole paths, ids of the hub.

        Returns what is noted. Raises ConfigError if it is another one.
        """
        for folder in (*parts_of(where), str(checkpoint.path), os.path.realpath(checkpoint.path)):
            self._folders.append((folder, checkpoint.name))
        noted = self.line("source", number)
        if noted:
            trouble = f"has changed since {self.journal.path} was started; start over with --restart"
            compare_fingerprints(noted, checkpoint, trouble)
            return noted
        return self.note(
            "source",
            number=number,
            name=checkpoint.name,
            where=without_folders(where),
            fingerprint=checkpoint.fingerprint(),
        )

    def recipe(
        self,
        pairs: Sequence[Pair],
        weights: Sequence[float],
        scores_now: Sequence[float],
        composition: Weights,
        metrics: Mapping[str, Metrics],
        held_out: ScoredPairs,
        samples: Sequence[Sample],
        model: Mapping[str, str | None],
        seconds: Mapping[str, float],
        mix: Rows = (),
    ) -> Recipe:
        """Everything that another person needs to build the same model and to see what it is; see docs/output.md.

        metrics: of base and merge. held_out: the pairs that were, maybe none. model: device, compute and saved dtype.
        seconds: by phase; those of the search are in the journal. mix: the weights of a joint search.
        """
        begun = self._lines["run"][0]
        start = self._lines["start"][0]
        ends = self._lines["candidate"]
        joint = None
        if mix:
            steps = [line.metrics | {"seconds": line.seconds} for line in self._lines["step"]]
            joint = self._lines["joint"][0].model_copy(update={"weights": mix, "steps": steps})
        lines = [*self._lines["decision"], *self._lines["step"]]
        return Recipe(
            format=begun.format,
            program=begun.program,
            libraries=begun.libraries,
            settings=begun.settings,
            **model,
            sources=self._lines["source"],
            decisions=[line.written("packing", "computed") for line in self._lines["decision"]],
            failures={str(line.number): line.failure for line in ends if line.failure},
            phrases=_phrases(pairs, weights, start.log_probabilities, scores_now, start.rounding),
            held_out=_phrases(*held_out),
            metrics=dict(metrics),
            metrics_after={str(line.number): line.metrics for line in ends if line.metrics},
            baselines={str(line.number): line.metrics for line in self._lines["baseline"]},
            rounding=total_rounding(weights, start.rounding) if start.rounding else 0.0,
            joint=joint,
            samples=list(samples),
            composition=dict(composition),
            seconds={**seconds, "search": round(sum(line.seconds for line in lines), 1)},
        )


def begun_run(records: Sequence[Line]) -> Run | None:
    """How the run began that goes on from these lines of a journal, with what it computes in by now.

    None if that can't be told: whoever reads them says why.
    """
    computed = [record["computed"] for record in records if record.get("computed")]
    try:
        return Run.model_validate({**records[0], "computed": computed[-1]})
    except (IndexError, ValidationError):
        return None


def _phrases(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    start: Sequence[float],
    now: Sequence[float],
    rounding: Sequence[float] = (),
) -> list[Phrase]:
    """Pairs with their signed weights and probabilities, from log-probabilities before and after, and their rounding,
    if it is known."""
    phrases = []
    roundings = rounding or [0.0] * len(pairs)
    for pair, weight, before, after, least in zip(pairs, weights, start, now, roundings, strict=True):
        fields = pair.written() | {"weight": weight, "rounding": least}
        phrases.append(Phrase(**fields, before=probability(before), after=probability(after)))
    return phrases

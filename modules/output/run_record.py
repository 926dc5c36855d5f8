"""Records a run: settings, sources, decisions, scores. It keeps the journal during the run, and makes the recipe at its
end.

Knows: the fields of each line, which line may follow which. Refuses to know: how a decision is taken or carried out,
files other than its own.
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
    """A run's journal, in the terms of a run. Candidates are numbered from 1; the base is number 0."""

    packing: Packing | None = None  # of the phrases, for the last noted scores
    computed: str | None = None  # the name of the present arithmetic

    def __init__(self, journal: Journal, config: Config, computed: str) -> None:
        """Begin a journal, or continue one. computed: the name of the arithmetic.

        Raises ConfigError if the journal is another run's (it says what has changed), or if a line is damaged.
        """
        self.journal = journal
        self._current_run = run_of(config, computed)
        self._lines: dict[str, list[Any]] = {kind: [] for kind in LINES}
        self._folders: list[tuple[str, str]] = []  # of the sources, and their names
        if journal.records:
            self._load(config)
        if self.computed != computed:
            self.note("run", **dict(self._current_run))

    def _load(self, config: Config) -> None:
        """Load the journal's lines. Raises ConfigError."""
        records = self.journal.records
        path = self.journal.path
        earlier_run = begun_run(records)
        if earlier_run is None:
            raise damaged(path, 1)
        refuse_changes(earlier_run, self._current_run, path)
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
        """Whether a run of this configuration can have written a line after the lines so far. If not, resuming would
        give another result than the run."""
        if kind == "step":
            start_form = [list(map(len, joint.start)) for joint in self._lines["joint"]]
            forms = [list(map(len, rows)) for rows in (line.weights, line.mean, line.square)]
            return line.step == len(self._lines["step"]) + 1 and forms == start_form * 3
        if kind == "learned":
            return line.step == len(self._lines["learned"]) + 1
        if isinstance(line, Scored | Decided) and len(line.log_probabilities) != len(config.pairs):
            return False
        if kind == "start":
            is_of_pairs = len(line.weights) == len(config.pairs) and len(line.rounding) in (0, len(config.pairs))
            return is_of_pairs and bool(self._lines["answers"])
        if isinstance(line, Decided):
            earlier_count = sum(decision.candidate == line.candidate for decision in self._lines["decision"])
            turn, method = divmod(earlier_count, len(config.merge_method))
            layers = dict(enumerate(config.layers)) if config.layers else {turn: turn}
            expected = [(layers.get(turn, -1), config.merge_method[method]), (None, "lerp")]
            is_begun = self.line("source", line.candidate) and self._lines["start"]
            return bool(is_begun) and (line.layer, line.method) in expected
        return True

    def _add(self, kind: str, line: Record) -> None:
        self._lines[kind].append(line)
        self.packing = getattr(line, "packing", None) or self.packing
        self.computed = getattr(line, "computed", None) or self.computed

    def note(self, kind: str, **fields: Any) -> Any:
        """Write a line; it is on the disk when this returns. Its messages contain names of folders, not their paths.

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
        """A source's line of a kind; None if there is none yet."""
        return next((line for line in self._lines[kind] if line.number == number), None)

    def decisions(self, number: int) -> list[Decision]:
        """The decisions on a candidate."""
        return [line.decision for line in self._lines["decision"] if line.candidate == number]

    def decided(self, number: int, decision: Decision, **fields: Any) -> None:
        """Note a decision on a candidate. fields: further fields of the line."""
        self.note("decision", candidate=number, **asdict(decision), **fields)

    @property
    def was_widened(self) -> bool:
        """Whether the run began in an arithmetic that was too narrow."""
        return self.computed != self._lines["run"][0].computed

    def warnings(self, packing: Packing) -> list[str]:
        """Warnings about changes since the run began that may change the last digits of its result.

        packing: with which the run continues.
        """
        first_run = self._lines["run"][0]
        earlier_versions = {**first_run.libraries, "device": first_run.device}
        changes = []
        for name, value in {**self._current_run.libraries, "device": self._current_run.device}.items():
            if earlier_versions.get(name) != value:
                changes.append(f"the run started with {name} {earlier_versions.get(name)}, but this is {value}")
        if self.packing != packing:
            changes.append(f"phrases were scored as {self.packing} before, but now as {packing}")
        return [f"{change}; the last digits may differ" for change in changes]

    def source(self, number: int, where: str, checkpoint: Checkpoint) -> Source:
        """Note a model, or compare it with the noted one. where: full paths, ids of the hub.

        Returns the noted source. Raises ConfigError if the model is another one.
        """
        for folder in (*parts_of(where), str(checkpoint.path), os.path.realpath(checkpoint.path)):
            self._folders.append((folder, checkpoint.name))
        noted = self.line("source", number)
        if noted:
            complaint = f"has changed since {self.journal.path} was started; start over with --restart"
            compare_fingerprints(noted, checkpoint, complaint)
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
        final_scores: Sequence[float],
        composition: Weights,
        metrics: Mapping[str, Metrics],
        held_out: ScoredPairs,
        samples: Sequence[Sample],
        model: Mapping[str, str | None],
        seconds: Mapping[str, float],
        mix: Rows = (),
    ) -> Recipe:
        """Make the recipe: all that others need to build the same model and to judge it; see docs/output.md.

        metrics: of base and merge. held_out: the held-out pairs, maybe none. model: device, compute and saved dtype.
        seconds: by phase; those of the search are in the journal. mix: the weights of a joint search.
        """
        first_run = self._lines["run"][0]
        start = self._lines["start"][0]
        candidate_lines = self._lines["candidate"]
        joint = None
        if mix:
            steps = [line.metrics | {"seconds": line.seconds} for line in self._lines["step"]]
            joint = self._lines["joint"][0].model_copy(update={"weights": mix, "steps": steps})
        lines = [*self._lines["decision"], *self._lines["step"]]
        return Recipe(
            format=first_run.format,
            program=first_run.program,
            libraries=first_run.libraries,
            settings=first_run.settings,
            **model,
            sources=self._lines["source"],
            decisions=[line.written("packing", "computed") for line in self._lines["decision"]],
            failures={str(line.number): line.failure for line in candidate_lines if line.failure},
            phrases=_phrases(pairs, weights, start.log_probabilities, final_scores, start.rounding),
            held_out=_phrases(*held_out),
            metrics=dict(metrics),
            metrics_after={str(line.number): line.metrics for line in candidate_lines if line.metrics},
            baselines={str(line.number): line.metrics for line in self._lines["baseline"]},
            rounding=total_rounding(weights, start.rounding) if start.rounding else 0.0,
            joint=joint,
            samples=list(samples),
            composition=dict(composition),
            seconds={**seconds, "search": round(sum(line.seconds for line in lines), 1)},
        )


def begun_run(records: Sequence[Line]) -> Run | None:
    """The first line of a run, from the lines of its journal, but with its present arithmetic.

    None if the lines are damaged: the code that reads them says why.
    """
    computed = [record["computed"] for record in records if record.get("computed")]
    try:
        return Run.model_validate({**records[0], "computed": computed[-1]})
    except (IndexError, ValidationError):
        return None


def _phrases(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    initial: Sequence[float],
    final: Sequence[float],
    rounding: Sequence[float] = (),
) -> list[Phrase]:
    """The pairs with signed weights and probabilities. initial, final: joint log-probabilities. rounding: of the
    probabilities, if it is known."""
    phrases = []
    roundings = rounding or [0.0] * len(pairs)
    for pair, weight, initial_value, final_value, pair_rounding in zip(
        pairs, weights, initial, final, roundings, strict=True
    ):
        fields = pair.written() | {"weight": weight, "rounding": pair_rounding}
        phrases.append(Phrase(**fields, before=probability(initial_value), after=probability(final_value)))
    return phrases

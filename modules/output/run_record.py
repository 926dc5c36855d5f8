"""What a run writes down and reads back: settings, sources, decisions, scores; the journal while it works, the recipe
when it is done.

Knows: what each record holds. Refuses to know: how a decision is taken or carried out, files other than its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

from pydantic import ValidationError

from modules.checkpoints import Checkpoint
from modules.config import Config, Pair
from modules.output.changes import compare_fingerprints, refuse_changes, refuse_other_version, run_of
from modules.output.folder import OutputFolder
from modules.output.journal import JOURNAL_FILE, Journal, begun_with
from modules.output.public import Public
from modules.output.recipe import Recipe
from modules.output.records import (
    Baseline,
    Closed,
    Decided,
    Drifted,
    HeldOut,
    Joint,
    JointStart,
    Phrase,
    Record,
    Rows,
    Run,
    Sample,
    Settings,
    Source,
    Start,
    Step,
    Total,
    Widened,
    read_lines,
)
from modules.scoring import Drift, Packing, Value
from modules.search import Decision, Shares, probability, scores, total, total_rounding
from modules.search.joint import JointState

Kind = TypeVar("Kind", bound=Record)
Scored = tuple[Sequence[Pair], Sequence[float], Sequence[float], Sequence[float]]


class RunRecord:
    """A run's journal, in terms of what happens in a run. Candidates are numbered from 1; the base is number 0."""

    def __init__(self, journal: Journal, config: Config, computed: str, base: Checkpoint | None = None) -> None:
        """Begin a journal, or go on with one. Raises ConfigError, saying what has changed, if it is another run's, or
        naming the line that no run can have written.

        computed: what is computed in. base: the model that it was chosen for; without one, nothing is said of what has
        changed.
        """
        self.journal, self.public = journal, Public.of(config)
        self._now = self.public.record(run_of(config, computed))
        self._lines: list[Record] = []
        if not journal.records:
            self._note("run", self._now)
            return
        if journal.records[0]["kind"] == "run":
            refuse_other_version(journal.records[0], self._now, journal.path)
        self._lines, damaged = read_lines(journal.records, config)
        if damaged != 1 and base is not None:
            begun = self._all(Run)[0].model_copy(update={"computed": self._computed})
            refuse_changes(begun, self._now, base, journal)
        if damaged is not None:
            raise journal.damaged(damaged)
        self._lines = [self.public.record(line) for line in self._lines]  # an older version had whole paths in them
        if self._computed not in (None, computed):
            self._note("widened", Widened(computed=computed))

    @property
    def _computed(self) -> str | None:
        """What is computed in by now; None if an older version has not noted it."""
        told = [line.computed for line in self._lines if isinstance(line, Run | Widened | Decided)]
        return next((computed for computed in reversed(told) if computed), None)

    @property
    def was_widened(self) -> bool:
        """Whether the run began in a type that was too narrow."""
        return bool(self._all(Widened)) or any(line.computed for line in self._all(Decided))

    def _note(self, kind: str, line: Kind) -> Kind:
        line = self.public.record(line)
        self.journal.append(kind, **line.written())
        self._lines.append(line)
        return line

    def _all(self, kind: type[Kind]) -> list[Kind]:
        return [line for line in self._lines if isinstance(line, kind)]

    @property
    def settings(self) -> Settings:
        """With which the run began."""
        return self._all(Run)[0].settings

    @property
    def packing(self) -> Packing | None:
        """How the phrases were packed for the last scores that are noted; None if there are none, or it was not."""
        kinds = Start | Decided | Closed | Step
        known = [line.packing for line in self._lines if isinstance(line, kinds) and line.packing]
        return Packing(**known[-1].written()) if known else None

    def warnings(self, packing: Packing) -> list[str]:
        """What may keep the rest of the run from being what it would have been without the break.

        packing: that it goes on with.
        """
        run, now = self._all(Run)[0], {**self._now.libraries, "device": self._now.device}
        begun = {**run.libraries, "device": run.device or self._now.device}
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
        noted = self._all(Start)[0].packing
        return noted is None or noted.written() == asdict(packing)

    def source(self, number: int, text: str, where: str, checkpoint: Checkpoint) -> Source:
        """Note a model, or compare it with what was noted; text: what the configuration calls it, where: exactly.

        Returns what is noted. Raises ConfigError if it is another one.
        """
        known = [source for source in self._all(Source) if source.number == number]
        if known:
            since = f"has changed since {self.journal.path} was begun; --restart begins again"
            compare_fingerprints(known[0], checkpoint, since)
            return known[0]
        name, fingerprint = checkpoint.name, checkpoint.fingerprint()
        self.public.know(checkpoint.path, where)  # of the hub's models, it lies in the cache
        return self._note("source", Source(number=number, name=name, text=text, where=where, fingerprint=fingerprint))

    def start(
        self,
        log_probabilities: Sequence[float],
        weights: Sequence[float],
        packing: Packing,
        rounding: Sequence[float] = (),
    ) -> Start:
        """Note the base's scores, or find what was noted: joint log-probabilities, signed weights, how far rounding
        moves each probability."""
        measured = {"log_probabilities": log_probabilities, "weights": weights, "packing": asdict(packing)}
        measured |= {"rounding": rounding} if rounding else {}
        return self._all(Start)[0] if self._all(Start) else self._note("start", Start(**measured))

    def baseline(self, number: int) -> Baseline | None:
        """What was noted of a candidate taken whole."""
        return next((line for line in self._all(Baseline) if line.number == number), None)

    def note_baseline(
        self, number: int, total: float, held_out: float | None, drift: Drift | None, guarded: float | None = None
    ) -> Baseline:
        """Note how a candidate does that is taken whole. guarded: its drift as trials are judged by it."""
        more = {} if guarded is None else {"guarded": guarded}
        drifted = drift and Drifted(**asdict(drift))
        return self._note("baseline", Baseline(number=number, total=total, held_out=held_out, drift=drifted, **more))

    def joint_start(self) -> JointStart | None:
        """Where the steps of a joint search begin, if that is noted."""
        return next(iter(self._all(JointStart)), None)

    def note_joint_start(self, shares: Rows, total_slopes: Rows, drift_slopes: Rows | None) -> JointStart:
        """Note it, with how total and drift change there with each share."""
        more = {} if drift_slopes is None else {"drift_slopes": drift_slopes}
        return self._note("joint", JointStart(shares=shares, total_slopes=total_slopes, **more))

    def stepped(
        self, state: JointState, value: Value, held_out: float | None, seconds: float, packing: Packing
    ) -> None:
        """Note a step: the state that it has led to, the value and the held-out total that it began with."""
        began_with = {"total": value.total, "drift": value.divergence, "held_out": held_out}
        more = {"packing": asdict(packing), "seconds": round(seconds, 3)}
        self._note("step", Step(**asdict(state), **began_with, **more))

    def steps(self) -> list[Step]:
        """The steps of a joint search that were made."""
        return self._all(Step)

    @property
    def has_progress(self) -> bool:
        """Whether anything was decided."""
        return bool(self._all(Decided) or self._all(Step))

    def start_scores(self) -> tuple[float, ...]:
        """The base's log-probabilities."""
        return self._all(Start)[0].log_probabilities

    def decided(
        self, number: int, decision: Decision, seconds: float, packing: Packing, computed: str | None = None
    ) -> None:
        """Note a decision. computed: what the run goes on in, if it can't go on in what it was taken in."""
        more = {"packing": asdict(packing), "seconds": round(seconds, 3)}
        more |= {"computed": computed} if computed else {}
        told = {key: value for key, value in asdict(decision).items() if key != "drift" or value is not None}
        self._note("decision", Decided(candidate=number, **told, **more))

    def decisions(self, number: int | None = None) -> list[Decision]:
        """What was decided, on one candidate or altogether."""
        return [line.decision for line in self._all(Decided) if number in (None, line.candidate)]

    def closed(
        self,
        number: int,
        log_probabilities: Sequence[float],
        failure: str | None,
        packing: Packing,
        drift: Drift | None = None,
    ) -> None:
        """Note that a candidate has been searched, or given up; drift: how far the merge has gone by then."""
        scored = {"log_probabilities": log_probabilities, "packing": asdict(packing)}
        drifted = drift and Drifted(**asdict(drift))
        self._note("candidate", Closed(number=number, **scored, drift=drifted, failure=failure))

    def end(self, number: int) -> Closed | None:
        """What was noted at the end of a candidate's search; None if it is not over."""
        return next((line for line in self._all(Closed) if line.number == number), None)

    def recipe(
        self,
        pairs: Sequence[Pair],
        weights: Sequence[float],
        scores_now: Sequence[float],
        composition: Shares,
        drift: Drift | None,
        held_out: Scored,
        samples: Sequence[Sample],
        model: Mapping[str, str | None],
        seconds: Mapping[str, float],
        shares: Rows = (),
    ) -> Recipe:
        """Everything that another person needs to build the same model and to see what it is; see docs/recipe.md.

        held_out: the pairs that were, their signed weights and log-probabilities before and after, maybe none.
        model: device, compute dtype, saved dtype. seconds: by phase; those of the search are in the journal. shares: of
        a joint search.
        """
        run, start, decisions = self._all(Run)[0], self._all(Start)[0], self._all(Decided)
        phrases, in_all = _phrases(pairs, weights, start.log_probabilities, scores_now, start.rounding)
        measured = {} if drift is None else {"drift": Drifted(**asdict(drift))}
        drifts = {str(line.number): line.drift for line in self._all(Closed) if line.drift}
        if drifts:
            measured["drift_after"] = drifts
        if samples:
            measured["samples"] = list(samples)
        if self._all(Baseline):
            measured["baselines"] = self._all(Baseline)
        if shares:
            told = [line.written("shares", "mean", "square", "packing") for line in self.steps()]
            measured["joint"] = Joint(shares=shares, start=self.joint_start(), steps=told)
        if held_out[0]:
            others, their_total = _phrases(*held_out)
            measured["held_out"] = HeldOut(phrases=others, total=their_total)
        return Recipe(
            format=run.format,
            program=run.program,
            libraries=run.libraries,
            settings=run.settings,
            folder=run.folder,
            config=run.config,
            **model,
            sources=self._all(Source),
            decisions=[line.written("packing", "computed") for line in decisions],
            failures={str(line.number): line.failure for line in self._all(Closed) if line.failure},
            phrases=phrases,
            total=in_all,
            **measured,
            composition=dict(composition),
            seconds={**seconds, "search": round(sum(line.seconds for line in (*decisions, *self.steps())), 1)},
        )


def begun_run(target: OutputFolder) -> Run | None:
    """How the run began that goes on here; None if none does."""
    try:
        return Run.model_validate(begun_with(target.partial / JOURNAL_FILE))
    except ValidationError:  # whoever opens it says what is wrong with it
        return None


def _phrases(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    start: Sequence[float],
    now: Sequence[float],
    rounding: Sequence[float] = (),
) -> tuple[list[Phrase], Total]:
    """Pairs with their signed weights and probabilities, from log-probabilities before and after, and their rounding,
    if it is known; and their total."""
    known = [{"rounding": least} for least in rounding] or [{}] * len(pairs)
    phrases = [
        Phrase(**pair.written() | {"weight": weight}, before=probability(before), after=probability(after), **more)
        for pair, weight, before, after, more in zip(pairs, weights, start, now, known, strict=True)
    ]
    more = {"rounding": total_rounding(weights, rounding)} if rounding else {}
    return phrases, Total(before=total(scores(start, weights)), after=total(scores(now, weights)), **more)

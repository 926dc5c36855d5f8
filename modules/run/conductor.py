"""Carries out a search decision by decision: journal, console, resumption.

Knows: the order of what follows a decision. Refuses to know: how a decision is taken.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.downloads import Prefetcher
from modules.config.schema import Config
from modules.metrics.evaluator import Evaluator
from modules.model.arithmetic import FALLBACK
from modules.output import tables as report
from modules.output.advice import advice, beyond_limit
from modules.output.run_record import RunRecord
from modules.output.tables import ResultRow, by_other_settings, results_table
from modules.run.samples import Samples
from modules.run.steps import note_source
from modules.runtime.console import Console
from modules.runtime.errors import BrokenWeights, CheckpointError, TooNarrow
from modules.runtime.program import postponed
from modules.search.decision import Decision, Merge, Weights, composition_of, weights_of
from modules.search.joint import Rows
from modules.search.search import Search, forwards_of, forwards_of_candidate
from modules.search.strategies import scores


class Conductor:
    """Leads a search through all candidates. It resumes where an earlier run stopped."""

    scores_alone = False  # whether the search needs the scores of the candidates on their own

    def __init__(
        self,
        config: Config,
        console: Console,
        search: Search,
        record: RunRecord,
        prefetcher: Prefetcher,
        evaluator: Evaluator | None = None,
        samples: Samples | None = None,
    ) -> None:
        """evaluator, samples: only in the main process; they have already measured the base."""
        self.config = config
        self.console = console
        self.search = search
        self.record = record
        self.prefetcher = prefetcher
        self.evaluator = evaluator
        self.samples = samples
        self.layers = len(search.model.layers)
        self.weights: Rows = ()  # of a joint search, not of this one
        # The accepted merges of every layer and, last, of the header.
        self.origins: list[list[Merge]] = [[(1.0, search.model.checkpoint.name)] for _ in range(self.layers + 1)]

    def conduct(self, candidates: Sequence[Candidate], resume: bool = False, table: str = "full") -> None:
        """Search one candidate after another; show a phrase table before the first and after each.

        resume: whether the user asked to go on with an earlier run. table: how much of the tables is shown.
        """
        console = self.console
        start = self._start(resume, table)
        forwards = forwards_of_candidate(self.config, self.layers)
        with (
            console.progress(len(candidates) * forwards) as self.bar,
            postponed(console.on_interrupt) as self.end_if_asked,
        ):
            for number, candidate in enumerate(candidates, start=1):
                self._turn = f"{number}/{len(candidates)}"
                console.timed(f"Candidate {self._turn}: {candidate.name}")
                self._process_candidate(number, candidate)
                self.bar.left((len(candidates) - number) * forwards)
                self._show_state(start, table, whole_in_log=number == len(candidates))

    # -- shared with other searches -----------------------------------------------------------------------------------

    def _start(self, resume: bool, table: str) -> list[float]:
        """Show the base's scores. Note them, or take those that an earlier run noted. Returns the log-probabilities."""
        search = self.search
        record = self.record
        self._show_notes()
        self._show_table(table, whole_in_log=True)
        measured = list(search.log_probabilities)
        packing = search.scorer.packing
        start = record.line("start", 0) or record.note(
            "start",
            number=0,
            log_probabilities=measured,
            packing=packing,
            weights=search.weights,
            rounding=search.rounding,
        )
        search.log_probabilities = list(start.log_probabilities)
        search.weights = list(start.weights)
        if not record.was_widened:
            search.rounding = list(start.rounding)
        search.base_scores = scores(search.log_probabilities, search.weights)
        decisions = record.lines("decision")
        steps = record.lines("step")
        if decisions or steps:
            self.console.warnings(record.warnings(packing))
            if measured != search.log_probabilities and start.packing == packing and not record.was_widened:
                self.console.warning(
                    "the base scores differently than when the run started; the result may differ slightly"
                )
        if steps:
            self.console.timed(f"Resuming after step {steps[-1].step} of {self.config.joint.steps}")
        elif decisions:
            self.console.timed(f"Resuming: re-applying {len(decisions)} recorded decisions")
        elif resume:
            self.console.timed("Nothing to resume; starting a new run")
        if self.evaluator:
            self.evaluator.take_noted_scores()
        return list(search.log_probabilities)

    def _prepare_candidate(self, number: int, candidate: Candidate) -> None:
        """Wait for a candidate's files, note its source and its scores on its own."""
        group = self.search.group
        group.on_all_ranks(lambda: self.prefetcher.wait(number))
        note_source(self.record, group, number, candidate.where, candidate.checkpoint)
        group.on_all_ranks(lambda: self._evaluate_alone(number, candidate))

    def _show_state(self, start: Sequence[float], table: str, whole_in_log: bool) -> None:
        """Show how phrases and metrics changed, and which phrases improved only on the searched contexts."""
        self._show_table(table, start, whole_in_log)
        if self.evaluator is None:
            return
        phrases = self.evaluator.phrases
        base = self.evaluator.start
        current = self.evaluator.now
        self.console.line(report.metrics_line(base.metrics, current.metrics))
        if phrases.pairs:
            searched = report.gains(self.config.pairs, self.search.weights, start, self.search.log_probabilities)
            held_out = report.gains(phrases.pairs, phrases.weights, base.held_out, current.held_out)
            self.console.lines(report.overfit_lines(searched, held_out))

    def _show_table(self, kind: str, start: Sequence[float] | None = None, whole_in_log: bool = False) -> None:
        state = self.config.pairs, self.search.weights, self.search.log_probabilities, start
        rounding = self.search.rounding
        full_table = report.phrase_table(*state, "full", rounding) if whole_in_log else None
        self.console.lines(report.phrase_table(*state, kind, rounding), full_table)

    def _show_notes(self) -> None:
        self.console.lines(self.search.notes)
        self.search.notes.clear()

    def _evaluate_alone(self, number: int, candidate: Candidate) -> None:
        """Note the candidate's scores on its own, if they are wanted and not noted yet."""
        is_wanted = self.evaluator and (self.config.baselines or self.scores_alone) and self.search.scorer.has_tails
        noted_line = self.record.line("baseline", number) or self.record.line("candidate", number)
        if not is_wanted or noted_line or self.record.decisions(number):
            return
        self.console.timed(f"Scoring {candidate.name} on its own")
        try:
            evaluation = self.evaluator.evaluate_alone(candidate)
        except (BrokenWeights, CheckpointError) as error:  # the search will raise it, too
            if isinstance(error, TooNarrow) and self.search.model.may_widen:
                raise
            self.console.warning(f"{candidate.name} can't be scored on its own: {error}")
            return
        if evaluation is None:
            self.console.warning(f"Not enough memory to score {candidate.name} on its own")
            return
        self.record.note(
            "baseline",
            number=number,
            log_probabilities=evaluation.searched,
            packing=self.search.scorer.packing,
            metrics=evaluation.metrics,
        )

    @property
    def composition(self) -> Weights:
        """Each model's part in the weights. What is neither layer nor header stays the base's."""
        return self._composed_of([*map(weights_of, self.origins), {self.search.model.checkpoint.name: 1.0}])

    def _composed_of(self, weights: Sequence[Weights]) -> Weights:
        """The composition, from the models' weights in every layer, in the header and in the rest."""
        model = self.search.model
        parts = [*map(model.layer, range(self.layers)), model.header(), model.outside()]
        return composition_of((part.size, part_weights) for part, part_weights in zip(parts, weights, strict=True))

    # -- candidate by candidate ----------------------------------------------------------------------------------------

    def _process_candidate(self, number: int, candidate: Candidate) -> None:
        failure = None
        repeats_needed = self.search.repeated + len(self.record.decisions(number))
        try:
            self._prepare_candidate(number, candidate)
            failure = self._search(number, candidate)
        except CheckpointError as error:
            if self.config.on_error == "stop" or (isinstance(error, TooNarrow) and self.search.model.may_widen):
                raise
            failure = str(error)
            is_repeated = self.search.repeated >= repeats_needed
            check = partial(self._check_accepted, number, candidate, failure, is_repeated)
            self.search.group.on_all_ranks(check)
            self.search.measure()
        if self.search.inexact:
            name = self.search.model.arithmetic.name
            self.console.lines([], [f"{self.search.inexact:,} merged weights so far were rounded in {name}"])
        if failure:
            self.console.warning(f"Skipping the rest of {candidate.name}; its merges so far are kept: {failure}")
        self._show_notes()
        metrics = self.evaluator.evaluate().metrics if self.evaluator else {}
        if self.record.line("candidate", number) is None:
            self.record.note(
                "candidate",
                number=number,
                log_probabilities=self.search.log_probabilities,
                packing=self.search.scorer.packing,
                metrics=metrics,
                failure=failure,
            )

    def _check_accepted(self, number: int, candidate: Candidate, failure: str, is_repeated: bool) -> None:
        """Raise CheckpointError if a candidate's accepted merges can't be repeated: the output would lack them.

        is_repeated: whether this run has already repeated those of an earlier run.
        """
        accepted = [decision.layer for decision in self.record.decisions(number) if decision.ratio is not None]
        try:
            for layer in accepted if is_repeated else ():
                candidate.read(self.search.model.layer(layer).tensors)
        except CheckpointError:
            is_repeated = False
        if not is_repeated:
            reason = f"{candidate.name} can't be skipped, because its merges so far can't be repeated"
            raise CheckpointError(f"{failure}; {reason}")

    @property
    def is_base(self) -> bool:
        """Whether nothing was merged."""
        return all(len(merges) == 1 for merges in self.origins)

    def _search(self, number: int, candidate: Candidate) -> str | None:
        """Take the decisions that are still open. Returns why an earlier run gave the candidate up, or None."""
        noted_decisions = self.record.decisions(number)
        end = self.record.line("candidate", number)
        if end is not None:
            self.search.repeat(candidate, noted_decisions)
            self.search.log_probabilities = list(end.log_probabilities)
            self.search.measure_weighed()
            self._count_repeated(noted_decisions)
            return end.failure
        self._count_repeated(noted_decisions)
        began = time.monotonic()
        # The first decision waits until the noted ones are repeated: the bar must not take its speed from that.
        move_bar = self.bar.skip if noted_decisions else self.bar.update
        # Closed whatever happens: the candidate is read by a thread.
        with closing(self.search.candidate(candidate, noted_decisions)) as decisions:
            for decision in decisions:
                next_arithmetic = FALLBACK.name if self.search.outgrown else None
                seconds = round(time.monotonic() - began, 3)
                packing = self.search.scorer.packing
                self.record.decided(number, decision, seconds=seconds, packing=packing, computed=next_arithmetic)
                self._count(decision, move_bar)
                move_bar = self.bar.update
                merges = self.origins[self._part_index(decision)]
                self._show_notes()
                show_decision(self.console, decision, merges, self.layers, len(self.config.merge_method) > 1)
                self.end_if_asked()
                began = time.monotonic()
        return None

    def _count_repeated(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            self._count(decision, self.bar.skip)

    def _count(self, decision: Decision, move_bar: Callable[[float], object]) -> None:
        if decision.ratio is not None:
            self.origins[self._part_index(decision)].append((decision.weight, decision.model))
        move_bar(forwards_of(self.config, self.layers, decision.layer, decision.method))
        accepted = sum(len(merges) - 1 for merges in self.origins)
        part = "embedding + head" if decision.layer is None else f"layer {decision.layer}"
        self.bar.tell(f"candidate {self._turn}, {part}, {accepted} accepted")

    def _part_index(self, decision: Decision) -> int:
        return self.layers if decision.layer is None else decision.layer


def show_results(conductor: Conductor, candidates: Sequence[Candidate]) -> None:
    """Show base, candidates on their own and the merge side by side, if any candidate was scored so; then advice."""
    evaluator = conductor.evaluator
    search = conductor.search
    console = conductor.console
    merge = ResultRow("the merge", evaluator.now.metrics)
    candidate_rows = []
    for number, candidate in enumerate(candidates, start=1):
        baseline = conductor.record.line("baseline", number)
        if baseline:
            name = by_other_settings(candidate.name) if candidate.otherwise else candidate.name
            candidate_rows.append(ResultRow(name, baseline.metrics))
    if candidate_rows:
        base = ResultRow(f"{search.model.checkpoint.name} (base)", evaluator.start.metrics)
        console.lines(results_table([base, *candidate_rows, merge]))
        console.lines(advice(candidate_rows, merge, search.config, search.limits, conductor.layers))
    console.warnings(beyond_limit(merge, search.limits))


class Clock:
    """Measures the seconds of each phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, phase: str) -> None:
        """End a phase and begin the next one."""
        lap_end = time.monotonic()
        self.seconds[phase] = round(lap_end - self._began, 1)
        self._began = lap_end


def show_decision(
    console: Console, decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool
) -> None:
    """Show a decision: its warning and note, its two lines, and a rule below them."""
    if decision.warning:
        console.warning(decision.warning)
    if decision.note:
        console.line(decision.note)
    composition, outcome = report.decision_lines(decision, merges, layers, name_method)
    console.line(composition)
    console.timed(outcome)
    console.line("----")

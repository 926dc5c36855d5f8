"""Carries out a joint search step by step: journal, console, resumption, the choice of the result.

Knows: the order of what comes before, between and after the steps. Refuses to know: how a step is made.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

from modules.checkpoints.candidate import Candidate
from modules.metrics.registry import columns_of
from modules.output import tables as report
from modules.run.conductor import Conductor
from modules.runtime.errors import BrokenWeights, CheckpointError
from modules.runtime.oom import retry_on_oom
from modules.runtime.program import postponed
from modules.scoring.objective import Objective, Penalty, Value
from modules.search.decision import Result, Weights, mixed_weights
from modules.search.joint import (
    Joint,
    JointState,
    Rows,
    added,
    first_weights,
    given_weights,
    largest_factor,
    rounded,
    scaled,
)
from modules.search.mixing import Mix, Row

GIVEN = "joint.start"  # what messages call the weights that the configuration gives


class JointConductor(Conductor):
    """Leads a joint search. It resumes where an earlier run stopped."""

    scores_alone = True
    _candidates: Sequence[Candidate] = ()
    _header_weights: Row = ()  # of the header, if it is mixed; a candidate's may be left out there

    def conduct(self, candidates: Sequence[Candidate], resume: bool = False, table: str = "full") -> None:
        """Search; show a phrase table before the first step and after the last.

        Raises CheckpointError if a candidate can't be read or has weights that are no numbers: all are needed.
        """
        self._candidates = candidates
        start = self._start(resume, table)
        try:
            for number, candidate in enumerate(candidates, start=1):
                self._prepare_candidate(number, candidate)
            self._joint = self._build_joint()
            with postponed(self.console.on_interrupt) as self.end_if_asked:
                self._end(self._steps(self._starting_state()))
        except BrokenWeights as error:
            raise CheckpointError(f"{error}; search: joint needs every candidate") from None
        self._show_notes()
        if self.evaluator:
            self.evaluator.evaluate()
        self._show_state(start, table, whole_in_log=True)

    @property
    def composition(self) -> Weights:
        """Each model's part in the weights; the base's may be negative."""
        outside_rows = self.weights[self.layers :] or [(0.0,) * len(self._candidates)]
        rows = [*self.weights[: self.layers], self._header_weights or outside_rows[0], outside_rows[0]]
        base = self.search.model.checkpoint.name
        names = [candidate.name for candidate in self._candidates]
        return self._composed_of([mixed_weights(base, names, row) for row in rows])

    @property
    def is_base(self) -> bool:
        """Whether nothing was merged."""
        return not any(map(any, self.weights))

    def _build_joint(self) -> Joint:
        """Build the object that makes the steps. The model is still the base."""
        search = self.search
        config = self.config

        def make() -> Joint:
            arguments = search.model, search.tokenizer, self._candidates, config.merge_headers, search.streams
            mix = Mix(*arguments, layers=search.layers)
            weights = search.limits.weights
            weighed_metrics = [metric for metric in search.weighed if metric.name in weights]
            penalties = [Penalty(metric.name, weights[metric.name], metric.meter) for metric in weighed_metrics]
            objective = Objective(search.model, search.scorer, search.weights, penalties)
            return Joint(mix, objective, config.joint.steps, config.joint.step_size, search.group)

        joint = search.in_memory(make)
        self.console.lines(joint.mix.notes)
        return joint

    def _starting_state(self) -> JointState:
        """Find the state before the next step, and compose the model from it."""
        steps = self.record.lines("step")
        start_lines = self.record.lines("joint")
        if steps:
            state = JointState.of(steps[-1].model_dump())
        else:
            state = JointState.at(start_lines[0].start if start_lines else self._find_start())
        self._in_memory(partial(self._joint.go_to, state))
        return state

    def _find_start(self) -> Rows:
        """Find and note the first weights, and the gradients of total and weighed metrics there.

        The model is composed from these weights. Raises ConfigError if the objective doesn't follow the sum of the
        gradients.
        """
        limits = self.search.limits
        weights = self._configured_start()
        begin = GIVEN
        if not weights:
            begin, weights = self._best_start()
        self.console.timed(f"Starting from {begin}; measuring each layer's effect")
        state = JointState.at(weights)
        self._in_memory(partial(self._joint.go_to, state))
        summands: dict[str | None, Rows] = {}
        for name in (None, *limits.weights):
            summands[name] = self._in_memory(partial(self._gradient, weights, name), state)

        self.console.timed("Checking the gradient")
        error = self._in_memory(partial(self._joint.check, weights, added(summands.values())), state)
        self.console.timed(f"The gradient is right (relative error {error:.2%})")

        slopes = {"total": summands[None]}
        for name, weight in limits.weights.items():
            slopes[name] = tuple(tuple(scaled(row, 1 / weight)) for row in summands[name])
        self.record.note("joint", start=weights, slopes=slopes)
        return weights

    def _gradient(self, weights: Rows, name: str | None) -> Rows:
        """The gradient of a summand of the objective by every weight. name: the metric's; None: the total."""
        return self._joint.gradient(weights, self._joint.objective.part(name))

    def _configured_start(self) -> Rows:
        """The first weights from the configuration; empty if it has none."""
        start = self.config.joint.start
        mix = self._joint.mix
        return mix.limited(given_weights(start, mix.rows, len(self._candidates))) if start else ()

    def _best_start(self) -> tuple[str, Rows]:
        """The name of the best of base and candidates, and weights near it."""
        self.console.timed("Comparing base and candidates")
        named_weights = self._candidate_weights()
        objectives = [self.search.limits.objective(self.search.state)]
        objectives += [self._compose(weights) for _, weights in named_weights]
        names = [self.search.model.checkpoint.name, *(name for name, _ in named_weights)]
        mix = self._joint.mix
        return names[objectives.index(min(objectives))], mix.limited(first_weights(mix.rows, objectives))

    def _steps(self, state: JointState) -> JointState:
        """Make the remaining steps. Each is reported once its result is measured."""
        with self.console.progress(self._joint.steps) as bar:
            bar.skip(state.step)
            while state.step < self._joint.steps:
                self.end_if_asked()
                step_metrics = self._step_metrics()
                began = time.monotonic()
                state, value = self._in_memory(partial(self._joint.step, state), state)
                seconds = round(time.monotonic() - began, 3)
                metrics = {**step_metrics, "total": value.total, **value.metrics}
                packing = self.search.scorer.packing
                self.record.note("step", **asdict(state), metrics=metrics, packing=packing, seconds=seconds)
                self._show_notes()
                self._report_step(state.step - 1, metrics)
                bar.update(1)
                bar.tell(f"step {state.step}/{self._joint.steps}, objective {value.objective:.3f}")
            value: Value = self._in_memory(self._joint.value, state)
            self._report_step(state.step, {**self._step_metrics(), "total": value.total, **value.metrics})
        return state

    def _report_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a step's result; before the first step there is none."""
        if step:
            total_before = self.record.lines("step")[step - 1].metrics["total"]
            self.console.timed(report.step_line(step, self.config.joint.steps, total_before, metrics))

    def _end(self, state: JointState) -> None:
        """Compose the result exactly as it is saved: the last weights or, if better, start, candidate or base."""
        self.console.timed("Comparing the result with base and candidates")
        maxima = self.search.limits.maxima
        factor = largest_factor(partial(self._is_allowed, state)) if maxima else 1.0
        if factor < 1:
            named = {column.limit_key: maxima[column.name] for column in columns_of(maxima)}
            limits = ", ".join(f"{key} {most:g}" for key, most in named.items())
            self.console.timed(f"Scaled all weights by {factor:.3f} to hold {limits}")
        alternatives = [
            *self._candidate_weights(),
            ("the base", ((0.0,) * len(self._candidates),) * self._joint.mix.rows),
        ]
        start_weights = self._configured_start()
        alternatives += [(GIVEN, start_weights)] if start_weights else []
        objectives = [self._compose(weights) for _, weights in alternatives]
        if self._compose(rounded(state.weights, factor)) > min(objectives):
            name, weights = alternatives[objectives.index(min(objectives))]
            self._compose(weights)
            self.console.timed(f"No step beat {name}; keeping {name}")

    def _candidate_weights(self) -> list[tuple[str, Rows]]:
        """Each candidate's name, and the weights that take it alone: whole, or in the searched layers."""
        names = [candidate.name for candidate in self._candidates]
        mix = self._joint.mix
        where = " in the searched layers" if mix.is_restricted else ""
        named_weights = []
        for number, name in enumerate(names):
            row = tuple(float(column == number) for column in range(len(names)))
            named_weights.append((name + where, mix.limited((row,) * mix.rows)))
        return named_weights

    def _is_allowed(self, state: JointState, factor: float) -> bool:
        """Whether the metrics stay within their limits with all weights multiplied with a factor."""
        self._compose(rounded(state.weights, factor))
        return self.search.limits.allow(self.search.metrics)

    def _compose(self, weights: Rows) -> float:
        """Compose the model from these weights exactly as it would be saved. Returns its objective, infinite if it
        exceeds a limit or is no number."""
        search = self.search
        limits = self.search.limits
        search.in_memory(partial(self._joint.mix.compose, weights, exact=True))
        search.measure()
        self.weights = weights
        self._header_weights = self._joint.mix.header_weights(weights)
        objective = limits.objective(search.state)
        return objective if limits.allow(search.metrics) and math.isfinite(objective) else math.inf

    def _step_metrics(self) -> dict[str, float]:
        """The present model's metrics that are measured at every step."""
        return self.evaluator.evaluate_step() if self.evaluator else {}

    def _in_memory(self, work: Callable[[], Result], state: JointState | None = None) -> Result:
        """Do work that needs memory; if there is too little, try again with less. state: from which the model is
        composed before the next try."""

        def take_less() -> bool:
            has_freed = self.search.take_less_memory()
            if has_freed:
                self._joint.objective = self._joint.objective.packed_as(self.search.scorer)
                self._joint.mix.ahead = self.search.reads_ahead
                if state:
                    self._joint.go_to(state)
            return has_freed

        return retry_on_oom(work, take_less)

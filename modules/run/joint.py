"""A joint search carried out step by step: journal, console, resumption, what is kept at the end.

Knows: the order of what comes before, between and behind the steps. Refuses to know: how a step is made.
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
    """Leads a joint search, from where an earlier run has left it."""

    scores_alone = True
    _candidates: Sequence[Candidate] = ()
    _header_weights: Row = ()  # of the header, if it is mixed; a candidate's may be left out there

    def conduct(self, candidates: Sequence[Candidate], resume: bool = False, table: str = "full") -> None:
        """Search, with a phrase table before the first step and after the last.

        Raises CheckpointError if a candidate can't be read or is no number: none of them can be done without.
        """
        self._candidates = candidates
        start = self._start(resume, table)
        try:
            for number, candidate in enumerate(candidates, start=1):
                self._meet(number, candidate)
            self._joint = self._made_joint()
            with postponed(self.console.on_interrupt) as self.end_if_asked:
                self._end(self._steps(self._begun()))
        except BrokenWeights as error:
            raise CheckpointError(f"{error}; search: joint needs every candidate") from None
        self._show_notes()
        if self.evaluator:
            self.evaluator.evaluate()
        self._show_state(start, table, whole_in_log=True)

    @property
    def composition(self) -> Weights:
        """How much of each model the weights are; the base's weight may be negative."""
        outside = self.weights[self.layers :] or [(0.0,) * len(self._candidates)]
        rows = [*self.weights[: self.layers], self._header_weights or outside[0], outside[0]]
        base = self.search.model.checkpoint.name
        names = [candidate.name for candidate in self._candidates]
        return self._composed_of([mixed_weights(base, names, row) for row in rows])

    @property
    def is_base(self) -> bool:
        """Whether nothing was merged."""
        return not any(map(any, self.weights))

    def _made_joint(self) -> Joint:
        """What makes the steps. The model is still the base."""
        search = self.search
        config = self.config

        def make() -> Joint:
            mixed = search.model, search.tokenizer, self._candidates, config.merge_headers, search.streams
            mix = Mix(*mixed, layers=search.layers)
            weights = search.limits.weights
            weighed = [metric for metric in search.weighed if metric.name in weights]
            penalties = [Penalty(metric.name, weights[metric.name], metric.meter) for metric in weighed]
            objective = Objective(search.model, search.scorer, search.weights, penalties)
            return Joint(mix, objective, config.joint.steps, config.joint.step_size, search.group)

        joint = search.in_memory(make)
        self.console.lines(joint.mix.notes)
        return joint

    def _begun(self) -> JointState:
        """The state from which the next step is made, and the model composed from it."""
        steps = self.record.lines("step")
        begun = self.record.lines("joint")
        if steps:
            state = JointState.of(steps[-1].model_dump())
        else:
            state = JointState.at(begun[0].start if begun else self._find_start())
        self._in_memory(partial(self._joint.go_to, state))
        return state

    def _find_start(self) -> Rows:
        """Find and note where the steps begin, and how total and weighed metrics change there with every weight.

        The model is composed from there. Raises ConfigError if the objective doesn't follow the sum of these gradients.
        """
        limits = self.search.limits
        weights = self._given()
        begin = GIVEN
        if not weights:
            begin, weights = self._best_start()
        self.console.timed(f"Starting from {begin}; measuring each layer's effect")
        self._in_memory(partial(self._joint.go_to, JointState.at(weights)))
        summands: dict[str | None, Rows] = {}
        for name in (None, *limits.weights):
            summands[name] = self._in_memory(partial(self._gradient, weights, name))

        self.console.timed("Checking the gradient")
        error = self._in_memory(partial(self._joint.check, weights, added(summands.values())))
        self.console.timed(f"The gradient is right (relative error {error:.2%})")

        slopes = {"total": summands[None]}
        for name, weight in limits.weights.items():
            slopes[name] = tuple(tuple(scaled(row, 1 / weight)) for row in summands[name])
        self.record.note("joint", start=weights, slopes=slopes)
        return weights

    def _gradient(self, weights: Rows, name: str | None) -> Rows:
        """By how much a summand of the objective changes with every weight; name: of a metric, or None: the total."""
        return self._joint.gradient(weights, self._joint.objective.part(name))

    def _given(self) -> Rows:
        """The weights that the configuration gives to begin with; empty if it gives none."""
        start = self.config.joint.start
        mix = self._joint.mix
        return mix.limited(given_weights(start, mix.rows, len(self._candidates))) if start else ()

    def _best_start(self) -> tuple[str, Rows]:
        """The name of the best of base and candidates, and weights near it."""
        self.console.timed("Comparing base and candidates")
        reached = self._reached()
        objectives = [self.search.limits.objective(self.search.state)]
        objectives += [self._composed(weights) for _, weights in reached]
        names = [self.search.model.checkpoint.name, *(name for name, _ in reached)]
        mix = self._joint.mix
        return names[objectives.index(min(objectives))], mix.limited(first_weights(mix.rows, objectives))

    def _steps(self, state: JointState) -> JointState:
        """Make the steps that are left, and tell of each when it is known what it has led to."""
        with self.console.progress(self._joint.steps) as bar:
            bar.skip(state.step)
            while state.step < self._joint.steps:
                self.end_if_asked()
                evaluated = self._evaluated()
                began = time.monotonic()
                state, value = self._in_memory(partial(self._joint.step, state), state)
                seconds = round(time.monotonic() - began, 3)
                metrics = {**evaluated, "total": value.total, **value.metrics}
                packing = self.search.scorer.packing
                self.record.note("step", **asdict(state), metrics=metrics, packing=packing, seconds=seconds)
                self._show_notes()
                self._tell_of_step(state.step - 1, metrics)
                bar.update(1)
                bar.tell(f"step {state.step}/{self._joint.steps}, {value.objective:.3f}")
            value: Value = self._in_memory(self._joint.value, state)
            self._tell_of_step(state.step, {**self._evaluated(), "total": value.total, **value.metrics})
        return state

    def _tell_of_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """What a step has led to; of none, nothing."""
        if step:
            before = self.record.lines("step")[step - 1].metrics["total"]
            self.console.timed(report.step_line(step, self.config.joint.steps, before, metrics))

    def _end(self, state: JointState) -> None:
        """Compose what is kept, exactly: what the steps have found, or the best candidate or the base."""
        self.console.timed("Comparing the result with base and candidates")
        maxima = self.search.limits.maxima
        factor = largest_factor(partial(self._is_allowed, state)) if maxima else 1.0
        if factor < 1:
            named = {column.limit_key: maxima[column.name] for column in columns_of(maxima)}
            limits = ", ".join(f"{key} {most:g}" for key, most in named.items())
            self.console.timed(f"Scaled all weights by {factor:.3f} to hold {limits}")
        others = [*self._reached(), ("the base", ((0.0,) * len(self._candidates),) * self._joint.mix.rows)]
        given = self._given()
        others += [(GIVEN, given)] if given else []
        objectives = [self._composed(weights) for _, weights in others]
        if self._composed(rounded(state.weights, factor)) > min(objectives):
            name, weights = others[objectives.index(min(objectives))]
            self._composed(weights)
            self.console.timed(f"No step beat {name}; keeping {name}")

    def _reached(self) -> list[tuple[str, Rows]]:
        """Each candidate's name and weights where it is taken as far as the search goes: whole, or in some layers."""
        names = [candidate.name for candidate in self._candidates]
        mix = self._joint.mix
        where = " in the searched layers" if mix.is_restricted else ""
        reached = []
        for number, name in enumerate(names):
            row = tuple(float(other == number) for other in range(len(names)))
            reached.append((name + where, mix.limited((row,) * mix.rows)))
        return reached

    def _is_allowed(self, state: JointState, factor: float) -> bool:
        """Whether the metrics stay within their limits with all weights multiplied with a factor."""
        self._composed(rounded(state.weights, factor))
        return self.search.limits.allow(self.search.metrics)

    def _composed(self, weights: Rows) -> float:
        """Make the model exactly what saving keeps of these weights; its objective, infinite if it is beyond a limit or
        no number."""
        search = self.search
        limits = self.search.limits
        search.in_memory(partial(self._joint.mix.compose, weights, exact=True))
        search.measure()
        self.weights = weights
        self._header_weights = self._joint.mix.header_weights(weights)
        objective = limits.objective(search.state)
        return objective if limits.allow(search.metrics) and math.isfinite(objective) else math.inf

    def _evaluated(self) -> dict[str, float]:
        """The metrics that are measured at every step, of the present model."""
        return self.evaluator.evaluate_step() if self.evaluator else {}

    def _in_memory(self, work: Callable[[], Result], state: JointState | None = None) -> Result:
        """Do work of the steps that needs memory, again and again with less of it where it is not there. state: that
        the model must be of again before the next try."""

        def take_less() -> bool:
            done = self.search.take_less_memory()
            if done:
                self._joint.objective = self._joint.objective.packed_as(self.search.scorer)
                self._joint.mix.ahead = self.search.reads_ahead
                if state:
                    self._joint.go_to(state)
            return done

        return retry_on_oom(work, take_less)

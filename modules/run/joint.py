"""A joint search carried out step by step: journal, console, resumption, what is kept at the end.

Knows: the order of what comes before, between and behind the steps. Refuses to know: how a step is made.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from modules.checkpoints import Candidate
from modules.output import JointStart
from modules.output import tables as report
from modules.run.conductor import Conductor
from modules.run.steps import note_source
from modules.runtime import BrokenWeights, CheckpointError, postponed, within_memory
from modules.scoring import Objective, Value
from modules.search import Shares, mixed_shares
from modules.search.decision import Result
from modules.search.joint import Joint, JointState, Rows, first_shares, largest_factor, rounded
from modules.search.mixing import Mix, Row


class JointConductor(Conductor):
    """Leads a joint search, from where an earlier run has left it."""

    _candidates: Sequence[Candidate] = ()
    _header_shares: Row = ()  # of the header, if it is mixed; a candidate's may be left out there

    def conduct(self, candidates: Sequence[Candidate], resume: bool = False, table: str = "full") -> None:
        """Search, with a phrase table before the first step and after the last.

        Raises CheckpointError if a candidate can't be read or is no number: none of them can be done without.
        """
        self._candidates, search, console = candidates, self.search, self.console
        start = self._start(resume, table)
        try:
            for number, candidate in enumerate(candidates, start=1):
                search.group.on_all_ranks(partial(self.prefetcher.wait, number))
                note_source(self.record, search.group, number, candidate.text, candidate.where, candidate.checkpoint)
                search.group.on_all_ranks(partial(self._score_whole, number, candidate))
            joint = self._made_joint()
            with postponed(console.on_interrupt) as self.end_if_asked:
                self._end(joint, self._steps(joint, self._begun(joint)))
        except BrokenWeights as error:
            raise CheckpointError(f"{error}; search: joint can't do without a candidate") from None
        finally:
            for candidate in candidates:
                candidate.checkpoint.release()
        self._tell_notes()
        if self.watch:
            self.watch.look()
        self._show_table(table, start, whole_in_log=True)
        self._show_watch(start)

    @property
    def composition(self) -> Shares:
        """How much of each model the weights are; the base's share may be negative."""
        outside = self.shares[self.layers :] or [(0.0,) * len(self._candidates)]
        rows = [*self.shares[: self.layers], self._header_shares or outside[0], outside[0]]
        base, names = self.search.model.checkpoint.name, [candidate.name for candidate in self._candidates]
        return self._composed_of([mixed_shares(base, names, row) for row in rows])

    @property
    def is_base(self) -> bool:
        """Whether nothing was merged."""
        return not any(map(any, self.shares))

    def _made_joint(self) -> Joint:
        """What makes the steps. The model is still the base."""
        search, config = self.search, self.config

        def make() -> Joint:
            mixed = search.model, search.tokenizer, self._candidates, config.merge_headers, search.streams
            mix = Mix(*mixed, layers=search.layers)
            weight = search.limits.drift_weight
            objective = Objective(search.model, search.scorer, search.weights, self._meter if weight else None, weight)
            return Joint(mix, objective, config.joint.steps, config.joint.step_size, search.group)

        joint = search.in_memory(make)
        self.console.lines(joint.mix.notes)
        return joint

    def _begun(self, joint: Joint) -> JointState:
        """The state from which the next step is made, and the model composed from it."""
        if self.record.steps():
            state = JointState.of(self.record.steps()[-1].model_dump())
        else:
            noted = self.record.joint_start() or self._find_start(joint)
            state = JointState.at(noted.shares)
        self._in_memory(joint, partial(joint.go_to, state))
        return state

    def _find_start(self, joint: Joint) -> JointStart:
        """Find and note where the steps begin, and how total and drift change there with every share."""
        search, limits = self.search, self.search.limits
        weight = limits.drift_weight
        self.console.timed("Comparing base and candidates")
        objectives = [limits.objective(search.state)]
        objectives += [self._composed(joint, reached) for _, reached in self._reached(joint)]
        shares = joint.mix.limited(first_shares(joint.mix.rows, objectives))
        names = [search.model.checkpoint.name, *(name for name, _ in self._reached(joint))]
        begin = names[objectives.index(min(objectives))]
        self.console.timed(f"The steps begin at {begin}; checking the gradient")
        error = self._in_memory(joint, partial(joint.check, shares))
        self.console.timed(f"The gradient agrees with the objective's slope to {error:.2%}")

        self.console.timed("Measuring what every share changes")

        def slopes_of(pairs: bool) -> Rows:
            return self._in_memory(joint, lambda: joint.gradient(shares, joint.objective.part(pairs)))

        slopes = slopes_of(pairs=True)
        of_drift = [[slope / weight for slope in row] for row in slopes_of(pairs=False)] if weight else None
        return self.record.note_joint_start(shares, slopes, of_drift)

    def _steps(self, joint: Joint, state: JointState) -> JointState:
        """Make the steps that are left, and tell of each when it is known what it has led to."""
        with self.console.progress(joint.steps) as bar:
            bar.skip(state.step)
            while state.step < joint.steps:
                self.end_if_asked()
                held_out, began = self._held_out(), time.monotonic()
                state, value = self._in_memory(joint, partial(joint.step, state), state)
                seconds = time.monotonic() - began
                self.record.stepped(state, value, held_out, seconds, self.search.scorer.packing)
                self._tell_notes()
                self._tell_of_step(state.step - 1, value, held_out)
                bar.update(1)
                bar.tell(report.joint_standing(state.step, joint.steps, value.objective))
            value = self._in_memory(joint, joint.value, state)
            self._tell_of_step(state.step, value, self._held_out())
        return state

    def _tell_of_step(self, step: int, value: Value, held_out: float | None) -> None:
        """What a step has led to; of none, nothing."""
        if step:
            totals = self.record.steps()[step - 1].total, value.total
            drift = value.divergence if self.search.limits.drift_weight else None
            self.console.timed(report.step_line(step, self.config.joint.steps, *totals, held_out, drift))

    def _end(self, joint: Joint, state: JointState) -> None:
        """Compose what is kept, exactly: what the steps have found, or the best candidate or the base."""
        self.console.timed("Comparing what the steps have found with the candidates and the base")
        most = self.search.limits.max_drift
        factor = self._factor(joint, state, most) if most < math.inf else 1.0
        if factor < 1:
            self.console.timed(f"All shares times {factor:.3f}: so the drift stays within {most:g}")
        others = [*self._reached(joint), ("the base", ((0.0,) * len(self._candidates),) * joint.mix.rows)]
        objectives = [self._composed(joint, shares) for _, shares in others]
        if self._composed(joint, rounded(state.shares, factor)) > min(objectives):
            name, shares = others[objectives.index(min(objectives))]
            self._composed(joint, shares)
            self.console.timed(f"No step beat {name}: keeping it")

    def _reached(self, joint: Joint) -> list[tuple[str, Rows]]:
        """Each candidate's name and shares where it is taken as far as the search goes: whole, or in some layers."""
        names, mix = [candidate.name for candidate in self._candidates], joint.mix
        rows = [tuple(float(other == number) for other in range(len(names))) for number in range(len(names))]
        where = " in the searched layers" if mix.is_restricted else ""
        return [(name + where, mix.limited((row,) * mix.rows)) for name, row in zip(names, rows, strict=True)]

    def _factor(self, joint: Joint, state: JointState, most: float) -> float:
        """The largest factor of all shares with which the drift stays within a limit."""

        def drift_at(factor: float) -> float:
            self._composed(joint, rounded(state.shares, factor))
            return self.search.drift

        return largest_factor(drift_at, most)

    def _composed(self, joint: Joint, shares: Rows) -> float:
        """Make the model exactly what saving keeps of these shares; its objective, infinite if it drifts too far or
        is no number."""
        search, limits = self.search, self.search.limits
        search.in_memory(partial(joint.mix.compose, shares, exact=True))
        search.measure()
        self.shares = shares
        self._header_shares = joint.mix.header_shares(shares)
        objective = limits.objective(search.state)
        return objective if search.drift <= limits.max_drift and math.isfinite(objective) else math.inf

    def _held_out(self) -> float | None:
        """The total of the pairs that are held out, in the present model."""
        return self.watch.held_out_total() if self.watch and self.watch.pairs else None

    def _in_memory(self, joint: Joint, work: Callable[[], Result], state: JointState | None = None) -> Result:
        """Do work of the steps that needs memory, again and again with less of it where it is not there. state: that
        the model must be of again before the next try."""

        def take_less() -> bool:
            done = self.search.take_less_memory()
            if done:
                joint.objective = joint.objective.packed_as(self.search.scorer)
                joint.mix.ahead = self.search.reads_ahead
                if state:
                    joint.go_to(state)
            return done

        return within_memory(work, take_less)

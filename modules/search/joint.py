"""All weights at once, by gradient: the first weights, the steps of Adam, the rounding of the last weights.

Knows: rows of weights, Adam, the state that a step starts from. Refuses to know: tensors, files, printing.

Adam (Kingma and Ba 2014, https://arxiv.org/abs/1412.6980) works coordinate by coordinate, so each row of weights is
moved as soon as its gradient is there. Weights stay within 0 and 1.
"""

import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modules.config.schema import StartWeight
from modules.runtime.distributed import ALONE, Group
from modules.runtime.errors import ConfigError, ProcessLost
from modules.runtime.oom import is_out_of_memory
from modules.scoring.objective import Objective, Value
from modules.search.mixing import Mix, Row, Update

BETAS = (0.8, 0.95)  # Adam's decay rates of mean and square
TINY = 1e-12  # Adam's epsilon, against division by 0
LAST_STEP = 0.1  # size of the last step relative to the first; sizes fall linearly in between
# first weights, where the best model is the base, and where it is a candidate
AT_BASE = 0.02
AT_CANDIDATE = 0.98
LEAST = 0.01  # smaller weights are dropped at the end
DECIMALS = 2  # of the others

# The check of the gradient: how far weights move, and the relative error of the slope that is tolerated.
_PROBES = {torch.float64: (1e-3, 0.01), torch.float32: (0.02, 0.05)}
_PROBES_IN_HALF = (0.25, 0.3)
ROUNDINGS = 4  # how many machine epsilons of its type a probability may be off

Rows = tuple[tuple[float, ...], ...]  # for each row of weights, a number for each candidate


@dataclass(frozen=True)
class JointState:
    """All that the next step depends on, beside the files. As JSON, it comes back the same to the bit."""

    step: int  # number of steps made so far
    weights: Rows
    mean: Rows  # Adam's running mean of the gradient
    square: Rows  # Adam's running mean of its square

    @classmethod
    def at(cls, weights: Sequence[Row]) -> "JointState":
        """The state before the first step."""
        zeros = tuple((0.0,) * len(row) for row in weights)
        return cls(0, tuple(map(tuple, weights)), zeros, zeros)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "JointState":
        """The state from its stored fields, which have lists instead of tuples."""

        def rows(name: str) -> Rows:
            return tuple(tuple(map(float, row)) for row in stored[name])

        return cls(int(stored["step"]), rows("weights"), rows("mean"), rows("square"))


def first_weights(rows: int, objectives: Sequence[float]) -> Rows:
    """The weights before the first step: near the model with the lowest objective.

    objectives: the base's, then each candidate's.
    """
    best = objectives.index(min(objectives))
    candidates = len(objectives) - 1
    row = (AT_BASE,) * candidates
    if best:
        row = tuple(AT_CANDIDATE * (number == best) for number in range(1, candidates + 1))
    return (row,) * rows


def given_weights(start: Sequence[StartWeight], rows: int, candidates: int) -> Rows:
    """The weights before the first step as a configuration gives them.

    start: entries; their layers and candidates must exist. Of several for the same weight the last counts; a weight
    without an entry is 0.
    """
    weights = [[0.0] * candidates for _ in range(rows)]
    for entry in start:
        for row in range(rows) if entry.layers is None else entry.layers:
            weights[row][entry.candidate - 1] = entry.weight
    return tuple(map(tuple, weights))


def start_of(rows: Sequence[Row], mixes_outside: bool) -> tuple[StartWeight, ...]:
    """Entries from which `given_weights` makes these rows. mixes_outside: whether the last row is for tensors outside
    the layers."""
    entries = []
    for candidate, column in enumerate(zip(*rows, strict=True), start=1):
        layers = column[:-1] if mixes_outside else column
        common_weight = column[-1] if mixes_outside else 0.0
        if common_weight:
            entries.append(StartWeight(candidate, common_weight))
        for weight in dict.fromkeys(layers):
            if weight != common_weight:
                layers_alike = tuple(layer for layer, layer_weight in enumerate(layers) if layer_weight == weight)
                entries.append(StartWeight(candidate, weight, layers_alike))
    return tuple(entries)


def step_size(step: int, steps: int, first: float) -> float:
    """The size of a step, by its number counted from 1. steps: how many there are. first: size of the first."""
    return first * (1 - (1 - LAST_STEP) * (step - 1) / max(1, steps - 1))


def moved(state: JointState, row: int, gradient: Row, size: float) -> tuple[Row, Row, Row]:
    """A row's weights, mean and square after the next step of Adam."""
    moved_numbers = []
    for weight, mean, square, slope in zip(
        state.weights[row], state.mean[row], state.square[row], gradient, strict=True
    ):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * slope
        square = BETAS[1] * square + (1 - BETAS[1]) * slope * slope
        unbiased, root = (1 - beta ** (state.step + 1) for beta in BETAS)
        weight -= size * (mean / unbiased) / (math.sqrt(square / root) + TINY)
        moved_numbers.append((min(1.0, max(0.0, weight)), mean, square))
    weights, means, squares = zip(*moved_numbers, strict=True)
    return weights, means, squares


def added(summands: Iterable[Rows]) -> Rows:
    """The sum of rows of numbers, number by number."""
    total = []
    for rows in zip(*summands, strict=True):
        total.append(tuple(map(math.fsum, zip(*rows, strict=True))))
    return tuple(total)


def rounded(weights: Sequence[Row], factor: float = 1.0) -> Rows:
    """The final weights, multiplied by a factor: small ones are dropped, others rounded to two decimals."""
    kept_rows = []
    for row in weights:
        kept_rows.append(tuple(round(weight, DECIMALS) if weight >= LEAST else 0.0 for weight in scaled(row, factor)))
    return tuple(kept_rows)


def scaled(row: Row, factor: float) -> list[float]:
    """A row multiplied by a factor."""
    return [number * factor for number in row]


def largest_factor(is_allowed: Callable[[float], bool], halvings: int = 7) -> float:
    """The largest factor of all weights, up to 1, at which limits hold; found by bisection to within 2**-halvings.

    is_allowed: whether limits hold with weights multiplied by a factor; at 0, the base, they always do. The returned
    factor has been tried, unless it is 0.
    """
    if is_allowed(1.0):
        return 1.0
    low = 0.0
    high = 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if is_allowed(middle) else (low, middle)
    return low


class Joint:
    """Steps of joint search on a mix, the same in all processes of a group."""

    def __init__(
        self, mix: Mix, objective: Objective, steps: int = 25, first_size: float = 0.08, group: Group = ALONE
    ) -> None:
        """steps: how many. first_size: how far the first moves a weight at most. objective: made, like the mix,
        while the model was the base."""
        self.mix = mix
        self.objective = objective
        self.steps = steps
        self.first_size = first_size
        self.group = group

    def go_to(self, state: JointState) -> None:
        """Compose the model of a state, from which its next step starts. `step` leaves the model composed so."""
        self.group.on_all_ranks(lambda: self.mix.compose(state.weights))

    def step(self, state: JointState) -> tuple[JointState, Value]:
        """Make one more step; returns the new state, from which the model is composed, and the objective before.

        After a failure the model belongs to no state; after `go_to` the step can be made again. If one process lacks
        memory, the step fails in all of them.
        """
        rows = dict(enumerate(zip(state.weights, state.mean, state.square, strict=True)))
        size = step_size(state.step + 1, self.steps, self.first_size)

        def update(row: int, gradient: Row) -> Row:
            rows[row] = moved(state, row, self._sum(gradient), size)
            return rows[row][0]

        value = self._descend(self.objective, update)
        ordered = (rows[row] for row in range(self.mix.rows))
        return JointState(state.step + 1, *zip(*ordered, strict=True)), value

    def value(self) -> Value:
        """The objective of the model as it is."""
        return self._value_of_parts(self.objective, self.group.on_all_ranks(lambda: self.mix.value(self.objective)))

    def gradient(self, weights: Sequence[Row], objective: Objective | None = None) -> Rows:
        """d objective / d weight of each row and candidate, 0 in rows that are not mixed. weights: the model's, which
        stay. objective: one to use instead of `self.objective`, as `Objective.part` gives it."""
        rows = dict(enumerate([[0.0] * len(self.mix.candidates)] * self.mix.rows))

        def update(row: int, gradient: Row) -> Row:
            rows[row] = self._sum(gradient)
            return weights[row]

        self._descend(objective or self.objective, update)
        return tuple(tuple(rows[row]) for row in range(self.mix.rows))

    def check(self, weights: Sequence[Row], gradient: Rows) -> float:
        """Move all weights a little and compare the objective's change with its gradient; returns the relative error.

        weights: the model's, from which it is composed again afterwards. gradient: at these weights. Raises ConfigError
        if the error is more than rounding explains: such an architecture can't be searched by gradient.

        Each weight moves by another amount, in the direction in which, by the gradient, the objective grows. Moves are
        halved until half a move gives the same slope, or until rounding would hide the change.
        """
        value = self.value()
        chance = random.Random(0)
        signed_amounts = []
        for row in gradient:
            signed_amounts.append([math.copysign(chance.uniform(0.5, 1.5), slope) for slope in row])
        direction = self.mix.limited(signed_amounts)
        expected = sum(
            slope * step
            for slopes, steps in zip(gradient, direction, strict=True)
            for slope, step in zip(slopes, steps, strict=True)
        )
        dtype = self.mix.model.dtype
        amount, tolerance = _PROBES.get(dtype, _PROBES_IN_HALF)
        noise = ROUNDINGS * torch.finfo(dtype).eps * self.objective.size(value) / amount
        coarse, fine = (self._slope(weights, direction, probe) for probe in (amount, amount / 2))
        while abs(coarse - fine) > tolerance * abs(fine) + noise and 2 * noise <= tolerance * abs(expected):
            amount = amount / 2
            noise = 2 * noise
            coarse = fine
            fine = self._slope(weights, direction, amount / 2)
        self.mix.compose(weights)
        measured = (4 * fine - coarse) / 3  # extrapolated: without the error that grows with the amount squared
        if not abs(measured - expected) <= tolerance * abs(expected) + abs(coarse - fine) + noise:
            kind = type(self.mix.model.module).__name__
            raise ConfigError(
                f"{kind}: search: joint is not supported, because its gradient check failed (gradient {expected:.4g}, "
                f"measured {measured:.4g}); use search: greedy"
            )
        return abs(measured - expected) / max(abs(expected), sys.float_info.min)

    def _slope(self, weights: Sequence[Row], direction: Sequence[Row], amount: float) -> float:
        """The objective's slope along a direction: the central difference of two models on it."""
        objectives = []
        for offset in (amount, -amount):
            moved_rows = []
            for row, steps in zip(weights, direction, strict=True):
                moved_rows.append([weight + offset * step for weight, step in zip(row, steps, strict=True)])
            self.mix.compose(moved_rows)
            objectives.append(self.value().objective)
        return (objectives[0] - objectives[1]) / (2 * amount)

    def _descend(self, objective: Objective, update: Update) -> Value:
        """`Mix.descend` in all processes. One that fails says so in place of its part of the next sum."""
        try:
            value = self.mix.descend(objective, update)
        except _FailedElsewhere as failure:
            kind = torch.OutOfMemoryError if failure.lacks_memory else ProcessLost
            raise kind("another process of this run has failed") from None
        except Exception as error:
            self.group.sum([[0.0] * len(self.mix.candidates) + [1.0, float(not is_out_of_memory(error))]])
            raise
        self._sum([0.0] * len(self.mix.candidates))  # no process has failed after the last row
        return self._value_of_parts(objective, value)

    def _sum(self, row: Row) -> Row:
        """The sum of a row over all processes. Raises _FailedElsewhere if one of them has failed."""
        ((*sums, failed, other_failures),) = self.group.sum([[*row, 0.0, 0.0]])
        if failed:
            raise _FailedElsewhere(lacks_memory=not other_failures)
        if self.mix.model.may_widen and not all(map(math.isfinite, sums)):
            raise self.mix.model.too_narrow("a gradient overflows")
        return sums

    def _value_of_parts(self, objective: Objective, part: Value) -> Value:
        """An objective's value from the parts of all processes."""
        ((total, *values),) = self.group.sum([[part.total, *part.metrics.values()]])
        model = self.mix.model
        if model.may_widen and not all(map(math.isfinite, [total, *values])):
            raise model.too_narrow("a step overflows")
        (log_probabilities,) = self.group.sum([part.log_probabilities])
        return objective.sum_of(log_probabilities, total, dict(zip(part.metrics, values, strict=True)))


class _FailedElsewhere(Exception):
    """Another process has failed."""

    def __init__(self, lacks_memory: bool) -> None:
        super().__init__()
        self.lacks_memory = lacks_memory

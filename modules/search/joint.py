"""All weights at once, by gradient: where the steps begin, how each is made, what is kept at the end.

Knows: rows of weights, Adam, what a step needs to be gone on from. Refuses to know: tensors, files, printing.

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

# of Adam; what keeps it from dividing by nothing
BETAS = (0.8, 0.95)
TINY = 1e-12
LAST_STEP = 0.1  # the size of the last step by that of the first; those between fall evenly
# weights where the steps begin
AT_BASE = 0.02
AT_CANDIDATE = 0.98
# a smaller weight is dropped; what others are rounded to
LEAST = 0.01
DECIMALS = 2

# How far weights move to see whether the objective follows its gradient, and by which part of that it may fail to.
_TRIED = {torch.float64: (1e-3, 0.01), torch.float32: (0.02, 0.05)}
_TRIED_IN_HALF = (0.25, 0.3)
ROUNDINGS = 4  # by how many of its type's a probability may be off

Rows = tuple[tuple[float, ...], ...]  # of each row of weights, a number for each candidate


@dataclass(frozen=True)
class JointState:
    """All that the next step depends on, beside the files: written as JSON and read again, it gives the same bits."""

    step: int  # how many have been made
    weights: Rows
    mean: Rows  # of Adam: the running mean of the gradient
    square: Rows  # and of its square

    @classmethod
    def at(cls, weights: Sequence[Row]) -> "JointState":
        """Before the first step."""
        zeros = tuple((0.0,) * len(row) for row in weights)
        return cls(0, tuple(map(tuple, weights)), zeros, zeros)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "JointState":
        """From its fields, with lists where it has tuples."""

        def rows(name: str) -> Rows:
            return tuple(tuple(map(float, row)) for row in stored[name])

        return cls(int(stored["step"]), rows("weights"), rows("mean"), rows("square"))


def first_weights(rows: int, objectives: Sequence[float]) -> Rows:
    """Where the steps begin. objectives: of the base, then of each candidate; the lowest is begun at."""
    best = objectives.index(min(objectives))
    candidates = len(objectives) - 1
    row = (AT_BASE,) * candidates
    if best:
        row = tuple(AT_CANDIDATE * (number == best) for number in range(1, candidates + 1))
    return (row,) * rows


def given_weights(start: Sequence[StartWeight], rows: int, candidates: int) -> Rows:
    """The weights that a configuration gives to begin with. Of entries for the same row the last one counts, a row
    without any has none. start: entries whose layers and candidates are there."""
    weights = [[0.0] * candidates for _ in range(rows)]
    for entry in start:
        for row in range(rows) if entry.layers is None else entry.layers:
            weights[row][entry.candidate - 1] = entry.weight
    return tuple(map(tuple, weights))


def start_of(rows: Sequence[Row], mixes_outside: bool) -> tuple[StartWeight, ...]:
    """Entries of which `given_weights` makes these rows. mixes_outside: whether the last row is of all else."""
    entries = []
    for candidate, column in enumerate(zip(*rows, strict=True), start=1):
        layers = column[:-1] if mixes_outside else column
        everywhere = column[-1] if mixes_outside else 0.0
        if everywhere:
            entries.append(StartWeight(candidate, everywhere))
        for weight in dict.fromkeys(layers):
            if weight != everywhere:
                alike = tuple(layer for layer, other in enumerate(layers) if other == weight)
                entries.append(StartWeight(candidate, weight, alike))
    return tuple(entries)


def step_size(step: int, steps: int, first: float) -> float:
    """Of step number `step` of so many, counted from 1."""
    return first * (1 - (1 - LAST_STEP) * (step - 1) / max(1, steps - 1))


def moved(state: JointState, row: int, gradient: Row, size: float) -> tuple[Row, Row, Row]:
    """A row's weights, mean and square behind the next step of Adam."""
    found = []
    for weight, mean, square, slope in zip(
        state.weights[row], state.mean[row], state.square[row], gradient, strict=True
    ):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * slope
        square = BETAS[1] * square + (1 - BETAS[1]) * slope * slope
        unbiased, root = (1 - beta ** (state.step + 1) for beta in BETAS)
        weight -= size * (mean / unbiased) / (math.sqrt(square / root) + TINY)
        found.append((min(1.0, max(0.0, weight)), mean, square))
    weights, means, squares = zip(*found, strict=True)
    return weights, means, squares


def added(summands: Iterable[Rows]) -> Rows:
    """The sum of rows of numbers, number by number."""
    total = []
    for rows in zip(*summands, strict=True):
        total.append(tuple(map(math.fsum, zip(*rows, strict=True))))
    return tuple(total)


def rounded(weights: Sequence[Row], factor: float = 1.0) -> Rows:
    """The weights that are kept, multiplied with a factor: small ones are dropped, others have two decimals."""
    kept = []
    for row in weights:
        kept.append(tuple(round(weight, DECIMALS) if weight >= LEAST else 0.0 for weight in scaled(row, factor)))
    return tuple(kept)


def scaled(row: Row, factor: float) -> list[float]:
    """A row multiplied with a factor."""
    return [number * factor for number in row]


def largest_factor(is_allowed: Callable[[float], bool], halvings: int = 7) -> float:
    """The largest factor of all weights, up to 1, at which limits hold, by bisection: to within 2**-halvings.

    is_allowed: whether they hold with weights multiplied with a factor; at 0, which is the base, they do. The factor
    that is returned has been tried, unless it is 0.
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
        """steps, first_size: how many, and by how much a weight moves at most in the first. objective: made, as the mix
        was, while the model was the base."""
        self.mix = mix
        self.objective = objective
        self.steps = steps
        self.first_size = first_size
        self.group = group

    def go_to(self, state: JointState) -> None:
        """Compose the model that a state's next step starts from; `step` leaves it so."""
        self.group.on_all_ranks(lambda: self.mix.compose(state.weights))

    def step(self, state: JointState) -> tuple[JointState, Value]:
        """The state behind one more step, with the model composed from it; the objective before that step.

        Where it fails, the model is no state's; after `go_to` the step can be made again. What one process lacks memory
        for fails in all of them.
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
        return self._whole(self.objective, self.group.on_all_ranks(lambda: self.mix.value(self.objective)))

    def gradient(self, weights: Sequence[Row], objective: Objective | None = None) -> Rows:
        """d objective / d weight of each row and candidate, 0 where none moves. weights: those of the model, which
        it keeps. objective: another than the own, as `Objective.part` gives it."""
        rows = dict(enumerate([[0.0] * len(self.mix.candidates)] * self.mix.rows))

        def update(row: int, gradient: Row) -> Row:
            rows[row] = self._sum(gradient)
            return weights[row]

        self._descend(objective or self.objective, update)
        return tuple(tuple(rows[row]) for row in range(self.mix.rows))

    def check(self, weights: Sequence[Row], gradient: Rows) -> float:
        """Move all weights a little and see whether the objective follows its gradient; the model is then composed from
        the weights. By how much it does not, as a part of the slope. Raises ConfigError if that is more than rounding:
        such an architecture can't be searched by gradient. gradient: at these weights.

        Each weight moves by another amount, in the direction in which the gradient says that the objective grows; by
        less and less, until half of it gives the same slope or rounding is all that there would be to see.
        """
        self.mix.compose(weights)
        value = self.value()
        chance = random.Random(0)
        everywhere = []
        for row in gradient:
            everywhere.append([math.copysign(chance.uniform(0.5, 1.5), slope) for slope in row])
        direction = self.mix.limited(everywhere)
        told = sum(a * b for row, way in zip(gradient, direction, strict=True) for a, b in zip(row, way, strict=True))
        dtype = self.mix.model.dtype
        amount, tolerance = _TRIED.get(dtype, _TRIED_IN_HALF)
        noise = ROUNDINGS * torch.finfo(dtype).eps * self.objective.size(value) / amount
        far, near = (self._slope(weights, direction, one) for one in (amount, amount / 2))
        while abs(far - near) > tolerance * abs(near) + noise and 2 * noise <= tolerance * abs(told):
            amount = amount / 2
            noise = 2 * noise
            far = near
            near = self._slope(weights, direction, amount / 2)
        self.mix.compose(weights)
        found = (4 * near - far) / 3  # without what grows with the square of the amount
        if not abs(found - told) <= tolerance * abs(told) + abs(far - near) + noise:
            kind = type(self.mix.model.module).__name__
            raise ConfigError(
                f"{kind}: search: joint is not supported, because the gradient says {told:.4g} where the objective "
                f"changes by {found:.4g}"
            )
        return abs(found - told) / max(abs(told), sys.float_info.min)

    def _slope(self, weights: Sequence[Row], direction: Sequence[Row], amount: float) -> float:
        """By how much the objective grows along a direction, as two models say that lie on it."""
        found = []
        for side in (amount, -amount):
            moved_rows = []
            for row, ways in zip(weights, direction, strict=True):
                moved_rows.append([weight + side * way for weight, way in zip(row, ways, strict=True)])
            self.mix.compose(moved_rows)
            found.append(self.value().objective)
        return (found[0] - found[1]) / (2 * amount)

    def _descend(self, objective: Objective, update: Update) -> Value:
        """`Mix.descend` in all processes. One that fails says so in the place of its next part of a sum."""
        try:
            value = self.mix.descend(objective, update)
        except _Elsewhere as failure:
            kind = torch.OutOfMemoryError if failure.lacks_memory else ProcessLost
            raise kind("another process of this run has failed") from None
        except Exception as error:
            self.group.sum([[0.0] * len(self.mix.candidates) + [1.0, float(not is_out_of_memory(error))]])
            raise
        self._sum([0.0] * len(self.mix.candidates))  # none has failed behind the last row
        return self._whole(objective, value)

    def _sum(self, row: Row) -> Row:
        """Over all processes. Raises _Elsewhere if one of them has failed."""
        ((*found, failed, otherwise),) = self.group.sum([[*row, 0.0, 0.0]])
        if failed:
            raise _Elsewhere(lacks_memory=not otherwise)
        if self.mix.model.may_widen and not all(map(math.isfinite, found)):
            raise self.mix.model.too_narrow("a gradient overflows")
        return found

    def _whole(self, objective: Objective, part: Value) -> Value:
        """An objective's value of all processes' parts together."""
        ((total, *values),) = self.group.sum([[part.total, *part.metrics.values()]])
        model = self.mix.model
        if model.may_widen and not all(map(math.isfinite, [total, *values])):
            raise model.too_narrow("a step overflows")
        (log_probabilities,) = self.group.sum([part.log_probabilities])
        return objective.sum_of(log_probabilities, total, dict(zip(part.metrics, values, strict=True)))


class _Elsewhere(Exception):
    """Another process has failed."""

    def __init__(self, lacks_memory: bool) -> None:
        super().__init__()
        self.lacks_memory = lacks_memory

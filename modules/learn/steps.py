"""Steps of learning: the pairs and passages of each step, Adam, and the state from which learning continues.

Knows: the order that a seed gives, the size of a step. Refuses to know: how a gradient is computed, files, printing.

Adam (Kingma and Ba 2014, https://arxiv.org/abs/1412.6980) is torch's own; its rate falls evenly to a tenth.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.config.schema import Learn
from modules.learn.gradient import LearningObjective, Loss
from modules.runtime.errors import ConfigError
from modules.runtime.oom import retry_on_oom
from modules.scoring.drift import compared_tokens
from modules.search.joint import BETAS, step_size

HALVINGS = 20  # of the learning rate, at most
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what torch calls Adam's running means of the gradient and of its square


@dataclass(frozen=True)
class LearnState:
    """All that the next step depends on, beside base and settings. Tensors are copies on the host."""

    step: int  # number of steps made
    halvings: int  # how often the learning rate was halved
    tokens: int  # in a pack: the rounding of sums depends on it
    logits: int  # bytes at a time
    tensors: Mapping[str, Tensor]  # weights of the adapter, and Adam's means of each


class Learner:
    """Makes steps on an adapter."""

    def __init__(self, objective: LearningObjective, settings: Learn, seed: int) -> None:
        self.objective = objective
        self.settings = settings
        self.seed = seed
        self.step = 0
        self.halvings = 0
        self._weights = objective.adapter.weights
        self._adam = torch.optim.Adam(self._weights.values(), betas=BETAS, foreach=False)
        for weight in self._weights.values():
            moments = {name: torch.zeros_like(weight) for name in _MOMENTS}
            self._adam.state[weight].update(step=torch.tensor(0.0), **moments)

    @property
    def state(self) -> LearnState:
        """The state after the steps made so far."""
        tensors = {}
        for name, weight in self._weights.items():
            tensors[name] = weight.detach().to("cpu", copy=True)
            for moment in _MOMENTS:
                tensors[f"{name}.{moment}"] = self._adam.state[weight][moment].to("cpu", copy=True)
        budget = self.objective.budget
        return LearnState(self.step, self.halvings, budget.tokens, budget.logits, tensors)

    @torch.no_grad()
    def go_to(self, state: LearnState) -> None:
        """Continue from a state."""
        self.step = state.step
        self.halvings = state.halvings
        self.objective.budget = replace(self.objective.budget, tokens=state.tokens, logits=state.logits)
        for name, weight in self._weights.items():
            weight.copy_(state.tensors[name])
            self._adam.state[weight]["step"].fill_(state.step)
            for moment in _MOMENTS:
                self._adam.state[weight][moment].copy_(state.tensors[f"{name}.{moment}"])

    def gradient(self) -> tuple[list[Tensor], Loss]:
        """The gradient and loss of the next step, with fewer pairs in a pack if memory is short."""
        number = self.step
        seed = self.seed
        objective = self.objective
        pairs = drawn(len(objective.pairs), self.settings.pairs, number, f"{seed} pairs")
        passages = []
        for text in objective.texts:
            tokens = text.part * self.settings.drift_tokens
            passage_count = math.ceil(tokens * len(text.passages) / compared_tokens(text.passages))
            passages.append(drawn(len(text.passages), passage_count, number, f"{seed} {text.name}"))
        return retry_on_oom(lambda: objective.gradient(pairs, passages), self._take_less_memory)

    def _take_less_memory(self) -> bool:
        budget = self.objective.budget
        self.objective.budget = budget.halved()
        return budget.tokens > 1

    def move(self, gradient: Sequence[Tensor]) -> None:
        """Make a step."""
        for weight, weight_gradient in zip(self._weights.values(), gradient, strict=True):
            weight.grad = weight_gradient
        for group in self._adam.param_groups:
            group["lr"] = self.rate
        self._adam.step()
        self._adam.zero_grad()
        self.step += 1

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return step_size(self.step + 1, self.settings.steps, self.settings.learning_rate) / 2**self.halvings

    def undo(self, state: LearnState) -> None:
        """Go back to a state and continue with half the learning rate. Raises ConfigError after too many halvings."""
        halvings = self.halvings + 1
        if halvings > HALVINGS:
            raise ConfigError(
                f"the loss is still NaN after halving learn.learning_rate {HALVINGS} times; set a lower one"
            )
        self.go_to(replace(state, halvings=halvings))


def drawn(count: int, size: int, step: int, seed: str) -> list[int]:
    """The indices of the items, `size` of `count` or all, that a step uses: each comes once before any comes again.

    step: counted from 0. seed: of the order.
    """
    if size >= count:
        return list(range(count))
    positions = range(step * size, (step + 1) * size)
    turns = {position // count for position in positions}
    orders = {turn: _shuffled(count, f"{seed} {turn}") for turn in turns}
    return [orders[position // count][position % count] for position in positions]


def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order

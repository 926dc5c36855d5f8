"""Drift under trials, on a part of the neutral text: what a search is guarded by.

Knows: tail forwards, the measure of drift, several processes. Refuses to know: limits, weights, what is decided.
"""

from collections.abc import Sequence

import torch

from modules.model import ResidentModel
from modules.runtime import Rank
from modules.scoring.budget import Budget
from modules.scoring.drift import DriftMeter
from modules.scoring.hidden_states import last_states
from modules.scoring.tails import TailForwards, Trial
from modules.scoring.tokenization import Window


class Guard:
    """Measures how far a model has gone, and would go under trials, from what it was when the guard was made.

    All results are this process's share of the mean over all windows: the shares of all processes are added up.
    """

    def __init__(self, model: ResidentModel, windows: Sequence[Window], budget: Budget, rank: Rank) -> None:
        """windows: of neutral text; each process looks at some. Raises as DriftMeter does."""
        self._model = model
        own = windows[rank.number :: rank.world_size]
        self._meter = DriftMeter(model, own, keeps_head=True) if own else None
        self._share = sum(map(len, own)) / max(1, sum(map(len, windows)))
        self._inputs = self._meter.inputs if self._meter else []
        self.tails = TailForwards(model, self._inputs, budget)

    def drift(self) -> float:
        """Of the model as it stands, by whole forwards."""
        return self._share * self._meter.measure().divergence if self._meter else 0.0

    @torch.no_grad()
    def drifts(self, trials: Sequence[Trial], by_tails: bool) -> list[float]:
        """Under each trial's weights for the present layer. by_tails: by tail forwards, where whole ones would do, too.

        One trial at a time: masks of several windows do not fit several trials' worth of them.
        """
        if self._meter is None:
            return [0.0] * len(trials)
        hidden = []
        for index, inputs in enumerate(self._inputs):
            states = []
            for trial in trials:
                if by_tails:
                    states.append(last_states(self._model, inputs(), self.tails.trying(index, [trial])))
                else:
                    with trial():
                        states.append(last_states(self._model, inputs(), {}))
            hidden.append(torch.cat(states))
        found = self._meter.measure_on(hidden, same_header=True, stack=len(trials))
        return [self._share * drift.divergence for drift in found]

    @torch.no_grad()
    def header_drifts(self, trials: Sequence[Trial]) -> list[float]:
        """Under each trial's weights for the header, by whole forwards."""
        found = []
        for trial in trials if self._meter else ():
            with trial():
                hidden = [last_states(self._model, inputs(), {}) for inputs in self._inputs]
            found += self._meter.measure_on(hidden, trial, same_header=True)
        return [self._share * drift.divergence for drift in found] if self._meter else [0.0] * len(trials)

"""What a search is watched by: drift on neutral text, phrases that it never sees, and samples. No decision depends on
any of them.

Knows: when they are measured, how long that takes. Refuses to know: how, and what is decided.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from modules.checkpoints import Candidate
from modules.config import Config
from modules.model import ResidentModel, Settings
from modules.output import Sample
from modules.output.standings import Standing
from modules.runtime import Console, counted, first_line, is_out_of_memory, within_memory, without_panics
from modules.scoring import (
    NOT_TAKEN,
    Asked,
    Budget,
    Drift,
    DriftMeter,
    SamplingParams,
    Window,
    answers,
    build_scorer,
    doubtful_phrases,
    encode_pairs,
    has_template,
    of_pairs,
)
from modules.search import scores, total
from modules.search.search import Search, signed_weights


@dataclass(frozen=True)
class Sight:
    """What was seen at one time."""

    drift: Drift | None  # None where it is not measured
    held_out: tuple[float, ...]  # joint log-probabilities of the pairs that are held out


class Watch:
    """Looks at a model from its beginning on."""

    def __init__(
        self,
        config: Config,
        console: Console,
        model: ResidentModel,
        tokenizer: Any,
        budget: Budget,
        windows: Sequence[Window],
        asked: Asked | None = None,
    ) -> None:
        """Look at the base. windows: of neutral text. asked: the samples' prompts as it reads them. Raises ConfigError
        for pairs that it can't take."""
        began = time.monotonic()
        self._console, self.pairs, self._model = console, config.held_out_pairs, model
        self._texts = ["neutral text"] * bool(windows) + ["phrases held out"] * bool(self.pairs)
        self._tell()
        self._meter, self._scorer = _meter(console, model, windows), None
        if self.pairs:
            console.warnings(doubtful_phrases(self.pairs))
            encoded = encode_pairs(tokenizer, self.pairs, model.vocabulary, model.max_tokens)
            self._scorer = build_scorer(model, encoded, budget, tails=False)
        self.start = self.now = self._look()
        self.weights, warnings = signed_weights(self.pairs, config.auto_weights, self.start.held_out)
        console.warnings(warnings)
        asked = asked or Asked()
        params = SamplingParams(asked=asked)
        self._answers = partial(answers, model, tokenizer, seed=config.random_seed, params=params)
        prompts = [prompt for prompt in config.prompts if prompt in asked.texts or not has_template(tokenizer)]
        self._base_said = self._ask("base", prompts)  # now, so that the base need not come back
        self.seconds = time.monotonic() - began

    def look(self) -> None:
        """See how things are by now."""
        began = time.monotonic()
        self._tell()
        self.now = self._look()
        self.seconds += time.monotonic() - began

    def samples(self) -> list[Sample]:
        """The prompts with what the base has answered, and what the model answers by now."""
        began = time.monotonic()
        said = self._ask("merge", list(self._base_said))
        self.seconds += time.monotonic() - began
        return [Sample(prompt=prompt, base=self._base_said[prompt], merge=merge) for prompt, merge in said.items()]

    def _ask(self, who: str, prompts: Sequence[str]) -> dict[str, str]:
        """What the model answers; nothing, and a warning, where it can't: no reason to lose a merge."""
        if prompts:
            self._console.timed(f"The {who} answers {counted(len(prompts), 'prompt')}")
        try:
            with without_panics():
                said, problems = within_memory(lambda: self._answers(prompts), lambda: False)
        except Exception as error:  # of an architecture, of a chat template, of a device
            self._console.warning(f"there are no samples: {first_line(error)}")
            return {}
        self._console.warnings(problems)
        return said

    def held_out_total(self) -> float:
        """Of the pairs that are held out, by now."""
        began = time.monotonic()
        found = total(scores(self._held_out(), self.weights))
        self.seconds += time.monotonic() - began
        return found

    def standing(self, search: Search, name: str, log_probabilities: Sequence[float], sight: Sight) -> Standing:
        """How a model does. log_probabilities: of the searched pairs."""
        held_out = total(scores(sight.held_out, self.weights)) if self.pairs else None
        return Standing(name, total(scores(log_probabilities, search.weights)), held_out, sight.drift)

    def look_at_whole(
        self, search: Search, candidate: Candidate, guard: DriftMeter | None = None, own: Settings | None = None
    ) -> tuple[list[float], Sight, float | None] | None:
        """A candidate taken whole: log-probabilities of the searched pairs, what else is seen, and its drift as the
        guard measures it; None if memory is too short. own: see `score_whole`.

        Raises BrokenWeights and CheckpointError as reading does.
        """
        began = time.monotonic()

        def score() -> tuple[list[float], Sight, float | None]:
            scorers = [search.scorer.alone(), *([self._scorer] if self._scorer else [])]
            if own and own.values:
                scorers = [scorer.singly() for scorer in scorers]
            meters = [self._meter, guard]
            (searched, *others), drifts = self._model.in_range(
                lambda: search.score_whole(candidate, scorers, meters, own), _are_numbers
            )
            seen, guarded = map(_known, drifts)
            return searched, Sight(seen, tuple(others[0]) if others else ()), guarded and guarded.divergence

        try:
            return within_memory(score, lambda: False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            self.seconds += time.monotonic() - began

    def _tell(self) -> None:
        """Say what is looked at, before it takes its time."""
        if self._texts:
            self._console.timed(f"Measuring on {' and '.join(self._texts)}")

    def _look(self) -> Sight:
        drift = None
        if self._meter:
            drift = self._model.in_range(self._meter.measure, lambda drift: drift.is_finite)
        return Sight(_known(drift), self._held_out())

    def _held_out(self) -> tuple[float, ...]:
        if self._scorer is None:
            return ()

        def score() -> list[float]:
            return within_memory(self._scorer.score, self._take_less_memory)

        found = self._model.in_range(score, lambda values: all(map(math.isfinite, values)))
        return tuple(of_pairs(found, self._scorer.encoded))

    def _take_less_memory(self) -> bool:
        return self._scorer.take_less_memory() is not None


def _are_numbers(found: tuple[list[list[float]], list[Drift | None]]) -> bool:
    """Whether scores and drifts of a model could be computed."""
    scores_of_all, drifts = found
    values = [value for some in scores_of_all for value in some]
    return all(map(math.isfinite, values)) and all(drift.is_finite for drift in drifts if drift)


def _known(drift: Drift | None) -> Drift | None:
    """A drift that is a number: no journal holds another one."""
    return drift if drift and drift.is_finite else None


def _meter(console: Console, model: ResidentModel, windows: Sequence[Window]) -> DriftMeter | None:
    """What measures drift; None where that is not wanted, or can't be done."""
    if not windows:
        return None
    try:
        return DriftMeter(model, windows)
    except NOT_TAKEN as error:
        console.warning(f"drift can't be measured on this model: {first_line(error)}")
        return None

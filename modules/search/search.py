"""The search: every layer of a candidate, then its header; yields one Decision at a time.

Knows: the order of trials, when one is kept. Refuses to know: printing, logs, how a forward is made.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.conversion import Tensors
from modules.config.phrase_lists import Pair
from modules.config.schema import Config
from modules.merging.methods import ratios_for
from modules.model.arithmetic import FALLBACK
from modules.model.base_model import ResidentModel
from modules.model.devices import side_streams
from modules.model.embeddings import HeaderSkipped, aligned_header
from modules.model.part import Part
from modules.runtime.distributed import ALONE, Group
from modules.runtime.errors import BrokenWeights, ConfigError, TooNarrow
from modules.runtime.oom import retry_on_oom
from modules.runtime.text import pluralize
from modules.scoring.drift import DriftMeter
from modules.scoring.layout import check_numbers
from modules.scoring.scorer import Scorer, by_pair, of_pairs, other_ways, spreads
from modules.scoring.tails import TailForwards, Trial
from modules.search.decision import Decision, Result
from modules.search.prefetch import ReadAhead, layer_jobs
from modules.search.strategies import Limits, State, choose, probability, scores, total, total_rounding
from modules.search.trial import merged, read_part, trying

# Below this a probability has lost digits to underflow, and its reciprocal is no sensible weight.
SMALLEST_PROBABILITY = 2.2250738585072014e-308
ScoreTrials = Callable[[Sequence[Trial]], list[list[float]]]


class WeighedMetric(Protocol):
    """A metric that trials are judged by, lower is better.

    Each process measures its share of the text and gives its part of a value; the sum over all processes is the value.
    """

    name: str
    limit: float  # a trial with more is not taken; math.inf: none
    tails: TailForwards
    # The divergence from the base on all the text: a gradient is made of it, and a candidate on its own measured by it.
    meter: DriftMeter | None

    def weight(self, base_scores: Sequence[float]) -> float:
        """What 1 of the metric adds to the objective. base_scores: the base's, whose total the weight may refer to."""

    def value(self) -> float:
        """The metric of the model as it is."""

    def under_trials(self, trials: Sequence[Trial], by_tails: bool) -> list[float]:
        """The metric under each trial's weights for the present layer, by tail forwards or by whole ones."""

    def under_header_trials(self, trials: Sequence[Trial]) -> list[float]:
        """The metric under each trial's weights for the header."""


class Search:
    """A model that takes over merges that improve its scores.

    `log_probabilities` and `metrics` (those that are weighed or limited) describe its present state.
    """

    def __init__(
        self,
        model: ResidentModel,
        scorer: Scorer,
        config: Config,
        tokenizer: Any,
        group: Group = ALONE,
        weighed: Sequence[WeighedMetric] = (),
    ) -> None:
        """Score the base.

        tokenizer: the model's; candidates' vocabularies are matched with it. group: processes that search together;
        each has the model and a share of the scorer's packs. weighed: metrics that trials are judged by.
        Raises ConfigError if the base's scores are not finite.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.repeated = 0  # decisions of all candidates that were carried out again
        self.inexact = 0  # values of all merges so far that the compute type cannot represent
        self._merge_space: Tensors = {}  # tensors that merges are made in, for one part
        self.scorer = scorer
        self.config = config
        self.group = group
        self.weighed = weighed
        self.streams = side_streams(model.devices)  # for the tensors of candidates
        self._reading: ReadAhead[int | None, Any] | None = None  # of the present candidate
        self.reads_ahead = True
        self.layers = config.layers_in(len(model.layers))  # numbers of the layers that are searched
        self.notes: list[str] = []  # remedies for a lack of memory or of range that are not yet printed
        self.outgrown: str | None = None  # the installed merge that does not fit the compute type
        self.log_probabilities: list[float] = []
        self.metrics: dict[str, float] = {}
        self.measure(scorer.verified_scores)
        check_numbers(model, [items[0] for items in by_pair(scorer.encoded, scorer.encoded)], self.log_probabilities)
        self.weights, self.warnings = signed_weights(config.pairs, config.auto_weights, self.log_probabilities)
        self.base_scores = scores(self.log_probabilities, self.weights)
        self.rounding = self._rounding() if model.arithmetic.is_half else []

    @property
    def total(self) -> float:
        """The total score of the present state."""
        return total(self.state.scores)

    @property
    def state(self) -> State:
        """The scores and metrics of the model as it is."""
        return State(scores(self.log_probabilities, self.weights), self.metrics)

    @property
    def limits(self) -> Limits:
        """What a trial must be to be accepted."""
        config = self.config
        rounding = self.rounding
        weights = {metric.name: metric.weight(self.base_scores) for metric in self.weighed}
        auto_gain = 2.0 * total_rounding(self.weights, rounding)
        return Limits(
            threshold=config.strategy_threshold,
            min_gain=auto_gain if config.min_gain == "auto" else config.min_gain,
            rounding=[abs(weight) * spread for weight, spread in zip(self.weights, rounding, strict=bool(rounding))],
            weights={name: weight for name, weight in weights.items() if weight},
            maxima={metric.name: metric.limit for metric in self.weighed if metric.limit < math.inf},
        )

    def _rounding(self) -> list[float]:
        """How far rounding alone moves each pair's probability. The base is scored in equivalent ways to find out."""
        probabilities = [list(map(probability, self.log_probabilities))]
        for score_again in other_ways(self.scorer):
            (log_probabilities,) = self._scored(lambda score_again=score_again: [score_again()])
            probabilities.append(list(map(probability, of_pairs(log_probabilities, self.scorer.encoded))))
        return spreads(probabilities)

    def candidate(self, candidate: Candidate, decisions: Sequence[Decision] = ()) -> Generator[Decision, None, None]:
        """Search the layers of a candidate and, if so configured, its header.

        decisions: the first ones, taken by an earlier run; they are carried out without scoring, and not yielded.
        """
        to_repeat = deque(decisions)
        method_count = len(self.config.merge_method)
        parts = {index: self.model.layer(index) for index in self.layers}
        tries_header = self.config.merge_headers and len(to_repeat) <= method_count * len(parts)
        parts_to_read = dict(list(parts.items())[len(to_repeat) // method_count :])
        jobs: dict[int | None, Callable[[], Any]] = {**layer_jobs(candidate, parts_to_read, self.streams)}
        if tries_header:
            header = self.model.header().still()
            jobs[None] = partial(aligned_header, self.model, self.tokenizer, candidate, header)
        with ReadAhead(jobs, self.streams, self.reads_ahead) as self._reading:
            yield from self._layers(candidate, parts, to_repeat)
            if to_repeat:
                self._repeat_scored(candidate, to_repeat)
            elif tries_header:
                yield self._header(candidate)
                self._check_range()
        self.measure()

    def repeat(self, candidate: Candidate, decisions: Sequence[Decision]) -> None:
        """Carry out decisions that were taken on a candidate, without any forward.

        Raises ConfigError if these models can't have led to the decisions, CheckpointError if a file can't be read.
        """
        try:
            for decision in decisions:
                if decision.ratio is not None:
                    part, candidate_tensors = self.in_memory(partial(self._read, candidate, decision.layer))
                    self._install(part, candidate_tensors, decision.method, decision.ratio)
                self.repeated += 1
        except (BrokenWeights, HeaderSkipped, IndexError) as error:
            raise ConfigError(f"the merges of {candidate.name} can't be repeated: {error}") from None

    def _read(self, candidate: Candidate, layer: int | None) -> tuple[Part, Tensors]:
        """A layer of the model, or its header, and the candidate's tensors for it."""
        if layer is None:
            candidate_tensors, _ = aligned_header(self.model, self.tokenizer, candidate)
            return self.model.header(), candidate_tensors
        part = self.model.layer(layer)
        return part, read_part(candidate, part)

    def _install(self, part: Part, candidate_tensors: Tensors, method: str, ratio: float) -> None:
        """Merge for good. Whatever takes memory, and may be repeated, is done before the model changes."""
        part.install(self.in_memory(partial(self._merged, part, candidate_tensors, method, ratio)))
        if part.tensors.keys() == self.model.header().tensors.keys():
            self.model.has_base_header = False

    def _merged(self, part: Part, candidate_tensors: Tensors, method: str, ratio: float) -> Tensors:
        """The part's tensors after the merge, as they are to be installed."""
        inexact: list[Tensor] = []
        merged_tensors = merged(part, method, candidate_tensors, ratio, self._space_for(part), inexact)
        part.changes_in(merged_tensors)  # restores what is equal, down to the sign of a zero
        self.inexact += sum(int(count) for count in inexact)
        return merged_tensors

    def _space_for(self, part: Part) -> Tensors:
        """The tensors that the part is merged in."""
        self._merge_space = part.fitting(self._merge_space)  # an unsuitable space is freed before a new one is made
        self._merge_space = self._merge_space or part.space()
        return self._merge_space

    def measure(self, log_probabilities: list[float] | None = None) -> None:
        """Score by whole forwards: a candidate and a phrase table start from what a reader of the output would measure.

        log_probabilities: the result, where it is known. Raises TooNarrow if merges don't fit the compute type and
        another arithmetic may be taken.
        """
        if log_probabilities is None:
            (log_probabilities,) = self._scored(lambda: [self.scorer.score()])
        if self.model.may_widen and not all(map(math.isfinite, log_probabilities)):
            raise self.model.too_narrow("the model overflows")
        self.log_probabilities = of_pairs(log_probabilities, self.scorer.encoded)
        self.measure_weighed()

    def measure_weighed(self) -> None:
        """Measure the weighed metrics alone."""
        if self.weighed:
            (values,) = self._scored(lambda: [[metric.value() for metric in self.weighed]])
            self.metrics = self._by_name(values)

    def _by_name(self, values: Sequence[float]) -> dict[str, float]:
        """The weighed metrics' values by their names. values: in the order of `weighed`."""
        return {metric.name: value for metric, value in zip(self.weighed, values, strict=True)}

    def _repeat_scored(self, candidate: Candidate, decisions: Sequence[Decision]) -> None:
        """Carry decisions out; the state takes the scores that were noted of the last one."""
        self.repeat(candidate, decisions)
        self.log_probabilities = list(decisions[-1].log_probabilities)
        self.metrics = dict(decisions[-1].metrics)

    def _layers(
        self, candidate: Candidate, parts: Mapping[int, Part], to_repeat: deque[Decision]
    ) -> Iterator[Decision]:
        self._restart()
        methods = self.config.merge_method
        for index, part in parts.items():
            decisions = [to_repeat.popleft() for _ in methods if to_repeat]
            if decisions:
                self._repeat_scored(candidate, decisions)
            if len(decisions) < len(methods):
                yield from self._layer(candidate, index, part, methods[len(decisions) :])

    def _layer(self, candidate: Candidate, index: int, part: Part, methods: Sequence[str]) -> Iterator[Decision]:
        """Try a layer under some methods."""
        self.scorer.at_layer(index)
        for metric in self.weighed:
            metric.tails.at_layer(index)
        try:
            candidate_tensors = self.in_memory(partial(self._reading.take, index))
            warning = None
        except BrokenWeights as error:
            candidate_tensors = None
            warning = f"{error}; layer {index} is skipped"
        for method in methods:
            total_before = self.total
            ratio = None
            if candidate_tensors is not None:
                ratios = ratios_for(method, self.config.merge_ratios)
                ratio = self._decide(part, candidate_tensors, method, ratios, self._score_layer)
            yield Decision(candidate.name, index, method, ratio, total_before, *self._present(), warning)
            self._check_range()

    def _present(self) -> tuple[float, tuple[float, ...], dict[str, float]]:
        """The fields of a decision that describe the present state: total, log-probabilities, metrics."""
        return self.total, tuple(self.log_probabilities), self.metrics

    def _restart(self) -> None:
        """Begin with the first layer again."""
        self.scorer.restart()
        for metric in self.weighed:
            metric.tails.restart()

    def _header(self, candidate: Candidate) -> Decision:
        """The input embedding and the output head together, always by lerp."""
        part = self.model.header()
        total_before = self.total
        self._restart()  # frees hidden states: whole forwards need none
        self._merge_space = {}  # no layer is merged any more
        ratio = None
        warning = None
        note = None
        try:
            candidate_tensors, note = self.in_memory(partial(self._reading.take, None))
        except (BrokenWeights, HeaderSkipped) as error:
            warning = f"{error}; embedding and LM head are not merged"
        else:
            ratio = self._decide(part, candidate_tensors, "lerp", self.config.merge_ratios, self._score_whole)
        return Decision(candidate.name, None, "lerp", ratio, total_before, *self._present(), warning, note)

    def _decide(
        self, part: Part, candidate_tensors: Tensors, method: str, ratios: Sequence[float], score_trials: ScoreTrials
    ) -> float | None:
        """Try all ratios on the unchanged part, install the best and return it; None if none is accepted."""
        out = self.in_memory(partial(self._space_for, part))
        trials = [partial(trying, part, method, candidate_tensors, ratio, out) for ratio in ratios]
        rows = self._scored(lambda: score_trials(trials))
        overflowing = self._score_wider(rows, trials)
        results = []
        states = []
        for row in rows:
            count = len(row) - len(self.weighed)
            log_probabilities = of_pairs(row[:count], self.scorer.encoded)
            metrics = self._by_name(row[count:])
            results.append((log_probabilities, metrics))
            states.append(State(scores(log_probabilities, self.weights), metrics))
        best = choose(self.config.strategy, self.state, states, self.limits)
        if best is None:
            return None
        self._install(part, candidate_tensors, method, ratios[best])
        self.log_probabilities, self.metrics = results[best]
        if best in overflowing:
            self.outgrown = f"the accepted ratio {ratios[best]:g} overflows {self.model.arithmetic.name}"
        return ratios[best]

    def _score_wider(self, rows: list[list[float]], trials: Sequence[Trial]) -> list[int]:
        """Score trials whose scores are NaN or infinite again in FALLBACK, if that may be taken; returns their numbers.

        rows: every trial's scores; changed in place. Whole forwards are made, as cached hidden states were computed in
        the other arithmetic.
        """
        if not self.model.may_widen:
            return []
        overflowing = [number for number, row in enumerate(rows) if not all(map(math.isfinite, row))]
        if overflowing:
            overflowing_trials = [trials[number] for number in overflowing]
            with self.model.computing_in(FALLBACK):
                wider_rows = self._scored(lambda: self._score_whole(overflowing_trials))
            for number, row in zip(overflowing, wider_rows, strict=True):
                if not all(map(math.isfinite, row)):  # some products are made in the weights' type anyway
                    raise self.model.too_narrow("a trial overflows")
                rows[number] = row
            name = self.model.arithmetic.name
            share = f"{len(overflowing)} of {pluralize(len(trials), 'ratio')} overflow {name}"
            self.notes.append(f"{share}; scored in {FALLBACK.name} instead")
        return overflowing

    def _check_range(self) -> None:
        """Raise TooNarrow if a merge was installed that does not fit the compute type: later ones would not either.

        To be called once its decision is noted.
        """
        if self.outgrown:
            raise TooNarrow(f"{self.model.checkpoint.name}: {self.outgrown}")

    def _scored(self, work: Callable[[], list[list[float]]]) -> list[list[float]]:
        """Rows of scores, summed over all processes; a phrase has a score for each of its variants."""
        return self.group.sum(self.in_memory(work))

    def in_memory(self, work: Callable[[], Result]) -> Result:
        """Do work that needs memory in all processes; where one lacks it, repeat the work with less memory.

        Processes that had succeeded repeat it too, so work must have the same effect done once or several times.
        Raises torch.OutOfMemoryError if not even one pair and one ratio fit.
        """
        return retry_on_oom(lambda: self.group.on_all_ranks(work), self.take_less_memory)

    def take_less_memory(self) -> bool:
        """Score with smaller packs or fewer ratios at a time or, if that is impossible, stop reading ahead.

        Whether any of these was left to do.
        """
        remedy = self.group.on_all_ranks(self.scorer.take_less_memory)
        for metric in self.weighed:
            metric.tails.let_go()
        if remedy is None and self.reads_ahead:
            self.reads_ahead = False
            remedy = "continuing without reading layers ahead"
            if self._reading:
                self._reading.stop()
        if remedy:
            self.notes.append(f"Out of memory: {remedy}")
        return remedy is not None

    def _score_layer(self, trials: Sequence[Trial]) -> list[list[float]]:
        """A row for each trial for the present layer: log-probabilities, then the weighed metrics."""
        columns = [metric.under_trials(trials, self.scorer.has_tails) for metric in self.weighed]
        rows = self.scorer.score_trials(trials)
        return [[*row, *values] for row, *values in zip(rows, *columns, strict=True)]

    def _score_whole(self, trials: Sequence[Trial]) -> list[list[float]]:
        """The same rows by whole forwards: an embedding changes the input of every layer."""
        columns = [metric.under_header_trials(trials) for metric in self.weighed]
        rows = []
        for number, trial in enumerate(trials):
            with trial():
                rows.append([*self.scorer.score(), *(values[number] for values in columns)])
        return rows


def forwards_of(config: Config, layers: int, layer: int | None, method: str) -> int:
    """How many forwards of one layer a decision takes in a model of so many layers.

    Each ratio runs the layers from the decision's own on; for the header (layer None) it runs all.
    """
    return len(ratios_for(method, config.merge_ratios)) * (layers - (layer or 0))


def forwards_of_candidate(config: Config, layers: int) -> int:
    """How many forwards of one layer all decisions on one candidate take."""
    searched_layers = config.layers_in(layers)
    methods = config.merge_method
    forwards = sum(forwards_of(config, layers, layer, method) for layer in searched_layers for method in methods)
    return forwards + (forwards_of(config, layers, None, "lerp") if config.merge_headers else 0)


def signed_weights(
    pairs: Sequence[Pair], auto: bool, log_probabilities: Sequence[float]
) -> tuple[list[float], list[str]]:
    """Weights of all pairs, good phrases negative, and warnings.

    auto: 1 / the base's probability, so that every pair starts at 1 (or -1); a pair whose probability underflows keeps
    its configured weight.
    """
    weights = []
    warnings = []
    for pair, log_probability in zip(pairs, log_probabilities, strict=True):
        weight = pair.weight
        if auto and probability(log_probability) < SMALLEST_PROBABILITY:
            warnings.append(f"{pair} is too improbable for auto_weights; it keeps its weight {weight:g}")
        elif auto:
            weight = 1.0 / probability(log_probability)
        weights.append(-weight if pair.kind == "GOOD" else weight)
    return weights, warnings

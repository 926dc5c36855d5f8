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
    """A metric that trials are judged by, lower is better. Values are this process's parts: all processes' are summed.

    One process measures some of its text, and the parts of all add up to the value.
    """

    name: str
    limit: float  # a trial with more is not taken; math.inf: none
    tails: TailForwards
    # What a gradient is made of, and a candidate on its own is measured by: a divergence from the base on all the text.
    meter: DriftMeter | None

    def weight(self, base_scores: Sequence[float]) -> float:
        """What 1 of it adds to the total, which is that of the base's scores to begin with."""

    def value(self) -> float:
        """Of the model as it is."""

    def under_trials(self, trials: Sequence[Trial], by_tails: bool) -> list[float]:
        """Under each trial's weights for the present layer, by tail forwards or by whole ones."""

    def under_header_trials(self, trials: Sequence[Trial]) -> list[float]:
        """Under each trial's weights for the header."""


class Search:
    """A model that takes over what improves its scores.

    `log_probabilities` and `metrics`, those that are weighed or limited, are of its present state.
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

        tokenizer: the model's, with which candidates' vocabularies are matched. group: processes that search together;
        each has the model and a share of the scorer's packs. weighed: metrics that trials are judged by.
        Raises ConfigError if its scores are not finite.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.repeated = 0  # decisions that were carried out again, of all candidates
        self.inexact = 0  # numbers of all merges so far that the type that is computed in does not have
        self._space: Tensors = {}  # where merges are made, one part's worth
        self.scorer = scorer
        self.config = config
        self.group = group
        self.weighed = weighed
        self.streams = side_streams(model.devices)  # on which candidates arrive
        self._reading: ReadAhead[int | None, Any] | None = None  # of the present candidate
        self.reads_ahead = True
        self.layers = config.layers_in(len(model.layers))  # that are searched
        self.notes: list[str] = []  # what was done about a lack of memory or of range, and not yet told
        self.outgrown: str | None = None  # what the model holds that does not fit what is computed in
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
        """What the model scores as it is."""
        return State(scores(self.log_probabilities, self.weights), self.metrics)

    @property
    def limits(self) -> Limits:
        """What a trial must be to be accepted."""
        config = self.config
        rounding = self.rounding
        weights = {metric.name: metric.weight(self.base_scores) for metric in self.weighed}
        automatic = 2.0 * total_rounding(self.weights, rounding)
        return Limits(
            threshold=config.strategy_threshold,
            min_gain=automatic if config.min_gain == "auto" else config.min_gain,
            rounding=[abs(weight) * least for weight, least in zip(self.weights, rounding, strict=bool(rounding))],
            weights={name: weight for name, weight in weights.items() if weight},
            maxima={metric.name: metric.limit for metric in self.weighed if metric.limit < math.inf},
        )

    def _rounding(self) -> list[float]:
        """How far rounding alone moves each pair's probability: of the base, scored in equivalent ways."""
        found = [list(map(probability, self.log_probabilities))]
        for way in other_ways(self.scorer):
            (again,) = self._scored(lambda way=way: [way()])
            found.append(list(map(probability, of_pairs(again, self.scorer.encoded))))
        return spreads(found)

    def candidate(self, candidate: Candidate, done: Sequence[Decision] = ()) -> Generator[Decision, None, None]:
        """Search the layers of a candidate and, if so configured, its header.

        done: the first decisions, taken by an earlier run; they are carried out without scoring, and not yielded.
        """
        past = deque(done)
        count = len(self.config.merge_method)
        parts = {index: self.model.layer(index) for index in self.layers}
        tries_header = self.config.merge_headers and len(past) <= count * len(parts)
        wanted = dict(list(parts.items())[len(past) // count :])
        jobs: dict[int | None, Callable[[], Any]] = {**layer_jobs(candidate, wanted, self.streams)}
        if tries_header:
            still = self.model.header().still()
            jobs[None] = partial(aligned_header, self.model, self.tokenizer, candidate, still)
        with ReadAhead(jobs, self.streams, self.reads_ahead) as self._reading:
            yield from self._layers(candidate, parts, past)
            if past:
                self._repeat_scored(candidate, past)
            elif tries_header:
                yield self._header(candidate)
                self._check_range()
        self.measure()

    def repeat(self, candidate: Candidate, done: Sequence[Decision]) -> None:
        """Carry out decisions that were taken on a candidate, without any forward.

        Raises ConfigError if the models are not such that they could have been taken, CheckpointError if a file can't
        be read.
        """
        try:
            for decision in done:
                if decision.ratio is not None:
                    part, theirs = self.in_memory(partial(self._read, candidate, decision.layer))
                    self._install(part, theirs, decision.method, decision.ratio)
                self.repeated += 1
        except (BrokenWeights, HeaderSkipped, IndexError) as error:
            raise ConfigError(f"the merges of {candidate.name} can't be repeated: {error}") from None

    def _read(self, candidate: Candidate, layer: int | None) -> tuple[Part, Tensors]:
        """A layer of the model, or its header, and the candidate's tensors for it."""
        if layer is None:
            theirs, _ = aligned_header(self.model, self.tokenizer, candidate)
            return self.model.header(), theirs
        part = self.model.layer(layer)
        return part, read_part(candidate, part)

    def _install(self, part: Part, theirs: Tensors, method: str, ratio: float) -> None:
        """Merge for good. All that takes memory, and may be done again, comes before anything changes."""
        part.install(self.in_memory(partial(self._merged, part, theirs, method, ratio)))
        if part.tensors.keys() == self.model.header().tensors.keys():
            self.model.has_base_header = False

    def _merged(self, part: Part, theirs: Tensors, method: str, ratio: float) -> Tensors:
        """What a merge makes of the part's tensors for good."""
        inexact: list[Tensor] = []
        found = merged(part, method, theirs, ratio, self._room(part), inexact)
        part.changes_in(found)  # by which what is equal stays as it is, the sign of a zero included
        self.inexact += sum(int(count) for count in inexact)
        return found

    def _room(self, part: Part) -> Tensors:
        """Where the part is merged."""
        self._space = part.fitting(self._space)  # one that does not serve goes before there is a new one
        self._space = self._space or part.space()
        return self._space

    def measure(self, found: list[float] | None = None) -> None:
        """Score by whole forwards: a candidate and a phrase table start from what a reader of the output would find.

        found: what that gives, where it is known. Raises TooNarrow for merges that don't fit what is computed in, if
        another arithmetic may be taken.
        """
        if found is None:
            (found,) = self._scored(lambda: [self.scorer.score()])
        if self.model.may_widen and not all(map(math.isfinite, found)):
            raise self.model.too_narrow("the model overflows")
        self.log_probabilities = of_pairs(found, self.scorer.encoded)
        self.measure_weighed()

    def measure_weighed(self) -> None:
        """The same for the metrics that are weighed, alone."""
        if self.weighed:
            (values,) = self._scored(lambda: [[metric.value() for metric in self.weighed]])
            self.metrics = self._by_name(values)

    def _by_name(self, values: Sequence[float]) -> dict[str, float]:
        """Values of the metrics that are weighed."""
        return {metric.name: value for metric, value in zip(self.weighed, values, strict=True)}

    def _repeat_scored(self, candidate: Candidate, done: Sequence[Decision]) -> None:
        """Carry decisions out; the state's scores are those that were noted of the last one."""
        self.repeat(candidate, done)
        self.log_probabilities = list(done[-1].log_probabilities)
        self.metrics = dict(done[-1].metrics)

    def _layers(self, candidate: Candidate, parts: Mapping[int, Part], past: deque[Decision]) -> Iterator[Decision]:
        self._restart()
        methods = self.config.merge_method
        for index, part in parts.items():
            done = [past.popleft() for _ in methods if past]
            if done:
                self._repeat_scored(candidate, done)
            if len(done) < len(methods):
                yield from self._layer(candidate, index, part, methods[len(done) :])

    def _layer(self, candidate: Candidate, index: int, part: Part, methods: Sequence[str]) -> Iterator[Decision]:
        """Try a layer under some methods."""
        self.scorer.at_layer(index)
        for metric in self.weighed:
            metric.tails.at_layer(index)
        try:
            theirs = self.in_memory(partial(self._reading.take, index))
            warning = None
        except BrokenWeights as error:
            theirs = None
            warning = f"{error}; layer {index} is skipped"
        for method in methods:
            before = self.total
            ratio = None
            if theirs is not None:
                ratios = ratios_for(method, self.config.merge_ratios)
                ratio = self._decide(part, theirs, method, ratios, self._score_layer)
            yield Decision(candidate.name, index, method, ratio, before, *self._present(), warning)
            self._check_range()

    def _present(self) -> tuple[float, tuple[float, ...], dict[str, float]]:
        """What a decision notes of the state that it has led to."""
        return self.total, tuple(self.log_probabilities), self.metrics

    def _restart(self) -> None:
        """Begin with the first layer again."""
        self.scorer.restart()
        for metric in self.weighed:
            metric.tails.restart()

    def _header(self, candidate: Candidate) -> Decision:
        """The input embedding and the output head together, always by lerp."""
        part = self.model.header()
        before = self.total
        self._restart()  # whole forwards need no hidden states,
        self._space = {}  # and no layer is merged any more
        ratio = None
        warning = None
        note = None
        try:
            theirs, note = self.in_memory(partial(self._reading.take, None))
        except (BrokenWeights, HeaderSkipped) as error:
            warning = f"{error}; embedding and LM head are not merged"
        else:
            ratio = self._decide(part, theirs, "lerp", self.config.merge_ratios, self._score_whole)
        return Decision(candidate.name, None, "lerp", ratio, before, *self._present(), warning, note)

    def _decide(
        self, part: Part, theirs: Tensors, method: str, ratios: Sequence[float], score_trials: ScoreTrials
    ) -> float | None:
        """Try all ratios on the unchanged part, install the best and return it; None if none is accepted."""
        out = self.in_memory(partial(self._room, part))
        tries = [partial(trying, part, method, theirs, ratio, out) for ratio in ratios]
        found = self._scored(lambda: score_trials(tries))
        overflowing = self._score_wider(found, tries)
        trials = []
        tried = []
        for row in found:
            count = len(row) - len(self.weighed)
            log_probabilities = of_pairs(row[:count], self.scorer.encoded)
            metrics = self._by_name(row[count:])
            trials.append((log_probabilities, metrics))
            tried.append(State(scores(log_probabilities, self.weights), metrics))
        best = choose(self.config.strategy, self.state, tried, self.limits)
        if best is None:
            return None
        self._install(part, theirs, method, ratios[best])
        self.log_probabilities, self.metrics = trials[best]
        if best in overflowing:
            self.outgrown = f"the accepted ratio {ratios[best]:g} overflows {self.model.arithmetic.name}"
        return ratios[best]

    def _score_wider(self, found: list[list[float]], trials: Sequence[Trial]) -> list[int]:
        """Score trials whose scores are no numbers again in FALLBACK, if it may be taken, by whole forwards; their
        numbers. What is cached was computed in the other arithmetic."""
        if not self.model.may_widen:
            return []
        overflowing = [number for number, row in enumerate(found) if not all(map(math.isfinite, row))]
        if overflowing:
            again = [trials[number] for number in overflowing]
            with self.model.computing_in(FALLBACK):
                wider = self._scored(lambda: self._score_whole(again))
            for number, row in zip(overflowing, wider, strict=True):
                if not all(map(math.isfinite, row)):  # some products know no other type than the weights'
                    raise self.model.too_narrow("a trial overflows")
                found[number] = row
            name = self.model.arithmetic.name
            what = f"{len(overflowing)} of {pluralize(len(trials), 'ratio')} overflow {name}"
            self.notes.append(f"{what}; scored in {FALLBACK.name} instead")
        return overflowing

    def _check_range(self) -> None:
        """Raise TooNarrow once a merge is noted that does not fit what is computed in: all that comes would not."""
        if self.outgrown:
            raise TooNarrow(f"{self.model.checkpoint.name}: {self.outgrown}")

    def _scored(self, work: Callable[[], list[list[float]]]) -> list[list[float]]:
        """What scoring gives, of all processes together, phrases by their variants."""
        return self.group.sum(self.in_memory(work))

    def in_memory(self, work: Callable[[], Result]) -> Result:
        """Do work that needs memory, in all processes, again and again with less of it where it is not there.

        It is begun again in those too where it had succeeded, so that what it does once, and twice, must be the same.
        Raises torch.OutOfMemoryError if not even one pair and one ratio fit.
        """
        return retry_on_oom(lambda: self.group.on_all_ranks(work), self.take_less_memory)

    def take_less_memory(self) -> bool:
        """Score with smaller packs or fewer ratios at a time or, where that can't be, do without reading ahead."""
        done = self.group.on_all_ranks(self.scorer.take_less_memory)
        for metric in self.weighed:
            metric.tails.let_go()
        if done is None and self.reads_ahead:
            self.reads_ahead = False
            done = "continuing without reading layers ahead"
            if self._reading:
                self._reading.stop()
        if done:
            self.notes.append(f"Out of memory: {done}")
        return done is not None

    def _score_layer(self, trials: Sequence[Trial]) -> list[list[float]]:
        """Log-probabilities and, behind them, each weighed metric under each trial for the present layer."""
        columns = [metric.under_trials(trials, self.scorer.has_tails) for metric in self.weighed]
        rows = self.scorer.score_trials(trials)
        return [[*row, *values] for row, *values in zip(rows, *columns, strict=True)]

    def _score_whole(self, trials: Sequence[Trial]) -> list[list[float]]:
        """The same by whole forwards: an embedding changes what every layer sees."""
        columns = [metric.under_header_trials(trials) for metric in self.weighed]
        rows = []
        for number, trial in enumerate(trials):
            with trial():
                rows.append([*self.scorer.score(), *(values[number] for values in columns)])
        return rows


def forwards_of(config: Config, layers: int, layer: int | None, method: str) -> int:
    """Forwards of one layer that a decision takes in a model of so many layers: those from its layer on; of the header,
    which is None, all."""
    return len(ratios_for(method, config.merge_ratios)) * (layers - (layer or 0))


def forwards_of_candidate(config: Config, layers: int) -> int:
    """The same of all decisions on one candidate."""
    searched = config.layers_in(layers)
    methods = config.merge_method
    forwards = sum(forwards_of(config, layers, layer, method) for layer in searched for method in methods)
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

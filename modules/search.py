"""The search: every layer of a candidate, then its header; yields one Decision at a time.

Knows: the order of trials, when one is kept. Refuses to know: printing, logs, how a forward is made.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from modules.candidates import Candidate
from modules.checkpoints import load_tokenizer
from modules.config import Config, ConfigError, Pair
from modules.layouts import Tensors
from modules.merging import RECORDED_SHARE, align_rows, match_rows, ratios_for
from modules.models import BrokenWeights, Part, ResidentModel
from modules.probability import Scorer, Trial
from modules.strategies import choose, probability, scores, total

MIN_SHARED_TOKENS = 0.9  # of the base's vocabulary, for the headers to be merged at all

# Below this a probability has lost digits to underflow, and its reciprocal is no sensible weight.
SMALLEST_PROBABILITY = 2.2250738585072014e-308

ScoreTrials = Callable[[Sequence[Trial]], list[list[float]]]


@dataclass(frozen=True)
class Decision:
    """What became of one layer (or the header) under one method, after all its ratios were tried."""

    model: str  # the candidate's name
    layer: int | None  # None is the header
    method: str
    ratio: float | None  # the ratio that won; None if the base's tensors were retained
    before: float  # total score
    after: float
    warning: str | None = None  # why nothing could be tried
    note: str | None = None  # how the header was matched, if its rows are not simply the base's

    @property
    def share(self) -> float:
        """What an accepted merge adds to the composition: the ratio, or the method's own fixed share."""
        return 0.0 if self.ratio is None else RECORDED_SHARE.get(self.method, self.ratio)


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens that have a row in its header, and the number of rows: some may have no token."""

    tokens: Mapping[str, int]
    rows: int


@dataclass(frozen=True)
class Alignment:
    """Two vocabularies, side by side."""

    base: Vocabulary
    candidate: Vocabulary
    roles: Mapping[str, str]  # BOS and EOS of the base -> those of the candidate
    matches: Mapping[int, int]  # base row -> candidate row

    @property
    def is_plain(self) -> bool:
        """Whether the vocabularies are the same, row for row."""
        return self.base == self.candidate

    @property
    def known(self) -> int:
        """How many rows of the base have a token."""
        return len(set(self.base.tokens.values()))

    def describe(self, candidate: str) -> str:
        """How many rows were matched, how, and what becomes of the others. candidate: its name."""
        by_role = [
            f"{token} with {part}"
            for token, part in self.roles.items()
            if token in self.base.tokens and token not in self.candidate.tokens and part in self.candidate.tokens
        ]
        moved = sum(row != other for row, other in self.matches.items())
        lacking, nameless = self.known - len(self.matches), self.base.rows - self.known
        added = len(set(self.candidate.tokens.values()) - set(self.matches.values()))
        text = f"{len(self.matches)} of {self.base.rows} rows matched by token"
        text += f", BOS or EOS by role ({', '.join(by_role)})" if by_role else ""
        text += f", {moved} of them at another place" if moved else ""
        kept = [f"{lacking} ({candidate} has no row for their tokens)"] if lacking else []
        kept += [f"{nameless} (they have no token)"] if nameless else []
        text += f"; the base keeps its own in {' and in '.join(kept)}" if kept else ""
        if added or self.candidate.rows != self.base.rows:
            text += f"; {candidate} has {self.candidate.rows} rows"
            text += f", {added} of them for tokens that the base lacks" if added else ""
        return text


class HeaderSkipped(Exception):
    """A candidate's header can't be matched with the base's; the message says why."""


class Search:
    """A model that takes over what improves its scores. `log_probabilities` are those of its present state."""

    def __init__(self, model: ResidentModel, scorer: Scorer, config: Config, tokenizer: Any) -> None:
        """Score the base; its tokenizer is the one that candidates' vocabularies are matched with.

        Raises ConfigError if the base's scores are not finite.
        """
        self.model, self.scorer, self.config, self.tokenizer = model, scorer, config, tokenizer
        self._space: Tensors | None = None  # where merges are made, one layer's worth
        self.log_probabilities = scorer.score()
        if not all(math.isfinite(value) for value in self.log_probabilities):
            raise ConfigError("the base model's scores are not finite; try another dtype (bfloat16 or float32)")
        self.weights, self.warnings = signed_weights(config.pairs, config.auto_weights, self.log_probabilities)

    @property
    def total(self) -> float:
        """The total score of the present state."""
        return total(scores(self.log_probabilities, self.weights))

    def candidate(self, candidate: Candidate) -> Iterator[Decision]:
        """Search all layers of a candidate and, if so configured, its header."""
        yield from self._layers(candidate)
        if self.config.merge_headers:
            yield self._header(candidate)
        # Whole forwards once more: the next candidate and the phrase table start from what a reader would measure.
        self.log_probabilities = self.scorer.score()

    def steps(self, layer: int | None, method: str) -> int:
        """The work of one decision in forwards of one layer, the unit of the progress bar."""
        return len(ratios_for(method, self.config.merge_ratios)) * (len(self.model.layers) - (layer or 0))

    def steps_per_candidate(self) -> int:
        """The work of all decisions on one candidate."""
        layers: list[int | None] = list(range(len(self.model.layers)))
        steps = sum(self.steps(layer, method) for layer in layers for method in self.config.merge_method)
        return steps + (self.steps(None, "lerp") if self.config.merge_headers else 0)

    def _layers(self, candidate: Candidate) -> Iterator[Decision]:
        self.scorer.restart()
        for index in range(len(self.model.layers)):
            part = self.model.layer(index)
            try:
                theirs, warning = part.adopt(candidate.read(part.tensors), candidate.name), None
            except BrokenWeights as error:
                theirs, warning = None, f"{error}; layer {index + 1} stays as it is"
            for method in self.config.merge_method:
                if theirs is None:
                    yield self._untried(candidate, index, method, warning)
                else:
                    ratios = ratios_for(method, self.config.merge_ratios)
                    outcome = self._decide(part, theirs, method, ratios, self.scorer.score_trials)
                    yield Decision(candidate.name, index, method, *outcome)
            self.scorer.advance()

    def _header(self, candidate: Candidate) -> Decision:
        """The input embedding and the output head together, always by lerp."""
        part = self.model.header()
        try:
            theirs, note = self._aligned_header(candidate, part)
        except (BrokenWeights, HeaderSkipped) as error:
            return self._untried(candidate, None, "lerp", f"{error}; the header stays as it is")
        outcome = self._decide(part, theirs, "lerp", self.config.merge_ratios, self._score_whole)
        return Decision(candidate.name, None, "lerp", *outcome, note=note)

    def _untried(self, candidate: Candidate, layer: int | None, method: str, warning: str | None) -> Decision:
        return Decision(candidate.name, layer, method, None, self.total, self.total, warning)

    def _decide(
        self, part: Part, theirs: Tensors, method: str, ratios: Sequence[float], score_trials: ScoreTrials
    ) -> tuple[float | None, float, float]:
        """Try all ratios on the unchanged part, install the best if one is accepted: ratio, total before, after."""
        before = self.total
        self._space = out = part.space(self._space)
        trials = score_trials([partial(part.trying, method, theirs, ratio, out) for ratio in ratios])
        best = choose(
            self.config.strategy,
            scores(self.log_probabilities, self.weights),
            [scores(trial, self.weights) for trial in trials],
            self.config.strategy_threshold,
        )
        if best is None:
            return None, before, before
        part.install(part.merged(method, theirs, ratios[best], out))
        self.log_probabilities = trials[best]
        return ratios[best], before, self.total

    def _score_whole(self, trials: Sequence[Trial]) -> list[list[float]]:
        """Log-probabilities under each trial by whole forwards: an embedding changes what every layer sees."""
        results = []
        for trial in trials:
            with trial():
                results.append(self.scorer.score())
        return results

    # -- the candidate's header in the base's order -------------------------------------------------------------------

    def _aligned_header(self, candidate: Candidate, part: Part) -> tuple[Tensors, str | None]:
        """The candidate's header with its rows in the base's order, and a line about what had to be matched.

        Raises HeaderSkipped, BrokenWeights.
        """
        sources = self._header_sources(candidate, part)
        rows = min(tensor.shape[0] for tensor in part.tensors.values())
        their_rows = min(candidate.layout.shape(source)[0] for source in sources.values())
        alignment = self._align(candidate, rows, their_rows)
        stored = candidate.read(set(sources.values()))
        theirs = part.adopt({name: stored[source] for name, source in sources.items()}, candidate.name)
        aligned = {name: align_rows(ours, theirs[name], alignment.matches) for name, ours in part.tensors.items()}
        tying = self._about_tying(candidate, part)
        if alignment.is_plain and not tying:
            return aligned, None
        return aligned, f"Header: {alignment.describe(candidate.name)}" + (f"; {tying}" if tying else "")

    def _header_sources(self, candidate: Candidate, part: Part) -> dict[str, str]:
        """Tensor of the base's header -> the candidate's tensor that is merged into it. Raises HeaderSkipped.

        A candidate whose head is tied to its embedding may store only one of the two, which then stands for both.
        """
        embedding, head = self.model.embedding_name(), self._head_name()
        twins = {embedding: head, head: embedding} if _is_tied(candidate) else {}
        sources = {}
        for name, ours in part.tensors.items():
            source = name if name in candidate.layout else twins.get(name)
            if source is None or source not in candidate.layout:
                raise HeaderSkipped(f"{candidate.name} has no {name}")
            shape = candidate.layout.shape(source)
            if shape[1:] != ours.shape[1:] or 0 in shape:
                raise HeaderSkipped(
                    f"{candidate.name}'s {source} has shape {shape}, the base's has {tuple(ours.shape)}"
                )
            sources[name] = source
        return sources

    def _head_name(self) -> str | None:
        """The full name of the output head's weight, which a tied model has too."""
        head = self.model.module.get_output_embeddings()
        return next((f"{name}.weight" for name, child in self.model.module.named_modules() if child is head), None)

    def _about_tying(self, candidate: Candidate, part: Part) -> str | None:
        """What becomes of the candidate's head where one model has a head of its own and the other has not."""
        embedding, head = self.model.embedding_name(), self._head_name()
        if head is None:
            return None
        ours_is_own = head in part.tensors
        theirs_is_own = embedding in candidate.layout and head in candidate.layout
        if theirs_is_own and _is_tied(candidate):
            # As transformers has it: such a model is tied if, and only if, the two are equal. In .bin files they are.
            theirs_is_own = not torch.equal(*candidate.read([embedding, head]).values())
        if theirs_is_own and not ours_is_own:
            return f"the base's head is its embedding, so {candidate.name}'s own head is not used"
        if ours_is_own and not theirs_is_own:
            return f"{candidate.name}'s head is its embedding, which is merged into both of the base's"
        return None

    def _align(self, candidate: Candidate, rows: int, their_rows: int) -> Alignment:
        """The candidate's vocabulary beside the base's: rows of the same token, BOS and EOS by role.

        rows, their_rows: of the headers. Raises HeaderSkipped if too few match.
        """
        try:
            other = load_tokenizer(candidate.checkpoint.path, self.config.trust_remote_code)
        except ConfigError as error:
            raise HeaderSkipped(f"{error}, so none of the {rows} rows can be matched") from None
        if len(other.get_vocab()) <= len(other.all_special_ids):
            # What transformers makes of a folder without tokenizer files, for many architectures.
            raise HeaderSkipped(f"{candidate.name} has no tokenizer files, so none of the {rows} rows can be matched")
        ours, theirs = _vocabulary(self.tokenizer, rows), _vocabulary(other, their_rows)
        # Where one token of the base plays both parts, as in GPT-2, it is matched as the one that ends a text.
        roles = {self.tokenizer.bos_token: other.bos_token, self.tokenizer.eos_token: other.eos_token}
        roles = {token: part for token, part in roles.items() if token and part}
        alignment = Alignment(ours, theirs, roles, match_rows(ours.tokens, theirs.tokens, roles))
        matched, known = len(alignment.matches), alignment.known
        if matched < MIN_SHARED_TOKENS * known:
            shared = f"{matched} of the base's {known} tokens (at least {MIN_SHARED_TOKENS:.0%} are needed)"
            raise HeaderSkipped(f"{candidate.name} shares only {shared}")
        return alignment


def _vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The tokens of a tokenizer that a header of so many rows has room for."""
    return Vocabulary({token: row for token, row in tokenizer.get_vocab().items() if row < rows}, rows)


def _is_tied(candidate: Candidate) -> bool:
    """Whether a candidate's configuration ties its head to its embedding."""
    config = candidate.checkpoint.config
    return any(getattr(one, "tie_word_embeddings", False) for one in (config, config.get_text_config()))


def signed_weights(
    pairs: Sequence[Pair], auto: bool, log_probabilities: Sequence[float]
) -> tuple[list[float], list[str]]:
    """Weights of all pairs, good phrases negative, and warnings.

    auto: 1 / the base's probability, so that every pair starts at 1 (or -1); a pair whose probability underflows keeps
    its configured weight.
    """
    weights, warnings = [], []
    for pair, log_probability in zip(pairs, log_probabilities, strict=True):
        weight = pair.weight
        if auto and probability(log_probability) < SMALLEST_PROBABILITY:
            warnings.append(f"{pair} is too improbable to weigh; it keeps its weight {weight:g}")
        elif auto:
            weight = 1.0 / probability(log_probability)
        weights.append(-weight if pair.kind == "GOOD" else weight)
    return weights, warnings

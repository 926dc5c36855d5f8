"""The log-probability of each pair under the model: by whole forwards, and by tail forwards for the search.

Knows: packs, the model's forward, what is read from its logits, ways to score that differ by rounding alone.
Refuses to know: merging, strategies.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from modules.model.base_model import ResidentModel
from modules.runtime.distributed import Rank
from modules.runtime.text import pluralize
from modules.scoring.budget import FEWEST_TOKENS, Budget, Packing
from modules.scoring.exactness import Plain
from modules.scoring.hidden_states import Forward, ending_in, first_of, logits_with
from modules.scoring.packing import Inputs, Targets, build_packs
from modules.scoring.tails import TailForwards, Trial
from modules.scoring.tokenization import Encoded, spread

PACKS_EACH = 4  # packs for each of several processes, at least, so that they share the work evenly
SAMPLE = 16  # packs of one pair each that are compared with plain forwards
LENGTHS = 6  # of texts that are compared, in all packs together; at least the shortest and the longest of each

COPIES = 2  # of each pack in a batch, to measure rounding

DEFAULT = Budget()
ONLY = Rank()
Item = TypeVar("Item")


class Scorer:
    """Scores a fixed list of pairs under a model whose weights change.

    Deterministic: the same weights give the same bits. All results are joint log-probabilities of the phrases given
    their contexts, one per pair, in the order of the pairs. Here, each variant of a phrase is a pair of its own:
    `of_pairs` combines them, once the results of all processes are added up.
    """

    def __init__(
        self,
        model: ResidentModel,
        encoded: Sequence[Encoded],
        layout: str,
        budget: Budget = DEFAULT,
        tolerance: float = 0.0,
        stacked: bool = True,
        tails: bool = True,
        rank: Rank = ONLY,
    ) -> None:
        """tolerance: how far rounding may change a token's log-probability, as the layout was verified with. stacked:
        several trials at a time, where inputs allow it. tails: trials are scored from their layer on, not by whole
        forwards. rank: of several processes that share the packs; each has zeros for the pairs of the others."""
        self.model = model
        self.encoded = encoded
        self.pairs = len(encoded)
        self.layout = layout
        self.tolerance = tolerance
        self.rank = rank
        self.has_tails = tails  # whether layers take hidden states alone from other layers
        self._stacked = stacked
        self._longest_phrase = max(len(item.tokens) - item.start for item in encoded)
        self._layer = 0  # on which trials are scored
        self._pack(budget)
        # Smaller packs where there are too few to share them evenly.
        while self.packs < PACKS_EACH * rank.world_size and rank.world_size > 1 and self.budget.tokens > FEWEST_TOKENS:
            self._pack(replace(self.budget, tokens=self.budget.tokens // 2))
        self._verified = True  # whether these packs are exact; the caller has verified the layout
        # The model's scores when these packs were verified; None if not known.
        self.verified_scores: list[float] | None = None

    def _pack(self, budget: Budget) -> None:
        """Build the packs of all pairs and keep this process's share."""
        self.budget = budget
        self._verified = False
        self.verified_scores = None
        self.packs_here: list[Inputs] = []  # this process's packs
        self.packs = self.packed_tokens = self.columns = 0  # of all processes; columns: at which the head is read
        loads = [0] * self.rank.world_size
        for pack in build_packs(self.encoded, self.layout, budget.tokens):
            owner = loads.index(min(loads))
            loads[owner] += pack.tokens
            if owner == self.rank.number:
                self.packs_here.append(Inputs.of(pack, self.model.device, self.model.dtype))
            self.packs += 1
            self.packed_tokens += pack.tokens
            self.columns += len({target.column for target in pack.targets})
        self._from_layer = TailForwards(self.model, self.inputs, budget)
        self._from_layer.at_layer(self._layer)

    def describe(self) -> dict[str, object]:
        """How the pairs are scored, for a run's summary."""
        packs = pluralize(self.packs, "pack")
        packs += f" on {self.rank.world_size} processes" if self.rank.world_size > 1 else ""
        unpacked = sum(len(item.tokens) for item in self.encoded)
        note = "" if self.has_tails else "; each ratio takes a full forward pass"
        tokens = f"{self.packed_tokens:,} tokens per pass ({unpacked:,} without shared prefixes)"
        return {"Scoring": f"{tokens}, {packs}, layout {self.layout}{note}"}

    @property
    def settings(self) -> tuple[str, Budget, float, bool, bool]:
        """What another process needs to build the same scorer: layout, budget, tolerance, stacked, tails."""
        return self.layout, self.budget, self.tolerance, self._stacked, self.has_tails

    @property
    def packing(self) -> Packing:
        """The sizes that the last digits of the scores depend on, beside the weights."""
        return Packing(self.layout, self.budget.tokens, self.budget.logits, self._stacked)

    def pack_as(self, packing: Packing) -> None:
        """Pack as another scorer of the same layout, whatever its share of the packs: scores have its last digits."""
        self._from_layer.let_go()
        self._stacked = self._stacked and packing.stacked
        self._pack(packing.applied_to(self.budget))

    @torch.no_grad()
    def score(self) -> list[float]:
        """Joint log-probability of every pair under the model as it stands, by whole forwards."""
        self._verify_new_packs()
        return self.token_scores().sum(-1).tolist()

    @torch.no_grad()
    def token_scores(self) -> Tensor:
        """The log-probability of each phrase's tokens, zeros behind shorter phrases: (pairs, longest phrase)."""
        return self._collect(1, lambda index: {})[0]

    @torch.no_grad()
    def score_copies(self, count: int) -> list[float]:
        """The same as `score` but for rounding: `count` copies of each pack go through the model together."""
        return self._collect(count, lambda index: {}, copied=True)[-1].sum(-1).tolist()

    def in_smaller_packs(self) -> "Scorer | None":
        """A scorer with smaller packs, the same but for rounding; None if each pack has a single pair already."""
        budget = self.budget
        while budget.tokens > 1:
            budget = budget.halved()
            smaller = Scorer(self.model, self.encoded, self.layout, budget, *self.settings[2:], self.rank)
            if smaller.packs > self.packs:
                return smaller
        return None

    def alone(self) -> "Scorer":
        """A scorer that has all packs in this process."""
        return self if self.rank.world_size == 1 else Scorer(self.model, self.encoded, *self.settings)

    def singly(self) -> "Scorer":
        """A scorer of one pair at a time, which is exact with any settings of the model."""
        return Scorer(self.model, self.encoded, "single", *self.settings[1:])

    @property
    def inputs(self) -> list[Callable[[], dict[str, Tensor]]]:
        """For each pack, a function that makes the arguments of the model's forward."""
        return [inputs.arguments for inputs in self.packs_here]

    @torch.no_grad()
    def score_on(self, hidden: Sequence[Tensor]) -> list[float]:
        """Joint log-probabilities from another model's last hidden states, one tensor a pack, while the resident model
        holds that model's norm and head."""
        return self._collect(1, lambda index: ending_in(self.model, hidden[index]))[0].sum(-1).tolist()

    def restart(self) -> None:
        """Forget what is cached and go to layer 0. Needed after the embedding, or a layer before the present one,
        changed."""
        self._layer = 0
        self._from_layer.restart()

    def at_layer(self, layer: int) -> None:
        """Go to a layer: `score_trials` tries weights for it, with the layers before it as they are at that time."""
        self._layer = layer
        self._from_layer.at_layer(layer)

    def take_less_memory(self) -> str | None:
        """Halve the packs or, if no pack can be halved, score one trial at a time.

        Returns a message that says what was done, None if memory can't be reduced further.
        """
        self._from_layer.let_go()
        packs = self.packs
        while self.budget.tokens > 1:
            self._pack(self.budget.halved())
            if self.packs > packs:
                return f"continuing with packs of {self.budget.tokens} tokens"
        if self._stacked:
            self._stacked = False
            return "continuing with one ratio at a time"
        return None

    @torch.no_grad()
    def score_trials(self, trials: Sequence[Trial]) -> list[list[float]]:
        """Joint log-probabilities under each trial's weights for the present layer: (trials, pairs)."""
        return self.trial_token_scores(trials).sum(-1).tolist()

    @torch.no_grad()
    def trial_token_scores(self, trials: Sequence[Trial]) -> Tensor:
        """The log-probabilities of the phrases' tokens under each trial: (trials, pairs, longest phrase)."""
        self._verify_new_packs()
        if not self.has_tails:
            scores = []
            for trial in trials:
                with trial():
                    scores.append(self.token_scores())
            return torch.stack(scores)
        self._from_layer.fill()
        groups = [trials] if self.stacks else [[trial] for trial in trials]
        return torch.cat(
            [self._collect(len(group), partial(self._from_layer.trying, trials=group)) for group in groups]
        )

    @property
    def stacks(self) -> bool:
        """Whether several trials go through the model at a time, along the batch. Masks and position embeddings of
        batch 1 broadcast."""
        return self.has_tails and self._stacked and all(len(inputs.ids) == 1 for inputs in self.packs_here)

    # -- whether packs are exact --------------------------------------------------------------------------------------

    def agrees(self, plain: Plain, token_scores: Tensor | None = None) -> bool:
        """Whether token scores are those of plain forwards, within the tolerance, at every token of the compared pairs.

        token_scores: (pairs, longest phrase); None: by whole forwards.
        """
        token_scores = self.token_scores() if token_scores is None else token_scores
        pairs = self.compared()
        exact = plain.token_scores([self.encoded[pair] for pair in pairs], self.budget)
        deviations = [
            (token_scores[pair, : len(scores)] - scores).abs().max() for pair, scores in zip(pairs, exact, strict=True)
        ]
        return bool(torch.stack(deviations).max() <= self.tolerance)  # NaN is not

    def compared(self) -> list[int]:
        """The pairs that are compared with plain forwards, by length.

        Of each pack, the first and the last pair; and of some lengths, the shortest and the longest among them, the
        first pair and the last: pairs of one length differ in what stands before them in the pack.
        """
        # A pack of one pair differs from a plain forward in its preparation alone.
        packs = spread(self.packs_here, SAMPLE) if self.layout == "single" else self.packs_here
        lengths = max(2, LENGTHS // len(packs))
        chosen = {pair for inputs in packs for pair in self._unlike(inputs, lengths)}
        return sorted(chosen, key=lambda pair: (len(self.encoded[pair].tokens), pair))

    def _unlike(self, inputs: Inputs, lengths: int) -> list[int]:
        """Pairs of a pack that differ most in length and in position."""
        pairs = list(dict.fromkeys(inputs.targets.pairs.tolist()))
        by_length = defaultdict[int, list[int]](list)
        for pair in pairs:
            by_length[len(self.encoded[pair].tokens)].append(pair)
        chosen = [pairs[0], pairs[-1]]
        for length in spread(sorted(by_length), lengths):
            chosen += [by_length[length][0], by_length[length][-1]]
        return chosen

    def _verify_new_packs(self) -> None:
        """Verify packs that were made since the last verification, which hold other pairs together. If they are not
        exact, this process scores its pairs one at a time."""
        if self._verified:
            return
        local_pairs = {pair for inputs in self.packs_here for pair in inputs.targets.pairs.tolist()}
        if local_pairs and not self.agrees(Plain(self.model, self.tolerance)):
            packs = build_packs(self.encoded, "single", self.budget.tokens)
            local_packs = (pack for pack in packs if pack.targets[0].pair in local_pairs)
            self.packs_here = [Inputs.of(pack, self.model.device, self.model.dtype) for pack in local_packs]
            self._from_layer = TailForwards(self.model, self.inputs, self.budget)
            self._stacked = False
            self._from_layer.at_layer(self._layer)
        self._verified = True

    # -- the model's forward and what is read from it -----------------------------------------------------------------

    def _collect(self, stack: int, forwards_for: Callable[[int], dict[int, Forward]], copied: bool = False) -> Tensor:
        """Run all packs and return the phrases' token log-probabilities, (stack, pairs, longest phrase).

        copied: the model's input is a stack of copies; otherwise, a layer makes the stack.
        """
        # One entry for each token of each phrase: a sum over them, unlike scattered additions, has always one order.
        log_probabilities = torch.zeros(stack, self.pairs, self._longest_phrase, device=self.model.device)
        for index in range(len(self.packs_here)):
            for logits, targets in self._logits(index, stack, forwards_for(index), copied):
                normaliser = logits.logsumexp(-1)  # (stack, B, columns)
                chosen_logits = logits[:, targets.rows, targets.columns, targets.tokens]
                log_probabilities[:, targets.pairs, targets.indices] = (
                    chosen_logits - normaliser[:, targets.rows, targets.columns]
                )
        return log_probabilities

    def _logits(
        self, index: int, stack: int, forwards: dict[int, Forward], copied: bool = False
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Float32 logits (stack, B, columns, V) of one pack with the targets in them, in chunks of bounded size."""
        inputs = self.packs_here[index]
        last = len(self.model.layers) - 1
        arguments = inputs.arguments()
        if copied:
            arguments = {name: torch.cat([tensor] * stack) for name, tensor in arguments.items()}
        final: list[Tensor] = []  # the hidden states behind the last layer, kept for the second chunk on

        def recording(forward: Forward, *args: Any, **kwargs: Any) -> Any:
            output = forwards[last](forward, *args, **kwargs) if last in forwards else forward(*args, **kwargs)
            final.append(first_of(output))
            return output

        column_bytes = 4 * stack * inputs.ids.shape[0] * self.model.vocabulary
        chunk = max(1, self.budget.logits // column_bytes)
        for first, columns in zip(range(0, len(inputs.columns), chunk), inputs.columns.split(chunk), strict=True):
            layers = {**forwards, last: recording} if first == 0 else ending_in(self.model, final[0])
            logits = logits_with(self.model, arguments, layers, columns).float()
            yield logits.unflatten(0, (stack, -1)), inputs.targets_in(first, first + len(columns))


def by_pair(items: Iterable[Item], encoded: Sequence[Encoded]) -> list[list[Item]]:
    """Group items, one for each encoded variant, into one list for each pair."""
    groups: list[list[Item]] = []
    for item, variant in zip(items, encoded, strict=True):
        if variant.another:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def of_pairs(log_probabilities: Iterable[float], encoded: Sequence[Encoded]) -> list[float]:
    """The log-probability of each pair, that any of its variants follows, from those of all variants.

    Variants exclude each other, so probabilities add up. A pair without variants keeps its value to the last bit.
    """
    return [
        variants[0] if len(variants) == 1 else float(torch.tensor(variants, dtype=torch.float64).logsumexp(0))
        for variants in by_pair(log_probabilities, encoded)
    ]


def of_variants(weights: Iterable[float], encoded: Sequence[Encoded]) -> list[float]:
    """The pairs' weights, each repeated for every variant of its pair."""
    groups = by_pair(encoded, encoded)
    return [weight for weight, variants in zip(weights, groups, strict=True) for _ in variants]


def other_ways(scorer: Scorer) -> list[Callable[[], list[float]]]:
    """Two more ways to score the model as it stands, which differ by rounding alone: copies in a batch, and smaller
    packs or, if each pack has a single pair already, a batch of another size.

    With several processes, each has zeros for the others' pairs.
    """
    smaller = scorer.in_smaller_packs()
    second_way = smaller.score if smaller else partial(scorer.score_copies, COPIES + 1)
    return [partial(scorer.score_copies, COPIES), second_way]


def spreads(ways: Sequence[Sequence[float]]) -> list[float]:
    """The range of each pair's values over several ways to score: (ways, pairs) to (pairs)."""
    return [max(values) - min(values) for values in zip(*ways, strict=True)]

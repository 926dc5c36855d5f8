"""Builds the completion tree of every context by a beam search.

Knows: branching, probabilities. Refuses to know: torch, the model's forward, phrases, output formats.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from modules.config.schema import Mapper
from modules.mapper.detokenize import Detokenizer
from modules.mapper.next_tokens import Guess, Predictor
from modules.runtime.oom import retry_on_oom
from modules.scoring.packing import TokenTree
from modules.scoring.tokenization import Root


@dataclass(frozen=True)
class Node:
    """One token of a completion."""

    token: int
    log_probability: float  # of this token
    joint: float  # log-probability of all tokens from the context up to this one


@dataclass(frozen=True)
class Branch:
    """A completion: the explored nodes, then those of its greedy continuation."""

    nodes: tuple[Node, ...]
    length: int  # number of explored nodes; 0 if not even the first token was probable enough

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids, those of the continuation included."""
        return tuple(node.token for node in self.nodes)

    @property
    def joint(self) -> float:
        """Log-probability of the explored nodes."""
        return self.nodes[self.length - 1].joint if self.length else 0.0


@dataclass(frozen=True)
class CompletionTree:
    """The branches of one context, by falling joint probability."""

    root: Root
    branches: tuple[Branch, ...]
    cut: int = 0  # the least number of branches that max_branches left out; all are less likely than the kept ones


@dataclass(frozen=True)
class Hypothesis:
    """A completion that is still growing."""

    context: int  # number of its context
    path: tuple[int, ...]  # all token ids, the context's included
    spaces: str  # the spaces at the context's end that are not written yet
    nodes: tuple[Node, ...] = ()
    length: int | None = None  # number of explored nodes; None while it still branches
    finished: bool = False

    @property
    def joint(self) -> float:
        """Log-probability of the explored nodes."""
        explored = self.nodes[: self.length]
        return explored[-1].joint if explored else 0.0


def _likeliest_of_each(
    hypotheses: Sequence[Hypothesis], count: int | None
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The `count` likeliest hypotheses of each context (of equals those with lower tokens), and the others."""
    likeliest = []
    unlikelier = []
    counts = Counter[int]()
    for hypothesis in sorted(
        hypotheses, key=lambda hypothesis: (hypothesis.context, -hypothesis.joint, hypothesis.path)
    ):
        counts[hypothesis.context] += 1
        if count is None or counts[hypothesis.context] <= count:
            likeliest.append(hypothesis)
        else:
            unlikelier.append(hypothesis)
    return likeliest, unlikelier


@dataclass(frozen=True)
class BeamSearch:
    """Follows the likeliest next tokens from many contexts at once, level by level.

    If more hypotheses are open than the predictor's budget allows, they are processed in groups. The result does not
    depend on the budget.
    """

    predictor: Predictor
    settings: Mapper
    detokenizer: Detokenizer
    end_tokens: frozenset[int]  # those that end a text

    def trees(self, roots: Sequence[Root]) -> Iterator[CompletionTree]:
        """The tree of each context, in order."""
        settings = self.settings
        waiting = [Hypothesis(number, root.tokens, root.spaces) for number, root in enumerate(roots)]
        while waiting:
            group = self._fitting(waiting, settings.max_depth + settings.additional_length)
            waiting = waiting[len(group) :]
            explored, cut_hypotheses = self._explore(group)
            finished = self._in_groups(explored, settings.additional_length, self._continue)
            for context in (hypothesis.context for hypothesis in group):
                branches = [
                    Branch(hypothesis.nodes, hypothesis.length or 0)
                    for hypothesis in finished
                    if hypothesis.context == context
                ]
                branches.sort(key=lambda branch: (-branch.joint, branch.tokens))
                yield CompletionTree(
                    roots[context], tuple(branches), sum(hypothesis.context == context for hypothesis in cut_hypotheses)
                )

    def _explore(self, hypotheses: list[Hypothesis]) -> tuple[list[Hypothesis], list[Hypothesis]]:
        """The likeliest branches of each context, up to max_branches, not continued yet; and the hypotheses that were
        cut.

        Best first: only the likeliest hypotheses so far are followed. A successor is never likelier than its
        hypothesis, so the likeliest are found when none of them branches any more.
        """
        while True:
            likeliest, unlikelier = _likeliest_of_each(hypotheses, self.settings.max_branches)
            branching = [hypothesis for hypothesis in likeliest if hypothesis.length is None]
            if not branching:
                return likeliest, unlikelier
            ended = [hypothesis for hypothesis in likeliest if hypothesis.length is not None]
            hypotheses = ended + unlikelier + self._in_groups(branching, 1, self._step)

    def _continue(self, hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Continue hypotheses greedily to their ends."""
        finished = []
        while hypotheses:
            finished += [hypothesis for hypothesis in hypotheses if hypothesis.finished]
            hypotheses = self._step([hypothesis for hypothesis in hypotheses if not hypothesis.finished])
        return finished

    def _in_groups(
        self, hypotheses: list[Hypothesis], steps: int, work: Callable[[Sequence[Hypothesis]], list[Hypothesis]]
    ) -> list[Hypothesis]:
        """Do `work`, which takes `steps` steps, on all hypotheses, in groups that fit into memory."""

        def next_group() -> tuple[int, list[Hypothesis]]:
            group = self._fitting(hypotheses, steps)
            return len(group), work(group)

        results = []
        while hypotheses:
            count, grown = retry_on_oom(next_group, self.predictor.take_less_memory)
            results += grown
            hypotheses = hypotheses[count:]
        return results

    def _fitting(self, hypotheses: list[Hypothesis], steps: int) -> list[Hypothesis]:
        """The first hypotheses, at least one, that can take `steps` steps within the budget if they don't branch."""
        tree = TokenTree()
        for number, hypothesis in enumerate(hypotheses):
            tree.add(hypothesis.path)
            tokens = len(tree) + (number + 1) * steps
            if number and (tokens > self.predictor.token_budget or number >= self.predictor.max_paths):
                return hypotheses[:number]
        return hypotheses

    def _step(self, hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
        """The successors of these hypotheses, one token longer."""
        if not hypotheses:
            return []
        paths = [hypothesis.path for hypothesis in hypotheses]
        spaces = [hypothesis.spaces for hypothesis in hypotheses]
        guesses = self.predictor.next_tokens(paths, spaces, self.settings.top_k)
        return list(chain.from_iterable(map(self._successors, hypotheses, guesses)))

    def _successors(self, hypothesis: Hypothesis, guesses: Sequence[Guess]) -> list[Hypothesis]:
        settings = self.settings
        if hypothesis.length is None:
            probable = [guess for guess in guesses if math.exp(guess[1]) * 100 >= settings.prob_min]
            min_joint = settings.min_joint or 0.0
            likely = [guess for guess in probable if math.exp(hypothesis.joint + guess[1]) * 100 >= min_joint]
            if likely:
                return [self._extended(hypothesis, *guess) for guess in likely]
            hypothesis = replace(hypothesis, length=len(hypothesis.nodes))
        if not guesses or settings.additional_length == 0:
            return [replace(hypothesis, finished=True)]
        return [self._extended(hypothesis, *guesses[0])]

    def _extended(self, hypothesis: Hypothesis, token: int, log_probability: float) -> Hypothesis:
        """The hypothesis with one more token."""
        joint = hypothesis.nodes[-1].joint if hypothesis.nodes else 0.0
        nodes = (*hypothesis.nodes, Node(token, log_probability, joint + log_probability))
        path = (*hypothesis.path, token)
        is_full = self.predictor.max_tokens is not None and len(path) > self.predictor.max_tokens
        ends = is_full or token in self.end_tokens
        length = hypothesis.length
        if length is None and (ends or len(nodes) == self.settings.max_depth):
            length = len(nodes)
        is_continued = length is not None and len(nodes) - length == self.settings.additional_length
        spaces = self.detokenizer.spaces_after(hypothesis.spaces, token)
        return Hypothesis(hypothesis.context, path, spaces, nodes, length, finished=ends or is_continued)

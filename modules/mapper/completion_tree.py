"""The completion tree of every context.

Knows: branching, probabilities. Refuses to know: torch, the model's forward, phrases, output formats.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from modules.config import Mapper
from modules.mapper.detokenize import Spelling
from modules.mapper.next_tokens import Continuation, Guess
from modules.runtime import within_memory
from modules.scoring import Root, TokenTree


@dataclass(frozen=True, eq=False)
class Node:
    """One token of a completion. Nodes are shared: branches that begin alike have the same first nodes."""

    parent: "Node | None"
    token: int
    log_probability: float  # of this token
    joint: float  # log-probability of all tokens from the context to here

    @classmethod
    def after(cls, parent: "Node | None", token: int, log_probability: float) -> "Node":
        """The next node of a completion."""
        return cls(parent, token, log_probability, log_probability + (parent.joint if parent else 0.0))


def path_of(node: Node | None) -> list[Node]:
    """The nodes from the context to this one."""
    path = []
    while node is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def tokens_of(nodes: Sequence[Node]) -> list[int]:
    """The nodes' token ids."""
    return [node.token for node in nodes]


@dataclass(frozen=True, eq=False)
class Branch:
    """A completion: the nodes that were explored, and those by which it was greedily continued."""

    leaf: Node | None  # None if not even the first token was probable enough
    end: Node | None  # the last node of the continuation; the leaf itself if there is none

    @property
    def joint(self) -> float:
        """Log-probability of the branch without its continuation."""
        return self.leaf.joint if self.leaf else 0.0

    @cached_property
    def nodes(self) -> list[Node]:
        """The branch, then its continuation."""
        return path_of(self.end)

    @cached_property
    def length(self) -> int:
        """Number of tokens without the continuation."""
        return len(path_of(self.leaf))


@dataclass(frozen=True)
class CompletionTree:
    """All branches of one context, by falling joint probability."""

    root: Root
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class _Tip:
    """Where a completion has got to."""

    tree: int  # number of the context
    path: tuple[int, ...]  # all tokens, the context's included
    spaces: str  # what must be spelt next: what is left of the spaces at the context's end
    share: float  # of the work on its context
    leaf: Node | None = None
    end: Node | None = None
    depth: int = 0  # of the leaf
    length: int | None = None  # of the continuation, None while the completion still branches


@dataclass
class Explorer:
    """Follows the likeliest next tokens from every context at once, level by level.

    Where more tips are open than the predictor's budget allows, some of them are followed to their ends first. The
    result does not depend on the budget.
    """

    predictor: Continuation
    settings: Mapper
    spelling: Spelling
    end_tokens: frozenset[int]  # those that end a text
    advanced: Callable[[float], None] = field(default=lambda amount: None)  # told of work done, in contexts

    def explore(self, roots: Sequence[Root]) -> Iterator[CompletionTree]:
        """The tree of each context, in order, each as soon as it is complete."""
        branches: list[list[Branch]] = [[] for _ in roots]
        stack = [[_Tip(tree, root.tokens, root.spaces, 1.0) for tree, root in enumerate(roots)]]
        unfinished = Counter(range(len(roots)))  # number of open tips by context
        done = 0
        while stack:
            group, tips = within_memory(partial(self._advance, stack), self.predictor.take_less_memory)
            unfinished.subtract(tip.tree for tip in group)
            still_open = []
            for tip in tips:
                if self._is_finished(tip):
                    branches[tip.tree].append(Branch(tip.leaf, tip.end))
                    self.advanced(tip.share)
                else:
                    still_open.append(tip)
                    unfinished[tip.tree] += 1
            if still_open:
                stack.append(still_open)
            while done < len(roots) and not unfinished[done]:
                ordered = sorted(branches[done], key=lambda branch: (-branch.joint, tokens_of(branch.nodes)))
                yield CompletionTree(roots[done], tuple(ordered))
                done += 1

    def _advance(self, stack: list[list[_Tip]]) -> tuple[list[_Tip], list[_Tip]]:
        """As many of the last tips as fit, taken off, and those that follow on them."""
        group, rest = self._fitting(stack[-1])
        tips = self._step(group)
        stack[-1:] = [rest] if rest else []
        return group, tips

    def _fitting(self, tips: list[_Tip]) -> tuple[list[_Tip], list[_Tip]]:
        """As many tips, at least one, as can be followed to their ends within the budget if they do not branch."""
        tree, ahead = TokenTree(), 0
        for number, tip in enumerate(tips):
            tree.add(tip.path)
            ahead += self._steps_left(tip)
            if number and (len(tree) + ahead > self.predictor.token_budget or number >= self.predictor.max_paths):
                return tips[:number], tips[number:]
        return tips, []

    def _step(self, tips: Sequence[_Tip]) -> list[_Tip]:
        """The tips that follow on these; the work on them is counted."""
        asked = [tip for tip in tips if not self._is_full(tip)]
        paths, spaces = [tip.path for tip in asked], [tip.spaces for tip in asked]
        guesses = iter(self.predictor.next_tokens(paths, spaces, self.settings.top_k) if asked else [])
        successors = []
        for tip in tips:
            spent = tip.share / self._steps_left(tip)
            self.advanced(spent)
            left = replace(tip, share=tip.share - spent)
            successors += self._successors(left, [] if self._is_full(tip) else next(guesses))
        return successors

    def _successors(self, tip: _Tip, guesses: Sequence[Guess]) -> list[_Tip]:
        if tip.length is None and tip.depth < self.settings.max_depth:
            probable = [guess for guess in guesses if math.exp(guess[1]) * 100 >= self.settings.prob_min]
            if probable:
                share = tip.share / len(probable)
                return [self._branching(replace(tip, share=share), *guess) for guess in probable]
        return [self._continued(tip, guesses)]

    def _branching(self, tip: _Tip, token: int, log_probability: float) -> _Tip:
        node = Node.after(tip.leaf, token, log_probability)
        return replace(self._moved(tip, token), leaf=node, end=node, depth=tip.depth + 1)

    def _continued(self, tip: _Tip, guesses: Sequence[Guess]) -> _Tip:
        """The tip one greedy token on; where there is none, or none is wanted, as finished."""
        length = tip.length or 0
        if not guesses or length == self.settings.additional_length:
            return replace(tip, length=self.settings.additional_length)
        token, log_probability = guesses[0]
        return replace(self._moved(tip, token), end=Node.after(tip.end, token, log_probability), length=length + 1)

    def _moved(self, tip: _Tip, token: int) -> _Tip:
        return replace(tip, path=(*tip.path, token), spaces=self.spelling.spaces_after(tip.spaces, token))

    def _is_finished(self, tip: _Tip) -> bool:
        if tip.end is not None and tip.end.token in self.end_tokens:
            return True
        if tip.length is None:
            return tip.depth == self.settings.max_depth and self.settings.additional_length == 0
        return tip.length == self.settings.additional_length

    def _is_full(self, tip: _Tip) -> bool:
        """Whether the path is longer than anything the model takes."""
        return self.predictor.max_tokens is not None and len(tip.path) > self.predictor.max_tokens

    def _steps_left(self, tip: _Tip) -> int:
        """How often the model may still be asked behind this tip; at least once."""
        if tip.length is None:
            return max(1, self.settings.max_depth - tip.depth + self.settings.additional_length)
        return max(1, self.settings.additional_length - tip.length)

"""The completion tree of every context.

Knows: branching, probabilities. Refuses to know: torch, the model's forward, phrases, output formats.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from modules.config import Mapper
from modules.mapper.detokenize import Spelling
from modules.mapper.next_tokens import Continuation, Guess
from modules.runtime import within_memory
from modules.scoring import Root, TokenTree

ENDLESS = 10**12  # branches: nobody waits for more


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


def at_most(settings: Mapper) -> tuple[int, int]:
    """How many branches a context has at most, and for how many next tokens the model is asked there at most."""
    followed = min(settings.top_k, int(100 / settings.prob_min)) if settings.prob_min else settings.top_k
    most = int(100 / settings.min_joint) if settings.min_joint else ENDLESS
    ends, asked = 1, 0  # completions of one length; of all lengths before it
    for depth in range(settings.max_depth):
        asked += ends
        before, ends = ends, min(ends * followed, most)
        if ends == before:
            asked += ends * (settings.max_depth - depth - 1)
            break
    branches = min(ends, settings.max_branches or ends)
    return branches, asked + branches * settings.additional_length


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
class Cut:
    """What the limits have left out of a tree."""

    branches: int = 0  # at least so many, all less likely than those that are kept
    share: float = 0.0  # in how many of all cases the model takes one of these
    tokens: int = 0  # next tokens that were not followed: with them, a branch would be less probable than min_joint


@dataclass(frozen=True)
class CompletionTree:
    """The branches of one context, by falling joint probability."""

    root: Root
    branches: tuple[Branch, ...]
    cut: Cut = Cut()


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

    @property
    def joint(self) -> float:
        """Log-probability of the branch so far."""
        return self.leaf.joint if self.leaf else 0.0


def _first_of_each(tips: Iterable[_Tip], count: int) -> tuple[list[_Tip], list[_Tip]]:
    """The likeliest tips of each context, up to a number of them, and the others; of equals the lower tokens."""
    first, others, seen = list[_Tip](), list[_Tip](), Counter[int]()
    for tip in sorted(tips, key=lambda tip: (tip.tree, -tip.joint, tip.path)):
        (first if seen[tip.tree] < count else others).append(tip)
        seen[tip.tree] += 1
    return first, others


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
    _cuts: defaultdict[int, Cut] = field(default_factory=lambda: defaultdict(Cut), init=False)  # by number of context

    def explore(self, roots: Sequence[Root]) -> Iterator[CompletionTree]:
        """The tree of each context, in order, each as soon as it is complete."""
        self._cuts.clear()
        tips = [_Tip(tree, root.tokens, root.spaces, 1.0) for tree, root in enumerate(roots)]
        limit = self.settings.max_branches
        if limit is None:
            yield from self._followed(tips, roots)
            return
        while tips:
            group, tips = self._fitting(tips)
            yield from self._followed(self._likeliest(group, limit), roots)

    def _followed(self, tips: Sequence[_Tip], roots: Sequence[Root]) -> Iterator[CompletionTree]:
        """The trees of some contexts, from tips on that are followed to their ends, level by level."""
        trees = sorted({tip.tree for tip in tips})
        branches: dict[int, list[Branch]] = {tree: [] for tree in trees}
        stack: list[list[_Tip]] = []
        unfinished = Counter[int]()  # number of open tips by context
        while True:
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
            while trees and not unfinished[trees[0]]:
                tree = trees.pop(0)
                ordered = sorted(branches[tree], key=lambda branch: (-branch.joint, tokens_of(branch.nodes)))
                yield CompletionTree(roots[tree], tuple(ordered), self._cuts[tree])
            if not stack:
                return
            group, tips = self._advance(stack)
            unfinished.subtract(tip.tree for tip in group)

    def _likeliest(self, tips: Sequence[_Tip], limit: int) -> list[_Tip]:
        """Of each context the likeliest branches, up to a limit, not continued yet; all others are cut.

        Best first: only what is among the likeliest so far is asked about. Nothing that follows on a tip is likelier
        than the tip itself, so that the likeliest are found when none of them branches any more.
        """
        while True:
            likeliest, others = _first_of_each(tips, limit)
            branching = [tip for tip in likeliest if self._branches(tip)]
            if not branching:
                break
            stack, tips = [branching], [tip for tip in likeliest if not self._branches(tip)] + others
            while stack:
                tips += self._advance(stack)[1]
        for tip in others:
            cut = self._cuts[tip.tree]
            share = cut.share + math.exp(tip.joint)
            self._cuts[tip.tree] = replace(cut, branches=cut.branches + 1, share=share)
            self.advanced(tip.share)
        return likeliest

    def _advance(self, stack: list[list[_Tip]]) -> tuple[list[_Tip], list[_Tip]]:
        """As many of the last tips as fit, taken off, and those that follow on them."""

        def advance() -> tuple[list[_Tip], list[_Tip]]:
            group, rest = self._fitting(stack[-1])
            tips = self._step(group)
            stack[-1:] = [rest] if rest else []
            return group, tips

        return within_memory(advance, self.predictor.take_less_memory)

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
        if self._branches(tip):
            probable = [guess for guess in guesses if math.exp(guess[1]) * 100 >= self.settings.prob_min]
            least = self.settings.min_joint or 0.0
            likely = [guess for guess in probable if math.exp(tip.joint + guess[1]) * 100 >= least]
            cut = self._cuts[tip.tree]
            self._cuts[tip.tree] = replace(cut, tokens=cut.tokens + len(probable) - len(likely))
            if likely:
                share = tip.share / len(likely)
                return [self._branching(replace(tip, share=share), *guess) for guess in likely]
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

    def _branches(self, tip: _Tip) -> bool:
        return tip.length is None and tip.depth < self.settings.max_depth and not self._is_finished(tip)

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

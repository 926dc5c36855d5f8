"""Token ids to packs: the rows that a model is asked about.

Knows: token ids, common beginnings, which position answers for which token. Refuses to know: tokenizers, torch, models.

Which position answers for which token (phrase "a b" in context "x y"):

    tokens      BOS   x    y    a    b     <- b is never an input
    answers for            a    b          <- the output at y scores a, the output at a scores b
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from modules.scoring.tokenization import Encoded


@dataclass(frozen=True)
class Target:
    """At `column` of row `row` the model is asked for the probability of `token`, the phrase's token number `place`."""

    row: int
    column: int
    token: int
    pair: int  # number of the pair whose phrase it is
    place: int


@dataclass(frozen=True)
class Pack:
    """What goes through the model at once: B rows of T input tokens each, and the targets that are read from them.

    A forest pack has one row (B = 1) that holds a token tree in preorder: `parents[i]` is the column of token i's
    predecessor, -1 for a root, and a token sees its ancestors only. Otherwise `parents` is None and rows are plain
    text, padded on the right, where causal attention never looks.
    """

    rows: tuple[tuple[int, ...], ...]
    targets: tuple[Target, ...]
    parents: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Number of input tokens, padding included."""
        return len(self.rows) * len(self.rows[0])


LAYOUTS = ("forest", "rows", "single")


def build_packs(encoded: Sequence[Encoded], layout: str, token_budget: int) -> Iterator[Pack]:
    """Pack all pairs; a pack holds at most `token_budget` tokens unless a single pair is longer.

    One pack after another is made: all together, they would take more memory than the phrases themselves.

    forest: all pairs share one row, each distinct token prefix computed once.
    rows:   one row a pair, sorted by length, padded on the right.
    single: one pack a pair.
    """
    numbered = list(enumerate(encoded))
    if layout == "forest":
        yield from _forest_packs(sorted(numbered, key=lambda item: item[1].tokens), token_budget)
        return
    by_length = sorted(numbered, key=lambda item: len(item[1].tokens))
    yield from map(_row_pack, _groups(by_length, token_budget if layout == "rows" else 0))


class TokenTree:
    """Token paths that share their beginnings: one node per distinct prefix, parents before children."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []  # -1 for a root
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    def __len__(self) -> int:
        return len(self.tokens)

    def known(self, path: Sequence[int]) -> list[int]:
        """The nodes of the path's longest beginning that is in the tree."""
        nodes: list[int] = []
        for token in path:
            node = self._children.get((nodes[-1] if nodes else -1, token))
            if node is None:
                break
            nodes.append(node)
        return nodes

    def add(self, path: Sequence[int]) -> list[int]:
        """All nodes of the path; those that are missing are made."""
        nodes = self.known(path)
        for token in path[len(nodes) :]:
            nodes.append(self.new_node(nodes[-1] if nodes else -1, token))
        return nodes

    def new_node(self, parent: int, token: int) -> int:
        """Another node behind a parent; a path that leads over this token leads over this node from now on."""
        self._children[parent, token] = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1


def _forest_packs(ordered: Iterable[tuple[int, Encoded]], token_budget: int) -> Iterator[Pack]:
    """Sorted pairs keep shared prefixes together, so cutting at the budget repeats few of them."""
    tree, targets = TokenTree(), list[Target]()
    for pair, item in ordered:
        inputs = item.tokens[:-1]
        if len(tree) and len(tree) + len(inputs) - len(tree.known(inputs)) > token_budget:
            yield _forest_pack(tree, targets)
            tree, targets = TokenTree(), []
        nodes = tree.add(inputs)
        for index in range(item.start, len(item.tokens)):
            targets.append(Target(0, nodes[index - 1], item.tokens[index], pair, index - item.start))
    yield _forest_pack(tree, targets)


def _forest_pack(tree: TokenTree, targets: Iterable[Target]) -> Pack:
    return Pack((tuple(tree.tokens),), tuple(targets), tuple(tree.parents))


def _groups(by_length: Iterable[tuple[int, Encoded]], token_budget: int) -> list[list[tuple[int, Encoded]]]:
    groups: list[list[tuple[int, Encoded]]] = [[]]
    for pair, item in by_length:
        if groups[-1] and (len(groups[-1]) + 1) * (len(item.tokens) - 1) > token_budget:
            groups.append([])
        groups[-1].append((pair, item))
    return groups


def _row_pack(group: Sequence[tuple[int, Encoded]]) -> Pack:
    width = max(len(item.tokens) for _, item in group) - 1
    rows, targets = [], []
    for row, (pair, item) in enumerate(group):
        inputs = item.tokens[:-1]
        # The padding is never read, by causality; any valid token will do.
        rows.append(inputs + (inputs[-1],) * (width - len(inputs)))
        targets += [
            Target(row, i - 1, item.tokens[i], pair, i - item.start) for i in range(item.start, len(item.tokens))
        ]
    return Pack(tuple(rows), tuple(targets))

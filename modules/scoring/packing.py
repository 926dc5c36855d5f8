"""Token ids to packs, the model's input rows; and packs to tensors on the device.

Knows: token ids, common prefixes, which position answers for which token, attention masks.
Refuses to know: tokenizers, models, probabilities.

Which position answers for which token (phrase "a b" in context "x y"):

    tokens      BOS   x    y    a    b     <- b is never an input
    answers for            a    b          <- the output at y scores a, the output at a scores b
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.scoring.tokenization import Encoded


@dataclass(frozen=True)
class Target:
    """A token of a phrase to score: its probability is read from the logits at `column` of row `row`."""

    row: int
    column: int
    token: int
    pair: int  # number of the pair whose phrase it is
    index: int  # of the token within its phrase


@dataclass(frozen=True)
class Pack:
    """The input of one forward: B rows of T input tokens each, and the targets that are read from its logits.

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

    Packs are made one at a time: all together, they would take more memory than the phrases themselves.

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
    """Token paths that share their prefixes: one node per distinct prefix, parents before children."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []  # -1 for a root
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    def __len__(self) -> int:
        return len(self.tokens)

    def known(self, path: Sequence[int]) -> list[int]:
        """The nodes of the path's longest prefix that is in the tree."""
        nodes: list[int] = []
        for token in path:
            node = self._children.get((nodes[-1] if nodes else -1, token))
            if node is None:
                break
            nodes.append(node)
        return nodes

    def add(self, path: Sequence[int]) -> list[int]:
        """All nodes of the path; missing ones are added."""
        nodes = self.known(path)
        for token in path[len(nodes) :]:
            nodes.append(self.new_node(nodes[-1] if nodes else -1, token))
        return nodes

    def new_node(self, parent: int, token: int) -> int:
        """Add a node behind a parent and return its number. From now on, paths with this token go through this node."""
        self._children[parent, token] = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1


def _forest_packs(ordered: Iterable[tuple[int, Encoded]], token_budget: int) -> Iterator[Pack]:
    """Forest packs of sorted pairs: sorting keeps shared prefixes together, so cutting at the budget repeats few."""
    tree = TokenTree()
    targets = list[Target]()
    for pair, item in ordered:
        inputs = item.tokens[:-1]
        if len(tree) and len(tree) + len(inputs) - len(tree.known(inputs)) > token_budget:
            yield _forest_pack(tree, targets)
            tree = TokenTree()
            targets = []
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
    rows = []
    targets = []
    for row, (pair, item) in enumerate(group):
        inputs = item.tokens[:-1]
        # The padding is never read, by causality; any valid token will do.
        rows.append(inputs + (inputs[-1],) * (width - len(inputs)))
        targets += [
            Target(row, i - 1, item.tokens[i], pair, i - item.start) for i in range(item.start, len(item.tokens))
        ]
    return Pack(tuple(rows), tuple(targets))


@dataclass(frozen=True)
class Targets:
    """Index tensors of one length: where in (B, columns, V) a target is read, and its entry in (pairs, indices)."""

    rows: Tensor
    columns: Tensor
    tokens: Tensor
    pairs: Tensor
    indices: Tensor  # of the token within its phrase


@dataclass(frozen=True)
class Inputs:
    """One pack on the device."""

    ids: Tensor  # input tokens, (B, T)
    positions: Tensor | None  # position ids, (1, T); None for 0, 1, 2, ...
    subtree_end: Tensor | None  # of a forest: the column behind the last token that sees each token, (T,)
    dtype: torch.dtype  # that the model computes in
    columns: Tensor  # the columns at which some row is read, ascending
    targets: Targets  # their columns are indices into `columns`, ascending
    target_columns: Sequence[int]  # the same indices on the host

    @classmethod
    def of(cls, pack: Pack, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """A pack for a model on `device` that computes in `dtype`."""
        positions = subtree_end = None
        if pack.parents is not None:
            positions, subtree_end = (
                torch.tensor(values, device=device) for values in _depths_and_subtree_ends(pack.parents)
            )
        columns = sorted({target.column for target in pack.targets})
        number = {column: i for i, column in enumerate(columns)}
        targets = sorted(pack.targets, key=lambda target: target.column)
        table = [(t.row, number[t.column], t.token, t.pair, t.index) for t in targets]
        return cls(
            torch.tensor(pack.rows, device=device),
            positions if positions is None else positions[None],
            subtree_end,
            dtype,
            torch.tensor(columns, device=device),
            Targets(*torch.tensor(table, device=device).T.contiguous()),
            [number[target.column] for target in targets],
        )

    def arguments(self) -> dict[str, Tensor]:
        """The arguments of the model's forward. The mask is made anew each time: kept for all packs, masks would take
        more memory than everything else."""
        if self.subtree_end is None:
            return {"input_ids": self.ids}
        number = torch.arange(len(self.subtree_end), device=self.subtree_end.device)
        seen = (number <= number[:, None]) & (number[:, None] < self.subtree_end)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": tree_mask(seen, self.dtype)}

    def targets_in(self, first: int, end: int) -> Targets:
        """The targets at indices first..end-1 of `columns`, with their columns counted from `first`."""
        targets = self.targets
        cut = slice(bisect_left(self.target_columns, first), bisect_left(self.target_columns, end))
        return Targets(
            targets.rows[cut],
            targets.columns[cut] - first,
            targets.tokens[cut],
            targets.pairs[cut],
            targets.indices[cut],
        )


def _depths_and_subtree_ends(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each token of a pack, its position and the column behind the last token that sees it.

    A pack's tree is in preorder, so the tokens that see a token, itself and its descendants, stand side by side.
    """
    depth = []
    ends = list(range(1, len(parents) + 1))
    for parent in parents:
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    for column in reversed(range(len(parents))):
        if parents[column] >= 0:
            ends[parents[column]] = max(ends[parents[column]], ends[column])
    return depth, ends


def attention_mask(parents: Sequence[int], earlier_mask: Tensor | None = None) -> Tensor:
    """Which tokens of a token tree each token sees, itself and its ancestors: (T, T), boolean.

    parents: the column of each token's predecessor, -1 for a root; parents come before their children. earlier_mask:
    the mask (S, S) of earlier tokens; the result is then the mask of the new ones, (T, S + T).
    """
    first = 0 if earlier_mask is None else earlier_mask.shape[0]
    seen = torch.zeros(len(parents), first + len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= first:
            seen[row] = seen[parent - first]
        elif parent >= 0 and earlier_mask is not None:
            seen[row, :first] = earlier_mask[parent]
        seen[row, first + row] = True
    return seen


def tree_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that is added to attention scores, 0 where a token is seen: (1, 1, T, S + T).

    Eager attention would add a boolean mask as 0 and 1.
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None]


def depths(seen: Tensor) -> Tensor:
    """The positions of tokens with this mask, (1, T): each token's distance from its root."""
    return seen.sum(-1)[None] - 1

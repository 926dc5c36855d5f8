"""Packs as tensors on the device: what a model's forward takes, and where its answers are read.

Knows: packs, tensors, attention masks. Refuses to know: models, probabilities, what the answers mean.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.scoring.packing import Pack


@dataclass(frozen=True)
class Targets:
    """Index tensors of one length: where in (B, columns, V) a target is read and where in (pairs, places) it goes."""

    rows: Tensor
    columns: Tensor
    tokens: Tensor
    pairs: Tensor
    places: Tensor  # number of the token within its phrase


@dataclass(frozen=True)
class Inputs:
    """One pack on the device."""

    ids: Tensor  # input tokens, (B, T)
    positions: Tensor | None  # (1, T); None where they are simply counted
    subtree_end: Tensor | None  # of a forest: how far the tokens reach that see each token, (T,)
    dtype: torch.dtype  # that the model computes in
    columns: Tensor  # the columns at which some row is read, ascending
    targets: Targets  # columns: numbers into `columns`, ascending
    target_columns: Sequence[int]  # the same numbers on the host

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
        table = [(t.row, number[t.column], t.token, t.pair, t.place) for t in targets]
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
        """What the model's forward takes. The mask is made anew each time: kept for all packs it would take more
        memory than everything else."""
        if self.subtree_end is None:
            return {"input_ids": self.ids}
        number = torch.arange(len(self.subtree_end), device=self.subtree_end.device)
        seen = (number <= number[:, None]) & (number[:, None] < self.subtree_end)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": tree_mask(seen, self.dtype)}

    def targets_in(self, first: int, end: int) -> Targets:
        """The targets read at columns number first..end-1, their columns counted from `first`."""
        t, cut = self.targets, slice(bisect_left(self.target_columns, first), bisect_left(self.target_columns, end))
        return Targets(t.rows[cut], t.columns[cut] - first, t.tokens[cut], t.pairs[cut], t.places[cut])


def _depths_and_subtree_ends(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each token of a pack its position, and the column behind the last token that sees it.

    A pack's tree is in preorder, so the tokens that see one, itself and all behind it, stand side by side.
    """
    depth, ends = [], list(range(1, len(parents) + 1))
    for parent in parents:
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    for column in reversed(range(len(parents))):
        if parents[column] >= 0:
            ends[parents[column]] = max(ends[parents[column]], ends[column])
    return depth, ends


def attention_mask(parents: Sequence[int], before: Tensor | None = None) -> Tensor:
    """Which tokens of a token tree each token sees, itself and its ancestors: (T, T), boolean.

    parents: the column of each token's predecessor, -1 for a root; parents come before their children. before: the
    mask (S, S) of tokens that are there already; the result is then that of the new ones, (T, S + T).
    """
    first = 0 if before is None else before.shape[0]
    seen = torch.zeros(len(parents), first + len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= first:
            seen[row] = seen[parent - first]
        elif parent >= 0 and before is not None:
            seen[row, :first] = before[parent]
        seen[row, first + row] = True
    return seen


def tree_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores of tokens with this mask, 0 where a token is seen: (1, 1, T, S + T).

    A boolean mask would be added as 0 and 1 by eager attention.
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None]


def depths(seen: Tensor) -> Tensor:
    """The positions of tokens with this mask, (1, T): a token's distance from its root."""
    return seen.sum(-1)[None] - 1

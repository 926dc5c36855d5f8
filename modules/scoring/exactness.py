"""The measure of every way to score: a model's own forward over one text at a time, and what rounding makes of it.

Knows: a model's forward, token ids. Refuses to know: packs, layouts, tail forwards, caches.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from modules.model.base_model import ResidentModel
from modules.scoring.budget import Budget
from modules.scoring.tokenization import Encoded

# What a way to score may differ by from plain forwards, in log-probability of any token: twice what rounding is
# seen to do, and this much where it does nothing. An inexact way differs by more: 0.015 for a tiny random MPT.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MOST_ROUNDING = 0.5
LOOKED_AT = 64  # tokens at the end of a text on which rounding is measured
COPIES = 4  # of that text at a time, at most


class Plain:
    """A model's forward as an evaluation harness makes it: the tokens of one text, and nothing else.

    Texts of one length go through it together, without padding, if that does not change their scores. What it says is
    kept, so the model must not change meanwhile.
    """

    def __init__(self, model: ResidentModel, tolerance: float | None = None) -> None:
        """tolerance: what a way to score may differ by per token; None: what is seen where rounding does nothing."""
        self._model = model
        self.tolerance = ROUNDING[model.dtype] if tolerance is None else tolerance
        self.known: dict[Encoded, Tensor] = {}  # log-probability of each token of a pair's phrase: (tokens,)
        self._takes_batches: bool | None = None  # whether texts can go together; None: not tried

    @torch.no_grad()
    def token_scores(self, items: Sequence[Encoded], budget: Budget) -> list[Tensor]:
        """Log-probability of each token of each pair's phrase: (tokens,), float32."""
        new = dict.fromkeys(item for item in items if item not in self.known)
        by_length = sorted(new, key=lambda item: len(item.tokens))
        for _, alike in groupby(by_length, key=lambda item: len(item.tokens)):
            for batch in self._batches(list(alike), budget):
                self._score(batch)
        return [self.known[item] for item in items]

    def _batches(self, alike: Sequence[Encoded], budget: Budget) -> Iterator[Sequence[Encoded]]:
        """Pairs of one length, as many at a time as the budget has room for."""
        length = len(alike[0].tokens)
        columns = length - min(item.start for item in alike)
        rows = min(budget.tokens // length, budget.logits // (4 * columns * self._model.vocabulary))
        first = 0
        while first < len(alike):
            size = 1 if self._takes_batches is False else max(1, rows)
            yield alike[first : first + size]
            first += size

    def _score(self, batch: Sequence[Encoded]) -> None:
        """Score pairs of one length together. The first time, the last one is scored alone as well."""
        self.known |= self._scores(batch)
        if len(batch) > 1 and self._takes_batches is None:
            last = batch[-1]
            together = self.known[last]
            alone = self._scores([last])[last]
            self._takes_batches = bool((together - alone).abs().max() <= self.tolerance)
            if not self._takes_batches:
                for item in batch:
                    self.known |= self._scores([item])

    def _scores(self, batch: Sequence[Encoded]) -> dict[Encoded, Tensor]:
        """The scores of pairs of one length in one forward."""
        first = min(item.start for item in batch) - 1
        inputs = [item.tokens[:-1] for item in batch]
        rows = self._log_probabilities(inputs, range(first, len(inputs[0])))
        scores = {}
        for item, row in zip(batch, rows, strict=True):
            scores[item] = _chosen(row[None, item.start - 1 - first :], item.tokens[item.start :])[0]
        return scores

    def next_tokens(self, path: Sequence[int]) -> Tensor:
        """Log-probabilities of all tokens behind a path: (V,), float32."""
        return self._log_probabilities([path], [len(path) - 1])[0, 0]

    @torch.no_grad()
    def measure_rounding(self, item: Encoded, budget: Budget) -> None:
        """Find the tolerance of this model on this machine, by a pair's text.

        One text alone against itself, repeated in a batch, each copy's embeddings moved by less than their last bit:
        products of other sizes and other roundings, and nothing else that could be wrong.
        """
        inputs = item.tokens[:-1]
        targets = item.tokens[-LOOKED_AT - 1 :][1:]
        asked = range(len(inputs) - len(targets), len(inputs))
        most = max(2, budget.logits // (4 * len(targets) * self._model.vocabulary))
        copies = max(1, min(most, COPIES, -(-budget.tokens // len(inputs))))
        alone = _chosen(self._log_probabilities([inputs], asked), targets)
        with self._model.embeddings_moved():
            repeated = _chosen(self._log_probabilities([inputs] * copies, asked), targets)
        rounding = float((repeated - alone).abs().max())
        self.tolerance = min(max(2 * rounding, ROUNDING[self._model.dtype]), MOST_ROUNDING)

    @torch.no_grad()
    def _log_probabilities(self, rows: Sequence[Sequence[int]], columns: Sequence[int]) -> Tensor:
        """Of all tokens, at the given columns of texts of one length: (B, columns, V)."""
        device = self._model.device
        ids = torch.tensor([list(row) for row in rows], device=device)
        index = torch.tensor(columns, device=device)
        return self._model.logits({"input_ids": ids, "use_cache": False}, index).float().log_softmax(-1)


def _chosen(log_probabilities: Tensor, tokens: Sequence[int]) -> Tensor:
    """Of (B, columns, V) the entries of one token in each column: (B, columns)."""
    index = torch.tensor(tokens, device=log_probabilities.device).expand(len(log_probabilities), -1)
    return log_probabilities.gather(-1, index[..., None])[..., 0]

"""The reference for every way to score: a model's own forward over one text at a time, and its rounding errors.

Knows: a model's forward, token ids. Refuses to know: packs, layouts, tail forwards, caches.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from modules.model.base_model import ResidentModel
from modules.scoring.budget import Budget
from modules.scoring.tokenization import Encoded

# A way to score may differ from plain forwards, in any token's log-probability, by twice the measured rounding, and by
# at least this. An inexact way differs by more: 0.015 for a tiny random MPT.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MOST_ROUNDING = 0.5
LOOKED_AT = 64  # tokens at the end of a text on which rounding is measured
COPIES = 4  # of that text in a batch, at most


class Plain:
    """A model's forward as an evaluation harness makes it: the tokens of one text, and nothing else.

    Texts of one length go through it together, without padding, if that does not change their scores. Scores are
    cached, so the model must not change.
    """

    def __init__(self, model: ResidentModel, tolerance: float | None = None) -> None:
        """tolerance: allowed difference of a way to score, per token; None: the least, without measured rounding."""
        self._model = model
        self.tolerance = ROUNDING[model.dtype] if tolerance is None else tolerance
        self.known: dict[Encoded, Tensor] = {}  # log-probability of each token of a pair's phrase: (tokens,)
        self._takes_batches: bool | None = None  # whether texts can go together; None: not tried

    @torch.no_grad()
    def token_scores(self, items: Sequence[Encoded], budget: Budget) -> list[Tensor]:
        """Log-probability of each token of each pair's phrase: (tokens,), float32."""
        unknown = dict.fromkeys(item for item in items if item not in self.known)
        by_length = sorted(unknown, key=lambda item: len(item.tokens))
        for _, same_length in groupby(by_length, key=lambda item: len(item.tokens)):
            for batch in self._batches(list(same_length), budget):
                self._score(batch)
        return [self.known[item] for item in items]

    def _batches(self, same_length: Sequence[Encoded], budget: Budget) -> Iterator[Sequence[Encoded]]:
        """Pairs of one length, as many at a time as the budget has room for."""
        length = len(same_length[0].tokens)
        columns = length - min(item.start for item in same_length)
        rows = min(budget.tokens // length, budget.logits // (4 * columns * self._model.vocabulary))
        first = 0
        while first < len(same_length):
            size = 1 if self._takes_batches is False else max(1, rows)
            yield same_length[first : first + size]
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
        """The token scores of pairs of one length, by one forward."""
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
        """Measure the tolerance for this model on this machine, with a pair's text.

        The text alone is compared with copies of it in a batch, whose embeddings are moved by less than their last bit:
        sizes of products and roundings differ, and nothing else.
        """
        inputs = item.tokens[:-1]
        targets = item.tokens[-LOOKED_AT - 1 :][1:]
        columns = range(len(inputs) - len(targets), len(inputs))
        most_copies = max(2, budget.logits // (4 * len(targets) * self._model.vocabulary))
        copies = max(1, min(most_copies, COPIES, -(-budget.tokens // len(inputs))))
        alone = _chosen(self._log_probabilities([inputs], columns), targets)
        with self._model.embeddings_moved():
            repeated = _chosen(self._log_probabilities([inputs] * copies, columns), targets)
        rounding = float((repeated - alone).abs().max())
        self.tolerance = min(max(2 * rounding, ROUNDING[self._model.dtype]), MOST_ROUNDING)

    @torch.no_grad()
    def _log_probabilities(self, rows: Sequence[Sequence[int]], columns: Sequence[int]) -> Tensor:
        """Log-probabilities of all tokens at the given columns of texts of one length: (B, columns, V)."""
        device = self._model.device
        ids = torch.tensor([list(row) for row in rows], device=device)
        index = torch.tensor(columns, device=device)
        return self._model.logits({"input_ids": ids, "use_cache": False}, index).float().log_softmax(-1)


def _chosen(log_probabilities: Tensor, tokens: Sequence[int]) -> Tensor:
    """The entries of one token in each column, (B, columns), of (B, columns, V)."""
    index = torch.tensor(tokens, device=log_probabilities.device).expand(len(log_probabilities), -1)
    return log_probabilities.gather(-1, index[..., None])[..., 0]

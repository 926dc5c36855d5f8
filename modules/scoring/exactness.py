"""The measure of every way to score: a model's own forward over one text at a time, and what rounding makes of it.

Knows: a model's forward, token ids. Refuses to know: packs, layouts, tail forwards, caches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.model.base_model import ResidentModel
from modules.scoring.tokenization import Encoded

# What a way to score may differ by from plain forwards, in log-probability of any token: twice what rounding is
# seen to do, and this much where it does nothing. An inexact way differs by more: 0.015 for a tiny random MPT.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MOST_ROUNDING = 0.5
LOOKED_AT = 64  # tokens at the end of a text on which rounding is measured


class Plain:
    """A model's forward as an evaluation harness makes it: the tokens of one text, and nothing else.

    What it says is kept, so the model must not change meanwhile.
    """

    def __init__(self, model: ResidentModel) -> None:
        self._model = model
        self._known: dict[Encoded, Tensor] = {}

    def token_scores(self, item: Encoded) -> Tensor:
        """Log-probability of each token of a pair's phrase: (tokens,), float32."""
        if item not in self._known:
            inputs, targets = item.tokens[:-1], item.tokens[item.start :]
            (self._known[item],) = _chosen(
                self._log_probabilities([inputs], range(item.start - 1, len(inputs))), targets
            )
        return self._known[item]

    def next_tokens(self, path: Sequence[int]) -> Tensor:
        """Log-probabilities of all tokens behind a path: (V,), float32."""
        return self._log_probabilities([path], [len(path) - 1])[0, 0]

    @property
    def is_finite(self) -> bool:
        """Whether all that was asked for so far are numbers."""
        return all(bool(found.isfinite().all()) for found in self._known.values())

    @torch.no_grad()
    def tolerance(self, tokens: Sequence[int], token_budget: int, logits_budget: int) -> float:
        """What a way to score may differ by in this model, on this machine, per token.

        One text alone against itself, repeated in a batch, each copy's embeddings moved by less than their last bit:
        products of other sizes and other roundings, and nothing else that could be wrong. Budgets: see budget.Budget.
        """
        inputs, targets = tokens[:-1], tokens[-LOOKED_AT - 1 :][1:]
        asked = range(len(inputs) - len(targets), len(inputs))
        most = max(2, logits_budget // (4 * len(targets) * self._model.vocabulary))
        copies = max(1, min(most, -(-token_budget // len(inputs))))
        alone = _chosen(self._log_probabilities([inputs], asked), targets)
        with self._model.embeddings_moved():
            repeated = _chosen(self._log_probabilities([inputs] * copies, asked), targets)
        rounding = float((repeated - alone).abs().max())
        return min(max(2 * rounding, ROUNDING[self._model.dtype]), MOST_ROUNDING)

    @torch.no_grad()
    def _log_probabilities(self, rows: Sequence[Sequence[int]], columns: Sequence[int]) -> Tensor:
        """Of all tokens, at the given columns of texts of one length: (B, columns, V)."""
        device = self._model.device
        ids, index = torch.tensor([list(row) for row in rows], device=device), torch.tensor(columns, device=device)
        return self._model.logits({"input_ids": ids, "use_cache": False}, index).float().log_softmax(-1)


def _chosen(log_probabilities: Tensor, tokens: Sequence[int]) -> Tensor:
    """Of (B, columns, V) the entries of one token in each column: (B, columns)."""
    index = torch.tensor(tokens, device=log_probabilities.device).expand(len(log_probabilities), -1)
    return log_probabilities.gather(-1, index[..., None])[..., 0]

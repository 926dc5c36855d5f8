"""Predicts next tokens: the probabilities of all tokens after any number of token paths at once.

Knows: the model's forward, keys and values, memory. Refuses to know: what the paths mean, which paths to follow.

    Predictor        a token tree that grows: each token goes through the model once; its keys and values are kept
    PlainPredictor   every path from its beginning, one at a time: for models for which Predictor is not exact
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from modules.mapper.detokenize import Detokenizer
from modules.model.base_model import ResidentModel
from modules.runtime.oom import retry_on_oom
from modules.scoring.budget import LOGITS_ON_CPU
from modules.scoring.exactness import Plain
from modules.scoring.layout import attention_window, is_taken
from modules.scoring.packing import TokenTree, attention_mask, depths, tree_mask
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import spread

TOKEN_BUDGET = 2048  # tokens whose keys and values are kept: 1 GiB for a Llama 2 7B, a quarter of it for a Llama 3 8B
VERIFIED = 8  # paths on which the kept keys and values are verified
COMPARED = 32  # likeliest next tokens that are compared

TokenPath = tuple[int, ...]  # token ids from the beginning of a text
Guess = tuple[int, float]  # a next token and its log-probability


class Predictor:
    """Predicts next tokens under a model that does not change meanwhile. Deterministic: the same bits every time.

    Keeps the keys and values of a token tree; the next request is mostly one token longer than a kept path.
    """

    way = "token tree with a KV cache"

    def __init__(self, model: ResidentModel, detokenizer: Detokenizer, token_budget: int = TOKEN_BUDGET) -> None:
        self.token_budget = token_budget  # distinct tokens of the paths of one request; a single path may be longer
        self.max_tokens = model.max_tokens  # longest path; None if the model sets no limit
        self.max_paths = max(1, LOGITS_ON_CPU // (4 * model.vocabulary))  # of one request, because of its logits' size
        self._model = model
        self._detokenizer = detokenizer
        self._allowed: dict[str, Tensor] = {}  # by spaces: (V,), whether a completion can begin with the token
        self.forget()

    @torch.no_grad()
    def next_tokens(self, paths: Sequence[TokenPath], spaces: Sequence[str], count: int) -> list[list[Guess]]:
        """The `count` likeliest next tokens after each path, the likeliest first; of equals, the lower id first.

        spaces: the spaces that must come next, per path. Tokens that don't begin with them, or with a part of them, are
        left out; the probabilities of the others don't change. Raises ConfigError if the model's output is NaN.
        """
        log_probabilities = self.log_probabilities(paths)
        if torch.isnan(log_probabilities).any():
            raise self._model.no_numbers()
        for row, required in enumerate(spaces):
            if required:
                log_probabilities[row, ~self._beginning_with(required)] = -torch.inf
        return _best(log_probabilities, count)

    def take_less_memory(self) -> bool:
        """Halve the size of a request. Returns whether that was possible."""
        can_take_less = self.token_budget > 1 or self.max_paths > 1
        self.token_budget = max(1, self.token_budget // 2)
        self.max_paths = max(1, self.max_paths // 2)
        return can_take_less

    def _beginning_with(self, spaces: str) -> Tensor:
        if spaces not in self._allowed:
            allowed = torch.zeros(self._model.vocabulary, dtype=torch.bool)
            allowed[self._detokenizer.beginning_with(spaces)] = True
            self._allowed[spaces] = allowed.to(self._model.device)
        return self._allowed[spaces]

    def forget(self) -> None:
        """Drop all keys and values."""
        self._tree = TokenTree()  # one column of the cache for each node
        self._mask = torch.zeros(0, 0, dtype=torch.bool)  # (T, T), which token attends to which
        self._cache = DynamicCache()

    def log_probabilities(self, paths: Sequence[TokenPath]) -> Tensor:
        """Log-probabilities of all tokens after each path: (paths, V), float32. Only new tokens are computed."""
        try:
            missing = sum(len(path) - len(self._tree.known(path[:-1])) for path in paths)  # new columns, at most
            if len(self._tree) + missing > self.token_budget:
                self._keep_only(paths)
            first_new = len(self._tree)
            ends: dict[TokenPath, int] = {}
            for path in paths:
                if path not in ends:
                    nodes = self._tree.add(path[:-1])
                    # A new node even for a known token: its logits are needed, and only new tokens have logits.
                    ends[path] = self._tree.new_node(nodes[-1] if nodes else -1, path[-1])
            return self._append(first_new, [ends[path] for path in paths])
        except BaseException:
            self.forget()  # the tree and the cache may no longer agree
            raise

    def _keep_only(self, paths: Iterable[TokenPath]) -> None:
        """Drop all columns except those of the paths."""
        kept_tree = TokenTree()
        columns = {}
        for path in paths:
            known_nodes = self._tree.known(path[:-1])
            columns.update(zip(kept_tree.add(path[: len(known_nodes)]), known_nodes, strict=True))
        if not columns:
            self.forget()
            return
        index = torch.tensor([columns[node] for node in range(len(kept_tree))])
        self._tree = kept_tree
        self._mask = self._mask[index][:, index]
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, index.to(layer.keys.device)]  # (1, heads, columns, head size)
            layer.values = layer.values[:, :, index.to(layer.values.device)]

    def _append(self, first_new: int, read_nodes: list[int]) -> Tensor:
        """Send the tree's nodes from `first_new` on through the model; the log-probabilities after `read_nodes`."""
        model = self._model
        new_mask = attention_mask(self._tree.parents[first_new:], self._mask)  # (T, first_new + T)
        unseen = torch.zeros(first_new, len(new_mask), dtype=torch.bool)
        self._mask = torch.cat([torch.cat([self._mask, unseen], dim=1), new_mask])
        logits = model.logits(
            {
                "input_ids": torch.tensor([self._tree.tokens[first_new:]], device=model.device),
                "attention_mask": tree_mask(new_mask, model.dtype).to(model.device),
                "position_ids": depths(new_mask).to(model.device),
                "past_key_values": self._cache,
                "use_cache": True,
            },
            torch.tensor([column - first_new for column in read_nodes], device=model.device),
        )
        if self._cache.get_seq_length() != len(self._tree):
            raise ValueError("the model did not use the cache")
        return logits[0].float().log_softmax(-1)


class PlainPredictor(Predictor):
    """Keeps no keys and values: every path goes through the model alone, from its beginning."""

    way = "recomputed one by one, without a KV cache"

    def log_probabilities(self, paths: Sequence[TokenPath]) -> Tensor:
        """Log-probabilities of all tokens after each path: (paths, V), float32."""
        plain = Plain(self._model)
        return torch.stack([plain.next_tokens(path) for path in paths])


def build_predictor(
    model: ResidentModel, detokenizer: Detokenizer, scorer: Scorer, paths: Sequence[TokenPath], longest: int
) -> Predictor:
    """The fastest predictor that is exact for this model. paths: to be continued, up to `longest` tokens.

    Kept keys and values are compared, token by token, with plain forwards of some paths, the shortest and the longest
    among them: at their present length and while they grow.
    """
    sample = spread(sorted(set(paths), key=len), VERIFIED)
    stages = _growing(sample, longest - max(map(len, paths)), model.max_tokens)
    plain = PlainPredictor(model, detokenizer)
    if scorer.layout != "forest" or longest > attention_window(model):
        return plain
    cached = Predictor(model, detokenizer)
    agrees = partial(_agrees, cached, plain, stages, scorer.tolerance)
    if not retry_on_oom(partial(is_taken, agrees), cached.take_less_memory):
        return plain
    cached.forget()
    return cached


@torch.no_grad()
def _agrees(
    predictor: Predictor, plain: PlainPredictor, stages: Sequence[Sequence[TokenPath]], tolerance: float
) -> bool:
    """Whether a predictor's log-probabilities of the likeliest tokens equal those of plain forwards, at each stage.
    Raises as the architecture's forward does."""
    for stage in stages:
        exact = plain.log_probabilities(stage)
        values, tokens = exact.topk(min(COMPARED, exact.shape[-1]))
        deviation = float((predictor.log_probabilities(stage).gather(-1, tokens) - values).abs().max())
        if not deviation <= tolerance:  # NaN is not
            return False
    return True


def _growing(paths: Sequence[TokenPath], steps: int, max_tokens: int | None) -> list[list[TokenPath]]:
    """The paths in four stages: as they are, one token longer, one short of full length, at full length. Their own
    tokens are repeated."""
    longest = max_tokens or max(map(len, paths)) + steps
    lengths = sorted({0, min(1, steps), max(0, steps - 1), steps})
    grown = []
    for added in lengths:
        grown.append([tuple(islice(cycle(path), min(len(path) + added, longest))) for path in paths])
    return grown


def _best(log_probabilities: Tensor, count: int) -> list[list[Guess]]:
    """The `count` largest of each row; of equals those with the lowest ids, which torch.topk does not guarantee."""
    count = min(count, log_probabilities.shape[-1])
    threshold = log_probabilities.topk(count).values[:, -1:]
    rows, tokens = ((log_probabilities >= threshold) & (log_probabilities > -torch.inf)).nonzero(as_tuple=True)
    guesses: list[list[Guess]] = [[] for _ in range(len(log_probabilities))]
    for row, token, value in zip(rows.tolist(), tokens.tolist(), log_probabilities[rows, tokens].tolist(), strict=True):
        guesses[row].append((token, value))
    return [sorted(row, key=lambda guess: (-guess[1], guess[0]))[:count] for row in guesses]

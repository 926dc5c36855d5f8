"""What the model would say next: probabilities of all tokens behind any number of token paths at once.

Knows: the model's forward, keys and values, memory. Refuses to know: what the paths mean, which of them are worth it.

Two ways, the fastest that is exact for the model:

    Cached       a token tree that grows: each token goes through the model once, and its keys and values are kept
    Recomputed   all paths from their beginnings, as a token tree, as rows of one length, or one at a time
"""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from modules.mapper.detokenize import Spelling
from modules.model import ResidentModel
from modules.runtime import within_memory
from modules.scoring import (
    LAYOUTS,
    LOGITS_ON_CPU,
    Encoded,
    Inputs,
    Plain,
    Scorer,
    TokenTree,
    attention_mask,
    attention_window,
    build_packs,
    depths,
    is_taken,
    spread,
    tree_mask,
)

TOKEN_BUDGET = 2048  # tokens whose keys and values are kept: 1 GiB for a Llama 2 7B, a quarter for a Llama 3 8B
VERIFIED = 8  # paths on which a way is verified
COMPARED = 32  # likeliest next tokens that are compared

TokenPath = tuple[int, ...]  # token ids from the beginning of a text
Guess = tuple[int, float]  # a next token and its log-probability


class Continuation(ABC):
    """Predicts next tokens under a model that does not change meanwhile. Deterministic: the same bits every time."""

    way: str  # how it is done, in words
    pace: float | None = None  # seconds for what follows on one path, about; None if that was not measured

    def __init__(self, model: ResidentModel, spelling: Spelling, token_budget: int = TOKEN_BUDGET) -> None:
        self.token_budget = token_budget  # distinct tokens that should be asked about at once; one path may be longer
        self.max_tokens = model.max_tokens  # longest path; None if the model sets no limit
        self.max_paths = max(1, LOGITS_ON_CPU // (4 * model.vocabulary))  # at once, for the size of the answer
        self._model, self._spelling = model, spelling
        self._allowed: dict[str, Tensor] = {}  # by spaces: (V,), whether a completion can begin with the token

    @torch.no_grad()
    def next_tokens(self, paths: Sequence[TokenPath], spaces: Sequence[str], count: int) -> list[list[Guess]]:
        """The `count` likeliest next tokens behind each path, the likeliest first; of equals, the lower id.

        spaces: what must be spelt next, per path; tokens that do not begin with it, or with a part of it, are left
        out, and the probabilities of the others stay as they are. Raises ConfigError if the model answers NaN.
        """
        log_probabilities = self._log_probabilities(paths)
        if torch.isnan(log_probabilities).any():
            raise self._model.no_numbers()
        for row, needed in enumerate(spaces):
            if needed:
                log_probabilities[row, ~self._beginning_with(needed)] = -torch.inf
        return _best(log_probabilities, count)

    def take_less_memory(self) -> bool:
        """Be asked about half as much at once; whether that was possible."""
        left = self.token_budget > 1 or self.max_paths > 1
        self.token_budget, self.max_paths = max(1, self.token_budget // 2), max(1, self.max_paths // 2)
        return left

    @abstractmethod
    def _log_probabilities(self, paths: Sequence[TokenPath]) -> Tensor:
        """Of all tokens behind each path: (paths, V), float32."""

    def _beginning_with(self, spaces: str) -> Tensor:
        if spaces not in self._allowed:
            allowed = torch.zeros(self._model.vocabulary, dtype=torch.bool)
            allowed[self._spelling.beginning_with(spaces)] = True
            self._allowed[spaces] = allowed.to(self._model.device)
        return self._allowed[spaces]


class Cached(Continuation):
    """Keeps the keys and values of a token tree; what is asked for next is mostly one token behind what is there."""

    way = "token tree with kept keys and values"

    def __init__(self, model: ResidentModel, spelling: Spelling, token_budget: int = TOKEN_BUDGET) -> None:
        super().__init__(model, spelling, token_budget)
        self._forget()

    def _forget(self) -> None:
        self._tree = TokenTree()  # one column of the cache for each node
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._cache = DynamicCache()

    def _log_probabilities(self, paths: Sequence[TokenPath]) -> Tensor:
        missing = sum(len(path) - len(self._tree.known(path[:-1])) for path in paths)  # columns to be added, at most
        if len(self._tree) + missing > self.token_budget:
            self._keep_only(paths)
        ends: dict[TokenPath, int] = {}
        first = len(self._tree)
        for path in paths:
            if path not in ends:
                nodes = self._tree.add(path[:-1])
                # New even where it is known: it is here that the model is asked, and only new tokens go through it.
                ends[path] = self._tree.new_node(nodes[-1] if nodes else -1, path[-1])
        try:
            return self._append(first, [ends[path] for path in paths])
        except BaseException:
            self._forget()  # the tree and the cache may no longer agree
            raise

    def _keep_only(self, paths: Iterable[TokenPath]) -> None:
        """Drop all columns but those that lead to the paths."""
        kept, columns = TokenTree(), {}
        for path in paths:
            known = self._tree.known(path[:-1])
            columns.update(zip(kept.add(path[: len(known)]), known, strict=True))
        if not columns:
            self._forget()
            return
        index = torch.tensor([columns[node] for node in range(len(kept))])
        self._tree, self._mask = kept, self._mask[index][:, index]
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, index.to(layer.keys.device)]  # (1, heads, columns, head size)
            layer.values = layer.values[:, :, index.to(layer.values.device)]

    def _append(self, first: int, read: list[int]) -> Tensor:
        """Send the tree's nodes from `first` on through the model; log-probabilities behind the nodes in `read`."""
        model, new = self._model, attention_mask(self._tree.parents[first:], self._mask)  # (T, first + T)
        seen = torch.zeros(len(self._tree), len(self._tree), dtype=torch.bool)
        seen[:first, :first], seen[first:] = self._mask, new
        self._mask = seen
        logits = model.logits(
            {
                "input_ids": torch.tensor([self._tree.tokens[first:]], device=model.device),
                "attention_mask": tree_mask(new, model.dtype).to(model.device),
                "position_ids": depths(new).to(model.device),
                "past_key_values": self._cache,
                "use_cache": True,
            },
            torch.tensor([column - first for column in read], device=model.device),
        )
        if self._cache.get_seq_length() != len(self._tree):
            raise ValueError("the model did not use the cache")
        return logits[0].float().log_softmax(-1)


class Recomputed(Continuation):
    """Keeps nothing: every path goes through the model from its beginning."""

    def __init__(self, model: ResidentModel, spelling: Spelling, layout: str, token_budget: int = TOKEN_BUDGET) -> None:
        """layout: one of packing.LAYOUTS."""
        super().__init__(model, spelling, token_budget)
        self._layout = layout
        self.way = "recomputed " + {"forest": "token tree", "rows": "rows", "single": "one at a time"}[layout]

    def _log_probabilities(self, paths: Sequence[TokenPath]) -> Tensor:
        found = torch.empty(len(paths), self._model.vocabulary, device=self._model.device)
        for numbers in self._together(paths):
            # What is asked at a path's end is asked in the way of a phrase that follows; which one does not matter.
            asked = [Encoded((*paths[number], paths[number][-1]), len(paths[number])) for number in numbers]
            for pack in build_packs(asked, self._layout, self.token_budget):
                inputs = Inputs.of(pack, self._model.device, self._model.dtype)
                logits = self._model.logits({**inputs.arguments(), "use_cache": False}, inputs.columns)
                chosen = logits[inputs.targets.rows, inputs.targets.columns].float()
                index = torch.tensor(numbers, device=self._model.device)[inputs.targets.pairs]
                found[index] = chosen.log_softmax(-1)
        return found

    def _together(self, paths: Sequence[TokenPath]) -> list[list[int]]:
        """Numbers of the paths that may share a pack: all of them, or, as rows, those of one length, never padded."""
        groups: dict[int, list[int]] = defaultdict(list)
        for number, path in enumerate(paths):
            groups[0 if self._layout == "forest" else len(path)].append(number)
        return list(groups.values())


@torch.no_grad()
def build_continuation(
    model: ResidentModel, spelling: Spelling, scorer: Scorer, paths: Sequence[TokenPath], longest: int
) -> Continuation:
    """The fastest way to continue `paths`, up to `longest` tokens, that is exact for this model.

    Every way is compared, token by token, with plain forwards of some paths, the shortest and the longest among them:
    as they are, and as they grow.
    """
    sample = spread(sorted(set(paths), key=len), VERIFIED)
    stages = _growing(sample, longest - max(map(len, paths)), model.max_tokens)
    trees = scorer.layout == "forest" and longest <= attention_window(model)
    budget = TOKEN_BUDGET

    def build() -> Continuation:
        plain, begun = Plain(model), time.perf_counter()
        exact = [torch.stack([plain.next_tokens(path) for path in stage]) for stage in stages]
        float(exact[-1].sum())  # waits for what has only been begun
        seconds = time.perf_counter() - begun
        ways: list[Callable[[], Continuation]] = [partial(Cached, model, spelling, budget)] if trees else []
        layouts = LAYOUTS if trees else LAYOUTS[1:]
        ways += [partial(Recomputed, model, spelling, layout, budget) for layout in layouts]
        exact_ways = (make for make in ways[:-1] if is_taken(partial(_agrees, make(), stages, exact, scorer.tolerance)))
        way = next(exact_ways, ways[-1])()
        # Where keys and values are kept, one token goes through the model, else the whole path.
        way.pace = seconds / sum(len(path) if isinstance(way, Cached) else 1 for stage in stages for path in stage)
        return way

    def take_less() -> bool:
        nonlocal budget
        left, budget = budget > 1, max(1, budget // 2)
        return left

    return within_memory(build, take_less)


def _growing(paths: Sequence[TokenPath], steps: int, max_tokens: int | None) -> list[list[TokenPath]]:
    """Paths as they are, one token longer, then one step from their full length, then there; with their own tokens."""
    most = max_tokens or max(map(len, paths)) + steps
    lengths = sorted({0, min(1, steps), max(0, steps - 1), steps})
    return [[tuple(islice(cycle(path), min(len(path) + more, most))) for path in paths] for more in lengths]


def _agrees(
    way: Continuation, stages: Sequence[Sequence[TokenPath]], exact: Sequence[Tensor], tolerance: float
) -> bool:
    """Whether a way gives, at each stage, the log-probabilities of plain forwards, for the likeliest tokens.
    Raises what the architecture does."""
    for stage, wanted in zip(stages, exact, strict=True):
        values, tokens = wanted.topk(min(COMPARED, wanted.shape[-1]))
        deviation = float((way._log_probabilities(stage).gather(-1, tokens) - values).abs().max())
        if not deviation <= tolerance:  # NaN is not
            return False
    return True


def _best(log_probabilities: Tensor, count: int) -> list[list[Guess]]:
    """The `count` largest of each row, of equals the lowest ids: torch.topk leaves open which of them it takes."""
    count = min(count, log_probabilities.shape[-1])
    least = log_probabilities.topk(count).values[:, -1:]
    rows, tokens = ((log_probabilities >= least) & (log_probabilities > -torch.inf)).nonzero(as_tuple=True)
    guesses: list[list[Guess]] = [[] for _ in range(len(log_probabilities))]
    for row, token, value in zip(rows.tolist(), tokens.tolist(), log_probabilities[rows, tokens].tolist(), strict=True):
        guesses[row].append((token, value))
    return [sorted(row, key=lambda guess: (-guess[1], guess[0]))[:count] for row in guesses]

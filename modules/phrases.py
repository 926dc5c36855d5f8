"""Phrase lists to token ids, and token ids to packs: the rows that a model is asked about.

Knows: tokenizers, token ids, which position answers for which token. Refuses to know: torch, models, weights.

Which position answers for which token (phrase "a b" in context "x y"):

    tokens      BOS   x    y    a    b
    position     0    1    2    3          <- b is never an input
    answers for                 y->a a->b  <- the output at y scores a, the output at a scores b
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from modules.config import ConfigError, Pair


@dataclass(frozen=True)
class Encoded:
    """A pair as token ids: `tokens[start:]` are the phrase's, everything before is given. start is at least 1."""

    tokens: tuple[int, ...]
    start: int


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

    A forest pack has one row (B = 1) that holds a token tree: `parents[i]` is the column of token i's predecessor, -1
    for a root, and a token sees its ancestors only. Otherwise `parents` is None and rows are plain text, padded on the
    right, where causal attention never looks.
    """

    rows: tuple[tuple[int, ...], ...]
    targets: tuple[Target, ...]
    parents: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Number of input tokens, padding included."""
        return len(self.rows) * len(self.rows[0])


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens
# ---------------------------------------------------------------------------------------------------------------------


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], vocabulary: int, max_tokens: int | None) -> list[Encoded]:
    """Token ids of all pairs, for a model of `vocabulary` embedding rows that takes at most `max_tokens` tokens.

    Raises ConfigError for a phrase without tokens of its own, and for a pair that the model can't take.
    """
    encoded = [encode_pair(tokenizer, pair.context, pair.phrase) for pair in pairs]
    for pair, item in zip(pairs, encoded, strict=True):
        if max_tokens is not None and len(item.tokens) - 1 > max_tokens:
            raise ConfigError(f"{pair} is {len(item.tokens)} tokens long; the base model takes {max_tokens}")
        if max(item.tokens) >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(max(item.tokens))
            raise ConfigError(f"{pair}: the base model has no embedding for its token '{token}'")
    return encoded


def encode_pair(tokenizer: Any, context: str, phrase: str) -> Encoded:
    """Encode context and phrase together and find where the phrase's tokens begin.

    The phrase's tokens are those that reach past the end of the context. Trailing spaces of the context belong to the
    phrase: most tokenizers write a space as the beginning of the next word.
    """
    boundary = len(context.rstrip(" "))
    if tokenizer.is_fast:
        tokens, start, end = _split_by_offsets(tokenizer, context + phrase, boundary)
    else:
        tokens, start, end = _split_by_prefix(tokenizer, context + phrase, boundary)
    if start >= end:
        raise ConfigError(f"{Pair('', phrase, context)} has no tokens in this model's vocabulary")
    if start == 0:
        tokens, start, end = [_first_token(tokenizer, phrase), *tokens], 1, end + 1
    return Encoded(tuple(tokens[:end]), start)


def _split_by_offsets(tokenizer: Any, text: str, boundary: int) -> tuple[list[int], int, int]:
    """Tokens of the text and the range of those that end after `boundary` (in characters)."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    beyond = [i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > boundary]
    return encoding["input_ids"], (beyond or [0])[0], (beyond or [-1])[-1] + 1


def _split_by_prefix(tokenizer: Any, text: str, boundary: int) -> tuple[list[int], int, int]:
    """The same for tokenizers without offsets: the tokens after the longest prefix shared with the context alone."""
    tokens = tokenizer(text)["input_ids"]
    given = tokenizer(text[:boundary])["input_ids"]
    shared = 0
    while shared < min(len(tokens), len(given)) and tokens[shared] == given[shared]:
        shared += 1
    # A tokenizer that closes every text with a special token closes this one too; it is not the phrase's.
    added = len(tokens) - len(tokenizer(text, add_special_tokens=False)["input_ids"])
    leading = 0
    while leading < min(added, len(tokens)) and tokens[leading] in tokenizer.all_special_ids:
        leading += 1
    return tokens, shared, len(tokens) - (added - leading)


def _first_token(tokenizer: Any, phrase: str) -> int:
    """What a text begins with, for phrases with nothing before them: BOS, or EOS where there is no BOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ConfigError(f"the phrase '{phrase}' needs a context: this tokenizer has neither a BOS nor an EOS token")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to packs
# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = ("forest", "rows", "single")


def build_packs(encoded: Sequence[Encoded], layout: str, token_budget: int) -> list[Pack]:
    """Pack all pairs; a pack holds at most `token_budget` tokens unless a single pair is longer.

    forest: all pairs share one row, each distinct token prefix computed once.
    rows:   one row a pair, sorted by length, padded on the right.
    single: one pack a pair.
    """
    numbered = list(enumerate(encoded))
    if layout == "forest":
        return _forest_packs(sorted(numbered, key=lambda item: item[1].tokens), token_budget)
    by_length = sorted(numbered, key=lambda item: len(item[1].tokens))
    if layout == "rows":
        return [_row_pack(group) for group in _groups(by_length, token_budget)]
    return [_row_pack([item]) for item in by_length]


class _Tree:
    """The token tree of one pack while it grows: one node per distinct token prefix, parents before children."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.children: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        self.targets: list[Target] = []

    def new_nodes(self, item: Encoded) -> int:
        """How many nodes the pair would add."""
        node, depth, inputs = -1, 0, item.tokens[:-1]
        while depth < len(inputs) and (node, inputs[depth]) in self.children:
            node, depth = self.children[node, inputs[depth]], depth + 1
        return len(inputs) - depth

    def add(self, pair: int, item: Encoded) -> None:
        node = -1
        for index, token in enumerate(item.tokens):
            if index >= item.start:
                self.targets.append(Target(0, node, token, pair, index - item.start))
            if index < len(item.tokens) - 1:
                node = self._child(node, token)

    def _child(self, parent: int, token: int) -> int:
        if (parent, token) not in self.children:
            self.children[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return self.children[parent, token]

    def pack(self) -> Pack:
        return Pack((tuple(self.tokens),), tuple(self.targets), tuple(self.parents))


def _forest_packs(ordered: Iterable[tuple[int, Encoded]], token_budget: int) -> list[Pack]:
    """Sorted pairs keep shared prefixes together, so cutting at the budget repeats few of them."""
    trees = [_Tree()]
    for pair, item in ordered:
        if trees[-1].tokens and len(trees[-1].tokens) + trees[-1].new_nodes(item) > token_budget:
            trees.append(_Tree())
        trees[-1].add(pair, item)
    return [tree.pack() for tree in trees]


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

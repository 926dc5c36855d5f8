"""Ranks the configured phrases among the model's completions.

Knows: completion trees, pairs, which completions have content words. Refuses to know: torch, models, output formats.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from modules.config.phrase_lists import Pair
from modules.config.schema import Mapper
from modules.mapper.completion_tree import Branch, CompletionTree, Node
from modules.mapper.detokenize import Detokenizer, Pieces
from modules.mapper.grammar import ADVERBS, english
from modules.scoring.tokenization import Encoded, Root

_ENGLISH = english()


@dataclass(frozen=True)
class Suggestion:
    """A phrase that the model is more likely to say."""

    phrase: str
    log_probability: float


@dataclass(frozen=True)
class PhraseRank:
    """The rank of a configured phrase among the branches of its context."""

    pair: Pair
    log_probability: float
    rank: int  # among the completions of its length, the phrase included; 1 is the most probable
    ranked: int  # the number of such completions
    too_rare: bool  # less probable than prob_min
    suggestion: Suggestion | None


@dataclass(frozen=True)
class _Rival:
    """A branch that differs from the phrase, cut to the phrase's length."""

    nodes: tuple[Node, ...]
    is_whole: bool  # whether its last word ends with it

    @property
    def joint(self) -> float:
        return self.nodes[-1].joint


def rank_phrases(
    tree: CompletionTree,
    phrases: Sequence[tuple[Pair, Sequence[Encoded], float]],
    settings: Mapper,
    detokenizer: Detokenizer,
) -> list[PhraseRank]:
    """Rank phrases among the branches that differ from them. phrases: each with its variants' tokens and its
    log-probability.

    A branch is cut to as many words as the phrase, or its longest variant, has: beside "skin", "spine. The wind" counts
    as "spine". A shorter branch is taken whole or, if it is the beginning of the phrase, with its continuation.
    Branches that are equal after the cut count once.
    """
    spelled_branches = [(branch, detokenizer.pieces(tree.root, branch.tokens)) for branch in tree.branches]
    ranks = []
    for pair, variants, log_probability in phrases:
        rivals = _rivals(tree.root, spelled_branches, pair, variants)
        likelier = [rival for rival in rivals if rival.joint > log_probability]
        ranks.append(
            PhraseRank(
                pair,
                log_probability,
                rank=1 + len(likelier),
                ranked=1 + len(rivals),
                too_rare=not math.exp(log_probability) * 100 >= settings.prob_min,
                suggestion=_suggestion(likelier, pair.phrase, tree.root, detokenizer),
            )
        )
    return ranks


def _rivals(
    root: Root, spelled_branches: Sequence[tuple[Branch, Pieces]], pair: Pair, variants: Sequence[Encoded]
) -> list[_Rival]:
    """All branches that differ from the phrase, each cut to the phrase's length."""
    rivals = {}
    words = max(_count_words(variant.phrase) for variant in pair.each)
    phrase_tokens = [variant.tokens for variant in variants]
    for branch, pieces in spelled_branches:
        path = (*root.tokens, *branch.tokens)
        if any(path[: len(phrase)] == phrase for phrase in phrase_tokens):
            continue  # the phrase itself
        explored = path[: len(root.tokens) + branch.length]
        begins_a_phrase = any(phrase[: len(explored)] == explored for phrase in phrase_tokens)
        limit = len(branch.nodes) if begins_a_phrase else branch.length
        length, is_whole = _whole_words(pieces, words, limit)
        if length:
            rivals[branch.tokens[:length]] = _Rival(branch.nodes[:length], is_whole)
    return list(rivals.values())


def _suggestion(likelier: Sequence[_Rival], phrase: str, root: Root, detokenizer: Detokenizer) -> Suggestion | None:
    """The most probable rival that has a new content word and can be written as a phrase."""
    meaningful = {_up_to_last_content_word(rival, phrase, root, detokenizer): None for rival in likelier}
    for nodes in sorted((nodes for nodes in meaningful if nodes), key=lambda nodes: -nodes[-1].joint):
        suggested = detokenizer.phrase(root, [node.token for node in nodes])
        if suggested is not None:
            return Suggestion(suggested, nodes[-1].joint)
    return None


def _up_to_last_content_word(
    rival: _Rival, phrase: str, root: Root, detokenizer: Detokenizer
) -> tuple[Node, ...] | None:
    """A completion up to its last content word: cut there, it is more probable. None if the phrase has all its content
    words: then it only continues the phrase."""
    tokens = [node.token for node in rival.nodes]
    words = _word_ends(detokenizer.text(root, tokens))
    if not rival.is_whole:
        words = words[:-1]
    content = [(word, end) for word, end in words if _ENGLISH.begins(word) and word not in ADVERBS]
    if {word for word, _ in content} <= {word for word, _ in _word_ends(phrase)}:
        return None
    last_end = content[-1][1]
    length = 1
    while len(detokenizer.text(root, tokens[:length])) < last_end:
        length += 1
    return rival.nodes[:length]


def _word_ends(text: str) -> list[tuple[str, int]]:
    """Every word, in lower case and with straight apostrophes, and its end in the text."""
    return [(match[0].lower().replace("’", "'"), match.end()) for match in re.finditer(r"\w+(?:['’]\w+)*", text)]


def _count_words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def _whole_words(pieces: Pieces, words: int, limit: int) -> tuple[int, bool]:
    """The number of tokens, at most `limit`, that spell this many words, and whether the last word is whole."""
    length = 0
    text = ""
    for tokens, piece in pieces:
        inside_a_word = bool(re.search(r"\w$", text) and re.match(r"\w", piece))
        is_enough = _count_words(text) >= words and not inside_a_word
        if length and (length + tokens > limit or is_enough):
            return min(length, limit), not inside_a_word
        length += tokens
        text += piece
    return min(length, limit), True

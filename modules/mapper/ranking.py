"""How the configured phrases compare with what the model would say.

Knows: completion trees, pairs. Refuses to know: torch, models, output formats.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from modules.config import Mapper, Pair
from modules.mapper.completion_tree import Branch, CompletionTree, Node, path_of, tokens_of
from modules.mapper.detokenize import Pieces, Spelling
from modules.scoring import Encoded, Root


@dataclass(frozen=True)
class Suggestion:
    """A phrase that the model is more likely to say."""

    phrase: str
    log_probability: float


@dataclass(frozen=True)
class PhraseRank:
    """How a configured phrase stands among the branches of its context."""

    pair: Pair
    log_probability: float
    place: int  # among the completions of its length, the phrase included; 1 is the most probable
    places: int  # how many such completions there are
    too_rare: bool  # less probable than prob_min
    suggestion: Suggestion | None


def rank_phrases(
    tree: CompletionTree, phrases: Sequence[tuple[Pair, Sequence[Encoded], float]], settings: Mapper, spelling: Spelling
) -> list[PhraseRank]:
    """Compare phrases, each with its variants' tokens and its log-probability, with the branches that go another way.

    A branch is taken up to as many words as the phrase has, or the longest of its variants: "spine. The wind" stands
    for "spine" beside "skin". A branch that is shorter is taken whole, or, where it is the beginning of the phrase,
    with its continuation. Branches that are then alike count once.
    """
    spelt = [(branch, spelling.pieces(tree.root, tokens_of(branch.nodes))) for branch in tree.branches]
    found = []
    for pair, variants, log_probability in phrases:
        others = _others(tree.root, spelt, pair, variants)
        rivals = [other for other in others if other.joint > log_probability]
        found.append(
            PhraseRank(
                pair,
                log_probability,
                place=1 + len(rivals),
                places=1 + len(others),
                too_rare=not math.exp(log_probability) * 100 >= settings.prob_min,
                suggestion=_best_phrase(rivals, tree.root, spelling),
            )
        )
    return found


def _others(root: Root, spelt: Sequence[tuple[Branch, Pieces]], pair: Pair, variants: Sequence[Encoded]) -> list[Node]:
    """The last nodes of all branches that go another way than the phrase, each taken up to the phrase's length."""
    others, words = {}, max(_words(one.phrase) for one in pair.each)
    said = [variant.tokens for variant in variants]
    for branch, pieces in spelt:
        tokens = tuple(tokens_of(branch.nodes))
        if any((*root.tokens, *tokens)[: len(phrase)] == phrase for phrase in said):
            continue  # the phrase itself
        own = (*root.tokens, *tokens[: branch.length])
        begins = any(phrase[: len(own)] == own for phrase in said)
        length = _whole_words(pieces, words, len(tokens) if begins else branch.length)
        if length:
            others[tokens[:length]] = branch.nodes[length - 1]
    return list(others.values())


def _best_phrase(rivals: Sequence[Node], root: Root, spelling: Spelling) -> Suggestion | None:
    """The most probable of the completions that can be written as a phrase."""
    for rival in sorted(rivals, key=lambda node: -node.joint):
        phrase = spelling.phrase(root, tokens_of(path_of(rival)))
        if phrase is not None:
            return Suggestion(phrase, rival.joint)
    return None


def _words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def _whole_words(pieces: Pieces, words: int, most: int) -> int:
    """The number of tokens, at most `most`, that spell this many whole words."""
    length, text = 0, ""
    for tokens, piece in pieces:
        inside_a_word = bool(re.search(r"\w$", text) and re.match(r"\w", piece))
        if length and (length + tokens > most or (_words(text) >= words and not inside_a_word)):
            break
        length, text = length + tokens, text + piece
    return min(length, most)

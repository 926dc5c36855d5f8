"""How the configured phrases compare with what the model would say.

Knows: completion trees, pairs, which completions say something. Refuses to know: torch, models, output formats.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from modules.config import Mapper, Pair
from modules.mapper.completion_tree import Branch, CompletionTree, Node, path_of, tokens_of
from modules.mapper.detokenize import Pieces, Spelling
from modules.mapper.grammar import ADVERBS, english
from modules.scoring import Encoded, Root

_ENGLISH = english()


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


@dataclass(frozen=True, eq=False)
class _Other:
    """A branch that goes another way than the phrase, up to the phrase's length."""

    end: Node
    is_whole: bool  # whether its last word ends with it


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
        rivals = [other for other in others if other.end.joint > log_probability]
        found.append(
            PhraseRank(
                pair,
                log_probability,
                place=1 + len(rivals),
                places=1 + len(others),
                too_rare=not math.exp(log_probability) * 100 >= settings.prob_min,
                suggestion=_suggestion(rivals, pair.phrase, tree.root, spelling),
            )
        )
    return found


def _others(
    root: Root, spelt: Sequence[tuple[Branch, Pieces]], pair: Pair, variants: Sequence[Encoded]
) -> list[_Other]:
    """All branches that go another way than the phrase, each taken up to the phrase's length."""
    others, words = {}, max(_words(one.phrase) for one in pair.each)
    said = [variant.tokens for variant in variants]
    for branch, pieces in spelt:
        tokens = tuple(tokens_of(branch.nodes))
        if any((*root.tokens, *tokens)[: len(phrase)] == phrase for phrase in said):
            continue  # the phrase itself
        own = (*root.tokens, *tokens[: branch.length])
        begins = any(phrase[: len(own)] == own for phrase in said)
        length, is_whole = _whole_words(pieces, words, len(tokens) if begins else branch.length)
        if length:
            others[tokens[:length]] = _Other(branch.nodes[length - 1], is_whole)
    return list(others.values())


def _suggestion(rivals: Sequence[_Other], phrase: str, root: Root, spelling: Spelling) -> Suggestion | None:
    """The most probable of the rivals that say something new and can be written as a phrase."""
    ends = dict.fromkeys(_end_of_meaning(rival, phrase, root, spelling) for rival in rivals)
    for end in sorted((end for end in ends if end is not None), key=lambda node: -node.joint):
        written = spelling.phrase(root, tokens_of(path_of(end)))
        if written is not None:
            return Suggestion(written, end.joint)
    return None


def _end_of_meaning(rival: _Other, phrase: str, root: Root, spelling: Spelling) -> Node | None:
    """Where the last word of a completion ends that is no function word: up to there it is likelier than with what
    follows. None if all such words are the phrase's own: then the completion only goes on where the phrase does."""
    path = path_of(rival.end)
    tokens = tokens_of(path)
    words = _word_ends(spelling.text(root, tokens))
    content = [(word, end) for word, end in words[: len(words) if rival.is_whole else -1] if _says_something(word)]
    if {word for word, _ in content} <= {word for word, _ in _word_ends(phrase)}:
        return None
    end = content[-1][1]
    return next(path[n] for n in range(len(path)) if len(spelling.text(root, tokens[: n + 1])) >= end)


def _word_ends(text: str) -> list[tuple[str, int]]:
    """Every word, in lower case and with straight apostrophes, and where it ends."""
    return [(match[0].lower().replace("’", "'"), match.end()) for match in re.finditer(r"\w+(?:['’]\w+)*", text)]


def _says_something(word: str) -> bool:
    return _ENGLISH.begins(word) and word not in ADVERBS


def _words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def _whole_words(pieces: Pieces, words: int, most: int) -> tuple[int, bool]:
    """The number of tokens, at most `most`, that spell this many whole words, and whether the last of them is whole."""
    length, text = 0, ""
    for tokens, piece in pieces:
        inside_a_word = bool(re.search(r"\w$", text) and re.match(r"\w", piece))
        if length and (length + tokens > most or (_words(text) >= words and not inside_a_word)):
            return min(length, most), not inside_a_word
        length, text = length + tokens, text + piece
    return min(length, most), True

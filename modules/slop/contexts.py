"""Contexts for phrases that a model over-uses, cut from its own texts: after the same text it may write them again.

Knows: texts and their prompts, which part of a text is a context, how many a phrase gets. Refuses to know: models,
tokenizers (a function counts tokens), files.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from modules.config.phrase_lists import Chat, Message, Pair
from modules.slop.finder import Finding, Text

# of the text before a phrase, in its context
FEWEST_TOKENS = 10
MOST_TOKENS = 40
MOST_TRIED = 12  # occurrences of a phrase whose probability is computed
# of a phrase that is listed
MOST_CONTEXTS = 6
FEWEST_PROMPTS = 3
LEAST = 0.05  # a phrase's probability in a context that is listed

_SENTENCE_END = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)]*\s+|\n+\s*")
_WORD_START = re.compile(r"(?<=\s)(?=\S)")

CountTokens = Callable[[str], int]
Item = TypeVar("Item")


def candidate_contexts(
    finding: Finding,
    texts: Sequence[Text],
    prompts: Sequence[str],
    answers_begin: Mapping[str, str] | None,
    count: CountTokens,
) -> dict[Pair, int]:
    """Pairs for the phrase's occurrences, each with the number of its prompt. At most MOST_TRIED, taken in turn from
    each prompt; only those that are spelled as the phrase is listed. answers_begin: see `Generator`.
    """
    pairs = dict[Pair, int]()
    for number, start, end in in_turn(finding.places, lambda occurrence: texts[occurrence[0]].prompt):
        text = texts[number].text
        prompt = prompts[texts[number].prompt]
        if text[start:end] != finding.phrase:
            continue
        if answers_begin is None:
            pair = Pair("BAD", finding.phrase, last_sentences(joined(prompt, text[:start]), count))
        else:
            answer = answers_begin[prompt] + last_sentences(text[:start], count)
            pair = Pair("BAD", finding.phrase, answer, chat=Chat((Message("user", prompt),), answer))
        pairs.setdefault(pair, texts[number].prompt)
        if len(pairs) == MOST_TRIED:
            break
    return pairs


def last_sentences(text: str, count: CountTokens) -> str:
    """The fewest last sentences of a text with FEWEST_TOKENS tokens; its last words if they exceed MOST_TOKENS."""
    for start in reversed(_sentence_starts(text)):
        if count(text[start:]) >= FEWEST_TOKENS:
            break
    if count(text[start:]) <= MOST_TOKENS:
        return text[start:]
    words = (text[match.start() :] for match in _WORD_START.finditer(text))
    return next((ending for ending in words if count(ending) <= MOST_TOKENS), "")


def _sentence_starts(text: str) -> list[int]:
    return [0, *(match.end() for match in _SENTENCE_END.finditer(text))]


def last_sentence(text: str) -> str:
    """The last sentence of a text, as an example."""
    return text[_sentence_starts(text)[-1] :]


def joined(opening: str, text: str) -> str:
    """An opening and the text that continues it, joined by a space where one is needed; neither contains it."""
    return opening + ("" if re.match(r"[\s.,;:!?'\u2019)]|$", text) else " ") + text


def in_turn(items: Sequence[Item], owner: Callable[[Item], int]) -> list[Item]:
    """The first item of every owner, then the second of each, and so on."""
    earlier = Counter[int]()
    rounds = []
    for item in items:
        rounds.append(earlier[owner(item)])
        earlier[owner(item)] += 1
    order = sorted(range(len(items)), key=rounds.__getitem__)
    return [items[number] for number in order]


def listed_contexts(candidates: Mapping[Pair, int], probabilities: Sequence[float]) -> list[Pair]:
    """The contexts for a phrase list: those in which the phrase is probable, the best of every prompt first.

    Empty if fewer than FEWEST_PROMPTS prompts have one: a phrase of one story is no habit.
    """
    probable = [(value, pair) for pair, value in zip(candidates, probabilities, strict=True) if value >= LEAST]
    best_first = [pair for _, pair in sorted(probable, key=lambda item: -item[0])]
    if len({candidates[pair] for pair in best_first}) < FEWEST_PROMPTS:
        return []
    return in_turn(best_first, candidates.__getitem__)[:MOST_CONTEXTS]

"""Contexts for what a model over-uses, cut from its own texts: where it said a phrase, it may say it again.

Knows: texts and the prompts to them, which beginnings make a context, how many a phrase gets. Refuses to know: models,
tokenizers (it is told how many tokens a text has), files.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from modules.config import Chat, Message, Pair
from modules.discovery.finder import Finding, Text

FEWEST_TOKENS, MOST_TOKENS = 10, 40  # of what stands before a phrase, in its context
MOST_TRIED = 12  # places of a phrase whose probability is asked for
MOST_CONTEXTS, FEWEST_PROMPTS = 6, 3  # of a phrase that is listed
LEAST = 0.05  # a phrase's probability in a context that is listed

_SENTENCE = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)]*\s+|\n+\s*")  # what stands between two sentences
_WORD = re.compile(r"(?<=\s)(?=\S)")

Count = Callable[[str], int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Possible:
    """A place of a phrase as a pair of a phrase list, and which prompt brought it."""

    pair: Pair
    prompt: int


def possible_contexts(
    finding: Finding, texts: Sequence[Text], prompts: Sequence[str], chats: bool, count: Count
) -> list[Possible]:
    """A pair for places where the phrase stands as it is listed, at most MOST_TRIED; one of each prompt in turn.

    chats: whether prompts are turns of a chat; else texts go on from them. count: how many tokens a text has.
    """
    found = list[Possible]()
    for number, start, end in in_turn(finding.places, lambda place: texts[place[0]].prompt):
        prompt, text = texts[number].prompt, texts[number].text
        if text[start:end] != finding.phrase:
            continue
        before = text[:start]
        if chats:
            answer = last_sentences(before, count)
            pair = Pair("BAD", finding.phrase, answer, chat=Chat((Message("user", prompts[prompt]),), answer))
        else:
            pair = Pair("BAD", finding.phrase, last_sentences(joined(prompts[prompt], before), count))
        if all(pair != other.pair for other in found):
            found.append(Possible(pair, prompt))
        if len(found) == MOST_TRIED:
            break
    return found


def last_sentences(before: str, count: Count) -> str:
    """The end of a text from the beginning of a sentence on: the shortest that has FEWEST_TOKENS, all of it if it has
    fewer; of sentences that have more than MOST_TOKENS the last words."""
    for start in reversed([0, *(match.end() for match in _SENTENCE.finditer(before))]):
        if count(before[start:]) >= FEWEST_TOKENS:
            break
    if count(before[start:]) <= MOST_TOKENS:
        return before[start:]
    words = [match.start() for match in _WORD.finditer(before)]
    return next((before[word:] for word in words if count(before[word:]) <= MOST_TOKENS), "")


def joined(opening: str, text: str) -> str:
    """A text behind the opening that it goes on from; the space between them is in neither."""
    return opening + ("" if re.match(r"[\s.,;:!?'\u2019)]|$", text) else " ") + text


def in_turn(items: Sequence[Item], owner: Callable[[Item], int]) -> list[Item]:
    """The first item of every owner, then the second of each, and so on; the owners in the order in which they come."""
    rounds: dict[int, int] = {}
    keyed = []
    for number, item in enumerate(items):
        rounds[owner(item)] = rounds.get(owner(item), -1) + 1
        keyed.append((rounds[owner(item)], number))
    return [items[number] for _, number in sorted(keyed)]


def listed_contexts(possible: Sequence[Possible], probabilities: Sequence[float]) -> list[Pair]:
    """The contexts that a phrase list gets: probable ones, the most probable of every prompt first.

    Empty if fewer than FEWEST_PROMPTS prompts have one: a phrase of one story is no habit.
    """
    probable = [(value, one) for one, value in zip(possible, probabilities, strict=True) if value >= LEAST]
    best_first = [one for _, one in sorted(probable, key=lambda item: -item[0])]
    if len({one.prompt for one in best_first}) < FEWEST_PROMPTS:
        return []
    return [one.pair for one in in_turn(best_first, lambda one: one.prompt)[:MOST_CONTEXTS]]


def last_words(before: str) -> str:
    """The end of a text from its last sentence on, to be shown."""
    return before[max([0, *(match.end() for match in _SENTENCE.finditer(before))]) :]

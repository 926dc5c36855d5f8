"""Phrase lists: their form in a file, the pairs that they mean, and which pairs are held out.

Knows: their keys, which weight a context has, what a chat is, how variants of a phrase are shown.
Refuses to know: all other keys, tokenizers and their chat templates.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from modules.config.fields import Boolean, EmptyOrText, Text, Weight, not_empty, one_or_more
from modules.config.yaml_file import shown
from modules.runtime.text import one_line, shortened

MOST_PAIRS = 100_000
PHRASES = ("bad_phrases", "good_phrases")
FEWEST = 3  # contexts of a phrase of which one is held out, however small the share


class Section:
    """A mapping of the file: an unknown key is an error. The text under a key describes it wherever keys are shown."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Message(Section):
    """A turn of a chat."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: EmptyOrText
    """The text of the turn."""


@dataclass(frozen=True)
class Chat(Section):
    """A context as a chat: its turns, and how the answer to them begins."""

    messages: tuple[Message, ...]
    answer: str = ""

    def __str__(self) -> str:
        """The chat on one line."""
        turns = [f"{turn.role}: {shortened(one_line(turn.content), keep='start')}" for turn in self.messages]
        return f"{' '.join(turns)} ▸ {self.answer}"


@dataclass(frozen=True)
class Pair(Section):
    """One phrase in one context: the unit that is scored."""

    kind: Literal["BAD", "GOOD"]
    phrase: str
    context: str  # of a chat that is rendered: all text before the phrase, special tokens included
    weight: Weight = 1.0
    chat: Chat | None = None
    variants: tuple[str, ...] = ()  # of an any-of phrase: the texts of which one must follow; `phrase` shows them all

    def __str__(self) -> str:
        """The pair for a message; a long context is cut to its end."""
        return f"the phrase '{self.phrase}' after '{shortened(self.shown)}'"

    @property
    def shown(self) -> str:
        """The context for display."""
        return self.context if self.chat is None else str(self.chat)

    @property
    def each(self) -> tuple["Pair", ...]:
        """A pair for each variant, with that as its only phrase."""
        return tuple(replace(self, phrase=text, variants=()) for text in self.variants) or (self,)

    def as_context(self, **settings: Any) -> Any:
        """The pair's context in the form of a phrase list. settings: its further keys, such as held_out: true."""
        if self.chat is None:
            return {"context": self.context, **settings} if settings else self.context
        answer = {"continue": self.chat.answer} if self.chat.answer else {}
        return {"messages": [asdict(turn) for turn in self.chat.messages], **answer, **settings}

    def written(self) -> dict[str, Any]:
        """The pair for journal and recipe. Empty `chat` and `variants` are left out: most pairs have none."""
        return {key: value for key, value in asdict(self).items() if key not in ("chat", "variants") or value}


@dataclass(frozen=True)
class Context(Section):
    """Where a phrase is scored: behind a text, or as the answer in a chat."""

    context: EmptyOrText | None = None
    """The text before the phrase; may be empty."""
    messages: Annotated[tuple[Message, ...], AfterValidator(not_empty)] | None = None
    """Instead of context: the turns of a chat, each {role: ..., content: ...}, rendered by the base's chat template."""
    continue_: Annotated[EmptyOrText, Field(alias="continue")] = ""
    """In a chat: the beginning of the answer, after which the phrase is scored."""
    weight: Weight | None = None
    """Weight of the phrase in this context, instead of the phrase's own weight."""
    held_out: Boolean = False
    """Score the phrase here, but do not search with it."""

    def __post_init__(self) -> None:
        """Raise ValueError if it is not either a text or a chat."""
        if (self.context is None) == (self.messages is None):
            raise ValueError("needs either context (for a text) or messages (for a chat)")
        if self.continue_ and self.messages is None:
            raise ValueError("continue needs messages")


def _context(value: Any) -> Any:
    return value if isinstance(value, Mapping) else {"context": value}


def _distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    distinct = set()
    for text in texts:
        if text in distinct:
            raise ValueError(f"{shown(text)} is listed twice")
        distinct.add(text)
    return texts


_Context = Annotated[Context, BeforeValidator(_context, json_schema_input_type=EmptyOrText | Context)]


@dataclass(frozen=True, kw_only=True)
class Phrase(Section):
    """A phrase and the contexts in which it is scored."""

    phrase: Annotated[one_or_more(Text), AfterValidator(_distinct)]
    """The text whose probability is measured. Of a list of texts, the probability that any of them follows. See
    docs/phrases.md#write-your-own."""
    weight: Weight = 1.0
    """How much the phrase counts: a factor of its probability in the total."""
    contexts: Annotated[tuple[_Context, ...], AfterValidator(not_empty)]
    """What comes before the phrase: texts, {context: ..., weight: ...}, {context: ..., held_out: true} to score only,
    or chats {messages: ..., continue: ...}. See docs/phrases.md."""


Phrases = tuple[Phrase, ...]
System = EmptyOrText | None


@dataclass(frozen=True)
class PhraseLists(Section):
    """A phrase list of Merge Monster: phrases in contexts, each pair of which is scored."""

    bad_phrases: Phrases = ()
    """What the merged model should say less."""
    good_phrases: Phrases = ()
    """What the merged model should say more."""
    system: System = None
    """System message for all chats in this list that have none."""


def pairs_of(kind: str, phrases: Sequence[Phrase], system: str | None) -> list[tuple[Pair, bool]]:
    """Each phrase in each of its contexts, and whether the context is marked as held out."""
    pairs = []
    for phrase in phrases:
        variants = phrase.phrase if len(phrase.phrase) > 1 else ()
        for context in phrase.contexts:
            text = context.context
            chat = None
            if context.messages is not None:
                text = context.continue_
                chat = Chat(_with_system(context.messages, system), context.continue_)
            weight = phrase.weight if context.weight is None else context.weight
            pair = Pair(kind, " / ".join(phrase.phrase), text, weight, chat, variants)
            pairs.append((pair, context.held_out))
    return pairs


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if system is None or any(turn.role == "system" for turn in messages):
        return messages
    return (Message("system", system), *messages)


def set_aside(pairs: Sequence[tuple[Pair, bool]], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs that are searched, and those that are held out, both in their order.

    pairs: each with whether it is marked as held out. Of each phrase's other contexts, this share is drawn: at least
    one if there are FEWEST, and never all.
    """
    phrases: dict[tuple[str, str], list[int]] = {}
    for number, (pair, is_marked) in enumerate(pairs):
        if not is_marked:
            phrases.setdefault((pair.kind, pair.phrase), []).append(number)
    searched = {number for numbers in phrases.values() for number in numbers}
    for (kind, phrase), numbers in phrases.items() if share else ():
        count = max(round(share * len(numbers)), int(len(numbers) >= FEWEST))
        # Each phrase has its own draw: a change of another phrase in the list does not affect it.
        drawn_numbers = random.Random(f"{seed} {kind} {phrase}").sample(numbers, min(count, len(numbers) - 1))
        searched.difference_update(drawn_numbers)
    searched_pairs = [pair for number, (pair, _) in enumerate(pairs) if number in searched]
    return searched_pairs, [pair for number, (pair, _) in enumerate(pairs) if number not in searched]

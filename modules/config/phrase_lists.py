"""Phrase lists: how the file writes them, and the pairs that they stand for.

Knows: their keys, which weight a context has, what a chat is, how variants of a phrase are shown, how many pairs there
may be. Refuses to know: all other keys, tokenizers and their chat templates.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationInfo

from modules.config.excerpts import shown
from modules.config.fields import Boolean, EmptyOrText, Role, Text, Weight, is_dumped, keys_of, listed
from modules.runtime import one_line, shortened

MOST_PAIRS = 100_000
PHRASES = ("bad_phrases", "good_phrases")

# Of all sections: an unknown key is an error. The text under a key describes it in the JSON schema.
CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Message:
    """A turn of a chat."""

    __pydantic_config__ = CLOSED
    role: Role
    """Whose turn it is."""
    content: EmptyOrText
    """What is said."""


@dataclass(frozen=True)
class Chat:
    """A context as a chat: its turns, and how the answer to them begins."""

    __pydantic_config__ = CLOSED
    messages: tuple[Message, ...]
    answer: str = ""

    def __str__(self) -> str:
        """The chat on one line."""
        turns = [f"{turn.role}: {shortened(one_line(turn.content), keep='start')}" for turn in self.messages]
        return f"{' '.join(turns)} ▸ {self.answer}"


@dataclass(frozen=True)
class Pair:
    """One phrase in one context: the unit that is scored."""

    __pydantic_config__ = CLOSED
    kind: str  # "BAD" or "GOOD"
    phrase: str
    context: str  # of a chat, once it is rendered, all that stands before the phrase, special tokens included
    weight: float = 1.0
    chat: Chat | None = None
    variants: tuple[str, ...] = ()  # of an any-of phrase the texts of which one must follow; `phrase` shows them all

    def __str__(self) -> str:
        """The pair in a message; of a long context its end is shown."""
        return f"the phrase '{self.phrase}' after '{shortened(self.shown)}'"

    @property
    def shown(self) -> str:
        """The context as people read it."""
        return self.context if self.chat is None else str(self.chat)

    @property
    def each(self) -> tuple["Pair", ...]:
        """The pair with each of its variants as its only phrase."""
        return tuple(replace(self, phrase=text, variants=()) for text in self.variants) or (self,)

    def under(self, system: str | None) -> "Pair":
        """The pair with a system turn before its chat, if it is one without."""
        if system is None or self.chat is None or any(turn.role == "system" for turn in self.chat.messages):
            return self
        return replace(self, chat=replace(self.chat, messages=(Message("system", system), *self.chat.messages)))

    def as_context(self, **settings: Any) -> Any:
        """The pair's context as a phrase list has it. settings: what is said of it there, such as held_out: true."""
        if self.chat is None:
            return {"context": self.context, **settings} if settings else self.context
        answer = {"continue": self.chat.answer} if self.chat.answer else {}
        return {"messages": [asdict(turn) for turn in self.chat.messages], **answer, **settings}

    def written(self) -> dict[str, Any]:
        """The pair as journal and recipe have it: most contexts are no chats, most phrases have no variants."""
        return {key: value for key, value in asdict(self).items() if key not in ("chat", "variants") or value}


@dataclass(frozen=True)
class HeldOut(Pair):
    """A pair that is marked to be scored and never searched."""


@dataclass(frozen=True)
class Context:
    """A context with a weight of its own."""

    __pydantic_config__ = CLOSED
    context: EmptyOrText
    """The beginning of a text; "" is the empty one."""
    weight: Weight | None = None
    """How much the phrase matters here, in place of the phrase's own weight."""
    held_out: Boolean = False
    """Score the phrase here, and do not search with it."""


def _turns(value: Any) -> Any:
    if not listed(value):
        raise ValueError("expected at least one turn, such as {role: user, content: ...}")
    return value


@dataclass(frozen=True)
class ChatContext:
    """A chat as a context: rendered by the chat template of the base's tokenizer."""

    __pydantic_config__ = CLOSED
    messages: Annotated[tuple[Annotated[Message, keys_of(Message)], ...], BeforeValidator(_turns)]
    """The turns, each a {role: ..., content: ...}."""
    continue_: Annotated[EmptyOrText, Field(alias="continue")] = ""
    """How the answer begins, behind which the phrase is scored."""
    weight: Weight | None = None
    """How much the phrase matters here, in place of the phrase's own weight."""
    held_out: Boolean = False
    """Score the phrase here, and do not search with it."""


def _context(value: Any) -> Context | ChatContext:
    if not isinstance(value, Mapping):
        return Context(_TEXT.validate_python(value))
    is_chat = not value.keys().isdisjoint(("messages", "continue"))
    if is_chat and "context" in value:
        raise ValueError("context is for a text, messages and continue are for a chat; it can't be both")
    return (_CHAT_CONTEXT if is_chat else _CONTEXT).validate_python(value)


_TEXT = TypeAdapter(EmptyOrText)
_CONTEXT = TypeAdapter(Annotated[Context, keys_of(Context)])
_CHAT_CONTEXT = TypeAdapter(Annotated[ChatContext, keys_of(ChatContext)])
_Context = Annotated[
    Context | ChatContext, PlainValidator(_context, json_schema_input_type=EmptyOrText | Context | ChatContext)
]


def _variants(value: Any) -> tuple[str, ...]:
    return _TEXTS.validate_python(value) if isinstance(value, list) else (_ONE_TEXT.validate_python(value),)


def _distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not texts:
        raise ValueError("expected at least one text")
    twice = next((text for text, count in Counter(texts).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{shown(twice)} stands twice")
    return texts


_ONE_TEXT = TypeAdapter(Text)
_TEXTS = TypeAdapter(Annotated[tuple[Text, ...], AfterValidator(_distinct)])
_Variants = Annotated[
    tuple[str, ...],
    PlainValidator(_variants, json_schema_input_type=Text | Annotated[list[Text], Field(min_length=1)]),
]


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A phrase and the contexts in which it is scored."""

    __pydantic_config__ = CLOSED
    phrase: _Variants
    """What to measure: how probable it is that the model goes on with this; of a list of texts, with any of them."""
    weight: Weight = 1.0
    """How much it matters."""
    contexts: Annotated[tuple[_Context, ...], Field(min_length=1), BeforeValidator(listed)]
    """One or more beginnings, each a text, a {context: ..., weight: ...} with a weight of its own, or a {messages: ...,
    continue: ...}, which is a chat."""


_PAIRS = TypeAdapter(tuple[Pair, ...])
_PHRASES = TypeAdapter(Annotated[tuple[Annotated[Phrase, keys_of(Phrase)], ...], BeforeValidator(listed)])


def _pairs(kind: str) -> PlainValidator:
    """For a tuple of pairs: made of a list of phrases."""

    def pairs(value: Any, info: ValidationInfo) -> tuple[Pair, ...]:
        if is_dumped(info):
            return _PAIRS.validate_python(value)
        return tuple(pair for phrase in _PHRASES.validate_python(value) for pair in _in_contexts(kind, phrase))

    return PlainValidator(pairs, json_schema_input_type=list[Phrase])


def _in_contexts(kind: str, phrase: Phrase) -> Iterator[Pair]:
    shown_as, variants = " / ".join(phrase.phrase), phrase.phrase if len(phrase.phrase) > 1 else ()
    for context in phrase.contexts:
        made = HeldOut if context.held_out else Pair
        weight = phrase.weight if context.weight is None else context.weight
        if isinstance(context, Context):
            yield made(kind, shown_as, context.context, weight, None, variants)
        else:
            chat = Chat(context.messages, context.continue_)
            yield made(kind, shown_as, chat.answer, weight, chat, variants)


BadPhrases = Annotated[tuple[Pair, ...], _pairs("BAD")]
GoodPhrases = Annotated[tuple[Pair, ...], _pairs("GOOD")]
System = EmptyOrText | None


@dataclass(frozen=True)
class PhraseLists:
    """A phrase list of Merge Monster: phrases in contexts, each pair of which is scored."""

    __pydantic_config__ = CLOSED
    bad_phrases: BadPhrases = ()
    """What the merged model should say less."""
    good_phrases: GoodPhrases = ()
    """What the merged model should say more."""
    system: System = None
    """A system turn before all chat contexts of this list that have none."""


def count_pairs(values: Any) -> int:
    """How many pairs a file's lists stand for, before they are made: a short file can stand for very many. A pair
    counts once for each of its phrase's variants."""
    lists = [values.get(key) for key in PHRASES] if isinstance(values, Mapping) else []
    entries = [entry for value in lists if isinstance(value, list) for entry in value if isinstance(entry, Mapping)]
    return sum(
        len(entry["contexts"]) * (len(entry["phrase"]) if isinstance(entry.get("phrase"), list) else 1)
        for entry in entries
        if isinstance(entry.get("contexts"), list)
    )

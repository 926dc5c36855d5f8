"""Phrase lists: how the file writes them, and the pairs that they stand for.

Knows: their keys, which weight a context has, how many pairs there may be. Refuses to know: all other keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter

from modules.config.fields import Boolean, EmptyOrText, Text, Weight, keys_of, listed
from modules.runtime import shortened

MOST_PAIRS = 100_000

# Of all sections: an unknown key is an error. The text under a key describes it in the JSON schema.
CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Pair:
    """One phrase in one context: the unit that is scored."""

    kind: str  # "BAD" or "GOOD"
    phrase: str
    context: str
    weight: float = 1.0

    def __str__(self) -> str:
        """The pair in a message; of a long context its end is shown."""
        return f"the phrase '{self.phrase}' after '{shortened(self.context)}'"


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


def _context(value: Any) -> Any:
    return value if isinstance(value, Mapping) else Context(_TEXT.validate_python(value))


_TEXT = TypeAdapter(EmptyOrText)
_Context = Annotated[Context, keys_of(Context), BeforeValidator(_context, json_schema_input_type=EmptyOrText | Context)]


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A phrase and the contexts in which it is scored."""

    __pydantic_config__ = CLOSED
    phrase: Text
    """What to measure: how probable it is that the model goes on with this."""
    weight: Weight = 1.0
    """How much it matters."""
    contexts: Annotated[tuple[_Context, ...], Field(min_length=1), BeforeValidator(listed)]
    """One or more beginnings, each a text or a {context: ..., weight: ...} with a weight of its own."""


_PHRASES = TypeAdapter(Annotated[tuple[Annotated[Phrase, keys_of(Phrase)], ...], BeforeValidator(listed)])


def _pairs(kind: str) -> PlainValidator:
    """For a tuple of pairs: made of a list of phrases."""

    def pairs(value: Any) -> tuple[Pair, ...]:
        return tuple(
            (HeldOut if context.held_out else Pair)(
                kind, phrase.phrase, context.context, phrase.weight if context.weight is None else context.weight
            )
            for phrase in _PHRASES.validate_python(value)
            for context in phrase.contexts
        )

    return PlainValidator(pairs, json_schema_input_type=list[Phrase])


BadPhrases = Annotated[tuple[Pair, ...], _pairs("BAD")]
GoodPhrases = Annotated[tuple[Pair, ...], _pairs("GOOD")]


@dataclass(frozen=True)
class PhraseLists:
    """A phrase list of Merge Monster: phrases in contexts, each pair of which is scored."""

    __pydantic_config__ = CLOSED
    bad_phrases: BadPhrases = ()
    """What the merged model should say less."""
    good_phrases: GoodPhrases = ()
    """What the merged model should say more."""


def count_pairs(values: Any) -> int:
    """How many pairs a file's lists stand for, before they are made: a short file can stand for very many."""
    lists = [values.get(field.name) for field in fields(PhraseLists)] if isinstance(values, Mapping) else []
    entries = [entry for value in lists if isinstance(value, list) for entry in value if isinstance(entry, Mapping)]
    return sum(len(entry["contexts"]) for entry in entries if isinstance(entry.get("contexts"), list))

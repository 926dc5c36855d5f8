"""Phrase lists and contexts to token ids.

Knows: tokenizers, token ids, which pairs are one and the same, which variants of a phrase exclude each other.
Refuses to know: torch, models, weights.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from modules.config.phrase_lists import Chat, Pair
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize, shortened

# The special tokens that a tokenizer puts before every text (BOS, others, mostly one or none), and behind it.
Frame = tuple[list[int], list[int]]
_NO_FRAME: Frame = ([], [])


@dataclass(frozen=True)
class Encoded:
    """A pair as token ids: `tokens[start:]` are the phrase's, everything before is given. start is at least 1.

    A pair whose phrase has variants is several of these, side by side: see `variants.of_pairs`.
    """

    tokens: tuple[int, ...]
    start: int
    another: bool = False  # whether it is another variant of the same pair as the one before it
    pair: str = field(default="", compare=False)  # as it is called in messages


@dataclass(frozen=True)
class Root:
    """A context as token ids: that with which its completions begin."""

    context: str
    tokens: tuple[int, ...]  # at least one
    spaces: str  # the spaces at the context's end; they are in no token here, a completion begins with them
    chat: Chat | None = None  # that the context is, if it is one

    @property
    def shown(self) -> str:
        """The context as people read it."""
        return self.context if self.chat is None else str(self.chat)


Window = tuple[int, ...]  # token ids of a piece of text
# tokens of a window, and of all that drift is measured on, at most
WINDOW = 256
MEASURED = 4096
MOST_DOUBTS = 10  # that are told one by one

Item = TypeVar("Item")


def doubtful_phrases(pairs: Sequence[Pair]) -> list[str]:
    """What may be a mistake in the lists, a line for each; of many, the first ones and how many more there are."""
    alike = defaultdict[tuple[str, str, bool], list[Pair]](list)
    for variant in (variant for pair in pairs for variant in pair.each):
        # Spaces between context and phrase are the phrase's, on whichever side they are written.
        given = variant.context.rstrip(" ")
        alike[given, variant.context[len(given) :] + variant.phrase, variant.chat is None].append(variant)
    doubts = []
    for same in alike.values():
        kinds = Counter(pair.kind for pair in same)
        for count in kinds.values():
            if count > 1:
                often = "twice and counts double" if count == 2 else f"and counts {count} times"
                doubts.append(f"{same[0]} is listed {often}")
        if len(kinds) > 1:
            doubts.append(f"{same[0]} is listed as bad and as good")
        spaced = [pair for pair in same if pair.context.endswith(" ") and pair.phrase.startswith(" ")]
        doubts += [f"{pair} begins with a space; it is scored with two spaces before it" for pair in spaced]
    more = len(doubts) - MOST_DOUBTS
    return [*doubts[:MOST_DOUBTS], f"and {more} more of this kind"] if more > 0 else doubts


def doubled_tokens(tokenizer: Any, pairs: Sequence[Pair]) -> list[str]:
    """A line if pairs write out what the tokenizer begins every text with anyway: it is taken once."""
    prefix, _ = _frame(tokenizer)
    names = tokenizer.convert_ids_to_tokens(prefix)
    texts = [variant.context + variant.phrase for pair in pairs if pair.chat is None for variant in pair.each]
    written = [text for text in texts if text.lstrip().startswith(tuple(names))]
    doubled = [text for text in written if _doubled(_tokens(tokenizer, text), prefix)]
    if not doubled:
        return []
    what = f"{pluralize(len(doubled), 'pair')} with {''.join(names)}, which the tokenizer adds to every text anyway"
    return [f"{what} ('{shortened(doubled[0])}'); only one is kept"]


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], vocabulary: int, max_tokens: int | None) -> list[Encoded]:
    """Token ids of all pairs, for a model of `vocabulary` embedding rows that takes at most `max_tokens` tokens; of a
    pair whose phrase has variants, those of each.

    Raises ConfigError for a phrase without tokens of its own, and for a pair that the model can't take.
    """
    frame = _frame(tokenizer)
    found = list[Encoded]()
    for pair in pairs:
        for item in _encode_variants(tokenizer, pair, frame):
            length = len(item.tokens)
            if max_tokens is not None and length - 1 > max_tokens:
                raise ConfigError(f"{pair} is {length} tokens long, but the base model takes {max_tokens}; shorten it")
            _check_embedded(tokenizer, pair, item.tokens, vocabulary)
            found.append(replace(item, pair=str(pair)))
    return found


def _encode_variants(tokenizer: Any, pair: Pair, frame: Frame) -> list[Encoded]:
    """The variants of a pair that exclude each other: one that begins with another's tokens is a part of that.

    All go on from the same tokens, so that their probabilities add up. Mostly these are the context's; where a variant
    makes one token of its own beginning and the context's end, all are scored from there on.
    """
    found = [encode_pair(tokenizer, one.context, one.phrase, frame, one.chat is None) for one in pair.each]
    if len(found) == 1:
        return found
    if len({item.tokens[0] for item in found}) > 1:  # not even a special token is before them all
        first = _first_token(tokenizer, pair.phrase)
        found = [item if item.tokens[0] == first else Encoded((first, *item.tokens), item.start + 1) for item in found]
    given = [item.tokens[: item.start] for item in found]
    start = _alike(min(given), max(given))  # what the first and the last in order share, all do
    texts = dict.fromkeys(item.tokens for item in found)
    whole = []
    for tokens in texts:
        beginnings = {tokens[:end] for end in range(start + 1, len(tokens))}
        if beginnings.isdisjoint(texts):
            whole.append(tokens)
    return [Encoded(tokens, start, another=number > 0) for number, tokens in enumerate(whole)]


def _check_embedded(tokenizer: Any, what: object, tokens: Sequence[int], vocabulary: int) -> None:
    if max(tokens) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise ConfigError(f"{what}: the base model has no embedding for its token '{token}'")


def encode_pair(tokenizer: Any, context: str, phrase: str, frame: Frame | None = None, special: bool = True) -> Encoded:
    """Encode context and phrase together and find where the phrase's tokens begin.

    The phrase's tokens are those that reach past the end of the context. Trailing spaces of the context belong to the
    phrase: most tokenizers write a space as the beginning of the next word. A control token of the context that takes
    the white space behind it along is given. What the text writes out of the prefix that the tokenizer adds is taken
    once. frame: what it adds, looked up if it is not given. special: whether it adds anything; a chat template has
    written all special tokens.
    """
    prefix, suffix = (frame or _frame(tokenizer)) if special else _NO_FRAME
    if tokenizer.is_fast:
        tokens, start, end = _split_by_offsets(tokenizer, context, phrase, special)
    else:
        tokens, start, end = _split_by_prefix(tokenizer, context, phrase, suffix, special)
    doubled = _doubled(tokens, prefix)
    if doubled:
        tokens = _once(tokens, prefix)
        start = max(start - doubled, len(prefix))
        end = end - doubled
    if start >= end:
        raise ConfigError(f"{Pair('', phrase, context)} has no tokens in this model's vocabulary")
    if start == 0:
        first = _first_token(tokenizer, phrase)
        start = 1
        if tokens[0] != first or end == 1:  # it is not written out
            tokens = [first, *tokens]
            end = end + 1
    return Encoded(tuple(tokens[:end]), start)


def neutral_windows(
    tokenizer: Any, texts: Sequence[str], vocabulary: int, max_tokens: int | None, for_trials: int = 0
) -> tuple[list[Window], list[Window]]:
    """Texts cut into windows of WINDOW tokens, what the tokenizer begins every text with first in each: at most
    MEASURED tokens, evenly spread, on which drift is measured; and others, of the beginnings of the texts, about
    `for_trials` tokens but never more than half of a text, on which it is while trials are made.

    Windows with a token that the model's `vocabulary` rows lack, and those of a single token, are left out.
    """
    prefix, _ = _frame(tokenizer)
    size = min(WINDOW, max_tokens or WINDOW) - len(prefix)
    beginnings = list[Window]()
    others = list[Window]()
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        end = min(-(-for_trials // len(texts)), len(tokens) // 2)
        for windows, part in ((beginnings, tokens[:end]), (others, tokens[end:])):
            for first in range(0, len(part), size):
                window = (*prefix, *part[first : first + size])
                if len(window) > 1 and max(window) < vocabulary:
                    windows.append(window)
    return spread(others, MEASURED // (size + len(prefix))), beginnings


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[number * (len(items) - 1) // (count - 1)] for number in range(count)]


def encode_prompt(
    tokenizer: Any, prompt: str, vocabulary: int, max_tokens: int | None, text: str | None = None
) -> list[int]:
    """Token ids of a prompt. text: as a chat template has written it; None: it is the beginning of a text.

    Raises ConfigError for a prompt that has no tokens, and for one that the model can't take with an answer.
    """
    if text is not None:
        tokens = _tokens(tokenizer, text, special=False)  # the template has written them
    else:
        prefix, suffix = _frame(tokenizer)
        tokens = _once(_open(_tokens(tokenizer, prompt), suffix), prefix)
    what = f"the prompt '{shortened(prompt)}'"
    if not tokens:
        raise ConfigError(f"{what} has no tokens in this model's vocabulary")
    if max_tokens is not None and len(tokens) >= max_tokens:
        raise ConfigError(f"{what} is {len(tokens)} tokens long, but the base model takes {max_tokens} with the answer")
    _check_embedded(tokenizer, what, tokens, vocabulary)
    return tokens


def encode_contexts(
    tokenizer: Any, contexts: Sequence[str], vocabulary: int, chats: Sequence[Chat | None] = ()
) -> list[Root]:
    """Token ids of contexts as `encode_pair` sees them before a phrase: without the spaces at their ends, unless a
    control token takes them along. chats: those that the contexts are, if any is one.

    Raises ConfigError for a context with a token that the model's `vocabulary` rows lack.
    """
    roots = []
    frame = _frame(tokenizer)
    for context, chat in zip(contexts, chats or [None] * len(contexts), strict=True):
        prefix, suffix = frame if chat is None else _NO_FRAME
        given, spaces = _given(tokenizer, context, suffix, special=chat is None)
        tokens = _once(given, prefix) if context.strip(" ") else []
        tokens = tokens or [_first_token(tokenizer, context)]
        _check_embedded(tokenizer, f"the context '{shortened(context)}'", tokens, vocabulary)
        roots.append(Root(context, tuple(tokens), spaces, chat))
    return roots


def _tokens(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _frame(tokenizer: Any) -> Frame:
    """What the tokenizer puts around every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = _tokens(tokenizer, "a")
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return whole[:first], whole[first + len(plain) :]
    return [], []


def _doubled(tokens: Sequence[int], prefix: Sequence[int]) -> int:
    """With how many tokens of the prefix, which the tokenizer has put before a text, the text begins itself."""
    own = tokens[len(prefix) :] if list(tokens[: len(prefix)]) == list(prefix) else []
    runs = (prefix[first:end] for end in range(len(prefix) + 1) for first in range(end))
    return max((len(run) for run in runs if list(own[: len(run)]) == list(run)), default=0)


def _once(tokens: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """Tokens without those that are in the prefix already."""
    return [*tokens[: len(prefix)], *tokens[len(prefix) + _doubled(tokens, prefix) :]]


def _split_by_offsets(tokenizer: Any, context: str, phrase: str, special: bool) -> tuple[list[int], int, int]:
    """Tokens of context and phrase, and the range of those that are the phrase's."""
    text = context + phrase
    boundary = len(context.rstrip(" "))
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    tokens = encoding["input_ids"]
    offsets = encoding["offset_mapping"]
    beyond = [i for i, (_, end) in enumerate(offsets) if end > boundary]
    if not beyond:
        return tokens, 0, 0
    first = beyond[0]
    begin, end = offsets[first]
    if begin < boundary and text[boundary:end].isspace() and _takes_white_space(tokenizer, tokens[first]):
        first += 1
    return tokens, first, beyond[-1] + 1


def _split_by_prefix(
    tokenizer: Any, context: str, phrase: str, suffix: Sequence[int], special: bool
) -> tuple[list[int], int, int]:
    """The same for tokenizers without offsets: the tokens after the longest prefix shared with the context alone."""
    tokens = _tokens(tokenizer, context + phrase, special)
    (given, _) = _given(tokenizer, context, suffix, special)
    return tokens, _alike(tokens, given), len(_open(tokens, suffix))


def _given(tokenizer: Any, context: str, suffix: Sequence[int], special: bool) -> tuple[list[int], str]:
    """A context's tokens as they stand before a phrase, and the spaces at its end that are left to the phrase."""
    given = context.rstrip(" ")
    if given and given != context:
        tokens = _open(_tokens(tokenizer, context, special), suffix)
        if tokens and _takes_white_space(tokenizer, tokens[-1]):
            return tokens, ""
    return _open(_tokens(tokenizer, given, special), suffix), context[len(given) :]


def _takes_white_space(tokenizer: Any, token: int) -> bool:
    """Whether it is a control token that takes the white space behind it along: by a flag of its own (rstrip), or as
    the end of its name."""
    try:
        added = tokenizer.added_tokens_decoder.get(token)
    except NotImplementedError:  # of mistral-common's, which reads no control token in a text
        return False
    name = added.content if added else ""
    return bool(name.strip()) and (added.rstrip or name != name.rstrip())


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    differing = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def _open(tokens: list[int], suffix: Sequence[int]) -> list[int]:
    """Tokens without those with which the tokenizer closes every text."""
    end = len(tokens) - len(suffix)
    return tokens[:end] if tokens[end:] == list(suffix) else tokens


def _first_token(tokenizer: Any, text: str) -> int:
    """What a text begins with that has nothing before it: BOS, or EOS where there is no BOS."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ConfigError(f"the phrase '{text}' needs a context: this tokenizer has neither a BOS nor an EOS token")
    return token

"""Phrase lists and contexts to token ids.

Knows: tokenizers, token ids, which pairs are duplicates, which variants of a phrase exclude each other.
Refuses to know: torch, models, weights.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from modules.config.phrase_lists import Chat, Pair
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize, shortened

# The special tokens that a tokenizer puts before every text (BOS and others, mostly one or none), and behind it.
Frame = tuple[list[int], list[int]]
_NO_FRAME: Frame = ([], [])


@dataclass(frozen=True)
class Encoded:
    """A pair as token ids: `tokens[start:]` are the phrase's, those before are the context's. start is at least 1.

    A pair whose phrase has variants is several of these, side by side: see `scorer.of_pairs`.
    """

    tokens: tuple[int, ...]
    start: int
    another: bool = False  # whether it is a further variant of the preceding one's pair
    pair: str = field(default="", compare=False)  # the pair's name in messages


@dataclass(frozen=True)
class Root:
    """A context as token ids, the root of its completions."""

    context: str
    tokens: tuple[int, ...]  # at least one
    spaces: str  # the spaces at the context's end; they are in no token here, a completion begins with them
    chat: Chat | None = None  # the chat, if the context is one

    @property
    def shown(self) -> str:
        """The context as people read it."""
        return self.context if self.chat is None else str(self.chat)


Window = tuple[int, ...]  # token ids of a piece of text
# At most: tokens of a window, and of all windows on which drift is measured.
WINDOW = 256
MEASURED = 4096
MOST_DOUBTS = 10  # with a line of their own

Item = TypeVar("Item")


def doubtful_phrases(pairs: Sequence[Pair]) -> list[str]:
    """Lines about likely mistakes in the lists, one each; of many, the first ones and the number of the rest."""
    by_text = defaultdict[tuple[str, str, bool], list[Pair]](list)
    for variant in (variant for pair in pairs for variant in pair.each):
        # Spaces between context and phrase belong to the phrase, whichever of the two they are written in.
        context = variant.context.rstrip(" ")
        by_text[context, variant.context[len(context) :] + variant.phrase, variant.chat is None].append(variant)
    doubts = []
    for same_text in by_text.values():
        kinds = Counter(pair.kind for pair in same_text)
        for count in kinds.values():
            if count > 1:
                repetition = "twice and counts double" if count == 2 else f"and counts {count} times"
                doubts.append(f"{same_text[0]} is listed {repetition}")
        if len(kinds) > 1:
            doubts.append(f"{same_text[0]} is listed as bad and as good")
        spaced = [pair for pair in same_text if pair.context.endswith(" ") and pair.phrase.startswith(" ")]
        doubts += [f"{pair} begins with a space; it is scored with two spaces before it" for pair in spaced]
    omitted = len(doubts) - MOST_DOUBTS
    return [*doubts[:MOST_DOUBTS], f"and {omitted} more of this kind"] if omitted > 0 else doubts


def doubled_tokens(tokenizer: Any, pairs: Sequence[Pair]) -> list[str]:
    """A line if pairs contain the tokens that the tokenizer puts before every text anyway: they are kept once."""
    prefix, _ = _frame(tokenizer)
    names = tokenizer.convert_ids_to_tokens(prefix)
    texts = [variant.context + variant.phrase for pair in pairs if pair.chat is None for variant in pair.each]
    written = [text for text in texts if text.lstrip().startswith(tuple(names))]
    doubled = [text for text in written if _repeated_tokens(_tokens(tokenizer, text), prefix)]
    if not doubled:
        return []
    finding = f"{pluralize(len(doubled), 'pair')} with {''.join(names)}, which the tokenizer adds to every text anyway"
    return [f"{finding} ('{shortened(doubled[0])}'); only one is kept"]


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], vocabulary: int, max_tokens: int | None) -> list[Encoded]:
    """Token ids of all pairs, and of each variant of a phrase. The model has `vocabulary` embedding rows and takes at
    most `max_tokens` tokens.

    Raises ConfigError for a phrase without tokens of its own, and for a pair that the model can't take.
    """
    frame = _frame(tokenizer)
    encoded = list[Encoded]()
    for pair in pairs:
        for variant in _encode_variants(tokenizer, pair, frame):
            length = len(variant.tokens)
            if max_tokens is not None and length - 1 > max_tokens:
                raise ConfigError(f"{pair} is {length} tokens long, but the base model takes {max_tokens}; shorten it")
            _check_embedded(tokenizer, pair, variant.tokens, vocabulary)
            encoded.append(replace(variant, pair=str(pair)))
    return encoded


def _encode_variants(tokenizer: Any, pair: Pair, frame: Frame) -> list[Encoded]:
    """The variants of a pair that exclude each other: one that begins with all tokens of another is left out, since the
    other's probability includes it.

    All start from the same tokens, so that their probabilities add up. Mostly these are the context's; if a variant's
    beginning and the context's end make one token, all are scored from that token on.
    """
    variants = [
        encode_pair(tokenizer, variant.context, variant.phrase, frame, variant.chat is None) for variant in pair.each
    ]
    if len(variants) == 1:
        return variants
    if (
        len({encoded.tokens[0] for encoded in variants}) > 1
    ):  # they have no first token in common, not even a special one
        first = _first_token(tokenizer, pair.phrase)
        variants = [
            encoded if encoded.tokens[0] == first else Encoded((first, *encoded.tokens), encoded.start + 1)
            for encoded in variants
        ]
    contexts = [encoded.tokens[: encoded.start] for encoded in variants]
    start = _common_length(
        min(contexts), max(contexts)
    )  # the prefix that the first and the last in order share, all share
    distinct = dict.fromkeys(encoded.tokens for encoded in variants)
    exclusive = []
    for tokens in distinct:
        beginnings = {tokens[:end] for end in range(start + 1, len(tokens))}
        if beginnings.isdisjoint(distinct):
            exclusive.append(tokens)
    return [Encoded(tokens, start, another=number > 0) for number, tokens in enumerate(exclusive)]


def _check_embedded(tokenizer: Any, label: object, tokens: Sequence[int], vocabulary: int) -> None:
    if max(tokens) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise ConfigError(f"{label}: the base model has no embedding for its token '{token}'")


def encode_pair(tokenizer: Any, context: str, phrase: str, frame: Frame | None = None, special: bool = True) -> Encoded:
    """Encode context and phrase together and find where the phrase's tokens begin.

    The phrase's tokens are those that reach past the end of the context. Trailing spaces of the context belong to the
    phrase: most tokenizers write a space as the beginning of the next word. A control token of the context that
    includes the white space behind it belongs to the context. Tokens of the tokenizer's prefix that the text contains
    as well are kept once. frame: the special tokens it adds, looked up if not given. special: whether it adds any; a
    chat template has written them all already.
    """
    prefix, suffix = (frame or _frame(tokenizer)) if special else _NO_FRAME
    if tokenizer.is_fast:
        tokens, start, end = _split_by_offsets(tokenizer, context, phrase, special)
    else:
        tokens, start, end = _split_by_prefix(tokenizer, context, phrase, suffix, special)
    doubled = _repeated_tokens(tokens, prefix)
    if doubled:
        tokens = _without_repeat(tokens, prefix)
        start = max(start - doubled, len(prefix))
        end = end - doubled
    if start >= end:
        raise ConfigError(f"{Pair('', phrase, context)} has no tokens in this model's vocabulary")
    if start == 0:
        first = _first_token(tokenizer, phrase)
        start = 1
        if tokens[0] != first or end == 1:  # the text does not contain it
            tokens = [first, *tokens]
            end = end + 1
    return Encoded(tuple(tokens[:end]), start)


def neutral_windows(
    tokenizer: Any, texts: Sequence[str], vocabulary: int, max_tokens: int | None, for_trials: int = 0
) -> tuple[list[Window], list[Window]]:
    """Texts cut into windows of WINDOW tokens, each with the tokenizer's prefix.

    The first list is for the drift that is shown: at most MEASURED tokens, evenly spread. The second is for the drift
    of trials: about `for_trials` tokens from the beginnings of the texts, never more than half of a text. Windows with
    a token beyond the model's `vocabulary` rows, and those of a single token, are left out.
    """
    prefix, _ = _frame(tokenizer)
    size = min(WINDOW, max_tokens or WINDOW) - len(prefix)
    beginnings = list[Window]()
    rest_windows = list[Window]()
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        end = min(-(-for_trials // len(texts)), len(tokens) // 2)
        for windows, part in ((beginnings, tokens[:end]), (rest_windows, tokens[end:])):
            for first in range(0, len(part), size):
                window = (*prefix, *part[first : first + size])
                if len(window) > 1 and max(window) < vocabulary:
                    windows.append(window)
    return spread(rest_windows, MEASURED // (size + len(prefix))), beginnings


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[number * (len(items) - 1) // (count - 1)] for number in range(count)]


def encode_prompt(
    tokenizer: Any, prompt: str, vocabulary: int, max_tokens: int | None, text: str | None = None
) -> list[int]:
    """Token ids of a prompt. text: the prompt as a chat template writes it; None if the prompt is plain text.

    Raises ConfigError for a prompt that has no tokens, and for one that leaves the model no room for an answer.
    """
    if text is not None:
        tokens = _tokens(tokenizer, text, special=False)  # the template has written them
    else:
        prefix, suffix = _frame(tokenizer)
        tokens = _without_repeat(_without_suffix(_tokens(tokenizer, prompt), suffix), prefix)
    label = f"the prompt '{shortened(prompt)}'"
    if not tokens:
        raise ConfigError(f"{label} has no tokens in this model's vocabulary")
    if max_tokens is not None and len(tokens) >= max_tokens:
        raise ConfigError(
            f"{label} is {len(tokens)} tokens long, but the base model takes {max_tokens} with the answer"
        )
    _check_embedded(tokenizer, label, tokens, vocabulary)
    return tokens


def encode_contexts(
    tokenizer: Any, contexts: Sequence[str], vocabulary: int, chats: Sequence[Chat | None] = ()
) -> list[Root]:
    """Token ids of contexts as `encode_pair` makes them before a phrase: without the spaces at their ends, unless a
    control token includes these. chats: for each context its chat, or None; empty if none is a chat.

    Raises ConfigError for a context with a token beyond the model's `vocabulary` rows.
    """
    roots = []
    frame = _frame(tokenizer)
    for context, chat in zip(contexts, chats or [None] * len(contexts), strict=True):
        prefix, suffix = frame if chat is None else _NO_FRAME
        context_tokens, spaces = _tokens_before_phrase(tokenizer, context, suffix, special=chat is None)
        tokens = _without_repeat(context_tokens, prefix) if context.strip(" ") else []
        tokens = tokens or [_first_token(tokenizer, context)]
        _check_embedded(tokenizer, f"the context '{shortened(context)}'", tokens, vocabulary)
        roots.append(Root(context, tuple(tokens), spaces, chat))
    return roots


def _tokens(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _frame(tokenizer: Any) -> Frame:
    """The special tokens that the tokenizer puts around every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = _tokens(tokenizer, "a")
    for first in range(len(framed) - len(plain) + 1):
        if framed[first : first + len(plain)] == plain:
            return framed[:first], framed[first + len(plain) :]
    return [], []


def _repeated_tokens(tokens: Sequence[int], prefix: Sequence[int]) -> int:
    """The number of tokens behind the tokenizer's prefix that repeat a part of it at the beginning of a text."""
    text_tokens = tokens[len(prefix) :] if list(tokens[: len(prefix)]) == list(prefix) else []
    runs = (prefix[first:end] for end in range(len(prefix) + 1) for first in range(end))
    return max((len(run) for run in runs if list(text_tokens[: len(run)]) == list(run)), default=0)


def _without_repeat(tokens: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """Tokens without those that repeat the prefix."""
    return [*tokens[: len(prefix)], *tokens[len(prefix) + _repeated_tokens(tokens, prefix) :]]


def _split_by_offsets(tokenizer: Any, context: str, phrase: str, special: bool) -> tuple[list[int], int, int]:
    """Tokens of context and phrase, and the range of the phrase's tokens."""
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
    """The same for tokenizers without offsets. The phrase begins where the tokens differ from the context's alone."""
    tokens = _tokens(tokenizer, context + phrase, special)
    (context_tokens, _) = _tokens_before_phrase(tokenizer, context, suffix, special)
    return tokens, _common_length(tokens, context_tokens), len(_without_suffix(tokens, suffix))


def _tokens_before_phrase(tokenizer: Any, context: str, suffix: Sequence[int], special: bool) -> tuple[list[int], str]:
    """A context's tokens before a phrase, and the spaces at its end that belong to the phrase."""
    given = context.rstrip(" ")
    if given and given != context:
        tokens = _without_suffix(_tokens(tokenizer, context, special), suffix)
        if tokens and _takes_white_space(tokenizer, tokens[-1]):
            return tokens, ""
    return _without_suffix(_tokens(tokenizer, given, special), suffix), context[len(given) :]


def _takes_white_space(tokenizer: Any, token: int) -> bool:
    """Whether a token is a control token that includes the white space behind it: by its flag rstrip, or because its
    name ends in white space."""
    try:
        added = tokenizer.added_tokens_decoder.get(token)
    except NotImplementedError:  # of mistral-common's, which reads no control token in a text
        return False
    name = added.content if added else ""
    return bool(name.strip()) and (added.rstrip or name != name.rstrip())


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    differing = (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(first), len(second)))


def _without_suffix(tokens: list[int], suffix: Sequence[int]) -> list[int]:
    """Tokens without the suffix that the tokenizer puts behind every text."""
    end = len(tokens) - len(suffix)
    return tokens[:end] if tokens[end:] == list(suffix) else tokens


def _first_token(tokenizer: Any, text: str) -> int:
    """The token before a text that has no context: BOS, or EOS if the tokenizer has no BOS."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ConfigError(f"the phrase '{text}' needs a context: this tokenizer has neither a BOS nor an EOS token")
    return token

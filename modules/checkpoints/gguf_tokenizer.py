"""The tokenizer of a GGUF file: built by transformers, compared with the file's lists, corrected where they differ.

Knows: what the keys tokenizer.ggml.* mean to llama.cpp (its src/llama-vocab.cpp), which tokens are never split.
Refuses to know: tensors, configurations, where the tokenizer is kept.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer, read_gguf_metadata

from modules.checkpoints.gguf_header import MERGES, TOKENS
from modules.checkpoints.gguf_splits import BEGINS_WITH_BOS, TAKES_WHOLE_WORDS, settle_split
from modules.runtime.errors import ConfigError, first_line, without_panics
from modules.runtime.text import pluralize, shortened

_KEY = "tokenizer.ggml."
_BYTE_LEVEL = "gpt2"
_SENTENCEPIECE = "llama"
_GEMMA_4 = "gemma4"
_ALPHABET = frozenset(bytes_to_unicode().values())  # of byte-level tokens: a character for each byte
_SPACE = "\u2581"  # in SentencePiece's tokens
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_NAMED = (*_ROLES.values(), "eot_token_id", "eom_token_id")
_UNTYPED = f"the file does not mark its control tokens ({_KEY}token_type), so its tokenizer may split some"
_HINT = "set the key tokenizer to the original model's folder"


@dataclass(frozen=True)
class Lists:
    """The file's lists and settings of its tokenizer."""

    tokens: Sequence[str]  # by their ids
    whole: Mapping[int, bool]  # id of a token that is never split -> whether it is special
    roles: Mapping[str, str | None]  # bos_token, ... -> the token
    adds_bos: bool  # before every text
    adds_eos: bool  # after every text


@dataclass(frozen=True)
class Rebuilt:
    """The tokenizer that a file describes."""

    tokenizer: PreTrainedTokenizerFast
    lists: Lists
    doubts: list[str]  # a line about each setting that the file leaves open


def rebuild_tokenizer(file: Path) -> Rebuilt:
    """The tokenizer that a GGUF file describes. Raises ConfigError if its lists are inconsistent or unusable."""
    try:
        keys, _ = read_gguf_metadata(str(file), (TOKENS, MERGES))
        tokenizer_keys = {key.removeprefix(_KEY): value for key, value in keys.items() if key.startswith(_KEY)}
        contradiction = _contradiction(tokenizer_keys)
    except Exception as error:  # of the reader, for a damaged file or a value of another type
        raise _refusal(file, f"can't be read ({first_line(error)})") from None
    if contradiction:
        raise _refusal(file, f"can't be rebuilt: {contradiction}")
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    values = {
        field: keys[f"tokenizer.{gguf_name}"] for gguf_name, field in names.items() if f"tokenizer.{gguf_name}" in keys
    }
    template = keys.get("tokenizer.chat_template") or ""
    try:
        with without_panics():
            state = json.loads(convert_gguf_tokenizer(keys["general.architecture"], values)[0].to_str())
            merged = set(map("".join, state["model"].get("merges", ())))
            lists = _lists(tokenizer_keys, merged, template)
            backend = _mended_tokenizer(state, tokenizer_keys, lists)
        doubts = [] if tokenizer_keys.get("token_type") is not None else [_UNTYPED]
        if tokenizer_keys.get("model") == _BYTE_LEVEL:
            doubts += settle_split(backend, tokenizer_keys.get("pre"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            add_bos_token=lists.adds_bos,
            add_eos_token=lists.adds_eos,
            chat_template=template or None,
            **lists.roles,
        )
        return Rebuilt(tokenizer, lists, [f"{doubt}; {_HINT}" for doubt in doubts])
    except Exception as error:  # the tokenizer library raises bare Exception
        raise _refusal(file, f"can't be rebuilt ({first_line(error)})") from None


def check_rebuilt(file: Path, tokenizer: Any, lists: Lists) -> None:
    """Compare a tokenizer with a file's lists: every token, and texts with the tokens that are never split. Raises
    ConfigError with the first difference."""
    difference = _difference(tokenizer, lists)
    if difference:
        raise _refusal(file, f"can't be rebuilt: {difference}")


def _refusal(file: Path, trouble: str) -> ConfigError:
    return ConfigError(f"{file}: its tokenizer {trouble}; {_HINT}")


def _contradiction(keys: Mapping[str, Any]) -> str | None:
    """Why a file's tokens can't be known, if its keys are inconsistent or incomplete; else None."""
    tokens = keys.get("tokens") or ()
    size = len(tokens)
    if not size:
        return f"the file lists no tokens ({TOKENS})"
    twice = [token for token, count in Counter(tokens).items() if count > 1 and token]
    if twice:
        return f"token {shortened(twice[0])!r} is listed more than once ({TOKENS})"
    for name in ("token_type", "scores"):
        if keys.get(name) is not None and len(keys[name]) != size:
            return f"{_KEY}{name} has {len(keys[name]):,} entries for {pluralize(size, 'token')}"
    if keys.get("merges") is None and (keys.get("model") == _BYTE_LEVEL or keys.get("scores") is None):
        return f"the file has neither merges nor scores ({MERGES})"
    for name in _NAMED:
        if not 0 <= keys.get(name, 0) < size:
            return f"{_KEY}{name} is {keys[name]}, but there are {pluralize(size, 'token')}"
    return None


def _lists(keys: Mapping[str, Any], merged: Collection[str], template: str) -> Lists:
    """The file's lists. merged: the tokens that merges make; template: the chat template."""
    model = keys.get("model")
    tokens = keys["tokens"]
    types = keys.get("token_type")
    named = {keys.get(name) for name in _NAMED}
    whole = {}
    for number, token in enumerate(tokens):
        is_ordinary = len(token) == 1 or token in merged  # a text can be tokenized to it
        if types is not None:
            kind = types[number]
        elif is_ordinary or re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = TokenType.NORMAL
        else:
            kind = TokenType.CONTROL
        if kind == TokenType.NORMAL and not is_ordinary:
            # The type may be wrong: no text is tokenized to it unless it is taken whole.
            is_beyond_bytes = model == _BYTE_LEVEL and not _ALPHABET.issuperset(token)
            kind = TokenType.CONTROL if is_beyond_bytes or number in named or token in template else kind
        if token and kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            whole[number] = kind != TokenType.USER_DEFINED
    roles: dict[str, str | None] = dict.fromkeys(_ROLES)
    for role, name in _ROLES.items():
        number = keys.get(name)
        # An ordinary token must not be padding or unknown: as a special token it would be cut out of every word.
        if number is not None and (number in whole or role in ("bos_token", "eos_token")):
            roles[role] = tokens[number]
    adds_bos = model == _SENTENCEPIECE or (model == _BYTE_LEVEL and keys.get("pre") in BEGINS_WITH_BOS)
    adds_bos = bool(keys.get("add_bos_token", adds_bos)) and model != _GEMMA_4  # whose chat template writes it
    adds_eos = bool(keys.get("add_eos_token", False))
    return Lists(
        tokens,
        whole,
        roles,
        adds_bos=adds_bos and roles["bos_token"] is not None,
        adds_eos=adds_eos and roles["eos_token"] is not None,
    )


def _mended_tokenizer(state: dict[str, Any], keys: Mapping[str, Any], lists: Lists) -> Tokenizer:
    """The tokenizer that transformers has built, with the file's tokens: exactly those listed as whole are never split.
    state: the tokenizer as JSON, which is changed."""
    model = state["model"]
    if model["type"] != "BPE":
        return Tokenizer.from_str(json.dumps(state))
    if keys.get("model") == _BYTE_LEVEL:
        model["vocab"] = {token: number for number, token in enumerate(lists.tokens)}
        model["ignore_merges"] = keys.get("pre") in TAKES_WHOLE_WORDS
    else:
        model["unk_token"] = lists.roles["unk_token"]
    if keys.get("model") == _SENTENCEPIECE:
        _settle_spaces(state, keys.get("add_space_prefix", True))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = [
        {"id": number, "content": lists.tokens[number], **plain, "special": special}
        for number, special in lists.whole.items()
        if lists.tokens[number] in model["vocab"]  # not so Gemma's runs of spaces, which are merged
    ]
    return Tokenizer.from_str(json.dumps(state))


def _settle_spaces(state: dict[str, Any], prefixed: bool) -> None:
    """Put a space before every stretch of text between whole tokens if `prefixed`, else none, as SentencePiece does:
    even if the text begins with a space. state: a tokenizer as JSON, which is changed."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepended = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    steps = [step for step in state["decoder"]["decoders"] if step["type"] != "Strip"]
    state["normalizer"] = {"type": "Sequence", "normalizers": [*prepended, replaced]}
    state["pre_tokenizer"] = None
    state["decoder"]["decoders"] = steps + stripped


def _difference(tokenizer: Any, lists: Lists) -> str | None:
    """The first difference between a tokenizer and a file's lists; None if there is none."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(lists.tokens))))
    for number, (rebuilt_token, listed_token) in enumerate(zip(names, lists.tokens, strict=True)):
        if rebuilt_token != listed_token and (rebuilt_token or "").replace(_SPACE, " ") != listed_token:
            return f"token {number} is {listed_token!r} in the file, but would be {rebuilt_token!r}"
    beyond = max(tokenizer.get_vocab().values()) + 1 - len(lists.tokens)
    if beyond > 0:
        return f"it would have {pluralize(beyond, 'token')} more than the file"
    for name in _ROLES:
        if getattr(tokenizer, name) != lists.roles[name]:
            return f"{name} is {lists.roles[name]!r} in the file, but would be {getattr(tokenizer, name)!r}"
    framed = tokenizer("a")["input_ids"]
    prefix = [tokenizer.bos_token_id] if lists.adds_bos else []
    suffix = [tokenizer.eos_token_id] if lists.adds_eos else []
    if framed != [*prefix, *tokenizer("a", add_special_tokens=False)["input_ids"], *suffix]:
        return f"a text would be tokenized as {tokenizer.convert_ids_to_tokens(framed)}"
    vocabulary = tokenizer.get_vocab()
    for number in lists.whole:
        token = lists.tokens[number]
        if token in vocabulary and number not in tokenizer(f"a{token}a", add_special_tokens=False)["input_ids"]:
            return f"token {token!r} would be split"
    return None

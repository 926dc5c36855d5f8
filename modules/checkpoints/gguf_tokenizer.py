"""The tokenizer of a GGUF file: built by transformers, compared with the file's own lists, mended where they differ.

Knows: what the keys tokenizer.ggml.* mean to llama.cpp (its src/llama-vocab.cpp), which tokens are taken whole.
Refuses to know: tensors, configurations, where the tokenizer is kept.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer, read_gguf_metadata

from modules.checkpoints.gguf_header import MERGES, TOKENS
from modules.checkpoints.gguf_splits import BEGINS_WITH_BOS, TAKES_WHOLE_WORDS, TEXTS, settle_split
from modules.runtime import ConfigError, counted, first_line, shortened, without_panics

_KEY = "tokenizer.ggml."
_BYTE_LEVEL, _SENTENCEPIECE, _GEMMA_4 = "gpt2", "llama", "gemma4"
_ALPHABET = frozenset(bytes_to_unicode().values())  # of byte-level tokens: a character for each byte
_SPACE = "\u2581"  # in SentencePiece's tokens
_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
_ROLES |= {"pad_token": "padding_token_id"}
_NAMED = (*_ROLES.values(), "eot_token_id", "eom_token_id")
_UNTYPED = f"the file does not say which tokens are control tokens ({_KEY}token_type), so its tokenizer may cut some"
_HINT = "set tokenizer: to the folder of the original's"


class _Kind(IntEnum):
    """What a file says of each of its tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Lists:
    """What a file says of its tokenizer."""

    keys: Mapping[str, Any]  # all of the file's
    merged: frozenset[str] = frozenset()  # the tokens that merges make

    def get(self, name: str, default: Any = None) -> Any:
        """The value of tokenizer.ggml.NAME."""
        return self.keys.get(_KEY + name, default)

    @property
    def model(self) -> str:
        """How tokens are made: gpt2 (of bytes), llama (SentencePiece), ..."""
        return self.get("model", "")

    @property
    def tokens(self) -> list[str]:
        """The tokens' texts, by their ids."""
        return self.get("tokens")

    @property
    def chat_template(self) -> str:
        """The text of the chat template, empty if there is none."""
        return self.keys.get("tokenizer.chat_template") or ""

    @property
    def is_typed(self) -> bool:
        """Whether the file says which tokens are control tokens."""
        return self.get("token_type") is not None

    def is_ordinary(self, token: str) -> bool:
        """Whether a token comes about in the middle of a text: a single character, or what a merge makes."""
        return len(token) == 1 or token in self.merged

    def kind(self, number: int) -> int:
        """What the file says of a token; if it says nothing, those that no merge makes are taken for control tokens."""
        if self.is_typed:
            return self.get("token_type")[number]
        token = self.tokens[number]
        is_text = self.is_ordinary(token) or re.fullmatch("<0x[0-9A-F]{2}>", token)
        return _Kind.NORMAL if is_text else _Kind.CONTROL

    @cached_property
    def whole(self) -> dict[int, bool]:
        """The tokens that are taken whole wherever they stand in a text, and whether each is a special one."""
        named = {self.get(name) for name in _NAMED}
        whole = {}
        for number, token in enumerate(self.tokens):
            kind = self.kind(number)
            if kind in (_Kind.CONTROL, _Kind.UNKNOWN):
                whole[number] = True
            elif kind == _Kind.USER_DEFINED:
                whole[number] = False
            elif kind == _Kind.NORMAL and not self.is_ordinary(token) and self._is_meant_whole(number, named):
                whole[number] = True
        return {number: special for number, special in whole.items() if self.tokens[number]}

    def _is_meant_whole(self, number: int, named: set[int]) -> bool:
        """Whether a token that no merge makes must still come about, though the file calls it a normal one."""
        token = self.tokens[number]
        if self.model == _BYTE_LEVEL and not _ALPHABET.issuperset(token):
            return True
        return number in named or token in self.chat_template

    def role(self, name: str) -> str | None:
        """The token that plays a part such as bos_token. To pad and to be unknown is no part for an ordinary token: it
        would be cut out of every word."""
        number = self.get(_ROLES[name])
        if number is None or (number not in self.whole and name in ("unk_token", "pad_token")):
            return None
        return self.tokens[number]

    @property
    def adds_bos(self) -> bool:
        """Whether every text begins with BOS."""
        if self.model == _GEMMA_4:
            return False  # its chat template writes it: so transformers has it
        default = self.model == _SENTENCEPIECE or (self.model == _BYTE_LEVEL and self.get("pre") in BEGINS_WITH_BOS)
        return self.role("bos_token") is not None and bool(self.get("add_bos_token", default))

    @property
    def adds_eos(self) -> bool:
        """Whether every text ends with EOS."""
        return self.role("eos_token") is not None and bool(self.get("add_eos_token", False))


@dataclass(frozen=True)
class Rebuilt:
    """The tokenizer that a file describes."""

    tokenizer: PreTrainedTokenizerFast
    lists: Lists
    doubts: list[str]  # a line about each thing that the file leaves open


def rebuild_tokenizer(file: Path) -> Rebuilt:
    """The tokenizer that a GGUF file describes. Raises ConfigError if its lists contradict each other, or make none."""
    try:
        keys, _ = read_gguf_metadata(str(file), (TOKENS, MERGES))
        lists = Lists(keys)
        contradiction = _contradiction(lists)
    except Exception as error:  # whatever a damaged file, or a value of another type, makes of its reader
        raise _refusal(file, f"can't be read ({first_line(error)})") from None
    if contradiction:
        raise _refusal(file, f"can't be rebuilt: {contradiction}")
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    values = {ours: keys[f"tokenizer.{theirs}"] for theirs, ours in names.items() if f"tokenizer.{theirs}" in keys}
    try:
        with without_panics():
            built = convert_gguf_tokenizer(keys["general.architecture"], values)[0]
            state = json.loads(built.to_str())
            merges = state["model"].get("merges", ())
            lists = replace(lists, merged=frozenset(map("".join, merges)))
            backend = _mended(built, state, lists)
        doubts = [] if lists.is_typed else [_UNTYPED]
        if lists.model == _BYTE_LEVEL and (doubt := settle_split(backend, lists.get("pre"))):
            doubts.append(doubt)
        return Rebuilt(_with_roles(backend, lists), lists, [f"{doubt}; {_HINT}" for doubt in doubts])
    except Exception as error:  # the tokenizer library raises bare Exception
        raise _refusal(file, f"can't be rebuilt ({first_line(error)})") from None


def check_rebuilt(file: Path, tokenizer: Any, lists: Lists) -> None:
    """Compare a tokenizer with a file's lists: every token, and texts with those that are taken whole. Raises
    ConfigError, with the first difference."""
    difference = _difference(tokenizer, lists)
    if difference:
        raise _refusal(file, f"can't be rebuilt: {difference}")


def _refusal(file: Path, trouble: str) -> ConfigError:
    return ConfigError(f"{file}: its tokenizer {trouble}; {_HINT}")


def _contradiction(lists: Lists) -> str | None:
    """What makes it impossible to know a file's tokens."""
    tokens, size = lists.tokens, len(lists.tokens or ())
    if not size:
        return f"the file lists no tokens ({_KEY}tokens)"
    twice = [token for token, count in Counter(tokens).items() if count > 1 and token]
    if twice:
        return f"token {shortened(twice[0])!r} is listed more than once ({_KEY}tokens)"
    for name in ("token_type", "scores"):
        if lists.get(name) is not None and len(lists.get(name)) != size:
            return f"{_KEY}{name} has {len(lists.get(name)):,} entries for {counted(size, 'token')}"
    if lists.get("merges") is None and (lists.model == _BYTE_LEVEL or lists.get("scores") is None):
        return f"the file says in no way how tokens are merged ({_KEY}merges)"
    spaced = next((merge for merge in lists.get("merges", ()) if merge.count(" ") != 1), None)
    if spaced is not None:
        return f"the merge {shortened(spaced)!r} is not of two parts ({_KEY}merges)"
    for name in _NAMED:
        if not 0 <= lists.get(name, 0) < size:
            return f"{_KEY}{name} is {lists.get(name)}, but there are {counted(size, 'token')}"
    return None


def _mended(built: Tokenizer, state: dict[str, Any], lists: Lists) -> Tokenizer:
    """What transformers has built, with the file's own tokens: those that are taken whole, and no others, are. state:
    the same as JSON, which is changed."""
    model = state["model"]
    if model["type"] != "BPE":
        return built
    if lists.model == _BYTE_LEVEL:
        model["vocab"] = {token: number for number, token in enumerate(lists.tokens)}
        model["ignore_merges"] = lists.get("pre") in TAKES_WHOLE_WORDS
    else:
        model["unk_token"] = lists.role("unk_token")
    if lists.model == _SENTENCEPIECE:
        _settle_spaces(state, lists.get("add_space_prefix", True))
    state["added_tokens"] = [
        _added(number, lists.tokens[number], special)
        for number, special in lists.whole.items()
        if lists.tokens[number] in model["vocab"]  # not so Gemma's runs of spaces, which are merged
    ]
    return Tokenizer.from_str(json.dumps(state))


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    """A token that is taken whole, as the tokenizer library writes it."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **plain, "special": special}


def _settle_spaces(state: dict[str, Any], prefixed: bool) -> None:
    """Have every stretch of text between whole tokens begin with a space, or none, as SentencePiece does it: also where
    it begins with one already. state: a tokenizer as JSON, which is changed."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepended = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    steps = [step for step in state["decoder"]["decoders"] if step["type"] != "Strip"]
    state["normalizer"] = {"type": "Sequence", "normalizers": [*prepended, replaced]}
    state["pre_tokenizer"] = None
    state["decoder"]["decoders"] = steps + stripped


def _with_roles(backend: Tokenizer, lists: Lists) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=lists.adds_bos,
        add_eos_token=lists.adds_eos,
        chat_template=lists.chat_template or None,
        **{name: lists.role(name) for name in _ROLES},
    )


def _difference(tokenizer: Any, lists: Lists) -> str | None:
    """The first thing that a tokenizer has otherwise than a file's lists."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(lists.tokens))))
    for number, (ours, theirs) in enumerate(zip(names, lists.tokens, strict=True)):
        if ours != theirs and (ours or "").replace(_SPACE, " ") != theirs:
            return f"token {number} is {theirs!r} in the file, and would be {ours!r}"
    beyond = max(tokenizer.get_vocab().values()) + 1 - len(lists.tokens)
    if beyond > 0:
        return f"it would have {counted(beyond, 'token')} more than the file"
    for name in _ROLES:
        if getattr(tokenizer, name) != lists.role(name):
            return f"{name} is {lists.role(name)!r} in the file, and would be {getattr(tokenizer, name)!r}"
    return _difference_in_texts(tokenizer, lists)


def _difference_in_texts(tokenizer: Any, lists: Lists) -> str | None:
    """The same, in the texts that are made of tokens that are taken whole and others."""
    framed = tokenizer("a")["input_ids"]
    first = [tokenizer.bos_token_id] if lists.adds_bos else []
    last = [tokenizer.eos_token_id] if lists.adds_eos else []
    if framed != [*first, *tokenizer("a", add_special_tokens=False)["input_ids"], *last]:
        return f"a text would become {tokenizer.convert_ids_to_tokens(framed)}"
    vocabulary = tokenizer.get_vocab()
    for number in lists.whole:
        token = lists.tokens[number]
        text = f"{TEXTS[number % len(TEXTS)]}a{token}a"
        if token in vocabulary and number not in tokenizer(text, add_special_tokens=False)["input_ids"]:
            return f"token {token!r} would be cut into pieces"
    return None

"""Converts token ids to text: the pieces of a completion, and the phrase that a user would write for it.

Knows: tokenizers, characters of several tokens. Refuses to know: models, probabilities.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from modules.runtime.errors import ConfigError
from modules.scoring.tokenization import Root, encode_pair

UNFINISHED = "\ufffd"  # what tokenizers show for a character with missing bytes
LONGEST_PIECE = 5  # tokens: a character has at most four bytes, and a space before them may have no text of its own
ANCHOR = 8  # tokens before a completion that are decoded with it: a token's text depends on the tokens before it

Pieces = list[tuple[int, str]]  # number of tokens, and the text that they spell together


class Detokenizer:
    """Decodes with one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """vocabulary: the model's number of tokens; one that the tokenizer lacks is shown as its number."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._special = set(tokenizer.all_special_ids)

    @cached_property
    def texts(self) -> list[str]:
        """The text of every token in the middle of a text; empty for special tokens and unknown numbers."""
        anchor = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        anchor_text = self._decode(anchor)
        text_tokens = [token for token in range(self._vocabulary) if self._is_text(token)]
        decoded = self._tokenizer.batch_decode(
            [[*anchor, token] for token in text_tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        texts = [""] * self._vocabulary
        for token, text in zip(text_tokens, decoded, strict=True):
            texts[token] = text[len(anchor_text) :]
        return texts

    def beginning_with(self, spaces: str) -> list[int]:
        """The tokens that can come first in a text that begins with these spaces."""
        return [
            token
            for token, text in enumerate(self.texts)
            if text and (text.startswith(spaces) or spaces.startswith(text))
        ]

    def spaces_after(self, spaces: str, token: int) -> str:
        """The rest of the spaces after this token is written."""
        return spaces[len(self.texts[token]) :] if spaces else ""

    def text(self, root: Root, tokens: Sequence[int]) -> str:
        """The tokens' text after a context, including the spaces at its end."""
        anchor = list(root.tokens[-ANCHOR:])
        return self._decode([*anchor, *tokens])[len(self._decode(anchor)) :]

    def pieces(self, root: Root, tokens: Sequence[int]) -> Pieces:
        """The completion as readable pieces, each with its number of tokens: one, or those of one character.

        Special tokens are shown by their names; others without text belong to the next piece. A character that stays
        incomplete is shown as U+FFFD.
        """
        pieces = []
        start = 0
        shown = ""
        for end in range(1, len(tokens) + 1):
            text = self.text(root, tokens[:end])
            waits = text.endswith(UNFINISHED) or (text == shown and self._is_text(tokens[end - 1]))
            if not waits or end == len(tokens) or end - start == LONGEST_PIECE:
                pieces.append((end - start, text[len(shown) :] or self._name(tokens[end - 1])))
                start = end
                shown = text
        return pieces

    def added(self, root: Root, tokens: Sequence[int], start: int) -> str:
        """The text that the tokens from number `start` on add to the earlier ones'; special ones by their names."""
        earlier_text = "".join(text for _, text in self.pieces(root, tokens[:start]))
        full_text = "".join(text for _, text in self.pieces(root, tokens))
        common = next(
            (i for i, (a, b) in enumerate(zip(earlier_text, full_text, strict=False)) if a != b), len(earlier_text)
        )
        return full_text[common:]

    def phrase(self, root: Root, tokens: Sequence[int]) -> str | None:
        """The phrase that, after the context, is encoded as exactly these tokens; None if there is none."""
        text = self.text(root, tokens)
        if not text.startswith(root.spaces) or UNFINISHED in text or self._special.intersection(tokens):
            return None
        phrase = text[len(root.spaces) :]
        if not phrase.strip():
            return None
        try:
            encoded = encode_pair(self._tokenizer, root.context, phrase, special=root.chat is None)
        except ConfigError:
            return None
        is_same = encoded.tokens == (*root.tokens, *tokens) and encoded.start == len(root.tokens)
        return phrase if is_same else None

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _is_text(self, token: int) -> bool:
        return token < len(self._tokenizer) and token not in self._special

    def _name(self, token: int) -> str:
        """The name that is shown for a token without text."""
        is_known = token < len(self._tokenizer)
        return self._tokenizer.convert_ids_to_tokens(token) if is_known else f"<{token}>"

"""Tokens back to text: pieces, whole characters, phrases that can be pasted."""

import pytest
import tiny
from completions import completed

from modules.config.phrase_lists import Pair
from modules.mapper.detokenize import UNFINISHED, Detokenizer
from modules.scoring.tokenization import encode_contexts, encode_pair

TEXTS = ["spine.", "a whisper, barely", "\U0001f642 fine", "\u65e5\u672c\u8a9e", "Crème brûlée", "two\nlines\there"]


@pytest.fixture(scope="module", params=["bpe", "spm"])
def detokenizer(request):
    tokenizer = tiny.TOKENIZERS[request.param]()
    return Detokenizer(tokenizer, len(tokenizer) + 2)  # two rows that the tokenizer does not know


@pytest.mark.parametrize("context", ["His voice was ", "", "He said: \U0001f642 "])
@pytest.mark.parametrize("text", TEXTS)
def test_a_completion_spells_what_was_written(detokenizer, context, text):
    root, tokens = completed(detokenizer, context, text)
    assert detokenizer.text(root, tokens) == root.spaces + text
    pieces = detokenizer.pieces(root, tokens)
    assert "".join(piece for _, piece in pieces) == root.spaces + text
    assert sum(count for count, _ in pieces) == len(tokens)


@pytest.mark.parametrize("character", ["\U0001f642", "\u65e5", "\u0113"])
def test_a_character_of_several_tokens_is_one_piece(detokenizer, character):
    root, tokens = completed(detokenizer, "a", character)
    assert len(tokens) > 1
    assert detokenizer.pieces(root, tokens) == [(len(tokens), character)]


def test_a_character_that_stays_unfinished_is_shown_as_such(detokenizer):
    root, tokens = completed(detokenizer, "a", "\U0001f642")
    pieces = detokenizer.pieces(root, tokens[:-1])
    assert sum(count for count, _ in pieces) == len(tokens) - 1
    assert all(UNFINISHED in piece for _, piece in pieces)
    assert detokenizer.phrase(root, tokens[:-1]) is None


def test_what_is_added_takes_over_an_unfinished_character(detokenizer):
    root, tokens = completed(detokenizer, "a", "b\U0001f642c")
    cut = len(tokens) - 2
    assert detokenizer.added(root, tokens, 0) == "b\U0001f642c"
    assert detokenizer.added(root, tokens, cut) == "\U0001f642c"


def test_a_token_without_text_belongs_to_what_follows():
    """A SentencePiece text begins with a space that is not shown, sometimes in a token of its own."""
    tokenizer = tiny.TOKENIZERS["spm"]()
    detokenizer = Detokenizer(tokenizer, len(tokenizer))
    root, tokens = completed(detokenizer, "", "\U0001f642 x")
    assert detokenizer.texts[tokens[0]] == " " and detokenizer.text(root, tokens[:1]) == ""
    assert detokenizer.pieces(root, tokens)[0] == (5, "\U0001f642")
    assert detokenizer.pieces(root, tokens[:1]) == [(1, "\u2581")]


def test_special_tokens_and_unknown_numbers_have_names(detokenizer):
    root, tokens = completed(detokenizer, "a", "b")
    end, unknown = detokenizer._tokenizer.eos_token_id, detokenizer._vocabulary - 1
    assert detokenizer.pieces(root, [*tokens, end, unknown]) == [(1, "b"), (1, "</s>"), (1, f"<{unknown}>")]
    assert detokenizer.texts[end] == detokenizer.texts[unknown] == ""
    assert detokenizer.phrase(root, [*tokens, end]) is None


@pytest.mark.parametrize("context", ["His voice was ", "His voice was", "Two  ", "", " "])
@pytest.mark.parametrize("text", ["spine", "a whisper, barely", "\U0001f642"])
def test_a_phrase_encodes_to_its_tokens_again(detokenizer, context, text):
    root, tokens = completed(detokenizer, context, text)
    assert detokenizer.phrase(root, tokens) == text


def test_tokens_that_a_text_would_not_be_encoded_as_are_no_phrase(detokenizer):
    """ "spine" letter by letter: a person who pastes it would have other tokens scored."""
    root, whole = completed(detokenizer, "down her ", "spine")
    first = completed(detokenizer, "down her ", "s")[1]
    apart = [*first, *(detokenizer.texts.index(letter) for letter in "pine")]
    assert detokenizer.text(root, apart) == " spine" and apart != whole
    assert detokenizer.phrase(root, apart) is None
    assert detokenizer.phrase(root, whole) == "spine"


def test_only_tokens_that_begin_with_the_spaces_or_a_part_of_them_may_follow(detokenizer):
    for spaces in (" ", "  "):
        allowed = detokenizer.beginning_with(spaces)
        assert allowed
        for token in allowed:
            text = detokenizer.texts[token]
            assert text.startswith(spaces) or spaces.startswith(text)
            assert detokenizer.spaces_after(spaces, token) == spaces[len(text) :]
    everything = {token for token, text in enumerate(detokenizer.texts) if text.startswith(" ")}
    assert everything <= set(detokenizer.beginning_with(" "))


def test_the_pair_and_its_completion_agree_on_where_the_phrase_begins(detokenizer):
    for pair in (*tiny.PAIRS, Pair("BAD", "x", ""), Pair("BAD", "x", "line\n"), Pair("BAD", "x", "line\n ")):
        root = encode_contexts(detokenizer._tokenizer, [pair.context], detokenizer._vocabulary)[0]
        encoded = encode_pair(detokenizer._tokenizer, pair.context, pair.phrase)
        assert encoded.tokens[: encoded.start] == root.tokens
        assert detokenizer.phrase(root, encoded.tokens[encoded.start :]) == pair.phrase

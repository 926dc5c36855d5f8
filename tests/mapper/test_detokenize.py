"""Tokens back to text: pieces, whole characters, phrases that can be pasted."""

import pytest
import tiny
from completions import completed

from modules.config import Pair
from modules.mapper.detokenize import UNFINISHED, Spelling
from modules.scoring.tokenization import encode_contexts, encode_pair

TEXTS = ["spine.", "a whisper, barely", "\U0001f642 fine", "\u65e5\u672c\u8a9e", "Crème brûlée", "two\nlines\there"]


@pytest.fixture(scope="module", params=["bpe", "spm"])
def spelling(request):
    tokenizer = tiny.TOKENIZERS[request.param]()
    return Spelling(tokenizer, len(tokenizer) + 2)  # two rows that the tokenizer does not know


@pytest.mark.parametrize("context", ["His voice was ", "", "He said: \U0001f642 "])
@pytest.mark.parametrize("text", TEXTS)
def test_a_completion_spells_what_was_written(spelling, context, text):
    root, tokens = completed(spelling, context, text)
    assert spelling.text(root, tokens) == root.spaces + text
    pieces = spelling.pieces(root, tokens)
    assert "".join(piece for _, piece in pieces) == root.spaces + text
    assert sum(count for count, _ in pieces) == len(tokens)


@pytest.mark.parametrize("character", ["\U0001f642", "\u65e5", "\u0113"])
def test_a_character_of_several_tokens_is_one_piece(spelling, character):
    root, tokens = completed(spelling, "a", character)
    assert len(tokens) > 1
    assert spelling.pieces(root, tokens) == [(len(tokens), character)]


def test_a_character_that_stays_unfinished_is_shown_as_such(spelling):
    root, tokens = completed(spelling, "a", "\U0001f642")
    pieces = spelling.pieces(root, tokens[:-1])
    assert sum(count for count, _ in pieces) == len(tokens) - 1
    assert all(UNFINISHED in piece for _, piece in pieces)
    assert spelling.phrase(root, tokens[:-1]) is None


def test_what_is_added_takes_over_an_unfinished_character(spelling):
    root, tokens = completed(spelling, "a", "b\U0001f642c")
    cut = len(tokens) - 2
    assert spelling.added(root, tokens, 0) == "b\U0001f642c"
    assert spelling.added(root, tokens, cut) == "\U0001f642c"


def test_a_token_without_text_belongs_to_what_follows():
    """A SentencePiece text begins with a space that is not shown, sometimes in a token of its own."""
    tokenizer = tiny.TOKENIZERS["spm"]()
    spelling = Spelling(tokenizer, len(tokenizer))
    root, tokens = completed(spelling, "", "\U0001f642 x")
    assert spelling.texts[tokens[0]] == " " and spelling.text(root, tokens[:1]) == ""
    assert spelling.pieces(root, tokens)[0] == (5, "\U0001f642")
    assert spelling.pieces(root, tokens[:1]) == [(1, "\u2581")]


def test_special_tokens_and_unknown_numbers_have_names(spelling):
    root, tokens = completed(spelling, "a", "b")
    end, unknown = spelling._tokenizer.eos_token_id, spelling._vocabulary - 1
    assert spelling.pieces(root, [*tokens, end, unknown]) == [(1, "b"), (1, "</s>"), (1, f"<{unknown}>")]
    assert spelling.texts[end] == spelling.texts[unknown] == ""
    assert spelling.phrase(root, [*tokens, end]) is None


@pytest.mark.parametrize("context", ["His voice was ", "His voice was", "Two  ", "", " "])
@pytest.mark.parametrize("text", ["spine", "a whisper, barely", "\U0001f642"])
def test_a_phrase_encodes_to_its_tokens_again(spelling, context, text):
    root, tokens = completed(spelling, context, text)
    assert spelling.phrase(root, tokens) == text


def test_tokens_that_a_text_would_not_be_encoded_as_are_no_phrase(spelling):
    """ "spine" letter by letter: a person who pastes it would have other tokens scored."""
    root, whole = completed(spelling, "down her ", "spine")
    first = completed(spelling, "down her ", "s")[1]
    apart = [*first, *(spelling.texts.index(letter) for letter in "pine")]
    assert spelling.text(root, apart) == " spine" and apart != whole
    assert spelling.phrase(root, apart) is None
    assert spelling.phrase(root, whole) == "spine"


def test_only_tokens_that_begin_with_the_spaces_or_a_part_of_them_may_follow(spelling):
    for spaces in (" ", "  "):
        allowed = spelling.beginning_with(spaces)
        assert allowed
        for token in allowed:
            text = spelling.texts[token]
            assert text.startswith(spaces) or spaces.startswith(text)
            assert spelling.spaces_after(spaces, token) == spaces[len(text) :]
    everything = {token for token, text in enumerate(spelling.texts) if text.startswith(" ")}
    assert everything <= set(spelling.beginning_with(" "))


def test_the_pair_and_its_completion_agree_on_where_the_phrase_begins(spelling):
    for pair in (*tiny.PAIRS, Pair("BAD", "x", ""), Pair("BAD", "x", "line\n"), Pair("BAD", "x", "line\n ")):
        root = encode_contexts(spelling._tokenizer, [pair.context], spelling._vocabulary)[0]
        encoded = encode_pair(spelling._tokenizer, pair.context, pair.phrase)
        assert encoded.tokens[: encoded.start] == root.tokens
        assert spelling.phrase(root, encoded.tokens[encoded.start :]) == pair.phrase

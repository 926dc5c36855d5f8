"""From text to tokens to packs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_encode
from tiny import PAIRS, TOKENIZERS, WithoutOffsets, bpe_tokenizer, spm_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from modules.config.phrase_lists import Chat, Message, Pair
from modules.runtime.errors import ConfigError
from modules.scoring.packing import LAYOUTS, build_packs
from modules.scoring.tokenization import (
    MOST_DOUBTS,
    Encoded,
    doubled_tokens,
    doubtful_phrases,
    encode_contexts,
    encode_pair,
    encode_pairs,
)

CHAT = Chat((Message("user", "Where is the apple?"),))
TOKENIZER = {name: make() for name, make in TOKENIZERS.items()}


def words(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(list(encoded.tokens[encoded.start :]))


@pytest.mark.parametrize("family", TOKENIZER)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.phrase)
def test_equals_the_naive_twin(family, pair):
    tokenizer = TOKENIZER[family]
    encoded = encode_pair(tokenizer, pair.context, pair.phrase)
    assert (list(encoded.tokens), encoded.start) == naive_encode(tokenizer, pair.context, pair.phrase)


def test_a_trailing_space_belongs_to_the_phrase():
    """And so does a part of a word that the context begins."""
    for tokenizer, word in ((TOKENIZER["bpe"], "\u0120anticipation"), (TOKENIZER["spm"], "\u2581anticipation")):
        with_space = encode_pair(tokenizer, "The atmosphere is thick with ", "anticipation")
        without = encode_pair(tokenizer, "The atmosphere is thick with", " anticipation")
        grown = encode_pair(tokenizer, "The atmosphere is thick with antici", "pation")
        assert with_space == without == grown
        assert words(tokenizer, with_space) == [word]


def listed(*pairs):
    """Pairs of bad phrases, or good ones where the phrase begins with a plus."""
    return [Pair("GOOD" if phrase[0] == "+" else "BAD", phrase.lstrip("+"), context) for phrase, context in pairs]


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([("a", "x "), ("b", "x "), ("a", "y "), ("A", "x ")], []),
        ([("a", "x "), (" a", "x")], ["after 'x ' is listed twice"]),
        ([("+a", "x ")] * 3, ["is listed and counts 3 times"]),
        ([("a", "x\n"), ("a", "x"), ("a", "x  ")], []),
        ([("a", "x "), ("+ a", "x")], ["is listed as bad and as good"]),
        ([(" a", "x ")], ["with two spaces"]),
        ([(" a", "x"), (" a", "x\n"), (" a", "")], []),
    ],
)
def test_what_may_be_a_mistake_is_told(pairs, words):
    doubts = doubtful_phrases(listed(*pairs))
    assert len(doubts) == len(words) and all(word in doubt for word, doubt in zip(words, doubts, strict=True))


def test_a_variant_that_is_listed_elsewhere_is_told():
    several = [Pair(kind, "any", "x ", variants=texts) for kind, texts in (("BAD", ("a", "b")), ("GOOD", ("a", "c")))]
    first, second = doubtful_phrases([several[0], Pair("BAD", "b", "x "), several[1]])
    assert "'a' after 'x ' is listed as bad and as good" in first and "'b' after 'x ' is listed twice" in second


def test_of_many_mistakes_the_first_are_told():
    doubts = doubtful_phrases(listed(*[(f"{number}", "x ") for number in range(30)] * 2))
    assert len(doubts) == MOST_DOUBTS + 1 and str(30 - MOST_DOUBTS) in doubts[-1]


@pytest.mark.parametrize("family", TOKENIZER)
def test_what_is_told_as_listed_twice_is_the_same_to_the_scorer(family):
    """Of all ways to share out up to three spaces between context and phrase."""
    pairs = [Pair("BAD", " " * own + "spine", "down her" + " " * before) for own in range(3) for before in range(3)]
    for one in pairs:
        for other in pairs:
            told = any("listed twice" in doubt for doubt in doubtful_phrases([one, other]))
            same = [encode_pair(TOKENIZER[family], pair.context, pair.phrase) for pair in (one, other)]
            assert told == (same[0] == same[1])


@pytest.mark.parametrize("family", TOKENIZER)
def test_a_space_that_is_a_token_of_its_own_still_belongs_to_the_phrase(family):
    tokenizer = TOKENIZER[family]
    encoded = encode_pair(tokenizer, "thick with ", "\U0001f642")
    assert tokenizer.decode(encoded.tokens[encoded.start :]).strip() == "\U0001f642"
    given = tokenizer("thick with")["input_ids"]
    assert list(encoded.tokens[: encoded.start]) == given


@pytest.mark.parametrize("family", TOKENIZER)
def test_an_empty_context_scores_from_the_beginning(family):
    tokenizer = TOKENIZER[family]
    for context in ("", "  "):
        encoded = encode_pair(tokenizer, context, "The apple")
        assert encoded.tokens[0] == tokenizer.bos_token_id
        assert encoded.start == 1
        assert "The apple" in tokenizer.decode(encoded.tokens[1:])


def test_without_bos_a_text_begins_with_eos():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer()._tokenizer, eos_token="</s>")
    assert encode_pair(tokenizer, "", "The apple").tokens[0] == tokenizer.eos_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer()._tokenizer)
    with pytest.raises(ConfigError, match="'The apple' needs a context"):
        encode_pair(bare, "", "The apple")


def with_controls(family):
    """A tokenizer with control tokens that take white space along: by their flags, or as the end of a name."""
    extra = [
        AddedToken("<|says|>", rstrip=True, special=True),
        AddedToken("<|both|>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("<|spaced|> ", special=True),
        AddedToken("<|plain|>", special=True),
        AddedToken("\n\n", normalized=False),  # white space that is a token is no control token
    ]
    return TOKENIZERS[family](extra=extra)


# The control token, the white space behind it that is the context's, that which is the phrase's.
BEHIND = [("", ""), (" ", ""), ("", " "), ("\n", ""), ("", "\n"), ("\n", " "), ("  ", "\n "), ("\t\n ", "")]
GIVEN = [
    *[(name, *spaces) for name in ("<|says|>", "<|both|>") for spaces in BEHIND],
    *[("<|spaced|>", " ", ""), ("<|spaced|>", "", " ")],
]


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", TOKENIZER)
def test_a_control_token_is_given_with_the_white_space_that_it_takes_along(family, special, offsets):
    """However that is shared out: what is scored are the tokens behind the control token."""
    tokenizer = with_controls(family)
    used = tokenizer if offsets else WithoutOffsets(tokenizer)
    for name, before, after in GIVEN:
        context, phrase = f"Where is it? {name}{before}", f"{after}The apple"
        if not (offsets or before or name != "<|spaced|>"):
            continue  # without offsets nobody can know where a token ends of which the context has a part
        found = encode_pair(used, context, phrase, special=special)
        assert list(found.tokens) == tokenizer(context + phrase, add_special_tokens=special)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(found.tokens[found.start - 1]).strip() == name
        if before or name != "<|spaced|>":
            (root,) = encode_contexts(used, [context], 10**6, [None if special else CHAT])
            assert root.tokens == found.tokens[: found.start] and root.spaces == ""


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("family", TOKENIZER)
def test_what_is_scored_of_other_tokens_stays_what_it_was(family, offsets):
    tokenizer = with_controls(family)
    used = tokenizer if offsets else WithoutOffsets(tokenizer)
    for context, phrase in (
        ("Where? <|plain|> ", "The apple"),
        ("Where? <|plain|>", " The apple"),
        ("Answer:\n", "\nThe apple"),  # "\n\n" is one token, of the phrase
        ("down her ", "<|says|> spine"),
        ("down her\n", "<|both|> spine"),
        ("It <|says|> sent shivers down her ", "spine"),
    ):
        found = encode_pair(used, context, phrase)
        assert (list(found.tokens), found.start) == naive_encode(tokenizer, context, phrase)


def test_variants_behind_a_control_token_exclude_each_other_as_its_tokens_say():
    """Of two that differ in the white space that it takes along, one is left."""
    tokenizer = with_controls("bpe")
    texts = ("The apple", "\nThe apple", "Her eyes")
    pair = Pair("BAD", " / ".join(texts), "Where is it? <|says|> ", variants=texts)
    first, second = encode_pairs(tokenizer, [pair], 10**6, None)
    assert first.start == second.start and second.another
    expected = [encode_pair(tokenizer, pair.context, text) for text in (texts[0], texts[2])]
    assert [item.tokens for item in (first, second)] == [item.tokens for item in expected]


def adding(before, after=()):
    """A tokenizer that puts special tokens around every text; with offsets, and as one without."""
    from tokenizers import processors

    special = ["[gMASK]", "<sop>", "<s>", "</s>"]
    tokenizer = spm_tokenizer(extra=special[:2])._tokenizer
    ids = [(name, tokenizer.token_to_id(name)) for name in special]
    single = " ".join([*before, "$A", *after])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": special[:2]})
    return [fast, WithoutOffsets(fast)]


PREFIXES = [(["<s>"], "<s>"), (["[gMASK]", "<sop>"], "[gMASK]<sop>"), (["[gMASK]", "<sop>"], "<sop>")]


@pytest.mark.parametrize("after", [(), ("</s>",)])
@pytest.mark.parametrize(("before", "written"), PREFIXES)
def test_a_special_token_that_is_written_out_and_added_is_taken_once(before, written, after):
    for tokenizer in adding(before, after):
        prefix = tuple(tokenizer.convert_tokens_to_ids(before))
        for context, phrase in (("", "The apple"), ("Her body quivers with ", "anticipation"), ("Answer:\n", "x")):
            there = f"{written}{context}"
            found = encode_pair(tokenizer, there, phrase)
            given = tokenizer(there.rstrip(" "), add_special_tokens=False)["input_ids"][
                len(tokenizer.tokenize(written)) :
            ]
            assert found.tokens[: len(prefix)] == prefix
            assert set(found.tokens[len(prefix) :]).isdisjoint({*prefix, *tokenizer.convert_tokens_to_ids(after)})
            assert found.tokens[: found.start] == (*prefix, *given)
            (root,) = encode_contexts(tokenizer, [there], 10**6)
            assert root.tokens == found.tokens[: found.start]
            line = doubled_tokens(tokenizer, listed((phrase, there), (phrase, context or "a")))
            assert len(line) == 1 and line[0].startswith(f"1 pair with {''.join(before)},")
        whole = encode_pair(tokenizer, "", f"{written}The apple")
        assert whole == encode_pair(tokenizer, written, "The apple")


def test_of_two_that_are_written_out_two_are_kept():
    for tokenizer in adding(["<s>"]):
        beginning = tokenizer.convert_tokens_to_ids("<s>")
        assert encode_pair(tokenizer, "<s><s>Her eyes ", "shine").tokens.count(beginning) == 2
        with pytest.raises(ConfigError, match="no tokens"):
            encode_pair(tokenizer, "", "<s>")


def test_a_closing_special_token_is_not_the_phrases():
    from tokenizers import processors

    tokenizer = spm_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    closed = encode_pair(tokenizer, "The apple is ", "in the bedroom")
    assert closed == encode_pair(TOKENIZER["spm"], "The apple is ", "in the bedroom")


def test_a_phrase_without_tokens_is_an_error():
    from tokenizers import normalizers

    tokenizer = bpe_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(ConfigError, match="has no tokens"):
        encode_pair(tokenizer, "The apple", "\u200b")


def test_a_pair_that_the_model_cannot_take_is_named():
    pairs = [Pair("BAD", "spine", "down her "), Pair("BAD", "spine", "down " * 50)]
    with pytest.raises(ConfigError, match=r"the phrase 'spine' after .* tokens long, but the base model takes 40"):
        encode_pairs(TOKENIZER["bpe"], pairs, 500, 40)
    with pytest.raises(ConfigError, match="the base model has no embedding for its token"):
        encode_pairs(TOKENIZER["bpe"], pairs, 200, None)


@pytest.mark.parametrize("family", TOKENIZER)
@pytest.mark.parametrize("pair", [*PAIRS, Pair("BAD", "The apple", ""), Pair("BAD", "\U0001f642!", "caf\xe9 ")])
def test_tokenizers_without_offsets_find_the_same_phrase(family, pair):
    tokenizer = TOKENIZER[family]
    exact = encode_pair(tokenizer, pair.context, pair.phrase)
    assert encode_pair(WithoutOffsets(tokenizer), pair.context, pair.phrase) == exact


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(TOKENIZER)),
    context=st.text(alphabet="ab \u00e9\u65e5\U0001f642\n.", max_size=12),
    phrase=st.text(alphabet="ab \u00e9\u65e5\U0001f642.", min_size=1, max_size=8).filter(lambda text: text.strip()),
)
def test_any_text_gives_a_phrase_that_reaches_the_end(family, context, phrase):
    tokenizer = TOKENIZER[family]
    encoded = encode_pair(tokenizer, context, phrase)
    assert 1 <= encoded.start < len(encoded.tokens)
    whole = tokenizer(context + phrase)["input_ids"]
    assert list(encoded.tokens)[-len(whole) :] == whole


# ---------------------------------------------------------------------------------------------------------------------
# Packs
# ---------------------------------------------------------------------------------------------------------------------


def path_to(pack, column):
    """The tokens that a column of a pack sees, itself last."""
    if pack.parents is None:
        raise AssertionError("rows have no tree")
    tokens = []
    while column >= 0:
        tokens.append(pack.rows[0][column])
        column = pack.parents[column]
    return tuple(reversed(tokens))


def answers(packs):
    """(pair, place) -> (what the target sees, the token it asks for)"""
    found = {}
    for pack in packs:
        for target in pack.targets:
            seen = (
                path_to(pack, target.column) if pack.parents is not None else pack.rows[target.row][: target.column + 1]
            )
            assert (target.pair, target.index) not in found
            found[target.pair, target.index] = (seen, target.token)
    return found


@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.integers(1, 8)), min_size=1, max_size=12
    ),
    layout=st.sampled_from(LAYOUTS),
    budget=st.integers(1, 40),
)
def test_every_layout_asks_for_every_token_of_every_phrase(data, layout, budget):
    encoded = [Encoded(tuple(tokens), min(start, len(tokens) - 1)) for tokens, start in data]
    packs = list(build_packs(encoded, layout, budget))
    expected = {
        (pair, index - item.start): (item.tokens[:index], item.tokens[index])
        for pair, item in enumerate(encoded)
        for index in range(item.start, len(item.tokens))
    }
    assert answers(packs) == expected
    longest = max(len(item.tokens) for item in encoded)
    assert all(pack.tokens <= max(budget, longest) for pack in packs)


def test_the_forest_computes_a_shared_prefix_once():
    encoded = [Encoded((1, 2, 3, 4), 2), Encoded((1, 2, 3, 5), 3), Encoded((1, 2, 6, 7), 2), Encoded((1, 2, 3, 4), 2)]
    (pack,) = build_packs(encoded, "forest", 100)
    assert sorted(pack.rows[0]) == [1, 2, 3, 6]  # a phrase's last token is never an input
    assert pack.parents[0] == -1


def test_rows_are_padded_on_the_right_and_sorted_by_length():
    encoded = [Encoded((1, 2, 3, 4, 5), 3), Encoded((6, 7), 1), Encoded((8, 9, 10), 2)]
    (pack,) = build_packs(encoded, "rows", 100)
    assert [row[0] for row in pack.rows] == [6, 8, 1]
    assert {len(row) for row in pack.rows} == {4}

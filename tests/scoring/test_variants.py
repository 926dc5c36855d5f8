"""Phrases with variants: which of them count, their sum against an enumeration, its gradient, several processes."""

import math

import mixes
import pytest
import reference
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mixes import InDouble, mixed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modules.config.phrase_lists import Pair
from modules.runtime.distributed import Rank
from modules.scoring.budget import Budget
from modules.scoring.gradient import GradientPass
from modules.scoring.scorer import by_pair, of_pairs, of_variants
from modules.scoring.tokenization import Encoded, encode_pair, encode_pairs

WORDS = ["<s>", "</s>", "down", "her", "his", "spine", "back", "shiver", "shivers", "up", "a"]
TOKENIZERS = {
    **{name: make() for name, make in tiny.TOKENIZERS.items()},
    "without offsets": tiny.WithoutOffsets(tiny.bpe_tokenizer()),
}


def any_of(*texts, context="", kind="BAD", weight=1.0):
    return Pair(kind, " / ".join(texts), context, weight, variants=texts)


def word_tokenizer():
    """Each word is a token, so that all there is to be said can be gone through."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>")


PAIRS = (
    any_of("shivers down her spine", "shivers up", "a shiver", context="down "),
    any_of("spine", "spine up", "back", context="down her ", weight=3.0),  # the second is a part of the first
    Pair("BAD", "spine", "down his "),
    any_of("her back", "his", kind="GOOD"),
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A base and candidates that know a few words."""
    tokenizer = word_tokenizer()
    return mixes.make(tmp_path_factory.mktemp("words"), tiny.llama_config(len(tokenizer), 2), tokenizer=tokenizer)


def value_of(objective):
    """What the base's objective is made of."""
    work = GradientPass(objective)
    work.begin()
    for block in objective.blocks:
        work.head_block(*block)
    return work.value()


def test_the_sum_is_that_of_all_that_may_be_said(words):
    """In many packs, which several variants of a pair are in."""
    one = mixed(*words, pairs=PAIRS, budget=Budget(tokens=4, logits=100), neutral=False)
    in_single = of_pairs(one.scorer.score(), one.encoded)
    with InDouble():
        module, found = mixes.plain(one.folder), value_of(one.objective)
        for number, pair in enumerate(PAIRS):
            before = one.tokenizer(pair.context)["input_ids"] or [0]
            texts = [tuple(one.tokenizer(text)["input_ids"]) for text in pair.variants or [pair.phrase]]
            expected = math.log(reference.any_of(module, before, texts))
            assert of_pairs(found.log_probabilities, one.encoded)[number] == pytest.approx(expected, rel=1e-9)
            assert in_single[number] == pytest.approx(expected, abs=1e-5)
        assert found.total == pytest.approx(3 - 1) and one.objective.size(found) == pytest.approx(4)
    assert [item.another for item in one.encoded] == [False, True, True, False, True, False, False, True]


def test_the_gradient_is_that_of_the_sum(words):
    one, shares = mixed(*words, pairs=PAIRS, neutral=False), [[0.3, 0.4]] * 3
    total, _, gradient = one.found(shares)
    expected, _, slopes = one.expected(shares, words[1], neutral=False)
    assert total == pytest.approx(expected, rel=1e-8)
    size = max(abs(slope) for row in slopes for slope in row)
    assert size > 1e-3
    for row, other in zip(gradient, slopes, strict=True):
        assert row == pytest.approx(other, rel=1e-7, abs=1e-8 * size)


def test_variants_may_be_shared_by_processes(words):
    """Each has zeros for the others' variants; what is summed over all processes is what one finds."""
    settings = {"pairs": PAIRS, "neutral": False, "compute": "float32", "budget": Budget(tokens=4)}
    one = mixed(*words, **settings)
    parts = [mixed(*words, **settings, rank=Rank(number, 3)).scorer.score() for number in range(3)]
    for parts_of_pair in by_pair(zip(*parts, strict=True), one.encoded)[:1]:
        assert len({[part != 0 for part in parts].index(True) for parts in parts_of_pair}) > 1
    found = of_pairs(map(sum, zip(*parts, strict=True)), one.encoded)
    assert found == pytest.approx(of_pairs(one.scorer.score(), one.encoded), rel=1e-5)


def test_sums_of_what_hardly_is():
    encoded = [Encoded((1, 2), 1), Encoded((1, 3), 1), Encoded((1, 4), 1, another=True), Encoded((1, 5), 1)]
    assert by_pair("abcd", encoded) == [["a"], ["b", "c"], ["d"]]
    assert of_variants([1.0, 2.0, -3.0], encoded) == [1.0, 2.0, 2.0, -3.0]
    found = of_pairs([-0.1, -900.0, -900.0, -math.inf], encoded)
    assert found == [-0.1, pytest.approx(-900 + math.log(2)), -math.inf]
    assert of_pairs([0.0, -math.inf, -2.0, 0.0], encoded)[1] == -2.0
    assert of_pairs([0.0, -math.inf, -math.inf, 0.0], encoded)[1] == -math.inf
    assert math.isnan(of_pairs([0.0, math.nan, -2.0, 0.0], encoded)[1])


TEXTS = st.text("ab e'sShiver", min_size=1, max_size=6).filter(str.strip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(context=st.sampled_from(["", "It sent ", "It sent", "quivers with antici", "ante", "x\n"]), texts=st.data())
def test_variants_exclude_each_other_and_go_on_from_the_same(name, context, texts):
    tokenizer = TOKENIZERS[name]
    variants = texts.draw(st.lists(TEXTS, min_size=2, max_size=5, unique=True))
    found = encode_pairs(tokenizer, [any_of(*variants, context=context)], 10**6, None)
    assert len({item.tokens[: item.start] for item in found}) == 1 and all(item.start >= 1 for item in found)
    assert [item.another for item in found] == [False] + [True] * (len(found) - 1)
    for item in found:
        assert not any(item.tokens[: len(other.tokens)] == other.tokens for other in found if other is not item)
    starts = set()
    for text in variants:  # each is one of them, or a part of one
        alone = encode_pair(tokenizer, context, text)
        more = alone.tokens if alone.tokens[0] == found[0].tokens[0] else (found[0].tokens[0], *alone.tokens)
        assert any(more[: len(item.tokens)] == item.tokens for item in found)
        starts.add(alone.start + len(more) - len(alone.tokens))
    assert found[0].start <= min(starts)


def test_a_variant_that_takes_up_the_contexts_end_moves_the_start_of_all():
    tokenizer, context = TOKENIZERS["bpe"], "quivers with antici"
    joined, apart = (encode_pair(tokenizer, context, text) for text in ("pation", " x"))
    assert joined.start < apart.start
    found = encode_pairs(tokenizer, [any_of("pation", " x", context=context)], 500, None)
    assert found == [joined, Encoded(apart.tokens, joined.start, another=True)]
    assert encode_pairs(tokenizer, [any_of("is", " was", context="The apple")], 500, None)[0].start == 2


def test_variants_of_a_first_word_are_scored_from_the_beginning_of_a_text():
    """No token is before them, and not all of them leave the context's word as it is."""
    tokenizer = TOKENIZERS["bpe"]
    found = encode_pairs(tokenizer, [any_of("er", "ex", context="H")], 500, None)
    assert {(item.tokens[0], item.start) for item in found} == {(tokenizer.bos_token_id, 1)}
    assert [tokenizer.decode(item.tokens[1:]) for item in found] == ["Her", "Hex"]


def test_of_one_variant_only_its_own_tokens_are_left():
    (found,) = encode_pairs(TOKENIZERS["bpe"], [any_of(" spine", " spine. His", context="her")], 500, None)
    assert found == encode_pair(TOKENIZERS["bpe"], "her", " spine")

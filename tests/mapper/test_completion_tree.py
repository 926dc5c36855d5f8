"""Completion trees: the beam search against a naive mapper, and how phrases stand among branches."""

import math
from pathlib import Path

import pytest
import reference
import tiny
import torch
from completions import scripted
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, MambaConfig, MistralConfig

from modules.checkpoints.checkpoint import load_tokenizer, open_checkpoint
from modules.config.phrase_lists import Pair
from modules.config.schema import Mapper
from modules.mapper.completion_tree import BeamSearch
from modules.mapper.detokenize import Detokenizer
from modules.mapper.next_tokens import PlainPredictor, Predictor, build_predictor
from modules.mapper.ranking import rank_phrases
from modules.model.loading import load_model
from modules.runtime.errors import ConfigError
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_contexts, encode_pair, encode_pairs

CONTEXTS = ["Her body quivers with ", "Her body quivers with", "The apple"]
MANY = 2048


class Model:
    """A model folder, opened both ways; what the naive mapper has asked is remembered from test to test."""

    def __init__(self, folder):
        self.resident = load_model(open_checkpoint(Path(folder), "model"), "cpu", "float32")
        self.tokenizer = load_tokenizer(Path(folder))
        self.detokenizer = Detokenizer(self.tokenizer, self.resident.vocabulary)
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.plain_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.answers = {}

    def verified_predictor(self, contexts, settings):
        """The predictor that the program takes for this model."""
        vocabulary, limit = self.resident.vocabulary, self.resident.max_tokens
        roots = encode_contexts(self.tokenizer, contexts, vocabulary)
        pairs = [Pair("BAD", "apple", context) for context in contexts]
        scorer = build_scorer(self.resident, encode_pairs(self.tokenizer, pairs, vocabulary, limit), tails=False)
        longest = max(len(root.tokens) for root in roots) + settings.max_depth + settings.additional_length
        return build_predictor(self.resident, self.detokenizer, scorer, [root.tokens for root in roots], longest)

    def trees(self, contexts, settings, budget=MANY, predictor=None, ends=frozenset()):
        predictor = predictor or Predictor(self.resident, self.detokenizer)
        predictor.token_budget = budget
        roots = encode_contexts(self.tokenizer, contexts, self.resident.vocabulary)
        search = BeamSearch(predictor, settings, self.detokenizer, frozenset(ends))
        return list(search.trees(roots))

    def naive(self, settings, ends=()):
        return reference.NaiveMapper(
            self.plain,
            self.plain_tokenizer,
            settings.prob_min,
            settings.top_k,
            settings.max_depth,
            settings.additional_length,
            ends,
            self.answers,
            settings.max_branches,
            settings.min_joint or 0.0,
        )

    def check(self, contexts, settings, budget=MANY, predictor=None, ends=()):
        """Ours and the naive mapper's trees are the same; our trees."""
        trees = self.trees(contexts, settings, budget, predictor, ends)
        for context, tree in zip(contexts, trees, strict=True):
            assert tree.root.context == context
            expected = {tuple(branch.tokens): branch for branch in self.naive(settings, ends).branches(context)}
            assert len(expected) == len(tree.branches)
            for branch in tree.branches:
                naive = expected[branch.tokens[: branch.length]]
                assert list(branch.tokens[branch.length :]) == naive.extension
                explored = [math.exp(node.log_probability) for node in branch.nodes[: branch.length]]
                assert explored == pytest.approx(naive.probabilities, abs=1e-5)
                assert math.exp(branch.joint) == pytest.approx(naive.joint, abs=1e-5)
            joints = [branch.joint for branch in tree.branches]
            assert joints == sorted(joints, reverse=True)
        return trees


def count(trees):
    return sum(len(tree.branches) for tree in trees)


@pytest.fixture(scope="module", params=["bpe", pytest.param("spm", marks=pytest.mark.slow)])
def model(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), "bpe")


def make(folder, family, config=tiny.llama_config, scale=20.0, **more):
    tokenizer = tiny.TOKENIZERS[family]()
    return Model(tiny.make_model(folder / family, config(len(tokenizer), layers=2, **more), tokenizer, scale=scale))


# ---------------------------------------------------------------------------------------------------------------------
# The same tree as the naive mapper's
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, budget",
    [
        (Mapper(0.0, 3, 3, 2), MANY),
        (Mapper(0.0, 2, 3, 2), 1),
        (Mapper(2.0, 3, 4, 4), 40),
        (Mapper(10.0, 4, 6, 0), 20),
        (Mapper(100.0, 3, 2, 3), MANY),
        pytest.param(Mapper(2.0, 3, 4, 8), 1, marks=pytest.mark.slow),
        pytest.param(Mapper(0.0, 4, 5, 0), 100, marks=pytest.mark.slow),
        pytest.param(Mapper(0.0, 1, 6, 3), MANY, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_tree_and_probabilities_as_naive(model, settings, budget):
    """Whatever the budget: where some go first, keys and values are dropped and computed again."""
    trees = model.check(CONTEXTS, settings, budget)
    assert all(tree.cut == 0 for tree in trees)
    if settings.prob_min == 0.0:
        assert count(trees) == len(CONTEXTS) * settings.top_k**settings.max_depth
    if settings.prob_min == 100.0:
        assert [branch.length for tree in trees for branch in tree.branches] == [0] * len(CONTEXTS)
    if settings.prob_min == 10.0:  # what is compared is neither a line nor a full tree
        lengths = {branch.length for tree in trees for branch in tree.branches}
        assert len(lengths) >= 3 and 6 in lengths


def test_without_kept_keys_and_values(model):
    predictor = PlainPredictor(model.resident, model.detokenizer)
    model.check(CONTEXTS, Mapper(5.0, 3, 3, 3), predictor=predictor)


def test_contexts_that_end_in_spaces_are_continued_from_the_text_before_them(model):
    """Two spaces too: what is offered spells both of them, in one token or in two."""
    contexts = ["It sent shivers down her ", "It sent shivers down her  "]
    for tree in model.check(contexts, Mapper(0.0, 2, 3, 2)):
        assert tree.root.spaces in ("", " ", "  ")
        for branch in tree.branches:
            assert model.detokenizer.text(tree.root, branch.tokens).startswith(tree.root.spaces)


def test_an_empty_context_begins_like_a_text(model):
    empty, _ = model.check(["", " "], Mapper(0.0, 2, 2, 2))
    assert empty.root.tokens == (model.tokenizer.bos_token_id,)


def test_contexts_of_one_token_and_of_300(tmp_path):
    model = make(tmp_path, "bpe", positions=512)
    contexts, settings = ["a", " apple" * 300], Mapper(0.0, 2, 2, 2)
    for predictor in (None, model.verified_predictor(contexts, settings)):
        short, long = model.check(contexts, settings, predictor=predictor)
        assert len(short.root.tokens) == 1 and len(long.root.tokens) >= 300
    model.check(contexts, settings, budget=1)


def test_texts_end_where_the_model_takes_no_more(tmp_path):
    model = make(tmp_path, "bpe", positions=24)
    context = "The apple is in the bedroom because that is"
    for settings in (Mapper(0.0, 2, 3, 10), Mapper(0.0, 2, 3, 30, max_branches=3)):
        tree, _ = model.check([context, "The apple"], settings)
        assert {len(tree.root.tokens) + len(branch.nodes) for branch in tree.branches} == {25}


@pytest.mark.parametrize("limits", [{}, {"max_branches": 4, "min_joint": 0.1}])
def test_a_branch_ends_with_the_text(model, limits):
    """An end token is not followed, neither while branching nor while continuing."""
    settings = Mapper(1.0, 3, 3, 5, **limits)
    first = model.trees(CONTEXTS, settings)[1].branches[0].tokens
    ends = {first[1], first[5]}
    trees = model.check(CONTEXTS, settings, ends=ends)
    branches = [branch.tokens for tree in trees for branch in tree.branches]
    assert any(len(tokens) == 2 for tokens in branches)
    assert all(not ends.intersection(tokens[:-1]) for tokens in branches)


def test_the_same_bits_every_time(model):
    assert model.trees(CONTEXTS, Mapper(1.0, 3, 4, 6)) == model.trees(CONTEXTS, Mapper(1.0, 3, 4, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------


class Counting(Predictor):
    """Counts for how many next tokens it is asked."""

    def __init__(self, model):
        super().__init__(model.resident, model.detokenizer)
        self.asked = 0

    def next_tokens(self, paths, spaces, count):
        self.asked += len(paths)
        return super().next_tokens(paths, spaces, count)


@pytest.mark.parametrize("prob_min, max_branches, budget", [(0.0, 1, MANY), (0.0, 5, 40), (2.0, 2, 1), (2.0, 1000, 40)])
def test_the_likeliest_branches_are_those_of_all_that_are(model, prob_min, max_branches, budget):
    """The naive mapper enumerates all, sorts them and takes the first."""
    trees = model.check(CONTEXTS, Mapper(prob_min, 3, 3, 2, max_branches), budget)
    everything = model.naive(Mapper(prob_min, 3, 3, 0))
    for context, tree in zip(CONTEXTS, trees, strict=True):
        cut = [branch.joint for branch in everything.branches(context)[max_branches:]]
        assert bool(cut) == bool(tree.cut) and tree.cut <= len(cut)


@pytest.mark.parametrize("max_branches, min_joint", [(None, 0.5), (None, 20.0), (3, 1.0), (3, 100.0)])
def test_branches_are_not_followed_below_min_joint(model, min_joint, max_branches):
    settings = Mapper(0.5, 3, 3, 2, max_branches, min_joint)
    for tree in model.check(CONTEXTS, settings):
        assert all(math.exp(branch.joint) * 100 >= min_joint - 1e-3 for branch in tree.branches)


def test_what_would_be_a_flood_is_not_enumerated(bpe):
    """Of the 16,384 branches of a context hardly more than the three that are kept are asked about."""
    predictor = Counting(bpe)
    (tree,) = bpe.trees(CONTEXTS[:1], Mapper(0.0, 4, 7, 4, 3), predictor=predictor)
    assert [len(branch.nodes) for branch in tree.branches] == [11] * 3
    assert tree.cut > 20 and predictor.asked < 1000


# ---------------------------------------------------------------------------------------------------------------------
# How an architecture is continued
# ---------------------------------------------------------------------------------------------------------------------


def mamba_config(vocabulary, layers):
    return MambaConfig(vocab_size=vocabulary, hidden_size=32, state_size=8, num_hidden_layers=layers)


def bloom_config(vocabulary, layers):
    return BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=layers, n_head=4)


def mistral_config(vocabulary, layers, window):
    return MistralConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=window,
    )


@pytest.mark.parametrize(
    "config, more, is_cached",
    [
        pytest.param(tiny.llama_config, {}, True, id="llama"),
        pytest.param(tiny.gpt2_config, {}, True, id="gpt2", marks=pytest.mark.slow),
        pytest.param(mistral_config, {"window": 100}, True, id="long window", marks=pytest.mark.slow),
        pytest.param(mistral_config, {"window": 8}, False, id="short window"),
        pytest.param(mamba_config, {}, False, id="mamba"),
        pytest.param(bloom_config, {}, False, id="bloom", marks=pytest.mark.slow),
    ],
)
def test_the_way_is_exact_for_the_architecture(tmp_path, config, more, is_cached):
    model = make(tmp_path, "bpe", config, scale=4.0, **more)
    settings = Mapper(0.0, 2, 2, 2)
    predictor = model.verified_predictor(CONTEXTS, settings)
    assert isinstance(predictor, PlainPredictor) != is_cached
    assert count(model.check(CONTEXTS, settings, predictor=predictor)) == 12


def test_kept_keys_that_are_wrong_are_not_taken(bpe, monkeypatch):
    """Every token sees all that are there, and not its own past only."""
    monkeypatch.setattr("modules.mapper.next_tokens.tree_mask", lambda seen, dtype: torch.zeros(1, 1, *seen.shape))
    assert isinstance(bpe.verified_predictor(CONTEXTS, Mapper(0.0, 2, 2, 2)), PlainPredictor)


def test_a_model_that_answers_nan_is_an_error(tmp_path):
    model = make(tmp_path, "bpe")
    with torch.no_grad():
        model.resident.module.model.norm.weight.fill_(math.nan)
    with pytest.raises(ConfigError, match="NaN"):
        model.trees(CONTEXTS, Mapper())


# ---------------------------------------------------------------------------------------------------------------------
# How phrases stand among the branches
# ---------------------------------------------------------------------------------------------------------------------


def stand(model, tree, phrase, probability, prob_min=10.0):
    encoded = encode_pair(model.tokenizer, tree.root.context, phrase)
    log_probability = math.log(probability) if probability else -math.inf
    pair = Pair("BAD", phrase, tree.root.context)
    (found,) = rank_phrases(tree, [(pair, [encoded], log_probability)], Mapper(prob_min), model.detokenizer)
    suggestion = found.suggestion and (found.suggestion.phrase, round(math.exp(found.suggestion.log_probability), 6))
    return found.rank, found.ranked, suggestion


SHIVERS = "It sent shivers down her "


def test_a_phrase_that_the_model_says_is_first_of_those_of_its_length(bpe):
    tree = scripted(bpe, SHIVERS, [("spine", 0.9), (". The", 0.5)], [("arm", 0.05), (".", 0.9)])
    assert stand(bpe, tree, "spine", 0.9) == (1, 2, None)


def test_branches_that_are_alike_at_the_phrases_length_count_once(bpe):
    both = [("spine", 0.9), (". His", 0.5)], [("spine", 0.9), (". The", 0.4)]
    tree = scripted(bpe, SHIVERS, *both, [("arm", 0.05), (".", 0.9)])
    assert stand(bpe, tree, "neck", 0.01) == (3, 3, ("spine", 0.9))
    assert stand(bpe, tree, "neck", 0.5) == (2, 3, ("spine", 0.9))
    assert stand(bpe, tree, "neck", 0.95) == (1, 3, None)


def test_a_phrase_of_two_words_is_compared_with_two_words(bpe):
    tree = scripted(bpe, "Her eyes were ", [("filled", 0.6), (" with", 0.5), (" tears", 1.0)], [("closed", 0.4)])
    assert stand(bpe, tree, "filled up", 0.2) == (3, 3, ("closed", 0.4))
    assert stand(bpe, tree, "open", 0.2) == (3, 3, ("filled", 0.6))


def test_a_branch_that_only_begins_the_phrase_is_taken_with_its_continuation(bpe):
    tree = scripted(bpe, "Her eyes were ", [("filled", 0.6), ("|", None), (" with", 0.5), (" tears", 0.5)])
    assert stand(bpe, tree, "filled up", 0.2) == (2, 2, None)  # which says nothing but the phrase's own "filled"
    assert stand(bpe, tree, "filled with tears", 0.15) == (1, 1, None)


def test_a_phrase_with_variants_is_compared_with_what_none_of_them_is(bpe):
    """At the length of the longest of them; with what begins like one of them, taken with its continuation."""
    tree = scripted(
        bpe,
        "Her eyes were ",
        [("filled", 0.5), ("|", None), (" with", 0.6), (" tears", 0.5)],
        [("closed", 0.3), (" tightly", 0.5)],
        [("open", 0.1), (" now", 0.5)],
    )

    def stand_any(*variants, probability):
        pair = Pair("BAD", " / ".join(variants), "Her eyes were ", variants=variants)
        encoded = [encode_pair(bpe.tokenizer, pair.context, text) for text in variants]
        phrase = (pair, encoded, math.log(probability))
        (found,) = rank_phrases(tree, [phrase], Mapper(), bpe.detokenizer)
        return found.rank, found.ranked, found.suggestion and found.suggestion.phrase

    assert stand_any("open", "closed", probability=0.4) == (2, 2, "filled")
    assert stand_any("open", "closed tightly", probability=0.25) == (2, 2, "filled")
    assert stand_any("filled up", "open", probability=0.12) == (3, 3, "closed tightly")
    assert stand_any("filled", "closed", probability=0.8) == (1, 2, None)


def test_what_cannot_be_written_as_a_phrase_is_a_rival_but_no_suggestion(bpe):
    tree = scripted(bpe, "The apple", [(bpe.tokenizer.eos_token_id, 0.5)], [(" fell", 0.3)])
    assert stand(bpe, tree, " was", 0.01) == (3, 3, (" fell", 0.3))
    assert stand(bpe, tree, " was", 0.4) == (2, 3, None)


def test_a_phrase_below_prob_min_is_marked_and_one_at_it_is_not(bpe):
    tree = scripted(bpe, "The apple", [(" is", 0.3)])
    marked = []
    for probability in (0.0999, 0.1, 0.5, 0.0):
        log_probability = math.log(probability) if probability else -math.inf
        encoded = encode_pair(bpe.tokenizer, "The apple", " was")
        phrase = (Pair("BAD", " was", "The apple"), [encoded], log_probability)
        marked.append(rank_phrases(tree, [phrase], Mapper(10.0), bpe.detokenizer)[0].too_rare)
    assert marked == [True, False, False, True]


def test_a_pasted_suggestion_has_the_probability_that_was_claimed(model):
    """By a plain forward of the suggestion, as if it had been written into the config."""
    settings, checked = Mapper(0.0, 4, 3, 4), 0
    contexts = [*CONTEXTS, "It sent shivers down her  ", ""]
    for tree in model.trees(contexts, settings):
        pair = Pair("BAD", "apple pie", tree.root.context)
        phrase = (pair, [encode_pair(model.tokenizer, pair.context, pair.phrase)], -math.inf)
        better = rank_phrases(tree, [phrase], settings, model.detokenizer)[0].suggestion
        if better:
            pasted = reference.log_probability(model.plain, model.plain_tokenizer, pair.context, better.phrase)
            assert better.log_probability == pytest.approx(pasted, abs=1e-4)
            checked += 1
    assert checked >= 3

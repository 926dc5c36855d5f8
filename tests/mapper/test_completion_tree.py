"""Completion trees: the fast explorer against the naive one, and how phrases stand among branches."""

import itertools
import math
from pathlib import Path

import pytest
import reference
import tiny
import torch
from completions import scripted
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, MambaConfig, MistralConfig

from modules.checkpoints.checkpoint import load_tokenizer, open_checkpoint
from modules.config import Mapper, Pair
from modules.mapper.completion_tree import Cut, Explorer, at_most, path_of, tokens_of
from modules.mapper.detokenize import Spelling
from modules.mapper.next_tokens import Cached, Recomputed, build_continuation
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
        self.spelling = Spelling(self.tokenizer, self.resident.vocabulary)
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.plain_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.answers = {}

    def continuation(self, contexts, settings, scorer_contexts=None):
        pairs = [Pair("BAD", "apple", context) for context in contexts]
        vocabulary, limit = self.resident.vocabulary, self.resident.max_tokens
        roots = encode_contexts(self.tokenizer, contexts, vocabulary)
        short = [pair for pair in pairs if limit is None or len(pair.context) < limit]
        scorer = build_scorer(self.resident, encode_pairs(self.tokenizer, short, vocabulary, limit), tails=False)
        longest = max(len(root.tokens) for root in roots) + settings.max_depth + settings.additional_length
        return build_continuation(self.resident, self.spelling, scorer, [root.tokens for root in roots], longest)

    def trees(self, contexts, settings, budget=MANY, predictor=None, ends=frozenset()):
        predictor = predictor or Cached(self.resident, self.spelling)
        predictor.token_budget = budget
        roots = encode_contexts(self.tokenizer, contexts, self.resident.vocabulary)
        return list(Explorer(predictor, settings, self.spelling, frozenset(ends)).explore(roots))

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
        """Ours and the naive mapper's trees are the same; the number of branches."""
        trees = self.trees(contexts, settings, budget, predictor, ends)
        for context, tree in zip(contexts, trees, strict=True):
            assert tree.root.context == context
            expected = {tuple(branch.tokens): branch for branch in self.naive(settings, ends).branches(context)}
            assert len(expected) == len(tree.branches)
            for branch in tree.branches:
                tokens = tokens_of(branch.nodes)
                naive = expected[tuple(tokens[: branch.length])]
                assert tokens[branch.length :] == naive.extension
                assert probabilities(branch) == pytest.approx(naive.probabilities, abs=1e-5)
                assert math.exp(branch.joint) == pytest.approx(naive.joint, abs=1e-5)
            joints = [branch.joint for branch in tree.branches]
            assert joints == sorted(joints, reverse=True)
        return sum(len(tree.branches) for tree in trees)


def probabilities(branch):
    return [math.exp(node.log_probability) for node in path_of(branch.leaf)]


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


# Of all combinations, every seventeenth is in each run of the tests.
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if number % 17 else [])
    for number, case in enumerate(itertools.product([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [0.0, 10.0, 100.0], [1, MANY]))
]


@pytest.mark.parametrize("top_k, max_depth, prob_min, budget", CASES)
def test_same_tree_and_probabilities_as_naive(model, top_k, max_depth, prob_min, budget):
    full = top_k**max_depth > 100 and prob_min == 0.0
    contexts = CONTEXTS[:1] if full else CONTEXTS
    settings = Mapper(prob_min, top_k, max_depth, 0 if full else 3)
    branches = model.check(contexts, settings, budget)
    if prob_min == 0.0:
        assert branches == len(contexts) * top_k**max_depth
    if prob_min == 100.0:
        assert branches == len(contexts)


def test_some_branches_end_early_and_others_do_not(model):
    """What the tests above compare is neither a line nor a full tree."""
    lengths = {branch.length for tree in model.trees(CONTEXTS, Mapper(10.0, 4, 6, 0)) for branch in tree.branches}
    assert len(lengths) >= 3 and 6 in lengths


@pytest.mark.sampled(4)
@pytest.mark.parametrize("budget", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 60)), 20, MANY])
def test_the_budget_changes_nothing(model, budget):
    """Neither where branches are followed one after another nor where kept keys and values are dropped."""
    model.check(CONTEXTS, Mapper(2.0, 3, 4, 8), budget)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", ["forest", "rows"])
@pytest.mark.parametrize("budget", [MANY, 1])
def test_without_kept_keys_and_values(model, layout, budget):
    model.check(CONTEXTS, Mapper(2.0, 3, 4, 5), budget, Recomputed(model.resident, model.spelling, layout))


def test_contexts_that_end_in_spaces_are_continued_from_the_text_before_them(model):
    """Two spaces too: what is offered spells both of them, in one token or in two."""
    contexts = ["It sent shivers down her ", "It sent shivers down her  "]
    model.check(contexts, Mapper(0.0, 3, 3, 4))
    for tree in model.trees(contexts, Mapper(0.0, 3, 3, 4)):
        assert tree.root.spaces in ("", " ", "  ")
        for branch in tree.branches:
            assert model.spelling.text(tree.root, tokens_of(branch.nodes)).startswith(tree.root.spaces)


def test_an_empty_context_begins_like_a_text(model):
    (tree,) = model.trees([""], Mapper(0.0, 2, 3, 2))
    assert tree.root.tokens == (model.tokenizer.bos_token_id,)
    assert model.check(["", " "], Mapper(0.0, 2, 3, 2)) > 8


def test_contexts_of_one_token_and_of_300(tmp_path):
    model = make(tmp_path, "bpe", positions=512)
    long = " apple" * 300
    roots = encode_contexts(model.tokenizer, ["a", long], model.resident.vocabulary)
    assert len(roots[0].tokens) == 1 and len(roots[1].tokens) >= 300
    settings = Mapper(0.0, 2, 3, 4)
    for budget in (1, MANY):
        assert model.check(["a", long], settings, budget) == 16
    assert model.check(["a", long], settings, predictor=model.continuation(["a", long], settings)) == 16


def test_texts_end_where_the_model_takes_no_more(bpe, tmp_path):
    model = make(tmp_path, "bpe", positions=24)
    settings = Mapper(0.0, 2, 4, 30)
    context = "The apple is in the bedroom because that is"
    for budget in (1, MANY):
        model.check([context, "The apple"], settings, budget)
    tree = model.trees([context], settings)[0]
    assert {len(tree.root.tokens) + len(branch.nodes) for branch in tree.branches} == {25}


def test_a_branch_ends_with_the_text(model):
    """An end token is not followed, neither while branching nor while continuing."""
    settings = Mapper(0.0, 3, 4, 10)
    free = model.trees(CONTEXTS, settings)
    first = free[1].branches[0].nodes
    ends = {first[1].token, first[6].token}
    model.check(CONTEXTS, settings, ends=ends)
    stopped = [
        tokens_of(branch.nodes) for tree in model.trees(CONTEXTS, settings, ends=ends) for branch in tree.branches
    ]
    assert any(len(tokens) == 2 for tokens in stopped)
    assert all(not ends.intersection(tokens[:-1]) for tokens in stopped)


def test_the_same_bits_every_time(model):
    def bits():
        trees = model.trees(CONTEXTS, Mapper(1.0, 3, 4, 6))
        return [[(n.token, n.log_probability) for n in branch.nodes] for tree in trees for branch in tree.branches]

    assert bits() == bits()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("max_branches", [None, 2])
@pytest.mark.parametrize("budget", [MANY, 40, 1])
def test_progress_adds_up_to_the_number_of_contexts(model, budget, max_branches):
    told = []
    predictor = Cached(model.resident, model.spelling, budget)
    roots = encode_contexts(model.tokenizer, CONTEXTS, model.resident.vocabulary)
    explorer = Explorer(predictor, Mapper(5.0, 3, 4, 6, max_branches), model.spelling, frozenset(), told.append)
    assert len(list(explorer.explore(roots))) == len(CONTEXTS)
    assert all(amount >= 0 for amount in told)
    assert sum(told) == pytest.approx(len(CONTEXTS))


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------


class Counting(Cached):
    """Counts for how many next tokens it is asked."""

    def __init__(self, model):
        super().__init__(model.resident, model.spelling)
        self.asked = 0

    def next_tokens(self, paths, spaces, count):
        self.asked += len(paths)
        return super().next_tokens(paths, spaces, count)


@pytest.mark.parametrize("budget", [pytest.param(1, marks=pytest.mark.slow), 40, MANY])
@pytest.mark.parametrize("max_branches", [1, 2, 5, 1000])
@pytest.mark.parametrize("prob_min", [0.0, 2.0])
def test_the_likeliest_branches_are_those_of_all_that_are(model, prob_min, max_branches, budget):
    """The naive mapper enumerates all, sorts them and takes the first."""
    settings = Mapper(prob_min, 3, 4, 3, max_branches)
    model.check(CONTEXTS, settings, budget)
    everything = Mapper(prob_min, 3, 4, 0)
    for context, tree in zip(CONTEXTS, model.trees(CONTEXTS, settings, budget), strict=True):
        cut = [branch.joint for branch in model.naive(everything).branches(context)[max_branches:]]
        assert bool(cut) == bool(tree.cut.branches) and tree.cut.branches <= len(cut)
        assert sum(cut) <= tree.cut.share + 1e-5 and tree.cut.tokens == 0
        assert tree.cut.share + sum(math.exp(branch.joint) for branch in tree.branches) <= 1 + 1e-5


@pytest.mark.parametrize("min_joint", [0.01, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("max_branches", [None, 3])
def test_branches_are_not_followed_below_min_joint(model, min_joint, max_branches):
    settings = Mapper(0.5, 3, 4, 3, max_branches, min_joint)
    model.check(CONTEXTS, settings)
    for context, tree in zip(CONTEXTS, model.trees(CONTEXTS, settings), strict=True):
        assert all(math.exp(branch.joint) * 100 >= min_joint - 1e-3 for branch in tree.branches)
        naive = model.naive(settings)
        naive.branches(context)
        assert tree.cut.tokens == naive.not_followed if max_branches is None else tree.cut.tokens <= naive.not_followed


def test_limits_go_together_with_ends_of_texts_and_of_the_model(bpe, tmp_path):
    settings = Mapper(0.0, 3, 4, 6, 4, 0.1)
    first = bpe.trees(CONTEXTS, settings)[1].branches[0].nodes
    bpe.check(CONTEXTS, settings, ends={first[1].token, first[5].token})
    short = make(tmp_path, "bpe", positions=12)
    short.check(["The apple is in the bedroom because", "The apple"], Mapper(0.0, 2, 4, 30, 3))


def test_without_limits_nothing_is_cut(model):
    assert all(tree.cut == Cut() for tree in model.trees(CONTEXTS, Mapper(1.0, 3, 4, 2)))


def test_what_would_be_a_flood_is_not_enumerated(bpe):
    """Of the 16,384 branches of a context hardly more than the three that are kept are asked about."""
    predictor = Counting(bpe)
    (tree,) = bpe.trees(CONTEXTS[:1], Mapper(0.0, 4, 7, 4, 3), predictor=predictor)
    assert [len(branch.nodes) for branch in tree.branches] == [11] * 3
    assert tree.cut.branches > 20 and predictor.asked < 1000


@pytest.mark.sampled(5)
@pytest.mark.parametrize("limits", [(None, None), (2, None), (None, 1.0), (2, 1.0)])
@pytest.mark.parametrize("settings", [(0.0, 3, 3, 4), (10.0, 20, 4, 0), (60.0, 3, 4, 4), (100.0, 3, 2, 2)])
def test_no_context_takes_more_than_was_said_before(model, settings, limits):
    settings = Mapper(*settings, *limits)
    branches, asked = at_most(settings)
    for context in CONTEXTS:
        predictor = Counting(model)
        (tree,) = model.trees([context], settings, predictor=predictor)
        assert len(tree.branches) <= branches and predictor.asked <= asked


def test_what_is_said_before_is_what_a_full_tree_takes(model):
    predictor = Counting(model)
    (tree,) = model.trees(CONTEXTS[:1], Mapper(0.0, 3, 3, 4), predictor=predictor)
    assert at_most(Mapper(0.0, 3, 3, 4)) == (len(tree.branches), predictor.asked) == (27, 13 + 27 * 4)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (Mapper(), (243, 121 + 243 * 20)),
        (Mapper(max_branches=6, min_joint=1.0), (6, 121 + 6 * 20)),
        (Mapper(40.0, 9, 5, 20), (32, 31 + 32 * 20)),
        (Mapper(10.0, 9, 5, 20, None, 10.0), (10, 1 + 9 + 3 * 10 + 10 * 20)),
        (Mapper(100.0, 9, 2**62, 20), (1, 2**62 + 20)),
        (Mapper(0.0, 9, 2**62, 0, 5), (5, None)),
    ],
)
def test_what_is_said_before_has_an_end(settings, expected):
    branches, asked = at_most(settings)
    assert branches == expected[0] and asked == (expected[1] or asked)


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "config, more, way",
    [
        (tiny.llama_config, {}, "token tree with kept keys and values"),
        (tiny.gpt2_config, {}, "token tree with kept keys and values"),
        (mistral_config, {"window": 100}, "token tree with kept keys and values"),
        (mistral_config, {"window": 8}, "recomputed rows"),
        (mamba_config, {}, "recomputed rows"),
        (bloom_config, {}, "recomputed rows"),
    ],
    ids=["llama", "gpt2", "long window", "short window", "mamba", "bloom"],
)
def test_the_way_is_exact_for_the_architecture(tmp_path, config, more, way):
    model = make(tmp_path, "bpe", config, scale=4.0, **more)
    settings = Mapper(0.0, 3, 3, 4)
    predictor = model.continuation(CONTEXTS, settings)
    assert predictor.way == way
    assert model.check(CONTEXTS, settings, predictor=predictor) == 81


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
    (found,) = rank_phrases(tree, [(pair, [encoded], log_probability)], Mapper(prob_min), model.spelling)
    suggestion = found.suggestion and (found.suggestion.phrase, round(math.exp(found.suggestion.log_probability), 6))
    return found.place, found.places, suggestion


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
        (found,) = rank_phrases(tree, [phrase], Mapper(), bpe.spelling)
        return found.place, found.places, found.suggestion and found.suggestion.phrase

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
        marked.append(rank_phrases(tree, [phrase], Mapper(10.0), bpe.spelling)[0].too_rare)
    assert marked == [True, False, False, True]


def test_a_pasted_suggestion_has_the_probability_that_was_claimed(model):
    """By a plain forward of the suggestion, as if it had been written into the config."""
    settings, checked = Mapper(0.0, 4, 3, 4), 0
    contexts = [*CONTEXTS, "It sent shivers down her  ", ""]
    for tree in model.trees(contexts, settings):
        pair = Pair("BAD", "apple pie", tree.root.context)
        phrase = (pair, [encode_pair(model.tokenizer, pair.context, pair.phrase)], -math.inf)
        better = rank_phrases(tree, [phrase], settings, model.spelling)[0].suggestion
        if better:
            pasted = reference.log_probability(model.plain, model.plain_tokenizer, pair.context, better.phrase)
            assert better.log_probability == pytest.approx(pasted, abs=1e-4)
            checked += 1
    assert checked >= 3

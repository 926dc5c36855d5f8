"""The scorer against a plain one-by-one log-softmax, in every layout, and the tail forward against whole forwards."""

import random
from contextlib import contextmanager

import pytest
import reference
import tiny
import torch
from transformers import AutoTokenizer, BloomConfig, MistralConfig, MptConfig

from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.phrase_lists import Pair
from modules.model.loading import load_model
from modules.scoring.budget import Budget
from modules.scoring.layout import build_scorer
from modules.scoring.packing import LAYOUTS
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import encode_pairs

ODD_PAIRS = (
    *tiny.PAIRS,
    Pair("BAD", "spine", "It sent shivers down her "),
    Pair("BAD", " spine", "It sent shivers down her"),
    Pair("BAD", "spine", "It sent shivers down her  "),
    Pair("BAD", "The apple", ""),
    Pair("BAD", "dropped the apple", "   "),
    Pair("BAD", "pation", "The atmosphere is thick with antici"),
    Pair("BAD", "\u65e5\u672c\u8a9e \U0001f642", "Cr\u00e8me br\u00fbl\u00e9e, na\u00efve "),
    Pair("BAD", "spine", "It sent shivers down her "),
    Pair("GOOD", "x", "Answer:\n"),
)
FAMILIES = sorted(tiny.TOKENIZERS)


@pytest.fixture(scope="module", params=FAMILIES)
def llama(request, tmp_path_factory):
    tokenizer = tiny.TOKENIZERS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.make_model(folder, tiny.llama_config(len(tokenizer)), tokenizer)


def load(folder, dtype="float32"):
    return load_model(open_checkpoint(folder, "model"), "cpu", dtype)


def one_by_one(folder, pairs):
    model, tokenizer = reference.load(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    return [reference.log_probability(model, tokenizer, pair.context, pair.phrase) for pair in pairs]


def encode(folder, pairs):
    return encode_pairs(AutoTokenizer.from_pretrained(folder), pairs, 10**9, None)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 20, 45, 10**6])
@pytest.mark.parametrize("logits", [1, 100_000, 1 << 26])
def test_probabilities_equal_a_plain_log_softmax(llama, layout, budget, logits):
    scorer = Scorer(load(llama), encode(llama, ODD_PAIRS), layout, Budget(budget, logits))
    assert scorer.score() == pytest.approx(one_by_one(llama, ODD_PAIRS), abs=1e-5, rel=1e-5)


def changed(model, layer, seed):
    """A trial that holds a layer's tensors, each a little changed."""
    part = model.layer(layer)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.1 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in part.tensors.items()
    }
    return tensors, lambda: part.holding(tensors)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [30, 10**6])
@pytest.mark.parametrize("logits", [20_000, 1 << 26])
@pytest.mark.parametrize("cache", [1, 10_000, 1 << 30])
def test_tail_forward_equals_whole_forwards(llama, layout, budget, logits, cache):
    model = load(llama)
    scorer = Scorer(model, encode(llama, ODD_PAIRS), layout, Budget(budget, logits, cache))
    for layer in range(len(model.layers)):
        scorer.at_layer(layer)
        trials = [changed(model, layer, seed) for seed in range(3)]
        found = scorer.score_trials([hold for _, hold in trials])
        for (_, hold), result in zip(trials, found, strict=True):
            with hold():
                assert result == pytest.approx(scorer.score(), abs=1e-5, rel=1e-5)
        part, tensors = model.layer(layer), trials[1][0]
        part.install(tensors)  # the cache must take over what is installed
    assert found[1] == pytest.approx(scorer.score(), abs=1e-5, rel=1e-5)


def test_trials_leave_no_trace(llama):
    model = load(llama)
    scorer = build_scorer(model, encode(llama, tiny.PAIRS))
    before = scorer.score()
    forwards = [layer.forward for layer in model.layers]
    scorer.score_trials([changed(model, 0, 1)[1]])
    assert scorer.score() == before
    assert [layer.forward for layer in model.layers] == forwards
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_an_error_in_a_trial_leaves_no_trace(llama):
    model = load(llama)
    scorer = build_scorer(model, encode(llama, tiny.PAIRS))
    before = scorer.score()

    @contextmanager
    def failing():
        raise RuntimeError("a trial that fails")
        yield

    with pytest.raises(RuntimeError, match="a trial that fails"):
        scorer.score_trials([failing])
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert scorer.score() == before


def test_neither_the_order_of_pairs_nor_another_loading_changes_a_bit(llama):
    model = load(llama)
    pairs = list(ODD_PAIRS)
    scores = dict(zip(pairs, Scorer(model, encode(llama, pairs), "forest").score(), strict=True))
    random.Random(1).shuffle(pairs)
    shuffled = Scorer(model, encode(llama, pairs), "forest").score()
    assert shuffled == [scores[pair] for pair in pairs]
    assert build_scorer(load(llama), encode(llama, pairs)).score() == shuffled


LONG = Pair("BAD", "spine", "It sent shivers down her spine. " * 6)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SMALL = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES = {
    "gpt2": (lambda size: tiny.gpt2_config(size), "forest"),
    # A window shorter than the longest pair: a tree mask would lift it.
    "mistral": (lambda size: MistralConfig(vocab_size=size, sliding_window=16, **SMALL), "rows"),
    # Takes a tree mask, but reckons positions from columns.
    "mpt": (lambda size: MptConfig(vocab_size=size, d_model=32, n_layers=3, n_heads=4, max_seq_len=256), "rows"),
    # Builds its own position bias from a 2-D mask.
    "bloom": (lambda size: BloomConfig(vocab_size=size, hidden_size=32, n_layer=3, n_head=4), "rows"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fastest_exact_layout_is_found(name, tmp_path):
    make_config, layout = ARCHITECTURES[name]
    tokenizer = tiny.bpe_tokenizer()
    folder = tiny.make_model(tmp_path, make_config(len(tokenizer)), tokenizer)
    pairs = (*tiny.PAIRS, LONG)
    model = load(folder)
    scorer = build_scorer(model, encode(folder, pairs))
    assert scorer.layout == layout
    assert scorer.score() == pytest.approx(one_by_one(folder, pairs), abs=1e-5, rel=1e-5)
    scorer.at_layer(1)
    trials = [changed(model, 1, seed)[1] for seed in range(2)]
    for trial, found in zip(trials, scorer.score_trials(trials), strict=True):
        with trial():
            assert found == pytest.approx(scorer.score(), abs=1e-5, rel=1e-5)


def test_a_window_is_never_lifted_however_little_it_shows(tmp_path):
    """Weights so small that attention hardly matters: the scores alone would not tell."""
    tokenizer = tiny.bpe_tokenizer()
    folder = tiny.make_model(tmp_path, ARCHITECTURES["mistral"][0](len(tokenizer)), tokenizer, scale=0.01)
    assert build_scorer(load(folder), encode(folder, (*tiny.PAIRS, LONG))).layout == "rows"


def test_eager_attention_takes_the_tree_mask(llama):
    from transformers import AutoModelForCausalLM

    model = load(llama)
    model.module = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    model.layers = model.module.model.layers
    scorer = build_scorer(model, encode(llama, ODD_PAIRS))
    assert scorer.layout == "forest"
    assert scorer.score() == pytest.approx(one_by_one(llama, ODD_PAIRS), abs=1e-5, rel=1e-5)

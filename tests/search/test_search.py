"""The whole search against the naive twin: the same decisions, the same tensors."""

import itertools
import random
import sys
from collections import Counter

import pytest
import reference
import tiny
import torch
from reference import METHOD_TEXTS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import modules.model.base_model
from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.choices import STRATEGIES
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.merging.methods import slice_weights
from modules.model.loading import load_model
from modules.scoring.budget import Budget
from modules.scoring.layout import build_scorer
from modules.scoring.scorer import DEFAULT
from modules.scoring.tokenization import encode_pairs
from modules.search.prefetch import ReadAhead
from modules.search.search import Search, signed_weights
from modules.search.trial import merged as mix

RATIOS = [0.2, 0.5, 0.9]


def search(tmp_path, base, candidates, pairs=tiny.PAIRS, budget=DEFAULT, **settings):
    """Our own search: decisions, the model's tensors, the search itself."""
    path = tiny.write_config(tmp_path / "my.yaml", base, candidates, tmp_path / "out", pairs, **settings)
    config = load_config(path)
    model = load_model(open_checkpoint(base, "base"), "cpu", config.dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    state = Search(
        model,
        build_scorer(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens), budget),
        config,
        tokenizer,
    )
    start = state.log_probabilities
    decisions = [d for folder in candidates for d in state.candidate(opened(folder, model))]
    return decisions, dict(model.module.state_dict()), state, start


def opened(folder, model):
    return open_candidate(open_checkpoint(folder, str(folder)), model.checkpoint, model.module)


def naive(base, candidates, pairs=tiny.PAIRS, **settings):
    method = settings.get("merge_method", "lerp")
    return reference.NaiveMerge(
        str(base),
        [str(folder) for folder in candidates],
        list(pairs),
        settings.get("merge_ratios", [0.2, 0.4, 0.6, 0.8]),
        [method] if isinstance(method, str) else method,
        settings.get("strategy", "cumulative"),
        settings.get("strategy_threshold", 0.6),
        settings.get("merge_headers", True),
        settings.get("auto_weights", False),
        layers=settings.get("layers"),
    ).run()


def compare(tmp_path, base, candidates, pairs=tiny.PAIRS, **settings):
    """Run both; assert that decisions, totals, probabilities and tensors agree. Returns our decisions."""
    pairs = sorted(pairs, key=lambda pair: pair.kind)  # a config's bad pairs come first
    decisions, tensors, state, start = search(tmp_path, base, candidates, pairs, **settings)
    twin = naive(base, candidates, pairs, **settings)
    assert start == pytest.approx(twin.start, abs=1e-5)
    ours = [(d.model, d.layer, d.method, d.ratio) for d in decisions]
    assert ours == [(d.model, d.layer, d.method, d.ratio) for d in twin.decisions]
    size = sum(abs(score) for score in twin.scores(twin.start))  # a total may be a difference of large sums
    for ours, theirs in zip(decisions, twin.decisions, strict=True):
        assert (ours.before, ours.after) == pytest.approx((theirs.before, theirs.after), rel=1e-4, abs=1e-4 * size)
    assert state.log_probabilities == pytest.approx(twin.current, abs=1e-4)
    for name, tensor in twin.model.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-5)
    return decisions


@pytest.fixture(scope="module", params=["bpe-untied", "spm-tied"])
def llamas(request, tmp_path_factory):
    """A base and two candidates; the second's vocabulary is moved, renamed at its end, and two tokens longer."""
    family, tying = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny.TOKENIZERS[family]()
    config = tiny.llama_config(len(tokenizer), layers=2, tied=tying == "tied")
    base = tiny.make_model(folder / "base", config, tokenizer)
    one = tiny.make_candidate(folder / "one", base, seed=1)
    chat = tiny.TOKENIZERS[family](extra=["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    two = tiny.make_candidate(folder / "two", base, 2, change=lambda model: model.resize_token_embeddings(len(chat)))
    chat.save_pretrained(two)
    return base, one, two


@pytest.mark.sampled(11)
@pytest.mark.parametrize("method, strategy, headers", list(itertools.product(METHOD_TEXTS, STRATEGIES, [True, False])))
def test_same_decisions_and_tensors_as_the_naive_twin(llamas, tmp_path, method, strategy, headers):
    base, one, two = llamas
    settings = {"merge_method": method, "strategy": strategy, "merge_headers": headers, "merge_ratios": RATIOS}
    compare(tmp_path, base, [one, two], strategy_threshold=0.4, **settings)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("auto", [True, False])
def test_lists_of_methods_go_on_from_each_others_results(llamas, tmp_path, auto):
    base, one, two = llamas
    methods = ["slerp", "slice", "lerp", "cyclic", "gradient"]
    decisions = compare(tmp_path, base, [two, one], merge_method=methods, merge_ratios=[0.3, 0.6], auto_weights=auto)
    assert any(decision.ratio is not None for decision in decisions)
    assert [d.method for d in decisions[:5]] == methods


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A base of five layers, and a candidate."""
    folder, tokenizer = tmp_path_factory.mktemp("deep"), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=5), tokenizer)
    return base, tiny.make_candidate(folder / "one", base)


@pytest.mark.sampled(17)
@pytest.mark.parametrize("method, strategy, headers", list(itertools.product(METHOD_TEXTS, STRATEGIES, [True, False])))
@pytest.mark.parametrize("layers", [[0, 2, 4], [1, 3], [2]], ids=str)
def test_some_layers_only(deep, tmp_path, method, strategy, headers, layers):
    base, one = deep
    settings = {"merge_method": [method, "lerp"], "strategy": strategy, "merge_headers": headers, "layers": layers}
    decisions = compare(tmp_path, base, [one], strategy_threshold=0.4, merge_ratios=RATIOS, **settings)
    found = [decision.layer for decision in decisions]
    assert found == [layer for layer in layers for _ in range(2)] + [None] * headers


def test_weights_with_input_first(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", tiny.gpt2_config(len(tokenizer)), tokenizer)
    candidates = [tiny.make_candidate(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    decisions = compare(tmp_path, base, candidates, merge_method=["slice", "gradient"], merge_ratios=RATIOS)
    assert any(decision.ratio is not None and decision.layer is not None for decision in decisions)


@pytest.mark.parametrize("strategy, auto", [*((name, False) for name in STRATEGIES), ("cumulative", True)])
def test_phrases_with_variants(llamas, tmp_path, strategy, auto):
    """Each is one pair with one weight; "anticipation." is a part of its first variant."""
    base, one, two = llamas
    texts = ("anticipation", "anticipation.", "determination", "a whisper")
    pairs = [Pair("BAD", " / ".join(texts), pair.context, pair.weight, variants=texts) for pair in tiny.PAIRS[:2]]
    places = ("the bedroom", "the kitchen")
    good = Pair("GOOD", " / ".join(places), "Answer: The apple is in ", 3.0, variants=places)
    settings = {"strategy": strategy, "auto_weights": auto, "strategy_threshold": 0.4, "merge_ratios": RATIOS}
    decisions = compare(tmp_path, base, [one, two], [*pairs, *tiny.PAIRS[2:], good], **settings)
    assert any(decision.ratio is not None for decision in decisions) == (strategy != "all_phrases")
    assert {len(decision.log_probabilities) for decision in decisions} == {6}


def test_after_a_candidate_the_present_state_is_measured_afresh(llamas, tmp_path, monkeypatch):
    base, one, _ = llamas
    _, _, state, _ = search(tmp_path, base, [one], dtype="bfloat16")
    assert state.log_probabilities == state.scorer.score()


def test_experts_stored_input_first_are_merged_along_their_inputs(tmp_path):
    from transformers import GptOssConfig

    tokenizer = tiny.bpe_tokenizer()
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    base = tiny.make_model(tmp_path / "base", config, tokenizer)
    model = load_model(open_checkpoint(base, "base"), "cpu", "auto")
    part = model.layer(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tuple(part.tensors[name].shape) == (4, 32, 48)
    theirs = {key: tensor + 1 for key, tensor in part.tensors.items()}
    merged = mix(part, "slice", theirs, 0.5, part.space())
    share = (merged[name] - part.tensors[name]).mean((0, 2))  # per input feature
    torch.testing.assert_close(share, slice_weights(32, 0.5), atol=1e-5, rtol=0)
    bias = name + "_bias"
    assert torch.equal(merged[bias], part.tensors[bias])


def test_several_packs_make_the_same_decisions(llamas, tmp_path):
    base, one, two = llamas
    whole = search(tmp_path, base, [one, two])
    split = search(tmp_path, base, [one, two], budget=Budget(tokens=12, logits=10_000))
    assert len(split[2].scorer.packs_here) > 1
    assert [(d.layer, d.ratio) for d in split[0]] == [(d.layer, d.ratio) for d in whole[0]]
    for name, tensor in whole[1].items():
        torch.testing.assert_close(split[1][name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_phrases_changes_nothing(llamas, tmp_path, seed):
    base, one, two = llamas
    pairs = list(tiny.PAIRS)
    random.Random(seed).shuffle(pairs)
    expected, found = (search(tmp_path, base, [one, two], some, Budget(tokens=20)) for some in (tiny.PAIRS, pairs))
    assert [(d.layer, d.method, d.ratio) for d in found[0]] == [(d.layer, d.method, d.ratio) for d in expected[0]]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


def test_hidden_states_that_are_not_kept_change_nothing(llamas, tmp_path):
    """Beside the device, partly nowhere, or nowhere at all."""
    base, one, two = llamas
    expected = search(tmp_path, base, [one, two], budget=Budget(tokens=20))
    for budget in (Budget(20, cache=0, cache_beside=1 << 20), Budget(20, cache=6000), Budget(20, cache=0)):
        found = search(tmp_path, base, [one, two], budget=budget)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_base_stays_tied_with_an_untied_candidate_and_the_reverse(tmp_path, tied):
    tokenizer, accepted = tiny.bpe_tokenizer(), 0
    base, other = (
        tiny.make_model(
            tmp_path / name, tiny.llama_config(len(tokenizer), layers=2, tied=tying), tokenizer, seed, scale=2.0
        )
        for name, tying, seed in (("base", tied, 0), ("other", not tied, 3))
    )
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (other, base))
    # The untied one's head has no part in a tied model; the tied one's embedding is its head too.
    source = {"model.embed_tokens.weight": "model.embed_tokens.weight", "lm_head.weight": "model.embed_tokens.weight"}
    for kind in ("BAD", "GOOD"):
        pairs = [Pair(kind, pair.phrase.split()[0], pair.context) for pair in tiny.PAIRS]
        decisions, tensors, state, _ = search(tmp_path, base, [other], pairs, merge_ratios=[0.1, 0.5, 0.9])
        header = decisions[-1]
        assert header.layer is None and header.warning is None
        module = state.model.module
        assert (module.get_input_embeddings().weight is module.get_output_embeddings().weight) == tied
        if header.ratio is not None:
            accepted += 1
            for name, counterpart in source.items():
                torch.testing.assert_close(tensors[name], torch.lerp(ours[name], theirs[counterpart], header.ratio))
    assert accepted


def test_a_strange_vocabulary_leaves_the_header_alone_and_says_so(tmp_path):
    base_tokenizer, strange = tiny.bpe_tokenizer(), tiny.spm_tokenizer()
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(base_tokenizer), layers=2), base_tokenizer)
    other = tiny.make_model(tmp_path / "other", tiny.llama_config(len(strange), layers=2), strange, seed=1)
    decisions, *_ = search(tmp_path, base, [other])
    assert [decision.layer for decision in decisions] == [0, 1, None]
    assert decisions[-1].ratio is None
    assert "shares only" in decisions[-1].warning and f"{len(base_tokenizer)} tokens" in decisions[-1].warning


def poison(name):
    def change(model):
        model.state_dict()[name].view(-1)[3] = float("nan")

    return change


def test_nan_in_a_candidates_layer_never_wins(llamas, tmp_path):
    base, *_ = llamas
    bad = tiny.make_candidate(
        tmp_path / "bad", base, 1, change=poison("model.layers.0.post_attention_layernorm.weight")
    )
    decisions, tensors, *_ = search(tmp_path, base, [bad])
    assert decisions[0].ratio is None
    assert "model.layers.0.post_attention_layernorm.weight holds NaN" in decisions[0].warning
    assert decisions[1].warning is None
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_nan_in_a_row_that_no_phrase_reads_never_wins(llamas, tmp_path):
    base, *_ = llamas
    bad = tiny.make_candidate(tmp_path / "bad", base, 1, change=poison("model.embed_tokens.weight"))
    decisions, tensors, *_ = search(tmp_path, base, [bad])
    assert decisions[-1].ratio is None and "holds NaN" in decisions[-1].warning
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_auto_weights_start_every_pair_at_one():
    pairs = [Pair("BAD", "a", "x", 7), Pair("GOOD", "b", "x", 7), Pair("BAD", "c", "x", 7)]
    weights, warnings = signed_weights(pairs, True, [-1.0, -2.0, -800.0])
    assert weights[:2] == pytest.approx([2.718281828, -7.389056099])
    assert weights[2] == 7
    assert len(warnings) == 1 and "'c' after 'x' is too improbable" in warnings[0]
    assert signed_weights(pairs, False, [-1.0, -2.0, -800.0]) == ([7, -7, 7], [])


class Waits(TorchDispatchMode):
    """Counts what would wait for a device, did the tensors live on one: values that Python is told, and copies of
    tensors that were made elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "lift_fresh"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHOD_TEXTS)
def test_nobody_waits_for_a_device_between_two_scores(tmp_path, method):
    """A decision's scores are told to the host, and nothing else on the way to them or to the model."""
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(400), tiny.bpe_tokenizer())
    candidates = [tiny.make_candidate(tmp_path / "one", base, 1)]
    accepted = Counter()

    def watched(self, part, *arguments):
        with Waits() as waits:
            ratio = own(self, part, *arguments)
        assert waits.seen == [], method
        accepted[ratio is not None] += 1
        return ratio

    own = Search._decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_decide", watched)
        search(tmp_path, base, candidates, merge_ratios=RATIOS, merge_method=[method])
    assert accepted[True] and sum(accepted.values()) == 4


def test_a_search_has_one_stream_for_each_device(tmp_path, monkeypatch):
    """PyTorch keeps what is freed on a stream for that stream: another one for each layer would keep a second model."""
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(400), tiny.bpe_tokenizer())
    candidates = [tiny.make_candidate(tmp_path / name, base, seed) for name, seed in (("one", 1), ("two", 2))]
    made, given = [], []
    monkeypatch.setattr("modules.search.search.side_streams", lambda devices: made.append(set(devices)) or ())
    own = ReadAhead.__init__
    monkeypatch.setattr(ReadAhead, "__init__", lambda *given_: given.append(given_[2]) or own(*given_))
    search(tmp_path, base, candidates, merge_ratios=RATIOS)
    assert made == [{torch.device("cpu")}] and given == [()] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Too little memory
# ---------------------------------------------------------------------------------------------------------------------


def limited(monkeypatch, tokens, from_call=0):
    """Every model's last layer is out of memory for more than so many tokens at a time, all ratios together."""
    calls, own = [0], modules.model.loading.load_model

    def checking(_layer, arguments, keywords):
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        calls[0] += 1
        if calls[0] > from_call and hidden.shape[0] * hidden.shape[1] > tokens:
            raise torch.OutOfMemoryError(f"{hidden.shape[0]} x {hidden.shape[1]} tokens")

    def loaded(*arguments, **keywords):
        model = own(*arguments, **keywords)
        model.layers[-1].register_forward_pre_hook(checking, with_kwargs=True)
        return model

    monkeypatch.setattr(sys.modules[__name__], "load_model", loaded)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("from_call", [0, 15])
@pytest.mark.parametrize("tokens, told", [(120, "packs of"), (60, "of"), (32, "one ratio at a time")])
def test_out_of_memory_takes_smaller_packs_and_the_same_decisions(tmp_path, monkeypatch, tokens, told, from_call):
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(400), tiny.bpe_tokenizer())
    candidates = [tiny.make_candidate(tmp_path / name, base, seed) for name, seed in (("one", 1), ("two", 2))]
    settings = {"merge_ratios": RATIOS, "merge_method": ["slerp", "lerp"]}
    expected, tensors, _, _ = search(tmp_path, base, candidates, **settings)
    limited(monkeypatch, tokens, from_call)
    found, limited_tensors, state, _ = search(tmp_path, base, candidates, **settings)
    assert [(d.layer, d.method, d.ratio) for d in found] == [(d.layer, d.method, d.ratio) for d in expected]
    assert [d.after for d in found] == pytest.approx([d.after for d in expected], rel=1e-4, abs=1e-7)
    assert all(torch.equal(limited_tensors[name], tensor) for name, tensor in tensors.items())
    # Before the search, while layouts are compared, it only begins with smaller packs.
    assert state.scorer.budget.tokens < 1024 and (from_call < 15 or any(told in note for note in state.memory_notes))


def test_not_even_one_pair_fits(tmp_path, monkeypatch):
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(400), tiny.bpe_tokenizer())
    candidate = tiny.make_candidate(tmp_path / "one", base, 1)
    limited(monkeypatch, 10)
    with pytest.raises(torch.OutOfMemoryError):
        search(tmp_path, base, [candidate])

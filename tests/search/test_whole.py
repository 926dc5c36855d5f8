"""A candidate scored whole, a layer at a time, against plain transformers with the whole candidate in memory."""

import pytest
import reference
import tiny
import torch
from architectures import configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.loading import load_model
from modules.model.settings import Settings, _computes_by, settings_of
from modules.scoring.budget import Budget
from modules.scoring.drift import DriftMeter, full_passage
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs
from modules.search.whole import score_whole

NAMES = ["GPT-2", "Gemma 2", "Phi", "BLOOM", "Mixtral"]


def everything_moved(model):
    """Norms and position tables too, so that one that is forgotten is seen."""
    torch.manual_seed(9)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05 * (1 + parameter.abs().mean()))


def whole(base, other, pairs=tiny.PAIRS, budget=None, as_it_is=False, by_own=False):
    model, tokenizer = load_model(open_checkpoint(base, "base"), "cpu", "float32"), AutoTokenizer.from_pretrained(base)
    candidate = open_candidate(open_checkpoint(other, "other"), model.checkpoint, model.module)
    encoded = encode_pairs(tokenizer, pairs, model.vocabulary, model.max_tokens)
    scorers = [build_scorer(model, encoded, budget or Budget()), build_scorer(model, encoded[:2], tails=False)]
    windows = [tuple(range(5, 30)), tuple(range(40, 65)), (3, 4, 9)]
    meter = DriftMeter(model, list(map(full_passage, windows)))
    own = settings_of(model, candidate.checkpoint) if by_own else Settings() if as_it_is else None
    assert not by_own or own.values
    if by_own:
        scorers = [scorer.singly() for scorer in scorers]
    state = {name: dict(vars(child)) for name, child in model.module.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    scores, ((drift,),) = score_whole(model, tokenizer, candidate, scorers, [meter], settings=own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    for name, child in model.module.named_modules():
        assert vars(child).keys() == state[name].keys()
        assert all(value is state[name][key] for key, value in vars(child).items()), name
    return scores, drift, windows, tokenizer


def check(base, other, **more):
    (first, second), drift, windows, tokenizer = whole(base, other, **more)
    plain_base, plain = (AutoModelForCausalLM.from_pretrained(folder).float().eval() for folder in (base, other))
    naive = reference.NaiveMerge(str(base), [], list(tiny.PAIRS), [0.5], ["lerp"])
    naive.tokenizer = tokenizer
    expected = naive.log_probabilities(plain)
    assert first == pytest.approx(expected, abs=1e-4, rel=1e-4) and second == pytest.approx(expected[:2], abs=1e-4)
    found = drift.divergence, drift.agreement, drift.perplexity
    assert found == pytest.approx(reference.plain_drift(plain_base, plain, windows), rel=1e-4, abs=1e-8)
    assert drift.divergence > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_whole_candidate_says(tmp_path, name):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", configuration(name, len(tokenizer)), tokenizer, scale=3.0)
    check(base, tiny.make_candidate(tmp_path / "other", base, change=everything_moved))


@pytest.mark.parametrize("tied", [True, False])
def test_in_many_packs_tied_and_untied(tmp_path, tied):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer), tied=tied), tokenizer, scale=3.0)
    check(base, tiny.make_candidate(tmp_path / "other", base, change=everything_moved), budget=Budget(tokens=20))


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_of_its_own_beside_a_base_that_is_tied(tmp_path, says_tied):
    """A file that has both is not tied, whatever its configuration says."""
    tokenizer = tiny.bpe_tokenizer()
    config = tiny.llama_config(len(tokenizer), tied=True)
    base = tiny.make_model(tmp_path / "base", config, tokenizer, scale=3.0)
    other = tiny.make_candidate(tmp_path / "other", base, change=everything_moved)

    def own_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    tiny.edit_checkpoint(other, own_head, tie_word_embeddings=says_tied)
    check(base, other, as_it_is=True)
    with pytest.raises(AssertionError):
        check(base, other)  # as a merge takes it, into one tensor


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
FULL, SLIDING = "full_attention", "sliding_attention"
OWN_SETTINGS = [
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("Llama", {"rope_parameters": YARN}),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}),
    ("Llama", {"hidden_act": "gelu"}),
    ("Llama", {"attn_implementation": "eager", "rms_norm_eps": 0.1}),
    ("GPT-2", {"activation_function": "relu", "layer_norm_epsilon": 0.1}),
    ("GPT-2", {"scale_attn_weights": False}),
    ("Phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    ("GPT-NeoX", {"use_parallel_residual": False}),
    ("Mistral", {"sliding_window": 4}),
    ("Gemma 2", {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    ("Gemma 3", {"layer_types": [FULL, SLIDING], "sliding_window": 5}),
    ("Granite", {"residual_multiplier": 0.2, "logits_scaling": 8.0, "embedding_multiplier": 3.0}),
    ("Mixtral", {"num_experts_per_tok": 1}),
    ("Qwen3-MoE", {"norm_topk_prob": True}),
    ("DeepSeek V3", {"routed_scaling_factor": 1.0}),
    ("MPT", {"attn_config": {"clip_qkv": 0.5}}),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name, settings", OWN_SETTINGS, ids=[f"{name} {some}" for name, some in OWN_SETTINGS])
def test_it_is_computed_by_its_own_settings(tmp_path, name, settings):
    """As transformers computes it that has it as its only model; and the base is what it was."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", configuration(name, len(tokenizer)), tokenizer, scale=3.0)
    other = tiny.make_candidate(tmp_path / "other", base, change=everything_moved)
    tiny.edit_checkpoint(other, **settings)
    check(base, other, by_own=True)
    with pytest.raises(AssertionError):
        check(base, other)


def test_settings_by_which_a_module_is_built_otherwise_are_not_taken(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", configuration("StableLM", len(tokenizer)), tokenizer)
    other = tiny.make_candidate(tmp_path / "other", base)
    model = load_model(open_checkpoint(base, "base"), "cpu", "float32")
    tiny.edit_checkpoint(other, use_parallel_residual=True)  # without one of its norms
    assert settings_of(model, open_checkpoint(other, "other")) is None
    tiny.edit_checkpoint(other, use_parallel_residual=False, hidden_act="relu")
    settings = settings_of(model, open_checkpoint(other, "other"))
    settings.values.append((vars(model.module), "forward", None))  # what fails when it is used
    assert settings is not None and not _computes_by(model, settings)

"""Drift against a plain loop: whole logits of two plain models, sums in float64."""

import pytest
import reference
import tiny
import torch
from architectures import configuration
from transformers import AutoModelForCausalLM

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.embeddings import aligned_header
from modules.model.loading import load_model
from modules.scoring import drift
from modules.scoring.drift import DriftMeter, Passage, full_passage

NAMES = ["Llama", "GPT-2", "Gemma 2", "Phi", "BLOOM", "Mamba", "Mixtral", "OPT"]


def made(tmp_path, config, tokenizer):
    base = tiny.make_model(tmp_path / "base", config, tokenizer, scale=3.0)
    return base, tiny.make_candidate(tmp_path / "other", base, amount=0.02)


def windows_of(vocabulary, seed=3):
    chance = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, vocabulary, (size,), generator=chance).tolist()) for size in (24, 24, 24, 9, 2)]


def check(found, expected):
    assert (found.divergence, found.agreement, found.perplexity) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def moved(base, other, header):
    """The base with the other's layers installed and, if asked, all the rest; and the same as a plain model."""
    model = load_model(open_checkpoint(base, "base"), "cpu", "float32")
    candidate = open_candidate(open_checkpoint(other, "other"), model.checkpoint, model.module)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()

    def install():
        parts = [(part, part.adopt(candidate.stream(part.tensors), "other")) for part in map(model.layer, range(2))]
        if header:
            parts.append((model.header(), aligned_header(model, tiny.bpe_tokenizer(), candidate)[0]))
            outside = model.outside()
            parts.append((outside, outside.adopt(candidate.stream(outside.tensors), "other")))
        for part, tensors in parts:
            part.install(tensors)
        model.has_base_header = not header
        plain.load_state_dict(model.module.state_dict())

    return model, plain, install


@pytest.mark.parametrize("name", NAMES)
def test_only_compared_positions_count(tmp_path, name):
    tokenizer = tiny.bpe_tokenizer()
    base, other = made(tmp_path, configuration(name, len(tokenizer)), tokenizer)
    model, plain, install = moved(base, other, header=False)
    windows = windows_of(len(tokenizer))
    chance = torch.Generator().manual_seed(5)
    compared = [tuple((torch.rand(len(window), generator=chance) < 0.4).tolist()) for window in windows]
    meter = DriftMeter(model, [Passage(*both) for both in zip(windows, compared, strict=True)])
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    install()
    check(meter.measure(), reference.plain_drift(before, plain, windows, compared))
    assert meter.tokens == sum(map(sum, compared))


@pytest.mark.parametrize("header", [False, True], ids=["layers", "layers and header"])
@pytest.mark.parametrize("name", NAMES)
def test_drift_is_that_of_whole_logits(tmp_path, monkeypatch, name, header):
    tokenizer = tiny.bpe_tokenizer()
    base, other = made(tmp_path, configuration(name, len(tokenizer)), tokenizer)
    monkeypatch.setattr(drift, "BLOCK", 4 * 75 * 50)  # of three windows, fifty rows at a time
    model, plain, install = moved(base, other, header)
    before, windows = AutoModelForCausalLM.from_pretrained(base).eval(), windows_of(len(tokenizer))
    meter = DriftMeter(model, list(map(full_passage, windows)))
    nothing = meter.measure()
    check(nothing, reference.plain_drift(before, plain, windows))
    assert nothing.divergence < 1e-9 and nothing.agreement == 1 and nothing.tokens == 83
    assert meter.measure_base() == nothing
    install()
    expected = reference.plain_drift(before, plain, windows)
    assert expected[0] > 1e-5
    check(meter.measure(), expected)


def test_a_token_that_pads_may_be_behind_a_block(tmp_path, monkeypatch):
    """The embedding is tied to the head, which has fewer rows for a moment than that token's number."""
    tokenizer = tiny.bpe_tokenizer()
    config = tiny.llama_config(len(tokenizer), tied=True, pad_token_id=len(tokenizer) - 1)
    base, _ = made(tmp_path, config, tokenizer)
    monkeypatch.setattr(drift, "BLOCK", 4 * 75 * 50)
    model = load_model(open_checkpoint(base, "base"), "cpu", "float32")
    assert DriftMeter(model, list(map(full_passage, windows_of(len(tokenizer))))).measure().divergence < 1e-9
    assert model.module.get_input_embeddings().padding_idx == len(tokenizer) - 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_header_comes_back_as_it_was(tmp_path, tied):
    tokenizer = tiny.bpe_tokenizer()
    base, other = made(tmp_path, tiny.llama_config(len(tokenizer), tied=tied), tokenizer)
    model, plain, install = moved(base, other, header=True)
    meter = DriftMeter(model, list(map(full_passage, windows_of(len(tokenizer)))))
    install()
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    check(
        meter.measure(),
        reference.plain_drift(AutoModelForCausalLM.from_pretrained(base).eval(), plain, windows_of(len(tokenizer))),
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())


def test_little_memory_gives_the_same(tmp_path, monkeypatch):
    tokenizer = tiny.bpe_tokenizer()
    base, other = made(tmp_path, tiny.llama_config(len(tokenizer)), tokenizer)
    model, _, install = moved(base, other, header=False)
    meter = DriftMeter(model, list(map(full_passage, windows_of(len(tokenizer)))))
    install()
    expected, own, seen = meter.measure(), torch.Tensor.max, []

    def limited(tensor, *arguments):
        seen.append(tensor.shape[-1])
        if tensor.dim() == 3 and tensor.shape[-1] > 30 and tensor.shape[0] < 30:
            raise torch.OutOfMemoryError("no room for so many rows")
        return own(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "max", limited)
    found = meter.measure()
    assert max(seen) > 30 and (found.divergence, found.perplexity) == pytest.approx(
        (expected.divergence, expected.perplexity), rel=1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_half_types_are_measured_too(tmp_path, dtype, tied):
    """Large hidden states, of which a half type keeps few digits, as real models have them; long windows."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer), tied=tied), tokenizer, scale=20.0)
    other = tiny.make_candidate(tmp_path / "other", base, amount=0.02)
    model = load_model(open_checkpoint(base, "base"), "cpu", dtype)
    windows = [*windows_of(len(tokenizer)), *(tuple(range(5, 105)) for _ in range(9))]
    meter = DriftMeter(model, list(map(full_passage, windows)))
    assert meter.measure().divergence < 1e-3 and meter.measure().agreement > 0.95
    candidate = open_candidate(open_checkpoint(other, "other"), model.checkpoint, model.module)
    for part in map(model.layer, range(3)):
        tensors = part.adopt(candidate.stream(part.tensors), "other")
        part.install(tensors)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    plain.load_state_dict({name: tensor.float() for name, tensor in model.module.state_dict().items()})
    expected = reference.plain_drift(AutoModelForCausalLM.from_pretrained(base).eval(), plain, windows)
    assert meter.measure().divergence == pytest.approx(expected[0], rel=0.2, abs=0.02) and expected[0] > 0.05

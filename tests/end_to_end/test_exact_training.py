"""The training of the demo's models: the gradients of transformers' own forward, the same bits on any machine."""

import dataclasses
import hashlib
import io
import os
import random
import subprocess
import sys

import pytest
import torch
from project import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT / "demo"))

import exact_training
import make_models
from exact_training import Adam, begin, loss_of

# Of the weights after three steps, on whatever machine.
EXPECTED = "28670bac0c18087d981c3ee6be2f8c8d1d82e4b14e0809fc9443154b6e016e65"

# What another processor would compute: other kernels, other sums, other exponentials.
ANOTHER_MACHINE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
}


def small_model():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        hidden_act="relu",
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    begin(model, random.Random(1))
    return model


def texts(rng):
    return [[rng.randrange(50) for _ in range(length)] for length in (2, 17, 9, 30)]


def weights_after_three_steps():
    """A digest."""
    model = small_model()
    rng = random.Random(2)
    optimizer = Adam(model)
    for _ in range(3):
        loss_of(model, texts(rng)).backward()
        optimizer.step(1e-3)
    return hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())).hexdigest()


def test_loss_and_gradients_are_those_of_an_ordinary_backward():
    model, plain = small_model(), small_model().double()
    rows = texts(random.Random(3))
    loss = loss_of(model, rows)
    loss.backward()
    scores = [plain(input_ids=torch.tensor([row])).logits[0, :-1] for row in rows]
    following = torch.tensor([token for row in rows for token in row[1:]])
    expected = torch.nn.functional.cross_entropy(torch.cat(scores), following)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    compared = 0
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        if weight.dim() == 2:
            assert (weight.grad - other.grad).norm() < 0.01 * other.grad.norm()
            compared += 1
    assert compared == 16


def test_adam_is_torchs():
    model, plain = small_model(), small_model()
    weights = [weight for weight in plain.parameters() if weight.dim() == 2]
    optimizer = Adam(model)
    twin = torch.optim.Adam(weights, lr=1e-2, betas=exact_training.BETAS)
    rng = random.Random(4)
    for _ in range(3):
        loss_of(model, texts(rng)).backward()
        for weight, other in zip((w for w in model.parameters() if w.dim() == 2), weights, strict=True):
            other.grad = weight.grad.clone()
        optimizer.step(1e-2)
        twin.step()
    for weight, other in zip((w for w in model.parameters() if w.dim() == 2), weights, strict=True):
        torch.testing.assert_close(weight, other)


def test_sums_are_exact_in_any_order():
    values = torch.randn(8192, generator=torch.Generator().manual_seed(1)) ** 3
    shuffled = values[torch.randperm(8192, generator=torch.Generator().manual_seed(2))]
    assert values.sum() != shuffled.sum()  # as float32 adds them
    assert torch.equal(exact_training.row_sums(values), exact_training.row_sums(shuffled))
    products = [exact_training.product(some[None], some[:, None]) for some in (values, shuffled)]
    assert torch.equal(*products)


def test_this_machine_comes_to_the_same_bits():
    assert weights_after_three_steps() == EXPECTED


@pytest.mark.slow
def test_another_machine_comes_to_the_same_bits():
    """As far as one machine can be told to be another."""
    code = "import test_exact_training as test; print(test.weights_after_three_steps())"
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests/end_to_end", "tests/helpers"))
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ANOTHER_MACHINE, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == EXPECTED


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_which_model_is_trained_and_how_far(tmp_path, monkeypatch, capsys):
    """And models that are not those of the pages are named."""
    short = tuple(dataclasses.replace(lesson, steps=2) for lesson in make_models.LESSONS)
    monkeypatch.setattr(make_models, "LESSONS", short)
    monkeypatch.setattr(make_models, "FOLDER", tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make_models.main()
    lines = capsys.readouterr().out.splitlines()
    for number, lesson in enumerate(short, 1):
        assert f"{number} of 3: {lesson.name}" in terminal.getvalue()
        assert any(line.strip().startswith(f"{number} of 3: {lesson.name}") for line in lines)
        assert lesson.name in lines[-1]
    assert "100%" in terminal.getvalue()
    make_models.main()
    again = capsys.readouterr().out.splitlines()
    assert len(again) == 2 and again[-1] == lines[-1]

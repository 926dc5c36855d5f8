"""What a run computes in: the rule, a machine with too little memory, runs that go on elsewhere or from before it."""

import json

import pytest
import torch
from broken_runs import RECIPE, break_off
from runs import digest, log_of, make_models, merge, stored

import modules.model.loading
import modules.run.plan
from modules.model.arithmetic import arithmetics

FREE = 600_000  # bytes: more than the models take in bfloat16, less than in float32
CPU, GPU = torch.device("cpu"), torch.device("cuda")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in bfloat16 and two candidates."""
    return make_models(tmp_path_factory.mktemp("models"), BF16)


@pytest.mark.parametrize(
    "compute, dtype, stored, device, expected",
    [
        ("auto", "auto", BF16, CPU, ["float32", "bfloat16"]),
        ("auto", "auto", F16, CPU, ["float32", "float16"]),
        ("auto", "auto", F32, CPU, ["float32"]),
        ("auto", "auto", BF16, GPU, ["float16"]),
        ("auto", "auto", F16, GPU, ["float16"]),
        ("auto", "auto", F32, GPU, ["float16"]),
        ("auto", "bfloat16", F32, CPU, ["bfloat16"]),
        ("auto", "bfloat16", BF16, GPU, ["bfloat16"]),
        ("float32", "bfloat16", BF16, GPU, ["float32"]),
        ("bfloat16", "auto", F16, CPU, ["bfloat16"]),
        ("bfloat16+float32", "auto", F16, GPU, ["bfloat16+float32"]),
    ],
)
def test_the_rule(compute, dtype, stored, device, expected):
    assert [arithmetic.name for arithmetic in arithmetics(compute, dtype, stored, device)] == expected


def told_and_noted(place):
    """What the summary says of types, and what the recipe does."""
    line = next(line for line in log_of(place).splitlines() if line.startswith("Dtype"))
    recipe = json.loads((place / "out" / RECIPE).read_text())
    return line.partition(": ")[2], recipe["dtype"], recipe["saved_dtype"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ("float32, saved as bfloat16", "float32", None)),
        ({"compute_dtype": "bfloat16"}, ("bfloat16, saved as bfloat16", "bfloat16", None)),
        ({"dtype": "float32"}, ("float32, saved as float32", "float32", "float32")),
        ({"dtype": "float32", "compute_dtype": "bfloat16"}, ("bfloat16, saved as float32", "bfloat16", "float32")),
    ],
)
def test_what_is_computed_in_and_what_is_saved(place, models, settings, expected):
    assert merge(place, models, **settings) == 0
    assert told_and_noted(place) == expected
    assert {dtype for dtype, _ in stored(place / "out").values()} == {"F32" if expected[2] else "BF16"}


def little_memory(monkeypatch):
    """As much as the run takes in half precision, and a little more."""
    for module in (modules.run.plan, modules.model.loading):
        monkeypatch.setattr(module, "free_memory", lambda _: FREE)


def test_too_little_memory_is_told_and_decides_for_the_whole_run(place, models, monkeypatch):
    with monkeypatch.context() as patch:
        little_memory(patch)
        assert merge(place, models) == 0
    assert told_and_noted(place)[:2] == ("bfloat16, saved as bfloat16", "bfloat16")
    assert "; computing in bfloat16 instead" in log_of(place)
    whole = place / "whole"
    (place / "out").rename(whole)
    break_off(place, whole, 6)
    assert merge(place, models, "--resume") == 0  # where there is enough memory
    assert told_and_noted(place)[:2] == ("bfloat16, saved as bfloat16", "bfloat16")
    assert digest(whole)["model.safetensors"] == digest(place / "out")["model.safetensors"]


def test_a_run_goes_on_in_what_its_journal_says_and_not_by_the_rule_of_before(place, models):
    assert merge(place, models) == 0
    whole = place / "whole"
    (place / "out").rename(whole)
    break_off(place, whole, 6)
    assert merge(place, models, "--resume") == 0
    assert "recorded decisions" in log_of(place)
    assert told_and_noted(place) == ("float32, saved as bfloat16", "float32", None)
    assert digest(whole)["model.safetensors"] == digest(place / "out")["model.safetensors"]

"""A part of the model: what it adopts of a candidate, and what it takes over for good."""

import pytest
import torch

from modules.model.part import BLOCKS, Part
from modules.runtime.errors import BrokenWeights, CheckpointError

SHAPES = {"matrix": (37, 5), "vector": (2 * BLOCKS + 1,), "short": (3,), "scalar": (), "stack": (2, 4, 3)}


def part(dtype, saved=None):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    types = dict.fromkeys(SHAPES, dtype)
    return Part(tensors, types, dict.fromkeys(SHAPES, saved or dtype), dict.fromkeys(SHAPES, -1))


def theirs(dtype, scale=1.0):
    chance = torch.Generator().manual_seed(1)
    return {name: (torch.randn(shape, generator=chance) * scale).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_adopted_is_cast_and_nothing_else(dtype, stored):
    given = theirs(stored)
    found = part(dtype).adopt(reversed(given.items()), "other")
    assert list(found) == list(SHAPES)
    for name, tensor in given.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_no_number_is_broken(name, value, dtype):
    given = theirs(torch.float32)
    given[name].view(-1)[-1] = value
    with pytest.raises(BrokenWeights, match=f"other: {name} holds NaN or infinite values"):
        part(dtype).adopt(given.items(), "other")


@pytest.mark.parametrize("name", SHAPES)
def test_what_does_not_fit_is_told_with_its_size(name):
    given = theirs(torch.float32)
    given[name].view(-1)[0] = -70000.0
    for target in (part(torch.float16), part(torch.float32, saved=torch.float16)):
        with pytest.raises(CheckpointError, match=f"{name} reaches 7e\\+04, too large for float16"):
            target.adopt(given.items(), "other")


def test_only_what_is_another_is_taken_over():
    """A zero with another sign is equal, and stays as it was."""
    target, given = part(torch.float32), theirs(torch.float32)
    given["vector"] = -torch.zeros(SHAPES["vector"])
    changed = target.changes_in(given)
    assert changed.tolist() == [name != "vector" for name in SHAPES]
    target.install(given)
    assert not target.tensors["vector"].signbit().any()
    assert all(torch.equal(target.tensors[name], given[name]) for name in SHAPES)


def test_space_serves_again_where_it_fits():
    one, other = part(torch.float32), part(torch.float16)
    space = one.space()
    assert one.fitting(space) == space and other.fitting(space) == {} and one.fitting({}) == {}

"""The methods against closed-form column shares and the naive twin."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import METHOD_TEXTS, naive_merge, naive_weights

from modules.merging.methods import (
    METHODS,
    cyclic_weights,
    gradient_weights,
    merge,
    parsed,
    ratios_for,
    seeded,
    slice_weights,
    spelled,
)

SHARES = {"slice": slice_weights, "cyclic": cyclic_weights, "gradient": gradient_weights}


def tensors(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def roughness(base, other):
    """How exactly float32 can know slerp's result: hardly, where matrices point almost the same or the opposite way."""
    size = base.shape[-2] * base.shape[-1]
    cosines = torch.cosine_similarity(base.double().reshape(-1, size), other.double().reshape(-1, size)).tolist()
    sines = [1.0 if abs(cosine) > 0.9995 else math.sqrt(1 - cosine**2) for cosine in cosines]  # linear beyond that
    return 2e-7 / min(sines) ** 3


@pytest.mark.parametrize("method", METHOD_TEXTS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 70)),
        st.tuples(st.integers(1, 9), st.integers(1, 70)),
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 70)),
    ),
    ratio=st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.8, 0.85, 1.0]) | st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_equals_the_naive_twin(method, shape, ratio, seed):
    base, other = tensors(shape, seed=seed)
    merged, expected = merge(method, base, other, ratio), naive_merge(method, base, other, ratio)
    exactly = max(1e-6, roughness(base, other)) if method == "slerp" and len(shape) > 1 else 1e-6
    torch.testing.assert_close(merged, expected, atol=exactly, rtol=1e-5)


@pytest.mark.parametrize("method", SHARES)
@pytest.mark.parametrize("width", [1, 3, 19, 20, 40, 64, 1000])
def test_column_shares_are_the_closed_form(method, width):
    for ratio in (0.0, 0.2, 0.25, 0.4, 0.45, 0.65, 0.85, 1.0):
        expected = torch.tensor(naive_weights(method, width, ratio), dtype=torch.float32)
        torch.testing.assert_close(SHARES[method](width, ratio), expected, atol=1e-6, rtol=0)


def test_slice_of_forty_columns_at_a_half_by_hand():
    # c = 20, e = 2: a in columns 0..17, shares 0, 1/4, 2/4, 3/4 in 18..21, b from 22 on.
    assert slice_weights(40, 0.5).tolist() == [0.0] * 18 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 18


def test_cyclic_of_forty_columns_by_hand():
    # t = 0.65: c = 14, e = 2: blend 12..15, four columns of b 16..19, blend back 20..23.
    blend = [0.0, 0.25, 0.5, 0.75]
    back = [1.0, 0.75, 0.5, 0.25]
    assert cyclic_weights(40, 0.65).tolist() == [0.0] * 12 + blend + [1.0] * 4 + back + [0.0] * 16


def test_ends_give_the_models_themselves():
    base, other = tensors((6, 40))
    for method in ("lerp", "slerp"):
        torch.testing.assert_close(merge(method, base, other, 0.0), base)
        torch.testing.assert_close(merge(method, base, other, 1.0), other)
    assert torch.equal(merge("lerp", base, other, 0.0), base)
    assert torch.equal(merge("lerp", base, other, 1.0), other)


@pytest.mark.parametrize("method", METHOD_TEXTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9,), (33, 40), (2, 5, 40), (1100, 1000)])
def test_half_types_are_computed_in_float32_and_rounded_once(method, dtype, shape):
    base, other = tensors(shape, dtype)
    merged = merge(method, base, other, 0.35)
    assert merged.dtype == dtype
    exact = merge(method, base.float(), other.float(), 0.35)
    if method == "slerp":  # its angle is a sum over the whole tensor, whose order differs
        torch.testing.assert_close(merged.float(), exact, atol=1e-7, rtol=torch.finfo(dtype).eps)
    else:
        assert torch.equal(merged, exact.to(dtype))


@pytest.mark.parametrize("method", METHOD_TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_unchanged(method, dtype):
    base, other = tensors((6, 40), dtype)
    copies = base.clone(), other.clone()
    out = torch.full_like(base, torch.nan)
    assert merge(method, base, other, 0.4, out=out) is out
    assert torch.equal(base, copies[0]) and torch.equal(other, copies[1])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("method", METHOD_TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_input_first_weights_are_merged_along_the_same_logical_axis(method, dtype):
    base, other = tensors((12, 40), dtype)
    turned = merge(method, base.T.contiguous(), other.T.contiguous(), 0.4, input_axis=-2)
    torch.testing.assert_close(turned.T, merge(method, base, other, 0.4), atol=1e-3, rtol=1e-3)


def test_slerp_keeps_length_and_turns_evenly():
    base, other = torch.zeros(1, 4), torch.zeros(1, 4)
    base[0, 0], other[0, 1] = 1.0, 1.0
    merged = merge("slerp", base, other, 1 / 3)
    torch.testing.assert_close(merged.norm(), torch.tensor(1.0))
    torch.testing.assert_close(torch.arccos(merged[0, 0]).rad2deg(), torch.tensor(30.0))


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_of_parallel_tensors_is_linear(factor):
    base, _ = tensors((6, 40))
    torch.testing.assert_close(merge("slerp", base, factor * base, 0.25), 0.75 * base + 0.25 * factor * base)


def test_slerp_of_zeros_is_finite():
    base, other = torch.zeros(4, 20), tensors((4, 20))[0]
    assert torch.isfinite(merge("slerp", base, other, 0.3)).all()
    assert torch.equal(merge("slerp", base, base.clone(), 0.3), base)


def test_cyclic_has_its_own_ratios():
    assert ratios_for("cyclic", (0.1, 0.2)) == (0.25, 0.45, 0.65, 0.85)
    assert ratios_for("lerp", (0.1, 0.2)) == (0.1, 0.2)


def test_what_does_not_match_is_refused():
    with pytest.raises(ValueError, match="can't merge"):
        merge("lerp", torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(ValueError, match="can't merge"):
        merge("lerp", torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16), 0.5)
    with pytest.raises(ValueError, match="unknown merge method 'tees'"):
        merge("tees", torch.zeros(2), torch.zeros(2), 0.5)


def test_every_method_is_tested():
    assert [parsed(text)[0] for text in METHOD_TEXTS] == list(METHODS)


def test_ties_keeps_the_largest_differences_by_hand():
    base, other = torch.zeros(2, 4), torch.tensor([[1.0, -8.0, 0.5, 2.0], [-4.0, 0.0, 3.0, 0.25]])
    expected = torch.tensor([[0.0, -4.0, 0.0, 0.0], [-2.0, 0.0, 1.5, 0.0]])
    assert torch.equal(merge("ties(density=0.4)", base, other, 0.5), expected)
    torch.testing.assert_close(merge("ties(density=1.0)", base, other, 0.5), merge("lerp", base, other, 0.5))


def test_dare_drops_by_chance_and_keeps_the_mean():
    base, other = tensors((200, 300))
    merged = merge("dare(density=0.25, seed=3)", base, other, 0.5, name="a")
    kept = merged != base
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(merged[kept], (base + 2.0 * (other - base))[kept])
    assert not torch.equal(merged, merge("dare(density=0.25, seed=3)", base, other, 0.5, name="b"))
    assert not torch.equal(merged, merge("dare(density=0.25, seed=4)", base, other, 0.5, name="a"))
    # Another ratio goes the same way further.
    further = merge("dare(density=0.25, seed=3)", base, other, 1.0, name="a")
    assert torch.equal(further != base, kept)


def test_names_and_parameters_as_one_text():
    assert spelled("lerp", {}) == "lerp"
    assert spelled("ties", {}) == "ties(density=0.5)"
    assert seeded(spelled("dare", {"density": 0.3}), 11) == "dare(density=0.3, seed=11)"
    assert seeded("dare(density=0.3, seed=5)", 11) == "dare(density=0.3, seed=5)"
    assert seeded("ties(density=0.3)", 11) == "ties(density=0.3)"
    for text in METHOD_TEXTS:
        assert spelled(*parsed(text)) == text


@pytest.mark.parametrize(
    "name, parameters, cause",
    [
        ("tees", {}, "tees"),
        ("lerp", {"density": 0.5}, "density"),
        ("ties", {"density": 0}, "density"),
        ("ties", {"density": 1.5}, "density"),
        ("ties", {"density": "half"}, "density"),
        ("ties", {"seed": 3}, "seed"),
        ("dare", {"seed": -1}, "seed"),
        ("dare", {"density": float("nan")}, "density"),
    ],
)
def test_what_a_method_cannot_be(name, parameters, cause):
    with pytest.raises(ValueError, match=cause):
        spelled(name, parameters)


@pytest.mark.parametrize("text", ["", "ties(", "ties(0.5)", "ties(density=open('x'))", "(" * 5000, "a.b", "ties(**x)"])
def test_what_is_no_method(text):
    with pytest.raises(ValueError):
        spelled(*parsed(text))

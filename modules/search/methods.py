"""The five merge methods: pure functions on tensors.

Knows: tensors and ratios. Refuses to know: models, layers, files, scores.

Every method keeps shape, dtype and device, computes in float32, and never changes its inputs. A column is one input
feature: the last axis of a weight stored (output, input).

To add a method, give METHODS in modules/config/choices.py its name, write a function below and decorate it:
@merge_method if it merges two tensors, @column_method if it says which share of the other model each column gets.

PyTorch is imported where it is used: modules.search is imported where nobody should wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modules.config import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    Combine = Callable[[Tensor, Tensor, float, Tensor], None]  # base, other, ratio, where to write the result
    Shares = Callable[[int, float], Tensor]  # width, ratio -> (width,) float32

# Two tensors closer than this in direction are merged linearly: the angle between them is too small to divide by.
SLERP_DOT_THRESHOLD = 0.9995

# Elements that half-precision tensors take through float32 at a time: on a CPU the temporaries stay in its cache, on an
# accelerator each block costs the time of a few launches, and its temporaries a little memory (128 MiB each).
_BLOCK_ON_CPU, _BLOCK_ELSEWHERE = 1 << 19, 1 << 25


@dataclass(frozen=True)
class Method:
    """A way to merge two tensors of one shape, and what the search must know of it."""

    combine: Combine
    ratios: tuple[float, ...] | None = None  # that it tries whatever is configured
    recorded_share: float | None = None  # in the composition, whatever the ratio


_METHODS: dict[str, Method] = {}


def merge_method(
    name: str, ratios: tuple[float, ...] | None = None, recorded_share: float | None = None
) -> Callable[[Combine], Combine]:
    """Make a function the merge method of a name. Raises KeyError if no configuration can name it; see Method."""
    _ = METHODS[name]

    def register(combine: Combine) -> Combine:
        _METHODS[name] = Method(combine, ratios, recorded_share)
        return combine

    return register


def column_method(
    name: str, ratios: tuple[float, ...] | None = None, recorded_share: float | None = None
) -> Callable[[Shares], Shares]:
    """Make a formula of column shares the merge method of a name. Tensors of one dimension stay the base's."""
    as_method = merge_method(name, ratios, recorded_share)

    def register(shares: Shares) -> Shares:
        @as_method
        def by_columns(base: Tensor, other: Tensor, ratio: float, out: Tensor) -> None:
            if base.dim() < 2:
                out.copy_(base)
                return
            import torch

            with base.device:  # made where they are used: to copy them there would wait for the device
                weights = shares(base.shape[-1], ratio)
            _in_float32(lambda a, b, o: torch.lerp(a, b, weights.expand_as(a), out=o), base, other, out)

        return shares

    return register


def ratios_for(method: str, merge_ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratios that a method tries: its own, or else the configured ones."""
    own = _METHODS[method].ratios
    return tuple(merge_ratios) if own is None else own


def recorded_share(method: str, ratio: float) -> float:
    """What a merge adds to the composition: the ratio, or the method's own share."""
    own = _METHODS[method].recorded_share
    return ratio if own is None else own


def merge(
    method: str, base: Tensor, other: Tensor, ratio: float, *, input_axis: int = -1, out: Tensor | None = None
) -> Tensor:
    """Merge `other` into `base` by a method's name.

    base, other: tensors of the same shape, dtype and device: (features,), (output, input) or (experts, output, input).
    input_axis: -1, or -2 for weights stored (input, output), as GPT-2's Conv1D does.
    out: where to write the result; may be neither input. It may be of another half type than these.
    Raises ValueError for an unknown method or tensors that do not match.
    """
    import torch

    if method not in _METHODS:
        raise ValueError(f"unknown merge method '{method}'")
    combine = _METHODS[method].combine
    if base.shape != other.shape or base.dtype != other.dtype:
        raise ValueError(f"can't merge {base.dtype} {tuple(base.shape)} with {other.dtype} {tuple(other.shape)}")
    out = torch.empty_like(base) if out is None else out
    if input_axis == -2 and base.dim() > 1:
        combine(base.mT, other.mT, ratio, out.mT)
    else:
        combine(base, other, ratio, out)
    return out


@merge_method("lerp")
def lerp(base: Tensor, other: Tensor, ratio: float, out: Tensor) -> None:
    """(1-t)*a + t*b. torch.lerp computes half types in float32 and rounds once."""
    import torch

    if out.dtype == base.dtype:
        torch.lerp(base, other, ratio, out=out)
    else:
        _in_float32(lambda a, b, o: torch.lerp(a, b, ratio, out=o), base, other, out)


@merge_method("slerp")
def slerp(base: Tensor, other: Tensor, ratio: float, out: Tensor) -> None:
    """Spherical interpolation of the whole tensor as one vector; stacked experts one matrix at a time.

    Formula and threshold as in mergekit's slerp: sin((1-t)*w)/sin(w) * a + sin(t*w)/sin(w) * b, w the angle between
    a and b. Tensors of one dimension are interpolated linearly.
    """
    import torch

    if base.dim() < 2:
        lerp(base, other, ratio, out)
        return
    if base.dim() > 2:
        for a, b, o in zip(base, other, out, strict=True):
            slerp(a, b, ratio, o)
        return
    dot = _cosine(base, other)
    angle = torch.arccos(dot.clamp(-1.0, 1.0))
    linear = dot.abs() > SLERP_DOT_THRESHOLD
    # No branch on a value that lives on the device: that would stop it for every tensor.
    share_base = torch.where(linear, 1.0 - ratio, torch.sin((1.0 - ratio) * angle) / torch.sin(angle))
    share_other = torch.where(linear, ratio, torch.sin(ratio * angle) / torch.sin(angle))
    _in_float32(lambda a, b, o: torch.mul(a, share_base, out=o).addcmul_(b, share_other), base, other, out)


@column_method("slice")
def slice_shares(width: int, ratio: float) -> Tensor:
    """The other's share per column, (width,) float32: none, a blend of 2e columns around c, then all.

    c = int(width*(1-ratio)), e = int(0.05*width); the blend's i-th column has i/2e. What falls outside is clipped.
    """
    edge = int(0.05 * width)
    return _ramp(width, int(width * (1 - ratio)) - edge, 2 * edge)


@column_method("cyclic", ratios=(0.25, 0.45, 0.65, 0.85), recorded_share=0.15)
def cyclic_shares(width: int, ratio: float) -> Tensor:
    """The other's share per column, (width,) float32: as slice, but back to the base after int(0.10*width) columns."""
    edge = int(0.05 * width)
    start = int(width * (1 - ratio)) - edge
    return _ramp(width, start, 2 * edge) - _ramp(width, start + 2 * edge + int(0.10 * width), 2 * edge)


@column_method("gradient", recorded_share=0.45)
def gradient_shares(width: int, ratio: float) -> Tensor:
    """The other's share per column, (width,) float32: up from 0 to 0.9 at c = int(width*(1-ratio)), then down again."""
    import torch

    peak = int(width * (1 - ratio))
    column = torch.arange(width, dtype=torch.float32)
    rising = 0.9 * column / torch.full((), float(max(peak, 1)))
    falling = 0.9 * (width - 1 - column) / torch.full((), float(max(width - peak, 1)))
    return torch.where(column < peak, rising, falling)


def _ramp(width: int, start: int, length: int) -> Tensor:
    """0 before `start`, i/length in the `length` columns from there, 1 after them."""
    import torch

    column = torch.arange(width, dtype=torch.float32) - start
    # By a tensor, not a number: a GPU multiplies with a number's inverse, and rounds otherwise.
    return (column / torch.full((), float(length))).clamp(0.0, 1.0) if length > 0 else (column >= 0).float()


def _in_float32(combine: Callable[[Tensor, Tensor, Tensor], Tensor], base: Tensor, other: Tensor, out: Tensor) -> None:
    """out <- combine(base, other) in float32, rounded once; half types go through it a block of rows at a time."""
    import torch

    if base.dtype == torch.float32:
        combine(base, other, out)
        return
    for a, b, o in zip(*(_row_blocks(tensor) for tensor in (base, other, out)), strict=True):
        o.copy_(combine(a.float(), b.float(), torch.empty(a.shape, dtype=torch.float32, device=a.device)))


def _cosine(base: Tensor, other: Tensor) -> Tensor:
    """Cosine of the angle between two tensors taken as vectors, a float32 scalar on their device."""
    import torch

    products = torch.zeros(3, dtype=torch.float32, device=base.device)  # a.b, a.a, b.b
    for a, b in zip(_row_blocks(base), _row_blocks(other), strict=True):
        a, b = a.float().flatten(), b.float().flatten()
        products += torch.stack((a.dot(b), a.dot(a), b.dot(b)))
    dot, norms = products[0], products[1:].sqrt()
    # A tensor of zeros has no direction; it is left as it is rather than divided by zero.
    return dot / torch.where(norms > 1e-8, norms, 1.0).prod()


def _row_blocks(tensor: Tensor) -> Sequence[Tensor]:
    block = _BLOCK_ON_CPU if tensor.device.type == "cpu" else _BLOCK_ELSEWHERE
    return tensor.split(max(1, block // max(1, tensor[0].numel())))

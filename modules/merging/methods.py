"""The merge methods: pure functions on tensors, with the names and parameters that a configuration gives them.

Knows: tensors, ratios, names, parameters. Refuses to know: models, layers, files, scores.

Every method keeps shape, dtype and device, computes in float32, and never changes its inputs. A column is one input
feature: the last axis of a weight stored (output, input).

To add a method, write a function below and decorate it: @merge_method if it merges two tensors, @column_method if it
says how much of the other model each column gets. Its keyword-only parameters are those that the YAML may give:

    merge_method: {name: ties, density: 0.3}

In records and in the search a method is one text with all of its parameters: `lerp`, `ties(density=0.3)`. A parameter
`seed` is the run's random_seed unless it is given; random draws still differ from tensor to tensor.

PyTorch is imported where it is used: the configuration reads names and parameters here, and a typo should be reported
at once.
"""

import ast
import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from torch import Tensor

# base, other, ratio, where to write the result; then its parameters by keyword
Combine = Callable[..., None]
Weights = Callable[[int, float], "Tensor"]  # width, ratio -> (width,) float32

Density = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

# Two tensors closer than this in direction are merged linearly: the angle between them is too small to divide by.
SLERP_DOT_THRESHOLD = 0.9995

# Elements that half-precision tensors take through float32 at a time: on a CPU the temporaries stay in its cache, on an
# accelerator each block costs the time of a few launches, and its temporaries a little memory (128 MiB each).
_BLOCK_ON_CPU = 1 << 19
_BLOCK_ELSEWHERE = 1 << 25


@dataclass(frozen=True)
class Method:
    """A way to merge two tensors of one shape, and its facts that the search needs."""

    summary: str  # as default.yaml prints it
    combine: Combine
    ratios: tuple[float, ...] | None = None  # fixed ones, instead of the configured merge_ratios
    recorded_weight: float | None = None  # fixed weight in the composition, instead of the ratio

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Its own parameters, by name."""
        all_parameters = inspect.signature(self.combine).parameters
        return {
            name: parameter
            for name, parameter in all_parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }


METHODS: dict[str, Method] = {}


def merge_method(
    name: str, summary: str, ratios: tuple[float, ...] | None = None, recorded_weight: float | None = None
) -> Callable[[Combine], Combine]:
    """Make a function the merge method of a name; see Method."""

    def register(combine: Combine) -> Combine:
        METHODS[name] = Method(summary, combine, ratios, recorded_weight)
        return combine

    return register


def column_method(
    name: str, summary: str, ratios: tuple[float, ...] | None = None, recorded_weight: float | None = None
) -> Callable[[Weights], Weights]:
    """Make a formula of column weights the merge method of a name. Tensors of one dimension stay the base's."""
    as_method = merge_method(name, summary, ratios, recorded_weight)

    def register(weights: Weights) -> Weights:
        @as_method
        def by_columns(base: "Tensor", other: "Tensor", ratio: float, out: "Tensor") -> None:
            if base.dim() < 2:
                out.copy_(base)
                return
            import torch

            with base.device:  # created on the device: a copy to it would make the CPU wait
                columns = weights(base.shape[-1], ratio)
            _in_float32(lambda a, b, o: torch.lerp(a, b, columns.expand_as(a), out=o), base, other, out)

        return weights

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Names and parameters
# ---------------------------------------------------------------------------------------------------------------------


def spelled(name: str, parameters: Mapping[str, Any]) -> str:
    """A method as one text, with all of its parameters except a seed that is not given.

    Raises ValueError, naming the mistake, for an unknown method or parameter and for an invalid value.
    """
    if name not in METHODS:
        raise ValueError(f"unknown merge method '{name}'; known: {', '.join(METHODS)}")
    known_parameters = METHODS[name].parameters
    for key in parameters:
        if key not in known_parameters:
            raise ValueError(f"{name} has no parameter '{key}'; it has {', '.join(known_parameters) or 'none'}")
    texts = []
    for key, parameter in known_parameters.items():
        value = parameters.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            continue
        try:
            checked = TypeAdapter(parameter.annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{name}, {key}: {error.errors(include_url=False)[0]['msg']}") from None
        texts.append(f"{key}={checked!r}")
    return f"{name}({', '.join(texts)})" if texts else name


@functools.cache
def parsed(method: str) -> tuple[str, dict[str, Any]]:
    """The name and the parameters of a method's text. Raises ValueError if the text is no method."""
    try:
        tree = ast.parse(method, mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(item.arg): ast.literal_eval(item.value) for item in tree.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ValueError(f"'{method[:60]}' is not a merge method")


def seeded(method: str, seed: int) -> str:
    """A method's text with a run's seed added, if the method takes a seed and the text has none."""
    name, parameters = parsed(method)
    return spelled(name, {"seed": seed, **parameters}) if "seed" in METHODS[name].parameters else method


def ratios_for(method: str, merge_ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratios that a method tries: its own, or else the configured ones."""
    fixed = METHODS[parsed(method)[0]].ratios
    return tuple(merge_ratios) if fixed is None else fixed


def recorded_weight(method: str, ratio: float) -> float:
    """The candidate's weight in the composition: the ratio, or the method's fixed weight."""
    fixed = METHODS[parsed(method)[0]].recorded_weight
    return ratio if fixed is None else fixed


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def merge(
    method: str,
    base: "Tensor",
    other: "Tensor",
    ratio: float,
    *,
    name: str = "",
    input_axis: int = -1,
    out: "Tensor | None" = None,
) -> "Tensor":
    """Merge `other` into `base` by a method's text.

    base, other: tensors of the same shape, dtype and device: (features,), (output, input) or (experts, output, input).
    name: of the tensor in the model; random draws differ from name to name.
    input_axis: -1, or -2 for weights stored (input, output), as GPT-2's Conv1D does.
    out: where to write the result; must not be an input. Its half type may differ from the inputs'.
    Raises ValueError for an unknown method or tensors that do not match.
    """
    import torch

    method_name, parameters = parsed(method)
    if method_name not in METHODS:
        raise ValueError(f"unknown merge method '{method_name}'")
    if base.shape != other.shape or base.dtype != other.dtype:
        raise ValueError(f"can't merge {base.dtype} {tuple(base.shape)} with {other.dtype} {tuple(other.shape)}")
    if "seed" in parameters:
        parameters = {**parameters, "seed": zlib.crc32(name.encode(), parameters["seed"] % 2**32)}
    combine = METHODS[method_name].combine
    out = torch.empty_like(base) if out is None else out
    if input_axis == -2 and base.dim() > 1:
        combine(base.mT, other.mT, ratio, out.mT, **parameters)
    else:
        combine(base, other, ratio, out, **parameters)
    return out


@merge_method("lerp", "linear interpolation of the two layers")
def lerp(base: "Tensor", other: "Tensor", ratio: float, out: "Tensor") -> None:
    """(1-t)*a + t*b. torch.lerp computes half types in float32 and rounds once."""
    import torch

    if out.dtype == base.dtype:
        torch.lerp(base, other, ratio, out=out)
    else:
        _in_float32(lambda a, b, o: torch.lerp(a, b, ratio, out=o), base, other, out)


@merge_method("slerp", "spherical interpolation of each weight matrix")
def slerp(base: "Tensor", other: "Tensor", ratio: float, out: "Tensor") -> None:
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
    # No branch on a value on the device: each would make the CPU wait for the device.
    weight_base = torch.where(linear, 1.0 - ratio, torch.sin((1.0 - ratio) * angle) / torch.sin(angle))
    weight_other = torch.where(linear, ratio, torch.sin(ratio * angle) / torch.sin(angle))
    _in_float32(lambda a, b, o: torch.mul(a, weight_base, out=o).addcmul_(b, weight_other), base, other, out)


@column_method(
    "slice", "the base's columns, a short blend, then the candidate's columns; the ratio is the candidate's part"
)
def slice_weights(width: int, ratio: float) -> "Tensor":
    """The other's weight per column, (width,) float32: none, a blend of 2e columns around c, then all.

    c = int(width*(1-ratio)), e = int(0.05*width); the blend's i-th column has i/2e. What falls outside is clipped.
    """
    edge = int(0.05 * width)
    return _ramp(width, int(width * (1 - ratio)) - edge, 2 * edge)


@column_method(
    "cyclic",
    "a band of the candidate's columns (15 %) at four fixed positions; merge_ratios is not used",
    ratios=(0.25, 0.45, 0.65, 0.85),
    recorded_weight=0.15,
)
def cyclic_weights(width: int, ratio: float) -> "Tensor":
    """The other's weight per column, (width,) float32: as slice, but back to the base after int(0.10*width) columns."""
    edge = int(0.05 * width)
    start = int(width * (1 - ratio)) - edge
    return _ramp(width, start, 2 * edge) - _ramp(width, start + 2 * edge + int(0.10 * width), 2 * edge)


@column_method(
    "gradient", "the candidate fades in to a peak at 1 - ratio and out again (45 % in all)", recorded_weight=0.45
)
def gradient_weights(width: int, ratio: float) -> "Tensor":
    """The other's weight per column, (width,) float32: up from 0 to 0.9 at c = int(width*(1-ratio)), then down."""
    import torch

    peak = int(width * (1 - ratio))
    column = torch.arange(width, dtype=torch.float32)
    rising = 0.9 * column / torch.full((), float(max(peak, 1)))
    falling = 0.9 * (width - 1 - column) / torch.full((), float(max(width - peak, 1)))
    return torch.where(column < peak, rising, falling)


@merge_method("ties", "lerp of the largest differences only; density is the fraction to keep")
def ties(base: "Tensor", other: "Tensor", ratio: float, out: "Tensor", *, density: Density = 0.5) -> None:
    """a + t * trim(b - a). trim keeps the int(density * n) of a matrix's n differences that are largest in size.

    As mergekit's `ties` with one model beside the base and `normalize: false`: with one model there is no sign to
    elect. Stacked experts are trimmed one matrix at a time.
    """
    if base.dim() > 2:
        for a, b, o in zip(base, other, out, strict=True):
            ties(a, b, ratio, o, density=density)
        return
    if base.numel() == 0:
        return
    difference = other.float() - base.float()
    sizes = difference.abs().flatten()
    kept_count = max(1, int(density * sizes.numel()))
    smallest_kept = sizes.kthvalue(sizes.numel() - kept_count + 1).values
    trimmed = difference.where(difference.abs() >= smallest_kept, 0.0)
    out.copy_(base.float() + ratio * trimmed)


@merge_method("dare", "lerp of a random fraction (density) of the differences, each divided by density")
def dare(base: "Tensor", other: "Tensor", ratio: float, out: "Tensor", *, density: Density = 0.5, seed: Seed) -> None:
    """a + t * (b - a) * mask / density. The mask is 1 with the probability density, for each number by itself.

    As mergekit's `dare_linear` with one model beside the base. The mask is drawn on the CPU, so that it is the same on
    every device, and is the same for all ratios.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(base.shape, generator=generator) < density).to(base.device)
    difference = (other.float() - base.float()).where(mask, 0.0)
    out.copy_(base.float() + (ratio / density) * difference)


def _ramp(width: int, start: int, length: int) -> "Tensor":
    """0 before `start`, i/length in the `length` columns from there, 1 after them."""
    import torch

    column = torch.arange(width, dtype=torch.float32) - start
    # By a tensor, not a number: a GPU multiplies with a number's inverse, and rounds otherwise.
    return (column / torch.full((), float(length))).clamp(0.0, 1.0) if length > 0 else (column >= 0).float()


def _in_float32(
    combine: "Callable[[Tensor, Tensor, Tensor], Tensor]", base: "Tensor", other: "Tensor", out: "Tensor"
) -> None:
    """out <- combine(base, other) in float32, rounded once; half types go through it a block of rows at a time."""
    import torch

    if base.dtype == torch.float32:
        combine(base, other, out)
        return
    for a, b, o in zip(*(_row_blocks(tensor) for tensor in (base, other, out)), strict=True):
        o.copy_(combine(a.float(), b.float(), torch.empty(a.shape, dtype=torch.float32, device=a.device)))


def _cosine(base: "Tensor", other: "Tensor") -> "Tensor":
    """Cosine of the angle between two tensors taken as vectors, a float32 scalar on their device."""
    import torch

    products = torch.zeros(3, dtype=torch.float32, device=base.device)  # a.b, a.a, b.b
    for a, b in zip(_row_blocks(base), _row_blocks(other), strict=True):
        a = a.float().flatten()
        b = b.float().flatten()
        products += torch.stack((a.dot(b), a.dot(a), b.dot(b)))
    dot = products[0]
    norms = products[1:].sqrt()
    # A tensor of zeros has no direction; it is left as it is rather than divided by zero.
    return dot / torch.where(norms > 1e-8, norms, 1.0).prod()


def _row_blocks(tensor: "Tensor") -> "Sequence[Tensor]":
    block = _BLOCK_ON_CPU if tensor.device.type == "cpu" else _BLOCK_ELSEWHERE
    return tensor.split(max(1, block // max(1, tensor[0].numel())))

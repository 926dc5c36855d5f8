"""The arithmetic of a model: the type of its products, and that of the residual stream between them.

Knows: torch's types, devices. Refuses to know: modules, phrases, candidates.

With a float32 residual stream, the embedding's output is float32 and every layer adds to it in float32. Products alone
(linear layers, attention) are made in the half type, as torch.autocast does it. Weights stay in the half type, except
vectors (norms and biases): they are small, and float32 norms multiply with them.
"""

from dataclasses import dataclass

import torch

from modules.checkpoints.readers import dtype_name

HALF_DTYPES = (torch.float16, torch.bfloat16)
STREAM = "+float32"  # behind the name of a half type: with a float32 residual stream


@dataclass(frozen=True)
class Arithmetic:
    """The types that a model is computed in."""

    dtype: torch.dtype  # of weights and products
    float32_stream: bool = False  # whether the residual stream is float32, where the dtype is a half type

    @classmethod
    def named(cls, name: str) -> "Arithmetic":
        """The arithmetic of a name in a configuration, journal or recipe: "float16", "bfloat16+float32"."""
        dtype, plus, _ = name.partition("+")
        return cls(getattr(torch, dtype), bool(plus))

    @property
    def name(self) -> str:
        """The name in a configuration, journal or recipe."""
        return dtype_name(self.dtype) + (STREAM if self.float32_stream else "")

    @property
    def is_half(self) -> bool:
        """Whether products are rounded to a half type."""
        return self.dtype in HALF_DTYPES

    @property
    def stream(self) -> torch.dtype:
        """The type of hidden states between layers."""
        return torch.float32 if self.float32_stream else self.dtype


# Taken for auto where float16 is too narrow: the range of float32, in half the memory.
FALLBACK = Arithmetic(torch.bfloat16, float32_stream=True)


def arithmetics(compute: str, dtype: str, stored: torch.dtype, device: torch.device) -> tuple[Arithmetic, ...]:
    """The arithmetics to choose from: the first that fits into memory is taken.

    compute, dtype: as configured; the first of the two that is not auto decides. If both are auto: float16 on an
    accelerator (FALLBACK replaces it if it proves too narrow); on a CPU float32, then the half type that the checkpoint
    is stored in. stored: the checkpoint's type.
    """
    name = dtype if compute == "auto" else compute
    if name != "auto":
        return (Arithmetic.named(name),)
    if device.type != "cpu":
        return (Arithmetic(torch.float16),)
    return Arithmetic(torch.float32), *((Arithmetic(stored),) if stored in HALF_DTYPES else ())

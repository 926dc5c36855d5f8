"""Run a program with float16 products made as an accelerator makes them: summed in float32 and rounded once.

    python benchmarks/float16_products.py merge_monster.py --config my.yaml

Most processors have no float16 products. PyTorch's own are several times slower there than this, which takes what
float32 products take.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor

linear = torch.nn.functional.linear


def linear_in_float32(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs (..., features) times weight (outputs, features): (..., outputs). Only float16 goes through float32."""
    if inputs.dtype != torch.float16 or weight.dtype != torch.float16 or torch.is_autocast_enabled(inputs.device.type):
        return linear(inputs, weight, bias)
    product = linear(inputs.float(), weight.float(), None if bias is None else bias.float())
    return product.half()


if __name__ == "__main__":
    torch.nn.functional.linear = linear_in_float32
    sys.argv.pop(0)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does for a program
    runpy.run_path(sys.argv[0], run_name="__main__")

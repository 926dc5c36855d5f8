"""How long a decision takes in each half type, with and without a float32 residual stream.

    python benchmarks/bench_half_types.py              # a Llama of 238 million random weights, in bfloat16
    python benchmarks/bench_half_types.py --layers 4   # a smaller one

Ratios of one candidate's layer in the middle are scored, in all types in turn, several times; the fastest turn counts.
float16 is missing where the processor has no such products. Prints a table and, as its last line, JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
import workload
from transformers import PreTrainedTokenizerFast

import modules.search  # noqa: F401 - what a configuration can name
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.arithmetic import Arithmetic
from modules.model.loading import load_model
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs

TYPES = ("float16", "bfloat16", "bfloat16+float32")
RATIOS = (0.2, 0.4, 0.6, 0.8)
PAIRS = 14
TURNS = 5
CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    workload.shape_options(parser, workload.Shape(dtype="bfloat16"))
    shape = workload.shape_of(parser.parse_args(arguments))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        workload.make_models({shape: [base]})
        names = [name for name in TYPES if name != "float16" or has_float16()]
        decisions = {name: decision(base, Arithmetic.named(name)) for name in names}
        seconds = in_turn(decisions)
    plain = seconds["bfloat16"]
    print(f"{'computed in':<20} {'a decision':>10} {'of bfloat16':>12}")
    for name, value in seconds.items():
        print(f"{name:<20} {value:>8.2f} s {value / plain:>12.2f}")
    print(json.dumps({"machine": workload.machine(CPU), "seconds": seconds}))
    return 0


def has_float16() -> bool:
    """Whether this processor has float16 products: PyTorch's own are several times slower."""
    product = (1, 256, 1024, 1024)
    wide = workload.product_seconds(product, torch.float32, CPU)
    return workload.product_seconds(product, torch.float16, CPU) < 2 * wide


def decision(base: Path, arithmetic: Arithmetic) -> Callable[[], object]:
    """What scores all ratios of a merge of the middle layer; the merge leaves the layer as it is."""
    model = load_model(open_checkpoint(base, "base"), "cpu", "auto", arithmetic)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    pairs = workload.phrase_pairs(PAIRS)
    scorer = build_scorer(model, encode_pairs(tokenizer, pairs, model.vocabulary, model.max_tokens))
    layer = len(model.layers) // 2
    part = model.layer(layer)
    scorer.at_layer(layer)
    own = {name: tensor.clone() for name, tensor in part.tensors.items()}
    return lambda: scorer.score_trials([lambda: part.holding(own)] * len(RATIOS))


def in_turn(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds that each takes, of TURNS turns the fastest; a first one, which fills caches, does not count."""
    found = {name: list[float]() for name in works}
    for turn in range(TURNS + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                found[name].append(time.perf_counter() - began)
    return {name: round(min(values), 3) for name, values in found.items()}


if __name__ == "__main__":
    sys.exit(main())

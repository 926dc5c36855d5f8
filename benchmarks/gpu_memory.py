"""Which model fits on which card, as the program itself plans it.

    python benchmarks/gpu_memory.py

Llama shapes in half precision, without weights, with the header and the seven ratios of default.yaml. No card is
needed: what is free on each is made up, a GiB less than its name says. Prints the table of docs/hardware.md.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from modules.model.memory import placement_of, sizes_of, weights_of
from modules.scoring.budget import FEWEST_TOKENS, TOKENS, layer_bytes

SHAPES = {  # layers, hidden, intermediate, heads, key and value heads
    "7B": (32, 4096, 11008, 32, 32),
    "13B": (40, 5120, 13824, 40, 40),
    "34B": (48, 8192, 22016, 64, 8),
    "70B": (80, 8192, 28672, 64, 8),
}
CARDS = ((24,), (48,), (80,), (24, 24), (48, 48), (80, 80))
DTYPE, RATIOS, CPU = torch.float16, 7, torch.device("cpu")


def main() -> None:
    """A row for each model."""
    heads = [f"{len(cards)} x {cards[0]} GB" for cards in CARDS]
    print(f"| model | base | reserved | {' | '.join(heads)} |")
    print(f"|{'---|' * (3 + len(CARDS))}")
    for name, shape in SHAPES.items():
        print(f"| {name} | {' | '.join(row(shape))} |")


def row(shape: tuple[int, ...]) -> list[str]:
    """What a model takes, and where its layers go on each of CARDS."""
    layers, hidden, intermediate, heads, kv_heads = shape
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config)
    memory, sizes = weights_of(module, DTYPE, with_header=True), sizes_of(module)
    most, least = (layer_bytes(sizes, DTYPE, tokens, RATIOS) for tokens in (TOKENS, FEWEST_TOKENS))
    reserved = memory.reserved + most
    cells = [f"{memory.base / 2**30:.1f} GiB", f"{reserved / 2**30:.1f} GiB"]
    for cards in CARDS:
        free = {torch.device("cuda", number): (size - 1) << 30 for number, size in enumerate(cards)}
        places = placement_of("cuda", module, DTYPE, replace(memory, activations=most), least, free)
        if places is None:
            cells.append("whole" if reserved <= free[torch.device("cuda", 0)] else "whole, in smaller packs")
        elif CPU in places:
            cells.append(f"{places.count(CPU)} of {layers} layers copied")
        else:
            cells.append("on both")
    return cells


if __name__ == "__main__":
    main()

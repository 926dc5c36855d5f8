"""The whole program at the size of a 7B model: how near it comes to reading each candidate once.

    python benchmarks/bench_gpu.py            # on a CUDA device; 60 GB of disk for the models
    python benchmarks/bench_gpu.py --small    # a small shape, wherever it is

Builds a random base and two candidates on the spot, checks the search of a small model against the naive one on this
device, then runs merge_monster.py itself, in this process, with 14 pairs, 4 ratios, lerp and headers. Measured besides:
  limit   the candidate's bytes read once from the page cache; its matrix products, one after another
  naive   whole-model copies and one forward per pair (tests/helpers/reference.py) on two layers, scaled to all
Prints a table, a line for docs/results.md and, as its last line, JSON.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import yaml

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "", "tests/helpers")]

import reference
from bench_merge import NaiveLayers
from workload import (
    Shape,
    even_ratios,
    limit_of,
    limit_rows,
    machine,
    make_models,
    page_row,
    parameter_count,
    peak_memory,
    phrase_pairs,
    print_table,
    reset_peak_memory,
)

import merge_monster
from modules.checkpoints.checkpoint import load_tokenizer
from modules.model.devices import resolve_device
from modules.scoring.packing import build_packs
from modules.scoring.tokenization import encode_pairs

LLAMA_7B = Shape(32, 4096, 14336, 32000, heads=32, kv_heads=8, dtype="float16")
# float16 products are slow on a CPU; these checkpoints are stored, and computed, in bfloat16.
SMALL = Shape(4, 256, 704, 4000, heads=8, kv_heads=2, dtype="bfloat16")
CHECKED = Shape(4, 128, 352, 4000, heads=4, kv_heads=2, dtype="float32")
NAIVE_LAYERS = 2


def main() -> None:
    """Build, check, measure, print."""
    options = parse_arguments()
    device = resolve_device(options.device)
    if device.type == "cpu" and not options.small:
        sys.exit("no GPU here; --small measures a small shape on the CPU")
    shape = SMALL if options.small else LLAMA_7B
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        check(Path(folder), device)
        result = measure(shape, Path(folder), device, options)
    print_table(result)
    print(page_row(result, shlex.join(["python", *sys.argv])))
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """What is measured, and where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small shape in place of the 7B one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where the models go for the time being (default: the system's)")
    parser.add_argument("--pairs", type=int, default=14)
    parser.add_argument("--ratios", type=int, default=4)
    parser.add_argument("--no-naive", action="store_true", help="leave the naive merge out")
    return parser.parse_args()


def check(folder: Path, device: torch.device) -> None:
    """The program's decisions on a small float32 model are those of the naive merge, on this device."""
    ratios, pairs = even_ratios(3), phrase_pairs(14)
    base, candidate = folder / "checked-base", folder / "checked-candidate"
    make_models({CHECKED: [base, candidate]}, str(device))
    recipe = merge(folder, base, [candidate], "checked", device, ratios, pairs)
    naive = reference.NaiveMerge(
        str(base), [str(candidate)], pairs, list(ratios), ["lerp"], auto_weights=True, device=str(device)
    ).run()
    ours = [(decision["layer"], decision["ratio"]) for decision in recipe["decisions"]]
    theirs = [(decision.layer, decision.ratio) for decision in naive.decisions]
    if ours != theirs:
        sys.exit(f"the decisions differ from the naive merge's: {ours}, {theirs}")


def merge(
    folder: Path,
    base: Path,
    candidates: list[Path],
    output: str,
    device: torch.device,
    ratios: tuple[float, ...],
    pairs: list,
) -> dict:
    """Run the program; the recipe of its output."""
    config = folder / f"{output}.yaml"
    phrases = {
        f"{kind.lower()}_phrases": [
            {"phrase": pair.phrase, "contexts": [pair.context]} for pair in pairs if pair.kind == kind
        ]
        for kind in ("BAD", "GOOD")
    }
    settings = {
        "device": str(device),
        "directories": {"model_path1": str(base), "output_directory": str(folder / output)},
        "models_to_merge": [str(candidate) for candidate in candidates],
        "merge_ratios": list(ratios),
        "auto_weights": True,  # of random words each is as improbable as the other
        **phrases,
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    code = merge_monster.main(["--config", str(config)])
    if code:
        sys.exit(f"the program ended with exit code {code}")
    return json.loads((folder / output / "merge_monster_recipe.json").read_text(encoding="utf-8"))


def measure(shape: Shape, folder: Path, device: torch.device, options: argparse.Namespace) -> dict[str, object]:
    """The program, then what no search can do without, then the naive merge."""
    base, *candidates = folders = [folder / name for name in ("base", "one", "two")]
    ratios, pairs = even_ratios(options.ratios), phrase_pairs(options.pairs)
    make_models({shape: folders}, str(device))
    before = reset_peak_memory(device)
    recipe = merge(folder, base, candidates, "merged", device, ratios, pairs)
    peak = peak_memory(device) - before
    each = [
        sum(decision["seconds"] for decision in recipe["decisions"] if decision["candidate"] == number)
        for number in range(1, len(candidates) + 1)
    ]
    tokens, columns = packed(base, shape, pairs)
    limit = limit_of(shape, candidates[-1], tokens, columns, len(ratios), True, device)
    naive = None if options.no_naive else naive_seconds(shape, base, candidates[-1], pairs, ratios, device)
    seconds = statistics.median(each)
    return {
        "machine": machine(device),
        "dtype": recipe["dtype"],
        "layers": shape.layers,
        "hidden": shape.hidden,
        "vocabulary": shape.vocabulary,
        "parameters": parameter_count(base),
        "pairs": len(pairs),
        "ratios": len(ratios),
        "packed_tokens": tokens,
        "loading_seconds": recipe["seconds"]["load"],
        "saving_seconds": recipe["seconds"]["save"],
        "seconds_of_each_candidate": [round(value, 3) for value in each],
        "search_seconds": round(seconds, 3),
        "naive_seconds": naive and round(naive, 1),
        "times_naive": naive and round(naive / seconds, 1),
        **limit_rows(limit, seconds),
        "times_limit": round(seconds / limit.seconds, 2),
        "base_gib": round(shape.bytes / 2**30, 3),
        "peak_gib_over_base": round((peak - shape.bytes) / 2**30, 3),
    }


def packed(base: Path, shape: Shape, pairs: list) -> tuple[int, int]:
    """Tokens of the forest, and columns at which its head is read."""
    packs = build_packs(encode_pairs(load_tokenizer(base), pairs, shape.vocabulary, None), "forest", 1024)
    sizes = [(pack.tokens, len({target.column for target in pack.targets})) for pack in packs]
    return sum(tokens for tokens, _ in sizes), sum(columns for _, columns in sizes)


def naive_seconds(
    shape: Shape, base: Path, candidate: Path, pairs: list, ratios: tuple[float, ...], device: torch.device
) -> float:
    """Of one candidate, from two of its layers."""
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, shape.dtype)
    naive = NaiveLayers(shape.layers, "lerp", base, candidate, pairs, ratios, dtype, device)
    for layer in range(NAIVE_LAYERS):
        naive.measure(layer)
    return naive.seconds()


if __name__ == "__main__":
    main()

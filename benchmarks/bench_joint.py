"""What a joint search costs: a step against its limit, and how the time grows with steps and candidates.

    python benchmarks/bench_joint.py

The whole program on a random Llama in float32, one thread, headers on, drift weighed: four layers of the size of the
real demo's model. All are measured in turn; medians count. The limit of a step is the matrix products of a forward, its
recomputation and its backward (four forwards' worth), one after another at the machine's own rate, and reading all
candidates once. Prints a table and, as its last line, JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from workload import (
    Shape,
    forward_products,
    machine,
    make_models,
    phrase_pairs,
    product_seconds,
    reading_seconds,
)

SHAPE = Shape(4, 576, 1536, 6000, heads=9, kv_heads=3, positions=512)
PAIRS, NEUTRAL, CANDIDATES = 40, 512, 4
STEP_CURVE, CANDIDATE_CURVE = (5, 10, 25), (1, 2, 4, 8)
FORWARDS = 4  # whose products a step can't do without: forward, recomputed, and twice as much backward


@dataclass(frozen=True)
class Bench:
    """Models on the disk, and how often each thing is measured."""

    folder: Path
    repeats: int

    def joint(self, steps: int, candidates: int) -> tuple[float, float]:
        """Seconds of all of a run's steps, and of one of them, the median."""
        place = self.folder / "run"
        place.mkdir(exist_ok=True)
        config = {
            "directories": {"model_path1": str(self.folder / "base"), "output_directory": str(place / "out")},
            "models_to_merge": [str(self.folder / f"candidate-{number}") for number in range(candidates)],
            "device": "cpu",
            "compute_dtype": "float32",
            "bad_phrases": [
                {"phrase": pair.phrase, "contexts": [pair.context]}
                for pair in phrase_pairs(PAIRS)
                if pair.kind == "BAD"
            ],
            "drift_weight": 2.0,
            "neutral_tokens": NEUTRAL,
            "neutral_texts": [str(self.folder / "neutral.txt")],
            "baselines": False,
            "samples": [],
            "search": "joint",
            "joint": {"steps": steps},
        }
        (place / "bench.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, str(ROOT / "merge_monster.py"), "--config", "bench.yaml", "--overwrite", "--quiet"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads((place / "out" / "merge_monster_recipe.json").read_text(encoding="utf-8"))
        return found["seconds"]["search"], statistics.median(step["seconds"] for step in found["joint"]["steps"])


def main() -> None:
    """Measure, print."""
    options = parse_arguments()
    torch.set_num_threads(1)
    steps, candidates = ((2, 4), (1, 2)) if options.quick else (STEP_CURVE, CANDIDATE_CURVE)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.repeats)
        names = ["base", *(f"candidate-{number}" for number in range(max(*candidates, CANDIDATES)))]
        make_models({SHAPE: [Path(folder) / name for name in names]})
        words = " ".join(f"w{number % 3000}" for number in range(3 * NEUTRAL))
        (Path(folder) / "neutral.txt").write_text(words, encoding="utf-8")
        result = measured(bench, steps, candidates)
    print_found(result)
    print(json.dumps({"machine": machine(torch.device("cpu")), "seconds": result}))


def parse_arguments() -> argparse.Namespace:
    """How much is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="of everything; medians count")
    parser.add_argument("--quick", action="store_true", help="two small points a curve")
    return parser.parse_args()


def measured(bench: Bench, steps: Sequence[int], candidates: Sequence[int]) -> dict[str, Any]:
    """All times in seconds, measured in turn."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(bench.repeats):
        for count in steps:
            seconds, step = bench.joint(count, CANDIDATES)
            times[f"steps {count}"].append(seconds)
            times["a step"].append(step)
        for count in candidates:
            times[f"candidates {count}"].append(bench.joint(steps[1], count)[0])
        times["limit of a step"].append(limit_of_a_step(bench.folder))
    return {name: statistics.median(some) for name, some in times.items()}


def limit_of_a_step(folder: Path) -> float:
    """Seconds that a step with all candidates can't do without, for the pairs as they are and the neutral tokens."""
    pairs = [pair for pair in phrase_pairs(PAIRS) if pair.kind == "BAD"]
    columns = sum(len(pair.phrase.split()) for pair in pairs) + NEUTRAL
    tokens = sum(len(pair.context.split()) for pair in pairs) + columns
    cpu, products = torch.device("cpu"), forward_products(SHAPE, tokens, columns)
    forward = sum(count * product_seconds(product, torch.float32, cpu) for product, count in products.items())
    return FORWARDS * forward + sum(reading_seconds(folder / f"candidate-{number}") for number in range(CANDIDATES))


def print_found(found: dict[str, float]) -> None:
    """The result for people."""
    for name, seconds in found.items():
        print(f"{name:<20} {seconds:7.2f} s")
    print(f"a step takes {found['a step'] / found['limit of a step']:.2f} times its limit")


if __name__ == "__main__":
    main()

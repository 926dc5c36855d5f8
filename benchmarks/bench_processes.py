"""How much faster several processes search than one: the whole program under torchrun, with 1,000 pairs.

    python benchmarks/bench_processes.py --processes 1 2

Builds a random Llama and one candidate, runs merge_monster.py once for each number of processes, each process with one
thread, in turn, and compares their decisions. Prints a table and, as its last line, JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

sys.path[:0] = [str(Path(__file__).parent)]

from workload import Shape, even_ratios, machine, make_models, phrase_pairs, shape_of, shape_options

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Build, measure, print."""
    options = parse_arguments()
    shape = shape_of(options)
    seconds: dict[int, list[float]] = {count: [] for count in options.processes}
    with tempfile.TemporaryDirectory() as folder:
        base, candidate = (Path(folder) / name for name in ("base", "candidate"))
        make_models({shape: [base, candidate]})
        config = write_config(Path(folder), base, candidate, options)
        decisions = []
        for _ in range(options.repeats):
            for count in options.processes:
                recipe = merge(Path(folder), config, count)
                seconds[count].append(recipe["seconds"]["search"])
                decisions.append([(decision["layer"], decision["ratio"]) for decision in recipe["decisions"]])
    if any(one != decisions[0] for one in decisions):
        sys.exit("the decisions differ")
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    first = medians[options.processes[0]]
    print("processes | search s | times faster")
    for count, median in medians.items():
        print(f"{count:>9} | {median:>8.1f} | {first / median:>12.2f}")
    print(json.dumps({"machine": machine(torch.device("cpu")), "pairs": options.pairs, "search_seconds": medians}))


def parse_arguments() -> argparse.Namespace:
    """Numbers of processes, and what they search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape_options(parser, Shape(8, 512, 1408, 4000))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


def write_config(folder: Path, base: Path, candidate: Path, options: argparse.Namespace) -> Path:
    """The YAML file of the runs."""
    entries = [{"phrase": pair.phrase, "contexts": [pair.context]} for pair in phrase_pairs(options.pairs)]
    settings = {
        "device": "cpu",
        "dtype": options.dtype,
        "directories": {"model_path1": str(base), "output_directory": str(folder / "merged")},
        "models_to_merge": [str(candidate)],
        "merge_ratios": list(even_ratios(4)),
        "merge_headers": False,
        "auto_weights": True,
        "bad_phrases": entries,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def merge(folder: Path, config: Path, count: int) -> dict:
    """Run the program in so many processes; the recipe of its output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*torchrun, str(ROOT / "merge_monster.py"), "--config", str(config), "--overwrite"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads((folder / "merged/merge_monster_recipe.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""What a replay takes beside mergekit for the same merge: processor time and memory of the whole program.

    python demo/make_real.py
    python benchmarks/bench_replay.py [--mergekit FOLDER]

A recipe that merges every layer and the header of a candidate at one ratio is carried out in turn with mergekit, which
is installed into an environment of its own, in FOLDER if it is to stay. Its card and pictures, which mergekit has not,
are timed apart. Prints a table and, as its last line, JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

sys.path[:0] = [str(Path(__file__).parents[part] / name) for part, name in ((0, ""), (1, ""), (1, "tests/helpers"))]

import mergekits
from workload import machine

from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.output.journal import Journal
from modules.output.recipe import write_recipe
from modules.output.run_record import RunRecord
from modules.scoring.budget import Packing
from modules.search.decision import Decision

ROOT = Path(__file__).parents[1]
RATIO = 0.4
METHODS = {"linear": "lerp", "slerp": "slerp"}  # as mergekit calls them -> as we do

# The program without what it draws, and without what it imports for that.
UNDRAWN = """
import sys, types
names = {"MERGE_MAP_FILE": "map", "PHRASE_CHART_FILE": "chart"}
nothing = dict.fromkeys(("merge_map", "phrase_chart"), lambda *arguments: None)
sys.modules["modules.output.plots"] = types.SimpleNamespace(**names, **nothing)
import merge_monster
import modules.run.steps
modules.run.steps.write_card = lambda *arguments: None
merge_monster.leave(merge_monster.main(sys.argv[1:]))
"""


def main() -> None:
    """Install, measure, print."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        mergekit = [str(mergekits.install(options.mergekit or place / "mergekit") / "mergekit-yaml")]
        rows = [row for method in METHODS for row in measured(place, mergekit, method, options)]
    print("merge | program | processor s | peak MB | beside mergekit")
    for row in rows:
        times = f"{row['times_seconds']:.2f} x, {row['times_megabytes']:.2f} x"
        print(f"{row['merge']} | {row['program']} | {row['seconds']:.2f} | {row['megabytes']:.0f} | {times}")
    result = {"machine": machine(torch.device("cpu")), "dtype": options.dtype, "runs": options.runs, "rows": rows}
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """Models and how often."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=ROOT / "demo/real/base")
    parser.add_argument("--candidate", type=Path, default=ROOT / "demo/real/careful")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="computed in")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, help="an environment that has it, or is to get it")
    return parser.parse_args()


def measured(place: Path, mergekit: list[str], method: str, options: argparse.Namespace) -> list[dict]:
    """A merge by all three, in turn: medians, and how many times mergekit's."""
    ours = write_inputs(place, method, options)
    output = str(place / "replayed")
    folders = [
        word for folder in (options.base, options.candidate) for word in ("--source", str(folder.resolve().parent))
    ]
    replay = ["--replay", str(ours), "--output", output, *folders]
    commands = {
        "mergekit": [*mergekit, str(place / "mergekit.yaml"), str(place / "merged"), "--quiet"],
        "a replay": [sys.executable, "-c", UNDRAWN, *replay],
        "with card and pictures": [sys.executable, str(ROOT / "merge_monster.py"), *replay],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            for before in ("replayed", "merged"):
                shutil.rmtree(place / before, ignore_errors=True)
            found[name].append(taken(place, command))
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    seconds, megabytes = medians["mergekit"]
    return [
        {
            "merge": method,
            "program": name,
            "seconds": round(took, 2),
            "megabytes": round(most),
            "times_seconds": round(took / seconds, 2),
            "times_megabytes": round(most / megabytes, 2),
        }
        for name, (took, most) in medians.items()
    ]


def write_inputs(place: Path, method: str, options: argparse.Namespace) -> Path:
    """Of one merge the recipe, and beside it the configuration of mergekit."""
    base, candidate = options.base.resolve(), options.candidate.resolve()
    settings = {
        "device": "cpu",
        "compute_dtype": options.dtype,
        "directories": {"model_path1": str(base), "output_directory": str(place / "replayed")},
        "models_to_merge": [str(candidate)],
        "bad_phrases": [{"phrase": "spine", "contexts": ["It sent shivers down her "]}],
    }
    (place / "merge.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    config = load_config(place / "merge.yaml")
    models = open_models(config, lambda job: None)
    layers = models.base.config.get_text_config().num_hidden_layers
    sources = (models.base, models.candidates[0].checkpoint)
    record = RunRecord(Journal(), config, options.dtype)
    for number, (checkpoint, folder) in enumerate(zip(sources, (base, candidate), strict=True)):
        record.source(number, str(folder), checkpoint)
    packing = Packing("forest", 8, 8, stacked=False)
    record.note("start", number=0, log_probabilities=[-1.0], weights=[1.0], packing=packing)
    for layer in (*range(layers), None):
        kind = METHODS[method] if layer is not None else "lerp"
        decision = Decision(sources[1].name, layer, kind, RATIO, 1.0, 1.0, (-1.0,))
        record.decided(1, decision, packing=packing, seconds=1.0)
    composition = {sources[1].name: RATIO, sources[0].name: 1 - RATIO}
    how = {"device": "cpu", "dtype": options.dtype, "saved_dtype": None}
    state = config.pairs, [1.0], [-1.0], composition, None, ((), (), (), ()), ()
    write_recipe(place, record.recipe(*state, how, {}))
    theirs = {
        "linear": {
            "models": [
                {"model": str(base), "parameters": {"weight": 1 - RATIO}},
                {"model": str(candidate), "parameters": {"weight": RATIO}},
            ],
        },
        "slerp": {
            "base_model": str(base),
            "models": [{"model": str(base)}, {"model": str(candidate)}],
            "parameters": {"t": RATIO},
        },
    }[method]
    theirs |= {"merge_method": method, "dtype": options.dtype, "out_dtype": "bfloat16"}
    (place / "mergekit.yaml").write_text(yaml.safe_dump(theirs), encoding="utf-8")
    return place / "merge_monster_recipe.json"


# Started in between: of a child, the system also counts what the process had that it was forked from.
MEASURE = """
import os, sys
_, status, usage = os.wait4(os.spawnvp(os.P_NOWAIT, sys.argv[2], sys.argv[2:]), 0)
with open(sys.argv[1], "w") as file:
    print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def taken(place: Path, command: list[str]) -> tuple[float, float]:
    """Processor seconds and the most memory, in MB, of a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", MEASURE, str(place / "taken.txt"), *command]
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    seconds, megabytes = (place / "taken.txt").read_text().split()
    return float(seconds), float(megabytes)


if __name__ == "__main__":
    main()

"""What a merge does to a real model: phrases, distance from the base, what it writes, seconds, memory.

    python benchmarks/bench_quality.py                       # the models of `make real`; hours at first, then minutes
    python benchmarks/bench_quality.py --rows base plain     # some rows
    python benchmarks/bench_quality.py --samples             # and three pairs of texts below the table

A row for the base, for each fine-tune taken whole, and for each way of searching; the merges are searched with
quality/searched.yaml by merge_monster.py, as anybody would run it, and judged by judge.py. A row is kept, in quality/
beside the models, under the digest of whatever it depends on. Prints a table and, as its last line, JSON.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoTokenizer

sys.path[:0] = [str(Path(__file__).parent)]

import judge
from judge import Sizes, Written

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "benchmarks/quality"
SEARCHED, HELD_OUT = QUALITY / "searched.yaml", QUALITY / "held-out.yaml"
NEUTRAL, PROMPTS = QUALITY / "neutral", QUALITY / "prompts.txt"
PROGRAM = [ROOT / "merge_monster.py", *sorted((ROOT / "modules").rglob("*.py"))]

CANDIDATES = ("plain", "reference", "careful", "overfit")  # in the order in which they are merged
SINGLE = (*CANDIDATES, "mute")  # judged on their own; mute ends its answers at once
BEST_FIRST = "best first"  # in place of the candidates: the one with the best searched total first

# A merge is what its YAML has beside the models: these settings, and of each row what is other there. A path, or a
# list of paths, is given as a Path: its contents count.
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "compute_dtype": "float32",
    "random_seed": 512,
    "merge_method": "lerp",
    "merge_ratios": [0.2, 0.4, 0.6, 0.8],
    "strategy": "cumulative",
    "phrase_files": [SEARCHED],
    "baselines": False,
    "samples": [],
}
MERGES: dict[str, dict[str, Any]] = {
    "greedy, bfloat16": {"compute_dtype": "bfloat16"},
    "greedy, bfloat16+float32": {"compute_dtype": "bfloat16+float32"},
    "greedy, float16": {"compute_dtype": "float16"},
    "greedy, float32": {},
    "greedy, float32, ratios to 1.0, best first": {
        "merge_ratios": [0.2, 0.4, 0.6, 0.8, 1.0],
        "models_to_merge": BEST_FIRST,
    },
    "all_phrases, float32": {"strategy": "all_phrases"},
    "quantitive, float32": {"strategy": "quantitive"},
    "greedy, float32, drift_weight 2": {"drift_weight": 2.0},
    "greedy, float32, drift_weight 8": {"drift_weight": 8.0},
    "greedy, float32, max_drift 0.02": {"max_drift": 0.02},
    "joint, drift_weight 0.1": {"search": "joint", "drift_weight": 0.1},
    "joint, drift_weight 0.5": {"search": "joint", "drift_weight": 0.5},
    "joint, drift_weight 2": {"search": "joint", "drift_weight": 2.0},
    "joint, drift_weight 2, float16": {"search": "joint", "drift_weight": 2.0, "compute_dtype": "float16"},
    "joint, drift_weight auto": {"search": "joint"},
    "joint, drift_weight 32": {"search": "joint", "drift_weight": 32.0},
    "learned": {"models_to_merge": [], "learn": {}},
    "joint, the four and the learned adapter": {"search": "joint", "learn": {}},
}

MERGE_THREADS = 1  # of a search; several at a time, as many as there are processors
MOST_PROCESSES = 4  # that search or judge at the same time, each with a base and a model
QUICK = Sizes(prompts=3, tokens=12, words=10, rounds=2, windows=1)

# Runs a command and writes down the most memory that it held. A process of its own: what starts another process lends
# it its own size.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge what is not kept yet; print."""
    options = parse_arguments(arguments)
    absent = [name for name in ("base", *SINGLE) if not (options.models / name / "config.json").is_file()]
    if absent:
        print(f"{options.models} lacks {', '.join(absent)}: run `make real` first", file=sys.stderr)
        return 2
    torch.set_num_threads(judge.THREADS)
    transformers.logging.disable_progress_bar()
    bench = Bench(options.models.resolve(), QUICK if options.quick else Sizes())
    merges = list(MERGES)[: 1 if options.quick else None]
    names = options.rows or ["base", *SINGLE, *merges]
    find_out(bench, list(dict.fromkeys(["base", *names])))
    rows = {name: bench.row(name) for name in dict.fromkeys(["base", *names])}
    figures = {name: bench.figures(row) for name, row in rows.items()}
    print_table(figures)
    if options.samples:
        merged = next((name for name in rows if name in MERGES), next(iter(MERGES)))
        print_samples(bench.prompts, rows["base"], bench.row(merged), merged)
    print(json.dumps({"machine": machine(), "judge": judge.VERSION, "rows": figures}))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Which models, which rows, how much of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["base", *SINGLE, *MERGES]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=f"of: {'; '.join(names)}")
    parser.add_argument("--models", type=Path, default=ROOT / "demo/real", help="the folder of the base and fine-tunes")
    parser.add_argument("--quick", action="store_true", help="a few words of each, and the first merge only")
    parser.add_argument("--samples", action="store_true", help="what the base and the first merge write to 3 prompts")
    return parser.parse_args(arguments)


def find_out(bench: "Bench", names: Sequence[str]) -> None:
    """Make the rows that are not kept yet, several at a time."""
    merges = [name for name in names if name in MERGES]
    # What a merge is made of may depend on the totals of the fine-tunes.
    ordered = any(MERGES[name].get("models_to_merge") == BEST_FIRST for name in merges)
    whole = dict.fromkeys([*(CANDIDATES if ordered else ()), *(name for name in names if name not in MERGES)])
    make_rows(bench, ["base"])  # the others are compared with its texts
    make_rows(bench, list(whole))
    make_rows(bench, merges)


def make_rows(bench: "Bench", names: Sequence[str]) -> None:
    """A process for each, as far as there are processors."""
    names = [name for name in names if not bench.file(name).exists()]
    processes = min(len(names), os.cpu_count() or 1, MOST_PROCESSES)
    if processes:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(make_row, [Bench(bench.models, bench.sizes)] * len(names), names):
                pass


def make_row(bench: "Bench", name: str) -> None:
    """What such a process does."""
    torch.set_num_threads(judge.THREADS)
    transformers.logging.disable_progress_bar()
    bench.row(name)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The models, and how much each is asked."""

    models: Path
    sizes: Sizes

    @property
    def kept(self) -> Path:
        """The folder of what is kept."""
        return self.models / "quality"

    @functools.cached_property
    def prompts(self) -> list[str]:
        """What the models are asked to write."""
        return PROMPTS.read_text(encoding="utf-8").splitlines()[: self.sizes.prompts]

    @functools.cached_property
    def texts(self) -> list[str]:
        """What the models are to be as good at as before."""
        return [file.read_text(encoding="utf-8") for file in sorted(NEUTRAL.glob("*.txt"))]

    @functools.cached_property
    def base(self) -> Any:
        """The base, in memory once there is something to judge."""
        return judge.load(self.models / "base")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The base's; fine-tunes have the same."""
        return AutoTokenizer.from_pretrained(self.models / "base")

    def file(self, name: str) -> Path:
        """Where a row is kept."""
        short = re.sub(r"\W+", "-", name).strip("-")
        return self.kept / f"{short}-{digest(self.depends_on(name))[:12]}.json"

    def row(self, name: str) -> Row:
        """What is known of a model: as it was kept, or found out now."""
        file = self.file(name)
        if not file.exists():
            folder = self.search(name) if name in MERGES else None
            print(f"judging: {name}", file=sys.stderr, flush=True)
            known = json.loads((folder / "search.json").read_text(encoding="utf-8")) if folder else {}
            row = self.judged(name, folder / known["made"] if folder else self.models / name) | known
            write_json(file, row)
            if folder:
                shutil.rmtree(folder)
        return json.loads(file.read_text(encoding="utf-8"))

    def depends_on(self, name: str) -> dict[str, Any]:
        """Whatever can change a row's figures."""
        return {
            "judge": [judge.VERSION, judge.THREADS, torch.__version__, transformers.__version__, vars(self.sizes)],
            "asked": [SEARCHED, HELD_OUT, NEUTRAL, PROMPTS],
            "base": self.models / "base",
            "model": self.settings(name) if name in MERGES else self.models / name,
            "program": [MERGE_THREADS, *PROGRAM] if name in MERGES else None,
        }

    def settings(self, name: str) -> dict[str, Any]:
        """The YAML of a merge, but for its output."""
        settings = {**SETTINGS, "models_to_merge": list(CANDIDATES), **MERGES[name]}
        order = settings["models_to_merge"]
        if order == BEST_FIRST:
            best = min(CANDIDATES, key=lambda name: self.row(name)["searched"])
            order = [best, *(other for other in CANDIDATES if other != best)]
        return {**settings, "models_to_merge": [self.models / name for name in order]}

    def judged(self, name: str, folder: Path) -> Row:
        """What the judge says of a model."""
        model = judge.load(folder, self.models / "base")
        phrases = {name: judge.read_pairs(file) for name, file in (("searched", SEARCHED), ("held_out", HELD_OUT))}
        pattern = judge.finder([pair.phrase for pairs in phrases.values() for pair in pairs if pair.weight > 0])
        texts = judge.write_texts(model, self.tokenizer, self.prompts, self.sizes)
        of_base = [written[0] for written in (texts if name == "base" else self.row("base")["texts"])]
        return {
            "own_kl": judge.own_divergence(self.base, model, self.tokenizer, self.prompts, of_base, pattern),
            **{name: judge.total(model, self.tokenizer, pairs) for name, pairs in phrases.items()},
            **judge.neutral_figures(self.base, model, self.tokenizer, self.texts, self.sizes),
            "words": [sum(map(judge.word_count, written)) for written in texts],
            "hits": [sum(judge.hit_count(pattern, text) for text in written) for written in texts],
            "texts": texts,
        }

    def search(self, name: str) -> Path:
        """Merge, unless that has been done; the folder of the merge, which is there until it is judged."""
        folder = self.file(name).with_suffix("")
        if not (folder / "search.json").exists():
            print(f"merging: {name}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            settings = self.settings(name)
            made = "merged"
            if "learn" in settings:
                made = "adapter"
                megabytes = run(folder, self.models / "base", settings, made, "--learn", made)
                settings["models_to_merge"].insert(0, folder / made)
            if settings["models_to_merge"] != [folder / "adapter"]:
                made = "merged"
                megabytes = run(folder, self.models / "base", settings, made)
            recipe = json.loads((folder / made / "merge_monster_recipe.json").read_text(encoding="utf-8"))
            known = {"composition": recipe["composition"], "seconds": recipe["seconds"]["search"], "made": made}
            write_json(folder / "search.json", {**known, "megabytes": megabytes})
        return folder

    def figures(self, row: Row) -> dict[str, Any]:
        """A row's figures, as the table and the last line have them."""
        written, base = (Written(one["words"], one["hits"]) for one in (row, self.row("base")))
        names = ("searched", "held_out", "kl", "own_kl", "same_next", "perplexity")
        return {
            **{name: row[name] for name in names},
            "rate": written.rate,
            "rate_interval": written.interval(),
            "change": written.change(base),
            "words": sum(row["words"]),
            "answer": sum(row["words"]) / sum(map(len, row["texts"])),
            **{name: row.get(name) for name in ("composition", "seconds", "megabytes")},
        }


def write_json(file: Path, value: Any) -> None:
    """A file that is whole or not there."""
    file.parent.mkdir(exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    unfinished.replace(file)


def run(folder: Path, base: Path, settings: dict[str, Any], output: str, *options: str) -> float:
    """Run the program; the most memory it held, in megabytes. output: the name of what it writes in the folder."""
    config = {"directories": {"model_path1": base, "output_directory": folder / output}, **settings}
    text = yaml.safe_dump(with_paths_as(str, config), allow_unicode=True)  # YAML holds no paths
    (folder / "merge.yaml").write_text(text, encoding="utf-8")
    # Few processors have float16 products; of the same values, these take what float32 takes.
    products = [str(ROOT / "benchmarks/float16_products.py")] if settings["compute_dtype"] == "float16" else []
    program = [
        sys.executable,
        *products,
        str(ROOT / "merge_monster.py"),
        "--config",
        "merge.yaml",
        "--overwrite",
        *options,
    ]
    measured = [sys.executable, "-c", MEASURE, "memory", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": str(MERGE_THREADS)}
    result = subprocess.run(measured, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the merge failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return int((folder / "memory").read_text()) * 1024 / 1e6


def digest(value: Any) -> str:
    """Of a value; of files, and of the files of a folder, their contents count and not where they lie."""
    return hashlib.sha256(json.dumps(with_paths_as(path_digest, value), sort_keys=True).encode()).hexdigest()


def with_paths_as(made: Callable[[Path], Any], value: Any) -> Any:
    """A value of lists and mappings with something made of each path in it."""
    if isinstance(value, dict):
        return {key: with_paths_as(made, item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_paths_as(made, item) for item in value]
    return made(value) if isinstance(value, Path) else value


@functools.cache
def path_digest(path: Path) -> Any:
    """Of a file, or of each file of a folder."""
    if path.is_dir():
        return {file.name: path_digest(file) for file in sorted(path.iterdir()) if file.is_file()}
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------

HEAD = (
    "model",
    "searched",
    "held-out",
    "KL",
    "own KL",
    "same next",
    "perplexity",
    "cliches",
    "against the base",
    "words",
    "an answer",
    "search",
    "memory",
)


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """The result for people."""
    rows = [HEAD, *(cells(name, row) for name, row in figures.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(
        "searched, held-out: the phrases' weighted probabilities - KL, own KL: nats per token, on neutral texts and on "
        "the base's own - same next: share of tokens - cliches: in 1,000 words - an answer: words - in brackets: 95 %\n"
        f"{machine()}"
    )


def cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    change, seconds, megabytes = row["change"], row["seconds"], row["megabytes"]
    low, high = row["rate_interval"]
    return (
        name,
        f"{100 * row['searched']:.1f}%",
        f"{100 * row['held_out']:.1f}%",
        f"{row['kl']:.4f}",
        f"{row['own_kl']:.4f}",
        f"{100 * row['same_next']:.1f}%",
        f"{row['perplexity']:.2f}",
        f"{row['rate']:.2f} ({low:.2f} to {high:.2f})",
        "" if change is None or name == "base" else "{:+.0f}% ({:+.0f} to {:+.0f})".format(*change),
        f"{row['words']:,}",
        f"{row['answer']:.0f}",
        "" if seconds is None else f"{seconds:.0f} s",
        "" if megabytes is None else f"{megabytes:,.0f} MB",
    )


def print_samples(prompts: Sequence[str], base: Row, merged: Row, name: str) -> None:
    """The first text to each of the first three prompts, of both models: same prompt, same seed."""
    for number, prompt in enumerate(prompts[:3]):
        print(f"\n{prompt}")
        for model, row in (("base", base), (name, merged)):
            print(f"\n  {model}:\n    " + row["texts"][number][0].strip().replace("\n", "\n    "))
    print()


def machine() -> str:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return f"{processor or platform.machine()}, {MERGE_THREADS} threads to search, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())

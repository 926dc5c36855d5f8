"""How fast the search is: against a naive merge, and against what no search can do without.

    python benchmarks/bench_merge.py                    # float32
    python benchmarks/bench_merge.py --dtype bfloat16   # the naive merge stays in float32

Builds a seeded random Llama and one candidate on disk, then measures in alternation, in one process:
  ours    the program's own search of the candidate's layers (read, merge, score, decide), headers off
  limit   its matrix products, one after another at the machine's own rate, and reading the candidate once
  naive   whole-model copies and one forward per pair (tests/helpers/reference.py), a layer at a time, scaled to all
Prints a table, a line for docs/results.md and, as its last line, JSON.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "", "tests/helpers")]

import reference
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
    shape_of,
    shape_options,
)

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.phrase_lists import Pair
from modules.config.schema import Config, Directories
from modules.model.loading import load_model
from modules.run.steps import prepare_libraries
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs
from modules.search.search import Search

CPU = torch.device("cpu")


def main() -> None:
    """Build, measure, print."""
    options = parse_arguments()
    shape = shape_of(options)
    prepare_libraries(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        base, candidate = (Path(folder) / name for name in ("base", "candidate"))
        make_models({shape: [base, candidate]})
        result = measure(options, shape, base, candidate, phrase_pairs(options.pairs))
    print_table(result)
    print(page_row(result, shlex.join(["python", *sys.argv])))
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """Sizes of the model and of the search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape_options(parser, Shape())
    parser.add_argument("--pairs", type=int, default=14)
    parser.add_argument("--ratios", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="searches of the whole candidate; the median counts")
    parser.add_argument("--method", default="lerp")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive merge out")
    return parser.parse_args()


def measure(
    options: argparse.Namespace, shape: Shape, base: Path, candidate: Path, pairs: list[Pair]
) -> dict[str, object]:
    """Alternate the measurements; times are medians. Memory is that of the first search, in a process still clean."""
    ratios = even_ratios(options.ratios)
    searches, limits, naive = [], [], None
    for repeat in range(options.repeats):
        run = search_once(shape.dtype, options.method, base, candidate, pairs, ratios)
        searches.append(run)
        limits.append(limit_of(shape, candidate, run.tokens, run.columns, len(ratios), False, CPU))
        if not options.no_naive:
            # Its two models come after the first search, whose memory is measured.
            naive = naive or NaiveLayers(shape.layers, options.method, base, candidate, pairs, ratios)
            naive.measure(repeat % shape.layers)
    seconds = statistics.median(run.seconds for run in searches)
    limit = sorted(limits, key=lambda limit: limit.seconds)[len(limits) // 2]
    tokens = shape.layers * (shape.layers + 1) / 2 * len(ratios) * searches[0].tokens
    naive_total = naive and naive.seconds()
    return {
        "machine": machine(CPU),
        "dtype": shape.dtype,
        "method": options.method,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "vocabulary": shape.vocabulary,
        "parameters": parameter_count(base),
        "pairs": len(pairs),
        "ratios": len(ratios),
        "packed_tokens": searches[0].tokens,
        "layout": searches[0].layout,
        "search_seconds": round(seconds, 2),
        "naive_seconds": naive_total and round(naive_total, 1),
        "times_naive": naive_total and round(naive_total / seconds, 1),
        **limit_rows(limit, seconds),
        "layer_tokens_per_second": round(tokens / seconds),
        "base_gib": round(shape.bytes / 2**30, 3),
        "peak_gib_over_base": round((searches[0].peak_bytes - shape.bytes) / 2**30, 3),
    }


@dataclass(frozen=True)
class SearchRun:
    """One search of the whole candidate."""

    seconds: float
    peak_bytes: int  # resident memory at its highest, less what the process held before the base was loaded
    tokens: int  # packed
    columns: int  # at which the head is read
    layout: str


def search_once(
    dtype: str, method: str, base: Path, candidate: Path, pairs: list[Pair], ratios: tuple[float, ...]
) -> SearchRun:
    """The program's own search, as a run does it; loading the base is in the memory, not in the time."""
    config = Config(
        Directories(str(base), "unused"),
        merge_ratios=ratios,
        merge_method=(method,),
        merge_headers=False,
        bad_phrases=tuple(pair for pair in pairs if pair.kind == "BAD"),
        good_phrases=tuple(pair for pair in pairs if pair.kind == "GOOD"),
    )
    before = reset_peak_memory(CPU)
    model = load_model(open_checkpoint(base, "base"), "cpu", dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    scorer = build_scorer(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens))
    search = Search(model, scorer, config, tokenizer)
    opened = open_candidate(open_checkpoint(candidate, "candidate"), model.checkpoint, model.module)
    start = time.perf_counter()
    for _ in search.candidate(opened):
        pass
    seconds = time.perf_counter() - start
    return SearchRun(seconds, peak_memory(CPU) - before, scorer.packed_tokens, scorer.columns, scorer.layout)


class NaiveLayers:
    """A naive merge, one layer at a time; whole models are copied, so it keeps two of its own."""

    def __init__(
        self,
        layers: int,
        method: str,
        base: Path,
        candidate: Path,
        pairs: list[Pair],
        ratios: tuple[float, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        """Load both models and score the base; none of this is timed."""
        self.layers, self.method, self.device, self.times = layers, method, device, []
        self.merge = reference.NaiveMerge(
            str(base), [], pairs, list(ratios), [method], dtype=dtype, device=str(device)
        ).run()
        self.other = reference.load(str(candidate), dtype, str(device))

    def measure(self, layer: int) -> None:
        """Time the search of one layer."""
        start = time.perf_counter()
        self.merge.decide(
            "candidate",
            layer,
            self.method,
            lambda model, ratio: self.merge.mix(model, self.other, layer, self.method, ratio),
        )
        self.times.append(time.perf_counter() - start)

    def seconds(self) -> float:
        """The median layer, times the number of layers."""
        return statistics.median(self.times) * self.layers


if __name__ == "__main__":
    main()

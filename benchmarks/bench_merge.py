"""How fast the search is: against a naive merge, and against the machine's own matrix products.

    python benchmarks/bench_merge.py                    # float32
    python benchmarks/bench_merge.py --dtype bfloat16   # the naive merge stays in float32

Builds a seeded random Llama and one candidate on disk, then measures in alternation, in one process:
  ours    the program's own search of the candidate's layers (read, merge, score, decide), headers off
  rate    the machine's matrix-product rate at the very shapes that the search multiplies
  naive   whole-model copies and one forward per pair (tests/reference.py), a layer at a time, scaled to all
Prints a table and, as its last line, JSON.
"""

import argparse
import gc
import json
import math
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import reference

from modules.candidates import open_candidate
from modules.checkpoints import open_checkpoint
from modules.config import Config, Directories, Pair
from modules.models import load_model
from modules.phrases import encode_pairs
from modules.probability import build_scorer
from modules.run import prepare_libraries
from modules.search import Search

Shape = tuple[int, int, int, int]


def main() -> None:
    """Build, measure, print."""
    options = parse_arguments()
    prepare_libraries(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        base, candidate = (Path(folder) / name for name in ("base", "candidate"))
        # In a process of its own: what it leaves in the allocator would blur the memory that is measured.
        maker = multiprocessing.get_context("spawn").Process(target=make_models, args=(options, base, candidate))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the models could not be made")
        result = measure(options, base, candidate, phrase_pairs(options.pairs))
    print_table(result)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """Sizes of the model and of the search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--pairs", type=int, default=14)
    parser.add_argument("--ratios", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="searches of the whole candidate; the median counts")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--method", default="lerp")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive merge out")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on
# ---------------------------------------------------------------------------------------------------------------------


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token per word w0, w1, ...: the pairs' lengths in tokens are then exactly what is written below."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{index}": index + 2 for index in range(size - 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def phrase_pairs(count: int) -> list[Pair]:
    """Bad pairs of 7 to 18 tokens, a few of them sharing a context, and one good pair of 45 tokens."""
    rng = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{rng.randrange(4000)}" for _ in range(number))

    pairs = [Pair("GOOD", words(7), words(38) + " ", 1.0)]
    while len(pairs) < count:
        context = words(rng.randint(6, 14)) + " "
        phrases = 2 if len(pairs) % 5 == 0 else 1
        pairs += [Pair("BAD", words(rng.randint(1, 4)), context, 1.0) for _ in range(phrases)]
    return pairs[:count]


def make_models(options: argparse.Namespace, base: Path, candidate: Path) -> None:
    """The base and one candidate, on disk."""
    tokenizer = word_tokenizer(options.vocabulary)
    make_model(options, tokenizer, base, None)
    make_model(options, tokenizer, candidate, base)


def make_model(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, folder: Path, base: Path | None
) -> None:
    """A seeded random Llama; a candidate is its base with every weight moved a little."""
    torch.manual_seed(1 if base else 0)
    if base:
        model = LlamaForCausalLM.from_pretrained(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=options.vocabulary,
                hidden_size=options.hidden,
                intermediate_size=options.intermediate,
                num_hidden_layers=options.layers,
                num_attention_heads=options.hidden // 64,
                max_position_embeddings=512,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=1,
            )
        ).to(getattr(torch, options.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The measurements
# ---------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, base: Path, candidate: Path, pairs: list[Pair]) -> dict[str, object]:
    """Alternate the measurements; times are medians. Memory is that of the first search, in a process still clean."""
    ratios = tuple(round((index + 1) / (options.ratios + 1), 3) for index in range(options.ratios))
    dtype = getattr(torch, options.dtype)
    searches, ideals, naive = [], [], None
    for repeat in range(options.repeats):
        searches.append(search_once(options, base, candidate, pairs, ratios))
        products = matrix_products(options, searches[-1])
        ideals.append(sum(count * product_seconds(shape, dtype) for shape, count in products.items()))
        if not options.no_naive:
            # Its two models come after the first search, whose memory is measured.
            naive = naive or NaiveLayers(options, base, candidate, pairs, ratios)
            naive.measure(repeat % options.layers)
    flops = sum(2 * count * math.prod(shape) for shape, count in products.items())
    seconds, ideal = (statistics.median(values) for values in ([s.seconds for s in searches], ideals))
    tokens = options.layers * (options.layers + 1) / 2 * options.ratios * searches[0].tokens
    naive_total = naive and naive.seconds()
    base_bytes = parameter_count(base) * dtype.itemsize
    return {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "dtype": options.dtype,
        "method": options.method,
        "layers": options.layers,
        "hidden": options.hidden,
        "vocabulary": options.vocabulary,
        "parameters": parameter_count(base),
        "pairs": len(pairs),
        "ratios": options.ratios,
        "packed_tokens": searches[0].tokens,
        "layout": searches[0].layout,
        "search_seconds": round(seconds, 2),
        "naive_seconds": naive_total and round(naive_total, 1),
        "times_naive": naive_total and round(naive_total / seconds, 1),
        "gflop": round(flops / 1e9),
        "machine_gflop_per_second": round(flops / ideal / 1e9, 1),
        "fraction_of_matrix_rate": round(ideal / seconds, 3),
        "layer_tokens_per_second": round(tokens / seconds),
        "base_gib": round(base_bytes / 2**30, 3),
        "peak_gib_over_base": round((searches[0].peak_bytes - base_bytes) / 2**30, 3),
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
    options: argparse.Namespace, base: Path, candidate: Path, pairs: list[Pair], ratios: tuple[float, ...]
) -> SearchRun:
    """The program's own search, as a run does it; loading the base is in the memory, not in the time."""
    config = Config(
        Directories(str(base), "unused"),
        merge_ratios=ratios,
        merge_method=(options.method,),
        merge_headers=False,
        bad_phrases=tuple(pair for pair in pairs if pair.kind == "BAD"),
        good_phrases=tuple(pair for pair in pairs if pair.kind == "GOOD"),
    )
    gc.collect()
    before = reset_peak_memory()
    model = load_model(open_checkpoint(base, "base"), "cpu", options.dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    scorer = build_scorer(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens))
    search = Search(model, scorer, config, tokenizer)
    start = time.perf_counter()
    for _ in search.candidate(open_candidate(open_checkpoint(candidate, "candidate"), model.checkpoint, model.module)):
        pass
    seconds = time.perf_counter() - start
    return SearchRun(seconds, peak_memory() - before, scorer.packed_tokens, scorer.columns, scorer.layout)


def matrix_products(options: argparse.Namespace, run: SearchRun) -> Counter[Shape]:
    """Every matrix product that the search can't do without, with its number: (batch, rows, inner, columns)."""
    hidden, wide, heads, trials = options.hidden, options.intermediate, options.hidden // 64, options.ratios

    def layer(batch: int) -> Counter[Shape]:
        rows = batch * run.tokens
        return Counter(
            {
                (1, rows, hidden, hidden): 4,
                (1, rows, hidden, wide): 2,
                (1, rows, wide, hidden): 1,
                (batch * heads, run.tokens, 64, run.tokens): 1,
                (batch * heads, run.tokens, run.tokens, 64): 1,
            }
        )

    products: Counter[Shape] = Counter()
    for index in range(options.layers):
        add(products, layer(1), trials + 1)  # each trial on its own, and one to move the cache on
        add(products, layer(trials), options.layers - 1 - index)
        add(products, Counter({(1, trials * run.columns, hidden, options.vocabulary): 1}), 1)
    add(products, layer(1), options.layers)  # the whole forward at the end
    add(products, Counter({(1, run.columns, hidden, options.vocabulary): 1}), 1)
    return products


def add(products: Counter[Shape], more: Counter[Shape], times: int) -> None:
    """products += times * more"""
    for shape, count in more.items():
        products[shape] += times * count


def product_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """Median time of one product, over matrices that, like a model's, do not all fit into the cache."""
    batch, rows, inner, columns = shape
    number = max(2, min(16, (64 << 20) // (batch * inner * columns * dtype.itemsize)))
    weights = [torch.randn(batch, columns, inner).to(dtype) for _ in range(number)]
    inputs = torch.randn(batch, rows, inner).to(dtype)
    times = []
    with torch.no_grad():
        for repeat in range(3 * number):
            start = time.perf_counter()
            if batch == 1:
                F.linear(inputs[0], weights[repeat % number][0])
            else:
                torch.bmm(inputs, weights[repeat % number].mT)
            times.append(time.perf_counter() - start)
    return statistics.median(times[number:])


class NaiveLayers:
    """A naive merge in float32, one layer at a time; whole models are copied, so it keeps two of its own."""

    def __init__(
        self, options: argparse.Namespace, base: Path, candidate: Path, pairs: list[Pair], ratios: tuple[float, ...]
    ) -> None:
        """Load both models and score the base; none of this is timed."""
        self.layers, self.method, self.times = options.layers, options.method, []
        self.merge = reference.NaiveMerge(str(base), [], pairs, list(ratios), [options.method]).run()
        self.other = reference.load(str(candidate), torch.float32)

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


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def reset_peak_memory() -> int:
    """Start a new peak; the resident memory now, in bytes. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Resident memory at its highest since the last reset, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) * 1024


def processor() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parameter_count(folder: Path) -> int:
    """Number of weights in a checkpoint."""
    return sum(math.prod(info.shape) for info in open_checkpoint(folder, "").tensors.values())


def print_table(result: dict[str, object]) -> None:
    """The result for people."""
    for name, value in result.items():
        print(
            f"{name.replace('_', ' '):<26} {value:,}"
            if isinstance(value, int)
            else f"{name.replace('_', ' '):<26} {value}"
        )


if __name__ == "__main__":
    main()

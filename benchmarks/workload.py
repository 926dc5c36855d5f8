"""What the benchmarks measure: seeded random Llamas, pairs of known length, and what no search can do without.

Knows: shapes, bytes, products, the machine. Refuses to know: the program that is measured.
"""

import argparse
import gc
import math
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests/helpers")]

from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.phrase_lists import Pair
from modules.scoring.budget import TOKENS

Product = tuple[int, int, int, int]  # batch, rows, inner, columns

READ_AT_A_TIME = 64 << 20  # bytes


@dataclass(frozen=True)
class Shape:
    """A Llama in numbers."""

    layers: int = 16
    hidden: int = 1024
    intermediate: int = 2816
    vocabulary: int = 16000
    heads: int = 16
    kv_heads: int = 16
    dtype: str = "float32"  # in which it is stored and computed
    positions: int = 4096  # the longest text it takes, in tokens

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of weights; embedding and head are two."""
        attention = 2 * self.hidden * (self.hidden + self.kv_heads * self.head_size)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return self.parameters * getattr(torch, self.dtype).itemsize


def shape_options(parser: argparse.ArgumentParser, default: Shape) -> None:
    """The options with which a benchmark's model is made larger or smaller."""
    for name in ("layers", "hidden", "intermediate", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--dtype", default=default.dtype, choices=["float32", "bfloat16", "float16"])


def shape_of(options: argparse.Namespace) -> Shape:
    """What the options say, with heads of 64."""
    heads = options.hidden // 64
    sizes = options.layers, options.hidden, options.intermediate, options.vocabulary
    return Shape(*sizes, heads, heads, options.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Models and phrases
# ---------------------------------------------------------------------------------------------------------------------


def make_models(folders: Mapping[Shape, Sequence[Path]], device: str = "cpu") -> None:
    """Of each shape a seeded random base and its candidates on disk, in a process of its own: what it leaves in
    allocators would blur what is measured."""
    maker = multiprocessing.get_context("spawn").Process(target=_make_models, args=(folders, device))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit("the models could not be made")


def _make_models(folders: Mapping[Shape, Sequence[Path]], device: str) -> None:
    for shape, places in folders.items():
        _make_family(shape, places, device)


@torch.no_grad()
def _make_family(shape: Shape, folders: Sequence[Path], device: str) -> None:
    tokenizer = word_tokenizer(shape.vocabulary)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    base = [parameter.clone() for parameter in model.parameters()]
    for number, folder in enumerate(folders):
        torch.manual_seed(number)
        for parameter, before in zip(model.parameters(), base, strict=True):
            # A candidate is the base with every weight moved a little.
            parameter.copy_(before + 0.01 * torch.randn_like(before) if number else before)
        model.save_pretrained(folder, max_shard_size="5GB")
        tokenizer.save_pretrained(folder)


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
        return " ".join(f"w{rng.randrange(3000)}" for _ in range(number))

    pairs = [Pair("GOOD", words(7), words(38) + " ", 1.0)]
    while len(pairs) < count:
        context = words(rng.randint(6, 14)) + " "
        phrases = 2 if len(pairs) % 5 == 0 else 1
        pairs += [Pair("BAD", words(rng.randint(1, 4)), context, 1.0) for _ in range(phrases)]
    return pairs[:count]


def even_ratios(count: int) -> tuple[float, ...]:
    """So many ratios between 0 and 1."""
    return tuple(round((index + 1) / (count + 1), 3) for index in range(count))


# ---------------------------------------------------------------------------------------------------------------------
# What no search can do without
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """The least that a search of one candidate can take, in seconds: reading and multiplying may go on side by side."""

    reading: float  # the candidate's bytes once, from the page cache
    products: float  # the matrix products at the rate that the device reaches on them, one after another
    flops: int

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.reading, self.products)

    @property
    def name(self) -> str:
        """Which of the two that is."""
        return "products" if self.products >= self.reading else "reading"


def limit_of(
    shape: Shape, folder: Path, tokens: int, columns: int, ratios: int, headers: bool, device: torch.device
) -> Limit:
    """Measure it now. tokens: packed; columns: at which the head is read."""
    products = matrix_products(shape, tokens, columns, ratios, headers)
    dtype = getattr(torch, shape.dtype)
    return Limit(
        reading_seconds(folder),
        sum(count * product_seconds(product, dtype, device) for product, count in products.items()),
        sum(2 * count * math.prod(product) for product, count in products.items()),
    )


def matrix_products(shape: Shape, tokens: int, columns: int, ratios: int, headers: bool) -> Counter[Product]:
    """Every matrix product that the search of a candidate can't do without, with its number."""
    found: Counter[Product] = Counter()
    # Each trial on its own and one to move the cache on, in every layer; then all layers above it, stacked.
    _add(found, _of_layer(shape, tokens), shape.layers * (ratios + 1))
    _add(found, _of_layer(shape, tokens, ratios), shape.layers * (shape.layers - 1) // 2)
    _add(found, _of_head(shape, columns, ratios), shape.layers)
    # And forwards of the whole model.
    _add(found, forward_products(shape, tokens, columns), 1 + (ratios if headers else 0))
    return found


def forward_products(shape: Shape, tokens: int, columns: int) -> Counter[Product]:
    """Every matrix product of one forward of the whole model. tokens: packed; columns: at which the head is read."""
    found: Counter[Product] = Counter()
    _add(found, _of_layer(shape, tokens), shape.layers)
    _add(found, _of_head(shape, columns), 1)
    return found


def _of_layer(shape: Shape, tokens: int, batch: int = 1) -> Counter[Product]:
    hidden, wide, kv = shape.hidden, shape.intermediate, shape.kv_heads * shape.head_size
    packs = -(-tokens // TOKENS)  # attention is within each
    seen, rows = -(-tokens // packs), batch * tokens
    found: Counter[Product] = Counter()
    for product, count in (
        ((1, rows, hidden, hidden), 2),
        ((1, rows, hidden, kv), 2),
        ((1, rows, hidden, wide), 2),
        ((1, rows, wide, hidden), 1),
        ((batch * shape.heads, seen, shape.head_size, seen), packs),
        ((batch * shape.heads, seen, seen, shape.head_size), packs),
    ):
        found[product] += count
    return found


def _of_head(shape: Shape, columns: int, batch: int = 1) -> Counter[Product]:
    return Counter({(1, batch * columns, shape.hidden, shape.vocabulary): 1})


def _add(found: Counter[Product], products: Counter[Product], times: int) -> None:
    for product, count in products.items():
        found[product] += times * count


def product_seconds(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Median time of one product, over matrices that, like a model's, do not all fit into a cache."""
    batch, rows, inner, columns = product
    number = max(2, min(16, (64 << 20) // (batch * inner * columns * dtype.itemsize)))
    weights = [torch.randn(batch, columns, inner, device=device, dtype=dtype) for _ in range(number)]
    inputs = torch.randn(batch, rows, inner, device=device, dtype=dtype)

    def multiply(turn: int) -> None:
        if batch == 1:
            F.linear(inputs[0], weights[turn % number][0])
        else:
            torch.bmm(inputs, weights[turn % number].mT)

    with torch.no_grad():
        if device.type == "cpu":
            return statistics.median(_seconds(multiply, turn) for turn in range(3 * number))
        # On an accelerator one after another without a pause, as the search does it.
        turns = 10 * number
        for turn in range(number):
            multiply(turn)
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        for turn in range(turns):
            multiply(turn)
        torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / turns


def _seconds(work: object, *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def reading_seconds(folder: Path) -> float:
    """The weight files of a model, read once, a piece after another into the same memory; the second time counts, when
    they are in the page cache."""
    memory = bytearray(READ_AT_A_TIME)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(memory):
                    pass
        times.append(time.perf_counter() - start)
    return times[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The machine, and what is printed
# ---------------------------------------------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> int:
    """Start a new peak; the memory that is in use now, in bytes: on the device or, for the CPU, of this process."""
    gc.collect()
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.get_device_module(device).empty_cache()
        torch.get_device_module(device).reset_peak_memory_stats(device)
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most memory taken since the last reset, in bytes: on a device all that PyTorch keeps reserved, which is what
    other programs lack. On the CPU resident memory, on Linux only."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_reserved(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) * 1024


def machine(device: torch.device) -> str:
    """Which device, and with what."""
    if device.type != "cpu":
        return f"{torch.get_device_module(device).get_device_name(device)}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parameter_count(folder: Path) -> int:
    """Number of weights in a checkpoint."""
    return sum(math.prod(info.shape) for info in open_checkpoint(folder, "").tensors.values())


def limit_rows(limit: Limit, seconds: float) -> dict[str, object]:
    """A search's time against its limit, for `print_table`."""
    return {
        "reading_seconds": round(limit.reading, 3),
        "products_seconds": round(limit.products, 3),
        "gflop": round(limit.flops / 1e9),
        "device_gflop_per_second": round(limit.flops / limit.products / 1e9, 1),
        "limit": limit.name,
        "fraction_of_limit": round(limit.seconds / seconds, 3),
        "fraction_of_matrix_rate": round(limit.products / seconds, 3),
    }


def page_row(result: dict[str, object], command: str) -> str:
    """A line of the first timings of docs/results.md."""
    naive = f"{result['naive_seconds']:,} s" if result["naive_seconds"] else "-"
    ratio = f"{result['times_naive']} x" if result["times_naive"] else "-"
    size = f"{result['parameters'] / 1e6:,.0f} M, {result['layers']} layers"
    limit = max(result["reading_seconds"], result["products_seconds"])
    memory = f"{result['base_gib']} + {result['peak_gib_over_base']} GiB"
    cells = (
        size,
        result["machine"],
        result["dtype"],
        naive,
        f"{result['search_seconds']} s",
        ratio,
        f"{limit:.2f} s ({result['limit']})",
        f"{result['fraction_of_limit'] * 100:.0f} %",
        memory,
        f"`{command}`",
    )
    return "| " + " | ".join(cells) + " |"


def print_table(result: dict[str, object]) -> None:
    """The result for people."""
    for name, value in result.items():
        print(
            f"{name.replace('_', ' '):<26} {value:,}"
            if isinstance(value, int)
            else f"{name.replace('_', ' '):<26} {value}"
        )

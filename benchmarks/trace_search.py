"""Whether a search waits for its candidate: a trace of one, and how much of the reading lies beside the computing.

    python benchmarks/trace_search.py --trace search.json    # to be looked at in https://ui.perfetto.dev

Searches one candidate of a random Llama under torch.profiler. Prints how long the reading thread read, for how much of
that the main thread was computing and, on a CUDA device, for how much of the copying kernels were running; then JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from workload import Shape, even_ratios, machine, make_models, phrase_pairs, print_table, shape_of, shape_options

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.schema import Config, Directories
from modules.model.devices import resolve_device
from modules.model.loading import load_model
from modules.run.steps import prepare_libraries
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs
from modules.search import prefetch
from modules.search.search import Search

Span = tuple[float, float]  # begin and end, in seconds


def main() -> None:
    """Build, trace, print."""
    options = parse_arguments()
    prepare_libraries(seed=0)
    reads = recorded(prefetch, "read_part", "read a layer")
    waits = recorded(prefetch.ReadAhead, "take", "wait for a layer")
    with tempfile.TemporaryDirectory() as folder:
        base, candidate = (Path(folder) / name for name in ("base", "candidate"))
        make_models({shape_of(options): [base, candidate]})
        result = trace(options, base, candidate, reads, waits)
    print_table(result)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """What is searched, where the trace goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape_options(parser, Shape(dtype="bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", type=Path, help="a file for the whole trace")
    return parser.parse_args()


def recorded(owner: object, name: str, label: str) -> list[Span]:
    """Have a function's calls shown in the trace; the list that their times will be in."""
    method, spans = getattr(owner, name), []

    def labelled(*arguments: Any) -> Any:
        begin = time.perf_counter()
        with record_function(label):
            result = method(*arguments)
        spans.append((begin, time.perf_counter()))
        return result

    setattr(owner, name, labelled)
    return spans


def trace(
    options: argparse.Namespace, base: Path, candidate: Path, reads: list[Span], waits: list[Span]
) -> dict[str, object]:
    """Search under the profiler; what overlapped what."""
    pairs, device = phrase_pairs(14), resolve_device(options.device)
    config = Config(
        Directories(str(base), "unused"),
        merge_ratios=even_ratios(4),
        merge_headers=False,
        bad_phrases=tuple(pair for pair in pairs if pair.kind == "BAD"),
        good_phrases=tuple(pair for pair in pairs if pair.kind == "GOOD"),
    )
    model = load_model(open_checkpoint(base, "base"), str(device), options.dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    scorer = build_scorer(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens))
    search = Search(model, scorer, config, tokenizer)
    opened = open_candidate(open_checkpoint(candidate, "candidate"), model.checkpoint, model.module)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    everything = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # the reading one, too
    with profile(activities=activities, experimental_config=everything) as profiler:
        begin = time.perf_counter()
        for _ in search.candidate(opened):
            pass
        end = time.perf_counter()
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    waited, reading = length(waits), length(reads)
    computing = complement(waits, (begin, end))
    rows = {
        "machine": machine(device),
        "dtype": options.dtype,
        "search_seconds": round(end - begin, 3),
        "reading_seconds": round(reading, 3),
        "waiting_seconds": round(waited, 3),
        "first_layer_seconds": round(waits[0][1] - waits[0][0], 3),  # nothing can be done meanwhile
        "reading_beside_computing": f"{shared(reads, computing) / reading:.0%}",
    }
    return rows | (on_device(profiler) if device.type == "cuda" else {})


def on_device(profiler: profile) -> dict[str, object]:
    """How much of the copying to the device lies beside kernels, from the profiler's own events."""
    copies, kernels = [], []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = event.time_range.start / 1e6, event.time_range.end / 1e6
            (copies if "HtoD" in event.name else kernels).append(span)
    copying = length(copies)
    return {
        "copying_seconds": round(copying, 3),
        "kernel_seconds": round(length(kernels), 3),
        "copying_beside_kernels": f"{shared(copies, kernels) / copying:.0%}" if copying else "nothing was copied",
    }


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same time in spans that do not overlap, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def length(spans: Sequence[Span]) -> float:
    """Seconds in the spans."""
    return sum(end - begin for begin, end in merged(spans))


def complement(spans: Sequence[Span], whole: Span) -> list[Span]:
    """What of the whole is in none of the spans."""
    edges = [whole[0], *(edge for span in merged(spans) for edge in span), whole[1]]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


def shared(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds that are in spans of both."""
    return length(one) + length(other) - length([*one, *other])


if __name__ == "__main__":
    main()

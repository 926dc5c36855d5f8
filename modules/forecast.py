"""How long a planned run will take on this machine, after a short calibration; the plan in words.

Knows: rates, seconds, what one candidate costs. Refuses to know: models, files other than one that it times.

What one candidate costs, for N layers, R ratios of a method and a forest of T packed tokens:

    forwards of one layer   R * N             on T tokens each, with every ratio's own weights
                            R * N * (N-1)/2   on all ratios at once: R * T tokens
                            R * N             on T tokens each, for the header
                            2 * N             to move the cache on, and whole forwards at the end
    output head             where a phrase's token is predicted, once per trial
    merges                  a layer's weights, once per trial and once more for the winner
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.merging import merge
from modules.preflight import Plan, Room, in_memory, on_disk
from modules.probability import SAMPLE

SECONDS_EACH = 0.2  # of one measurement
READ_AT_MOST, READ_AT_A_TIME = 256 << 20, 16 << 20  # bytes
CACHE = 64 << 20  # bytes; matrices that are used in turn take more than a processor's cache, as a model's do
# The most that one calibrating product computes, in FLOP: a fraction of a second on a CPU, enough to fill a GPU.
PRODUCT_ON_CPU, PRODUCT_ELSEWHERE = 2e10, 1e12
ATTENTION_SHARE = 0.1  # of that, what attention may compute, which is slower
CHECKS = 4  # forwards of all packs that verify them: whole, two trials from the first layer, each layer alone


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, measured."""

    plain: float  # matrix products with the tokens of one pair, FLOP/s
    alone: float  # the same with the packed tokens of one ratio
    stacked: float  # the same with all ratios' tokens
    attention: float  # the products within attention and all between them, FLOP/s
    merging: Mapping[str, float]  # method -> weights/s
    reading: float | None  # bytes/s from a candidate's file; None if none is here yet


@dataclass(frozen=True)
class Estimate:
    """About how long a run takes, in seconds. Downloads and saving are not in it."""

    start: float  # until the search begins; loading the base not included
    search: float  # of one candidate, reading not included
    loading: float | None  # the base's weights; None if the speed is not known
    reading: tuple[float, ...] | None  # each candidate's weights
    candidates: int
    rates: Rates

    @property
    def total(self) -> float:
        """All candidates, with as much of the reading as is known."""
        return self.start + self.candidates * self.search + (self.loading or 0.0) + sum(self.reading or ())


@torch.no_grad()
def calibrate(plan: Plan) -> Rates:
    """Measure this machine for a second or two, at the shapes of the plan and on its device."""
    sizes, stack, longest = plan.sizes, plan.stack, max(plan.packs)
    most = PRODUCT_ON_CPU if plan.device.type == "cpu" else PRODUCT_ELSEWHERE
    # The matrix of a layer's MLP, or what of it a single measurement allows.
    columns = int(min(sizes.widest, max(64, most / (2 * stack * longest * sizes.hidden))))
    one = columns * sizes.hidden
    number = max(3, min(64, CACHE // (one * plan.dtype.itemsize)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=plan.device, dtype=plan.dtype)

    matrices = random(number, columns, sizes.hidden)

    def product_rate(rows: int) -> float:
        inputs, turns = random(rows, sizes.hidden), cycle(matrices)
        return 2 * rows * one / seconds_each(lambda: inputs @ next(turns).mT, plan.device)

    def attention_rate() -> float:
        of_head = 4 * stack * longest**2 * sizes.head_size
        heads = int(min(sizes.heads, max(1, ATTENTION_SHARE * most / of_head)))
        inputs, mask = random(stack, heads, longest, sizes.head_size), random(1, 1, longest, longest)
        attend = torch.ops.aten.scaled_dot_product_attention
        return heads * of_head / seconds_each(lambda: attend(inputs, inputs, inputs, mask), plan.device)

    def merging_rate(method: str) -> float:
        turns, out = cycle(range(number)), torch.empty_like(matrices[0])

        def work() -> None:
            turn = next(turns)
            merge(method, matrices[turn], matrices[turn - 1], 0.5, out=out)

        return one / seconds_each(work, plan.device)

    methods = dict.fromkeys([*(method for method, _ in plan.methods), "lerp"])  # lerp is what headers are merged by
    return Rates(
        plain=product_rate(max(1, plan.text_tokens // plan.pairs)),
        alone=product_rate(longest),
        stacked=product_rate(stack * longest),
        attention=attention_rate() if sizes.heads else math.inf,
        merging={method: merging_rate(method) for method in methods},
        reading=_reading_rate(plan.weight_files),
    )


def seconds_each(work: Callable[[], Any], device: torch.device) -> float:
    """How long a piece of work takes when nothing interferes: of many times, the one that a quarter stay below.

    Measured over SECONDS_EACH; the first turn, which may be slow, does not count.
    """
    work()
    _wait_for(device)
    times: list[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < SECONDS_EACH:
        begin = time.perf_counter()
        work()
        _wait_for(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 4]


def _wait_for(device: torch.device) -> None:
    """Work on an accelerator has only been begun when its call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reading_rate(files: Iterable[Path]) -> float | None:
    """Bytes per second from the first file that is here, of which a part is read; None if none is here."""
    local = next((file for file in files if file.is_file()), None)
    if local is None:
        return None
    start, count = time.perf_counter(), 0
    with local.open("rb", buffering=0) as file:
        while count < READ_AT_MOST:
            read = len(file.read(READ_AT_A_TIME))
            count += read
            if read < READ_AT_A_TIME or time.perf_counter() - start > SECONDS_EACH:
                break
    return count / (time.perf_counter() - start)


def estimate(plan: Plan, rates: Rates) -> Estimate:
    """What the plan takes at these rates."""
    reading = rates.reading
    return Estimate(
        start=_start_seconds(plan, rates),
        search=_search_seconds(plan, rates),
        loading=None if reading is None else plan.disk.base / reading,
        reading=None if reading is None else tuple(count / reading for _, count in plan.disk.candidates),
        candidates=len(plan.disk.candidates),
        rates=rates,
    )


def _search_seconds(plan: Plan, rates: Rates) -> float:
    """One candidate: forwards, the output head, merges."""
    sizes, tokens = plan.sizes, plan.packed_tokens
    head = 2 * plan.columns * sizes.hidden * sizes.vocabulary
    forwards_alone = plan.forwards_alone + 2 * sizes.layers  # also to move the cache, and whole ones at the end
    alone = forwards_alone * _layer_seconds(plan, tokens, rates.alone, rates.attention)
    stacked = plan.forwards_stacked * _layer_seconds(plan, tokens, rates.stacked, rates.attention)
    heads = (plan.header_ratios + 1) * head / rates.alone + plan.trials * head / rates.stacked
    merging = sum(
        (ratios + 1) * sizes.layers * sizes.layer_weights / rates.merging[method] for method, ratios in plan.methods
    )
    if plan.header_ratios:
        merging += (plan.header_ratios + 1) * sizes.header_weights / rates.merging["lerp"]
    return alone + stacked + heads + merging


def _start_seconds(plan: Plan, rates: Rates) -> float:
    """Up to SAMPLE pairs of each pack are scored one at a time, all packs once or, as trials, on CHECKS forwards; then
    the search scores the base."""
    compared = min(1.0, SAMPLE * len(plan.packs) / plan.pairs) * plan.text_tokens
    packed = _layer_seconds(plan, (CHECKS + 1) * plan.packed_tokens, rates.alone, rates.attention)
    return plan.sizes.layers * (_layer_seconds(plan, compared, rates.plain, rates.attention) + packed)


def _layer_seconds(plan: Plan, tokens: float, products: float, attention: float) -> float:
    """One layer's forward on so many tokens, at these rates: its weights, and attention within a pack."""
    sizes = plan.sizes
    within = 4 * tokens * max(plan.packs) * sizes.heads * sizes.head_size
    return 2 * tokens * sizes.active_weights / products + within / attention


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan, room: Room, estimate: Estimate) -> list[str]:
    """The plan for the person at the terminal, one line for each of its figures."""
    rows = {
        **_work_rows(plan),
        **_needs_rows(plan, room),
        "Measured": ", ".join(_rate_texts(estimate.rates)),
        "Time (estimate)": "; ".join(_time_texts(estimate)),
    }
    return [f"{name:<16} : {value}" for name, value in rows.items()]


def _work_rows(plan: Plan) -> dict[str, str]:
    """What will be computed."""
    count, packs = len(plan.disk.candidates), len(plan.packs)
    tried = [f"{method} at {ratios} ratios" for method, ratios in plan.methods]
    tried += [f"the header at {plan.header_ratios}"] if plan.header_ratios else []
    return {
        "Candidates": f"{count} ({', '.join(name for name, _ in plan.disk.candidates)})",
        "Layers": f"{plan.sizes.layers} of about {plan.sizes.layer_weights / 1e6:,.1f} million weights",
        "Tried": f"every layer by {', '.join(tried)}",
        "Decisions": f"{plan.decisions:,} a candidate, {count * plan.decisions:,} in all",
        "Phrases": f"{plan.pairs} pairs, {plan.packed_tokens:,} tokens packed from {plan.text_tokens:,}, "
        f"{packs} {'pack' if packs == 1 else 'packs'} (if the model takes them as a forest, as most do)",
        "Work": f"{plan.forwards:,} forwards of one layer a candidate, each on all packed tokens",
    }


def _needs_rows(plan: Plan, room: Room) -> dict[str, str]:
    """What it takes, and of what is free."""
    disk, memory = plan.disk, plan.memory
    reads = [count for _, count in disk.candidates]
    each = on_disk(max(reads)) + (" at most" if min(reads) < max(reads) else "")
    free = f", {on_disk(room.disk)} free"
    header = f" or the header {in_memory(memory.header)}" if memory.header else ""
    parts = f"base {in_memory(memory.base)}, three layers {in_memory(memory.layers)}{header}"
    parts += f", activations about {in_memory(memory.activations)}"
    rows = {
        "Bytes to read": f"{on_disk(disk.base)} of the base, {each} of each candidate, "
        f"{on_disk(disk.base + sum(reads))} in all",
        "Bytes to write": f"{on_disk(disk.output)} in {disk.output_files} files to {plan.output}{free}",
        "Memory needed": f"{in_memory(memory.total)} on {plan.device} ({parts})"
        + (f", {in_memory(room.memory)} free" if room.memory is not None else ""),
    }
    if disk.downloads:
        rows["Downloads"] = f"{on_disk(disk.downloads)} still to be fetched from the hub"
    return rows


def _rate_texts(rates: Rates) -> list[str]:
    merging = [f"{method} {rate / 1e9:,.2f}" for method, rate in rates.merging.items()]
    reading = [f"reading {rates.reading / 1e9:,.2f} GB/s"] if rates.reading is not None else []
    return [f"{rates.stacked / 1e9:,.0f} GFLOP/s", f"{', '.join(merging)} billion weights/s", *reading]


def _time_texts(estimate: Estimate) -> list[str]:
    texts = [f"search {duration(estimate.search)} a candidate"]
    if estimate.reading:
        longest = f"{duration(max(estimate.reading))} each"
        texts.append(f"reading {longest}" + (" at most" if len(set(estimate.reading)) > 1 else ""))
    left_out = "downloads and saving" if estimate.reading else "reading, downloads and saving"
    return [*texts, f"{duration(estimate.total)} in all, without {left_out}"]


def duration(seconds: float) -> str:
    """A time with two units at most: an estimate has no more digits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"

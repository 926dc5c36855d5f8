"""About how long a planned run will take on this machine, after a short calibration; the plan in words.

Knows: rates, seconds, what one candidate costs. Refuses to know: models, files other than one that it times.

What one candidate costs, for N layers that are all searched, R ratios of a method and a forest of T packed tokens:

    forwards of one layer   R * N             on T tokens each, with every ratio's own weights
                            R * N * (N-1)/2   on all ratios at once: R * T tokens
                            R * N             on T tokens each, for the header
                            2 * N             to move the cache on, and whole forwards at the end
    output head             where a phrase's token is predicted, once per trial
    merges                  a layer's weights, once per trial and once more for the winner
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from modules.merging.methods import merge
from modules.run.plan import Plan
from modules.run.room import Available
from modules.runtime import in_memory, naming, on_disk, spans

SECONDS_EACH = 0.2  # of one measurement
READ_AT_MOST = 64 << 20  # bytes
CACHE = 64 << 20  # bytes; matrices that are used in turn take more than a processor's cache, as a model's do
# The most that one calibrating product computes, in FLOP: a fraction of a second on a CPU, enough to fill a GPU.
PRODUCT_ON_CPU, PRODUCT_ELSEWHERE = 2e10, 1e12
CHECKING = 6  # steps
ATTENTION_SHARE = 0.1  # of that, what attention may compute, which is slower


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, measured."""

    alone: float  # matrix products with the packed tokens of one ratio, FLOP/s
    stacked: float  # the same with all ratios' tokens
    attention: float  # the products within attention and all between them, FLOP/s
    merging: Mapping[str, float]  # method -> weights/s
    reading: float | None  # bytes/s from a candidate's file; None if none is here yet


@dataclass(frozen=True)
class Estimate:
    """About how long a run takes, in seconds. Downloads and saving are not in it."""

    search: float  # of one candidate or, if it is joint, of all; reading not included
    total: float  # of all, with the reading if its speed is known, and what is measured beside the search
    watching: float = 0.0  # of the total: drift, candidates taken whole


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
        alone=product_rate(longest),
        stacked=product_rate(stack * longest),
        attention=attention_rate() if sizes.heads else math.inf,
        merging={method: merging_rate(method) for method in methods},
        reading=_reading_rate(plan),
    )


def seconds_each(work: Callable[[], Any], device: torch.device) -> float:
    """How long a piece of work takes when nothing interferes: of many times, the one that a quarter stay below.

    Measured over SECONDS_EACH; the first turn, which may be slow, does not count.
    """

    def once() -> float:
        begin = time.perf_counter()
        work()
        if device.type != "cpu":  # there, work has only been begun when its call returns
            torch.accelerator.synchronize(device)
        return time.perf_counter() - begin

    once()
    end = time.perf_counter() + SECONDS_EACH
    times = [once()]
    while time.perf_counter() < end:
        times.append(once())
    return sorted(times)[len(times) // 4]


def _reading_rate(plan: Plan) -> float | None:
    """Bytes per second from the first of the candidates' files that is here, of which a part is read."""
    local = next((file for file in plan.weight_files if file.is_file()), None)
    if local is None:
        return None
    start = time.perf_counter()
    with naming(local), local.open("rb", buffering=0) as file:
        return len(file.read(READ_AT_MOST)) / (time.perf_counter() - start)


def estimate(plan: Plan, rates: Rates) -> Estimate:
    """What the plan takes at these rates."""
    search = _joint_seconds(plan, rates) if plan.steps else _search_seconds(plan, rates)
    count, watching = len(plan.disk.candidates), _watching_seconds(plan, rates)
    bytes_read = plan.disk.base + sum(size for _, size in plan.disk.candidates) + plan.disk.whole
    reading = bytes_read / rates.reading if rates.reading else 0
    return Estimate(search, (1 if plan.steps else count) * search + watching + reading, watching)


def _watching_seconds(plan: Plan, rates: Rates) -> float:
    """Drift of the base and after each candidate, by both models' heads; every candidate taken whole, phrases too."""
    sizes, count = plan.sizes, len(plan.disk.candidates)
    layers, head = 2 * sizes.layers * sizes.active_weights, 2 * sizes.hidden * sizes.vocabulary
    times = 2 * count + 1 if plan.baselines else count + 1
    whole = count * (plan.packed_tokens * layers + plan.columns * head) if plan.baselines else 0
    return (times * plan.neutral_tokens * (layers + 2 * head) + whole) / rates.alone


def _search_seconds(plan: Plan, rates: Rates) -> float:
    """One candidate: forwards, the output head, merges."""
    sizes = plan.sizes
    tokens = plan.packed_tokens + plan.guarding_tokens
    products = 2 * tokens * sizes.active_weights
    attention = 4 * tokens * max(plan.packs) * sizes.heads * sizes.head_size / rates.attention
    column = 2 * sizes.hidden * sizes.vocabulary
    # Drift is read at every token, and the base's answer there as well: of a layer, once for all ratios.
    head = column * (plan.columns + plan.guarding_tokens * (1 + 1 / plan.stack))
    whole_head = column * (plan.columns + plan.guarding_tokens * 2)
    # Also to move the cache, up to the last layer that is searched, and whole ones at the end.
    forwards_alone = plan.forwards_alone + plan.searched[-1] + 1 + sizes.layers
    alone = forwards_alone * (products / rates.alone + attention)
    stacked = plan.forwards_stacked * (products / rates.stacked + attention)
    heads = (plan.header_ratios + 1) * whole_head / rates.alone + plan.trials * head / rates.stacked
    merged = [(method, (ratios + 1) * len(plan.searched) * sizes.layer_weights) for method, ratios in plan.methods]
    if plan.header_ratios:
        merged.append(("lerp", (plan.header_ratios + 1) * sizes.header_weights))
    return alone + stacked + heads + sum(weights / rates.merging[method] for method, weights in merged)


def _joint_seconds(plan: Plan, rates: Rates) -> float:
    """All steps: a forward, the layers once more, twice as much backward; candidates contracted and mixed. Backward it
    goes to the first layer that is mixed, or to what is before all of them. To find where they begin and to check the
    gradient takes about as long as CHECKING steps."""
    sizes, count, mixed = plan.sizes, len(plan.disk.candidates), len(plan.searched)
    tokens, weights = plan.packed_tokens + plan.guarding_tokens, mixed * sizes.layer_weights
    back = sizes.layers - (0 if plan.memory.header else plan.searched[0])
    layers = tokens * (2 * (sizes.layers + 2 * back + mixed) * sizes.active_weights)
    head = (3 * plan.columns + 4 * plan.guarding_tokens) * 2 * sizes.hidden * sizes.vocabulary
    passes = 4 * (sizes.layers + 3 * back)
    attention = passes * tokens * max(plan.packs) * sizes.heads * sizes.head_size / rates.attention
    mixing = 2 * count * (weights + sizes.header_weights) / rates.merging["lerp"]
    return (plan.steps + CHECKING) * ((layers + head) / rates.alone + attention + mixing)


def plan_lines(plan: Plan, room: Available, estimate: Estimate) -> list[str]:
    """The plan for the person at the terminal, one line for each of its figures."""
    disk, memory, count, packs = plan.disk, plan.memory, len(plan.disk.candidates), len(plan.packs)
    some = f"layers {', '.join(spans(plan.layers))}" if plan.layers else ""
    tried = [
        f"{some or 'every layer'} by {', '.join(f'{method} at {ratios} ratios' for method, ratios in plan.methods)}"
    ]
    tried += [f"the header at {plan.header_ratios}"] if plan.header_ratios else []
    decisions = f"{plan.decisions:,} a candidate, {count * plan.decisions:,} in all"
    if plan.steps:
        tried, decisions = [f"all shares{some and f' of {some}'} at once, by gradient"], f"{plan.steps} steps"
    reads = [bytes_read for _, bytes_read in disk.candidates]
    each = on_disk(max(reads)) + (" at most" if min(reads) < max(reads) else "")
    header = " and the header" if memory.header else ""
    parts = f"base {in_memory(memory.base)}, layers{header} that are searched {in_memory(memory.searched)}"
    parts += f", activations about {in_memory(memory.activations)}"
    free = f", {in_memory(room.memory)} free" if room.memory is not None else ""
    rows = {
        "Candidates": f"{count} ({', '.join(name for name, _ in disk.candidates)})",
        "Layers": f"{plan.sizes.layers} of about {plan.sizes.layer_weights / 1e6:,.1f} million weights",
        "Tried": ", ".join(tried),
        "Decisions": decisions,
        "Phrases": f"{plan.pairs} pairs, {plan.packed_tokens:,} tokens packed from {plan.text_tokens:,}, "
        f"{packs} {'pack' if packs == 1 else 'packs'} (if the model takes them as a forest, as most do)",
        "Bytes to read": f"{on_disk(disk.base)} of the base, {each} of each candidate, "
        f"{on_disk(disk.base + sum(reads))} in all",
        "Bytes to write": f"{on_disk(disk.output)} to {plan.output}, {on_disk(room.disk)} free",
        "Memory needed": f"{in_memory(memory.reserved)} on {plan.device} ({parts}){free}",
        "Downloads": f"{on_disk(disk.downloads)} still to be fetched from the hub" if disk.downloads else "",
        "Time (estimate)": f"{duration(estimate.search)} {'to search' if plan.steps else 'a candidate'}, "
        f"{duration(estimate.total)} in all, "
        + (f"{duration(estimate.watching)} of it for drift and baselines, " if estimate.watching else "")
        + "without downloads and saving",
    }
    return [f"{name:<16} : {value}" for name, value in rows.items() if value]


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

"""Before a run: what is free on this machine, and whether that is enough for the plan.

Knows: disks, memory, what to do about a lack. Refuses to know: what a run takes, and why.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from modules.checkpoints import Models, cache_folder
from modules.config import Config
from modules.model import (
    Arithmetic,
    Memory,
    arithmetics,
    free_memory,
    free_on_accelerators,
    resolve_device,
    too_large_for,
)
from modules.output import place_of
from modules.run.plan import Plan, plan_run, share_of
from modules.runtime import ConfigError, in_memory, on_disk


def fitting_plan(config: Config, models: Models, sharing: int, begun: str | None) -> tuple[Plan, list[str]]:
    """The plan of a run that computes in what fits into memory, and a line if that is not what is best.

    begun: in what the run computes that goes on. Raises as `plan_run` does.
    """
    device = resolve_device(config.device)
    ways = arithmetics(config.compute_dtype, config.dtype, models.base.main_dtype(), device)
    if begun and config.compute_dtype == config.dtype == "auto":
        ways = (Arithmetic.named(begun),)
    plan = plan_run(config, models, ways[0], sharing)
    needed, free = plan.memory.reserved, _free_for(plan)
    if len(ways) == 1 or free is None or needed <= free:
        return plan, []
    return plan_run(config, models, ways[1], sharing), [too_large_for(*ways, needed, free)]


@dataclass(frozen=True)
class Available:
    """What is free where a run needs it."""

    folder: Path  # the output goes to its file system
    disk: int  # bytes
    memory: int | None  # bytes on the device; None if it can't be asked
    refusal: str | None  # why the output can't be written; None if it can
    lacking: tuple[str, ...] = ()  # what its file system can't do, a line each


def find_available(plan: Plan) -> Available:
    """Ask the machine. What can be done where the output goes is tried, on a small folder that is removed again."""
    place = place_of(plan.output)
    # A run that did not finish may have left a part of its output; it is removed before this one is written.
    left = sum(file.stat().st_size for file in place.partial.rglob("*") if file.is_file())
    try:
        refusal, lacking = None, place.lacks()
    except OSError as error:
        refusal, lacking = place.refusal(error), []
    return Available(
        folder=place.nearest,
        disk=shutil.disk_usage(place.nearest).free + left,
        memory=_free_for(plan),
        refusal=refusal,
        lacking=tuple(lacking),
    )


def _free_for(plan: Plan) -> int | None:
    """Bytes that are free where the plan puts its weights; None if that can't be asked."""
    if plan.placement is None:
        return share_of(free_memory(plan.device), plan.sharing)
    return sum(free_on_accelerators().values()) + psutil.virtual_memory().available


def check(plan: Plan, room: Available) -> list[str]:
    """What might go wrong, a line each. Raises ConfigError, naming everything at once, for what surely would."""
    problems = [*_writing_problems(plan, room), *_memory_problems(plan, room)]
    if problems:
        raise ConfigError(*problems)
    return [*room.lacking, *_memory_warnings(plan, room)]


def _writing_problems(plan: Plan, room: Available) -> list[str]:
    problems = [room.refusal] if room.refusal else []
    fetched = plan.disk.downloads if _same_disk(room.folder, cache_folder()) else 0
    if plan.disk.needed + fetched > room.disk:
        what = f"writing {plan.output} takes {on_disk(plan.disk.needed)}"
        what += f" beside {on_disk(fetched)} of downloads" if fetched else ""
        advice = "make room, or name a directory on a larger disk with --output"
        if plan.output.is_dir() and any(plan.output.iterdir()):
            advice += "; the output that stands there goes only after the new one stands, so moving it away makes room"
        problems.append(f"{what}, the disk of {room.folder} has {on_disk(room.disk)} free: {advice}")
    return problems


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _memory_problems(plan: Plan, room: Available) -> list[str]:
    """Only what can't be avoided counts: the weights that a run holds at the same time."""
    memory, needed = plan.memory, _least(plan, plan.memory)
    if room.memory is None or needed <= room.memory:
        return []
    advice = ["close other programs" if plan.device.type == "cpu" else "end other programs that use it"]
    if memory.header and _least(plan, replace(memory, header=0)) <= room.memory:
        advice.append("set merge_headers: false")
    if plan.dtype == torch.float32:
        advice.append("set compute_dtype: bfloat16, which takes half")
    advice.append("use a machine with more" if plan.device.type == "cpu" else "choose a device with more memory")
    what = f"the base ({in_memory(memory.base)} in {plan.arithmetic.name}) and what is searched at a time "
    what += f"({in_memory(needed - memory.base)}) don't fit into the memory of {plan.device}, which has "
    return [f"{what}{in_memory(room.memory)} free, {in_memory(needed)} are needed: {', or '.join(advice)}"]


def _least(plan: Plan, memory: Memory) -> int:
    """Bytes of weights without which there is no run. On a CPU it can't do with less than it would take."""
    return memory.base + memory.searched if plan.device.type == "cpu" else memory.held


def _memory_warnings(plan: Plan, room: Available) -> list[str]:
    warnings, memory = [], plan.memory
    if room.memory is not None and memory.reserved > room.memory:
        free, needed = in_memory(room.memory), in_memory(memory.reserved)
        warnings.append(
            f"memory may not suffice: {plan.device} has {free} free, about {needed} are needed, of which "
            f"{in_memory(memory.activations)} for activations; fewer merge_ratios need less"
        )
    left_over = [place for place in plan.placement or () if place.type == "cpu"]
    if left_over:
        warnings.append(
            f"{len(left_over)} of {plan.sizes.layers} layers don't fit on the GPUs: they stay in the CPU's memory, and "
            "every forward copies them, which takes several times as long"
        )
    return warnings

"""Plans a run: what it will do, what it needs of memory, disk and time, and whether that is available.

Knows: headers, shapes, what is free on this machine, layers with made-up weights. Refuses to know: weights, scores.
"""

import copy
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from modules.checkpoints.architecture import find_layers
from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.downloads import bytes_needed, cache_folder
from modules.checkpoints.open_models import Models
from modules.checkpoints.weight_files import index_file, local_files
from modules.config.inputs import read_neutral_texts, read_prompts, real_path
from modules.config.locations import partial_of
from modules.config.schema import Config
from modules.merging.methods import ratios_for
from modules.model.arithmetic import Arithmetic, arithmetics
from modules.model.devices import free_memory, resolve_device
from modules.model.loading import too_large_for
from modules.model.memory import Memory, Sizes, free_on_accelerators, placement_of, sizes_of, weights_of
from modules.model.part import BLOCKS
from modules.runtime.errors import ConfigError
from modules.runtime.text import duration, in_memory, on_disk, ranges
from modules.scoring.budget import TOKENS, Budget, budget_of, layer_bytes, logits_bytes
from modules.scoring.layout import NOT_TAKEN
from modules.scoring.packing import Pack, build_packs
from modules.scoring.samples import BATCH
from modules.scoring.tokenization import doubled_tokens, encode_pairs, neutral_windows
from modules.search.search import forwards_of_candidate

# On a disk, beyond the tensors: headers of shards, rounding up to blocks; journal, recipe and pictures.
MARGIN = 0.01
MARGIN_FLAT = 16 << 20

TIMED_LAYERS = 2
# Forwards of a layer that one step of a joint search is worth: forward, once more for the gradient, twice backward.
FORWARDS_OF_A_STEP = 4
STEPS_BEFORE = 3  # the cost, in steps, of finding where a joint search begins and of checking its gradient


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what it needs. It assumes that phrases are packed as a forest; most models allow that."""

    config: Config
    candidates: tuple[str, ...]
    device: torch.device
    arithmetic: Arithmetic
    sizes: Sizes
    packs: tuple[int, ...]  # tokens in every pack of the forest
    trial_tokens: int  # on which drift is measured under every trial
    neutral_tokens: int  # on which it is measured after every candidate
    memory: Memory
    free: int | None  # bytes of memory where the weights go; None: not known
    budget: Budget  # of scoring
    placement: tuple[torch.device, ...] | None  # where each layer goes, if not all of them to the device
    output: int  # bytes that are written
    disk_needed: int  # bytes: the output, a margin, and downloads to the same disk
    disk_free: int  # bytes
    downloads: int  # bytes that are still to be fetched from the hub
    warnings: tuple[str, ...] = ()

    @property
    def decisions(self) -> int:
        """The number of decisions per candidate: every layer under every method, and the header."""
        layers = self.config.layers_in(self.sizes.layers)
        return len(layers) * len(self.config.merge_method) + self.config.merge_headers

    @property
    def forwards(self) -> int:
        """Forwards of one layer in the whole search."""
        config = self.config
        layers = self.sizes.layers
        if config.search == "joint":
            return (config.joint.steps + STEPS_BEFORE) * FORWARDS_OF_A_STEP * layers
        return len(self.candidates) * forwards_of_candidate(config, layers)


def make_plan(config: Config, models: Models, sharing: int = 1, earlier_arithmetic: str | None = None) -> Plan:
    """Plan a run whose models are open; no weight is read. The plan chooses the arithmetic that fits into memory.

    sharing: how many processes on this machine do the same; on a CPU each gets an equal part of the memory.
    earlier_arithmetic: the name of that in which a resumed run computes. Raises ConfigError if the device is absent,
    the base can't take a phrase, or memory or disk surely don't suffice; what may not suffice is a warning.
    """
    device = resolve_device(config.device)
    choices = arithmetics(config.compute_dtype, config.dtype, models.base.main_dtype(), device)
    if earlier_arithmetic and config.compute_dtype == config.dtype == "auto":
        choices = (Arithmetic.named(earlier_arithmetic),)
    plan = _plan_in(choices[0], config, models, sharing)
    needed = plan.memory.reserved
    if len(choices) > 1 and plan.free is not None and needed > plan.free:
        smaller = _plan_in(choices[1], config, models, sharing)
        warning = too_large_for(*choices, needed, plan.free)
        plan = replace(smaller, warnings=(*smaller.warnings, warning))
    return replace(plan, warnings=(*plan.warnings, *check(plan)))


def _plan_in(arithmetic: Arithmetic, config: Config, models: Models, sharing: int) -> Plan:
    base = models.base
    module = models.module
    dtype = arithmetic.dtype
    stream = arithmetic.stream
    device = resolve_device(config.device)
    sizes = sizes_of(module)
    # Raise if a layer or a candidate does not exist.
    config.layers_in(sizes.layers)
    config.start_in(sizes.layers, len(models.candidates))
    tokenizer = load_tokenizer(base.path, base.companions)
    longest = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    encoded = encode_pairs(tokenizer, config.pairs, sizes.vocabulary, longest)
    texts = read_neutral_texts(config.neutral_texts)
    neutral, _ = neutral_windows(tokenizer, texts, sizes.vocabulary, longest)
    is_joint = config.search == "joint"
    stack = 1 if is_joint else max(len(ratios_for(method, config.merge_ratios)) for method in config.merge_method)

    weights = weights_of(module, dtype, config.merge_headers, _largest_cast(models, dtype))
    lengths = [len(item.tokens) for item in encoded]
    most_activations = layer_bytes(sizes, stream, min(TOKENS, sum(lengths)), stack)
    least_activations = layer_bytes(sizes, stream, max(lengths), 1)  # one pair and one ratio at a time
    placement = placement_of(
        config.device, module, dtype, replace(weights, activations=most_activations), least_activations
    )
    free = _free_on(device, sharing)
    weight_bytes = weights.searched if placement else weights.reserved
    budget = budget_of(sizes, stream, device, stack, None if free is None else free - weight_bytes)

    packs = list(build_packs(encoded, "forest", budget.tokens))
    tokens = tuple(pack.tokens for pack in packs)
    columns = max(map(_columns, packs))
    kept_layers = sizes.layers if is_joint else 1  # layers whose hidden states are kept at the same time
    hidden_states = min(budget.cache, kept_layers * sum(tokens) * sizes.hidden * stream.itemsize)
    logits = 2 * logits_bytes(sizes, stack, columns, budget)  # as the model has them, then in float32
    activations = hidden_states + layer_bytes(sizes, stream, max(tokens), stack) + logits
    if placement:
        free = sum(free_on_accelerators().values()) + psutil.virtual_memory().available

    output = output_bytes(config, base)
    disk_needed, disk_free = _disk(config, models, output)
    return Plan(
        config=config,
        candidates=tuple(candidate.name for candidate in models.candidates),
        device=device,
        arithmetic=arithmetic,
        sizes=sizes,
        packs=tokens,
        trial_tokens=config.neutral_tokens if config.is_guarded else 0,
        neutral_tokens=sum(map(len, neutral)),
        memory=replace(weights, activations=activations),
        free=free,
        budget=budget,
        placement=placement and tuple(placement),
        output=output,
        disk_needed=disk_needed,
        disk_free=disk_free,
        downloads=bytes_needed(models.jobs),
        warnings=tuple(doubled_tokens(tokenizer, config.pairs)),
    )


def _columns(pack: Pack) -> int:
    """The number of a pack's tokens at which the head is read."""
    return len({target.column for target in pack.targets})


def _free_on(device: torch.device, sharing: int) -> int | None:
    free = free_memory(device)
    return free // sharing if free is not None and device.type == "cpu" else free


def _largest_cast(models: Models, dtype: torch.dtype) -> int:
    """Bytes of the largest block of a candidate that is cast to the base's dtype once it is on the device."""
    largest = 0
    for candidate in models.candidates:
        conversion = candidate.conversion
        for name in conversion:
            if conversion.dtype(name) != dtype:
                largest = max(largest, math.prod(conversion.shape(name)) * conversion.dtype(name).itemsize // BLOCKS)
    return largest


def output_bytes(config: Config, base: Checkpoint) -> int:
    """The bytes of an output: its weights, and the base's files beside them."""
    total = sum(base.companions.published.values())
    index = index_file(local_files(base.path))
    if index:
        total += (base.path / index).stat().st_size
    for info in base.tensors.values():
        is_cast = config.dtype != "auto" and info.dtype.is_floating_point
        dtype = getattr(torch, config.dtype) if is_cast else info.dtype
        total += math.prod(info.shape) * dtype.itemsize
    return total


def _disk(config: Config, models: Models, output: int) -> tuple[int, int]:
    """Bytes that are needed on the output's disk, and those that are free there."""
    needed = output + int(output * MARGIN) + MARGIN_FLAT
    folder = real_path(Path(config.directories.output_directory))
    # What a run has left that did not finish is removed before this output is written.
    unfinished = sum(file.stat().st_size for file in partial_of(folder).rglob("*") if file.is_file())
    disk = next(path for path in folder.parents if path.exists())
    if disk.stat().st_dev == cache_folder().stat().st_dev:
        needed += bytes_needed(models.jobs)  # all sources are kept until the output is made of them
    return needed, shutil.disk_usage(disk).free + unfinished


def check(plan: Plan) -> list[str]:
    """A warning for each thing that might go wrong. Raises ConfigError for all that surely would, in one error."""
    config = plan.config
    memory = plan.memory
    device = plan.device
    free = plan.free
    problems = []
    warnings = []
    if plan.disk_needed > plan.disk_free:
        problems.append(
            f"{config.directories.output_directory}: {on_disk(plan.disk_needed)} of disk space needed, "
            f"{on_disk(plan.disk_free)} free; free some space, or choose a larger disk with --output"
        )
    on_cpu = device.type == "cpu"
    # The least that the weights need at a time. On a CPU the reserved memory can't be reduced.
    required = memory.base + memory.searched if on_cpu else memory.held
    if free is not None and required > free:
        problems.append(
            f"{device}: {in_memory(required)} of memory needed in {plan.arithmetic.name}, {in_memory(free)} free; "
            "close other programs, or set merge_headers: false or compute_dtype: bfloat16"
        )
    elif free is not None and memory.reserved > free:
        warnings.append(
            f"may run out of memory: about {in_memory(memory.reserved)} needed on {device}, {in_memory(free)} free; "
            f"fewer merge_ratios reduce the {in_memory(memory.activations)} for activations"
        )
    if problems:
        raise ConfigError(*problems)
    copied = sum(layer_device.type == "cpu" for layer_device in plan.placement or ())
    if copied:
        warnings.append(
            f"{copied} of {plan.sizes.layers} layers don't fit on the GPUs; they are copied from the CPU in every "
            "forward pass, which makes the search several times slower"
        )
    return warnings


def estimate_seconds(plan: Plan, module: PreTrainedModel) -> float | None:
    """Estimate the seconds of a search's forwards, without downloads, reading and saving. None: not measurable.

    module: the base's, without weights.
    """
    longest = max(plan.packs)
    try:
        seconds = seconds_of_a_layer(module, longest, plan.arithmetic.dtype, plan.device)
    except NOT_TAKEN:  # the model's forward needs something else, or there is no memory for it
        return None
    count = len(plan.candidates)
    searched = plan.forwards * (sum(plan.packs) + plan.trial_tokens)
    # Drift of the base and after each candidate; where candidates are scored whole, that of each and its phrases.
    measured = (count + 1) * plan.neutral_tokens
    measured += count * (plan.neutral_tokens + sum(plan.packs)) if plan.config.baselines else 0
    return seconds / longest * (searched + measured * plan.sizes.layers)


@torch.no_grad()
def seconds_of_a_layer(module: PreTrainedModel, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measure the seconds of a forward of `tokens` tokens through one layer, as the mean of the first layers.

    module: the base's, without weights.
    """
    module = copy.deepcopy(module)
    layers = find_layers(module)[1]
    short_model = module.base_model
    del layers[TIMED_LAYERS:]
    short_model.to(dtype).to_empty(device=device)
    for tensor in (*short_model.parameters(), *short_model.buffers()):
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    inputs = torch.zeros(1, tokens, dtype=torch.long, device=device)
    short_model(inputs[:, :1], use_cache=False)  # the first call also initializes, so it is not timed
    begin = time.perf_counter()
    short_model(inputs, use_cache=False)
    if device.type != "cpu":  # there, work has only been begun when the call returns
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - begin) / len(layers)


def texts_to_write(plan: Plan, module: PreTrainedModel, models: float) -> tuple[int, float | None]:
    """The number of texts that `models` models write for --discover or --rate, and the seconds they take (about; None:
    not measurable). models: may be fractional; a fraction stands for a model that writes fewer texts. Raises
    ConfigError if the prompts can't be read."""
    settings = plan.config.discover
    prompts = read_prompts(settings.prompts and [settings.prompts], for_chats=True, key="discover.prompts")
    texts = round(models * len(prompts) * settings.samples)
    try:
        seconds = seconds_of_a_layer(module, BATCH, plan.arithmetic.dtype, plan.device)
    except NOT_TAKEN:
        return texts, None
    return texts, seconds * plan.sizes.layers * settings.tokens * math.ceil(texts / BATCH)


def plan_lines(plan: Plan, seconds: float | None) -> list[str]:
    """The lines that show the user a plan. seconds: about how long it takes; None: not known."""
    config = plan.config
    memory = plan.memory
    searched = f"layers {', '.join(ranges(config.layers))}" if config.layers else "all layers"
    searched += ", embedding and LM head" if config.merge_headers else ""
    if config.search == "joint":
        searched += "; joint, all candidates at once"
        decisions = f"{config.joint.steps} steps"
    else:
        searched += f"; {', '.join(config.merge_method)} at {', '.join(f'{ratio:g}' for ratio in config.merge_ratios)}"
        decisions = f"{plan.decisions:,} per candidate, {len(plan.candidates) * plan.decisions:,} in total"
    disk = f"{on_disk(plan.output)} for {config.directories.output_directory}, {on_disk(plan.disk_free)} free"
    needed = f"{in_memory(memory.reserved)} on {plan.device}"
    needed += f", {in_memory(plan.free)} free" if plan.free is not None else ""
    rows = {
        "Candidates": f"{len(plan.candidates)} ({', '.join(plan.candidates)})",
        "Layers": str(plan.sizes.layers),
        "Search": searched,
        "Decisions": decisions,
        "Pairs": f"{len(config.pairs)}, {sum(plan.packs):,} tokens per pass",
        "Disk needed": disk,
        "Memory needed": needed,
        "Downloads": f"{on_disk(plan.downloads)} from the hub" if plan.downloads else "",
        "Time (estimate)": "unknown for this model"
        if seconds is None
        else f"about {duration(seconds)}, plus downloads and saving",
    }
    return [f"{name:<16} : {value}" for name, value in rows.items() if value]

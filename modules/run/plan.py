"""Before a run: what it will do, and what that takes.

Knows: what a search computes, reads, holds and writes. Refuses to know: weights (it counts them, from headers and
shapes alone), whether there is room for them, how fast anything is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modules.checkpoints import (
    Candidate,
    Checkpoint,
    Models,
    bytes_needed,
    find_layers,
    index_file,
    load_tokenizer,
    local_files,
)
from modules.config import Config, read_neutral_texts
from modules.model import (
    BLOCKS,
    Arithmetic,
    Memory,
    Sizes,
    free_memory,
    header_weights,
    placement_of,
    resolve_device,
    sizes_of,
    weights_of,
)
from modules.scoring import (
    TOKENS,
    Budget,
    budget_of,
    build_packs,
    doubled_tokens,
    encode_pairs,
    layer_bytes,
    logits_bytes,
    neutral_windows,
)
from modules.search import ratios_for

# On a disk: what an index, the headers of shards and rounding up to blocks may take beyond the tensors.
MARGIN = 0.01
MARGIN_FLAT = 1 << 20
RECORD, RECORD_OF_PAIR = 500, 24  # bytes of a decision in the journal, and of each pair's score in it


@dataclass(frozen=True)
class Disk:
    """What a run reads and writes, in bytes."""

    base: int  # read of the base
    candidates: tuple[tuple[str, int], ...]  # name and what is read of it
    output: int  # weights and the files beside them
    downloads: int  # what is still to be fetched from the hub
    whole: int = 0  # read once more of all candidates together, to score them taken whole
    records: int = 0  # about, of all decisions: the journal and the recipe

    @property
    def needed(self) -> int:
        """What the output's file system must have room for, a margin included."""
        return self.output + self.records + int(self.output * MARGIN) + MARGIN_FLAT


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what that takes. Phrases are taken to be packed as a forest, which most models allow."""

    output: Path
    device: torch.device
    arithmetic: Arithmetic  # what is computed in
    sizes: Sizes
    methods: tuple[tuple[str, int], ...]  # in order: a method and how many ratios it tries
    header_ratios: int  # 0 if the header is not tried
    pairs: int
    text_tokens: int  # of all pairs, each on its own
    packs: tuple[int, ...]  # tokens in every pack of the forest
    columns: int  # at which the output head is read
    disk: Disk
    memory: Memory
    budget: Budget  # of scoring
    placement: tuple[torch.device, ...] | None  # where each layer goes, if not all of them to the device
    sharing: int  # how many processes have the device's memory to share
    weight_files: tuple[Path, ...]  # the candidates'; those that come from the hub may not be here yet
    steps: int = 0  # of a joint search; of another one none
    neutral_tokens: int = 0  # on which drift is measured
    guarding_tokens: int = 0  # on which it is measured under every trial
    baselines: bool = False  # whether candidates are scored whole, too
    layers: tuple[int, ...] | None = None  # that are searched; None: all
    doubts: tuple[str, ...] = ()  # what may be a mistake in the phrases, as this base's tokenizer reads them

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and products."""
        return self.arithmetic.dtype

    @property
    def searched(self) -> tuple[int, ...]:
        """The layers that are searched."""
        return tuple(range(self.sizes.layers)) if self.layers is None else self.layers

    @property
    def packed_tokens(self) -> int:
        """Tokens that go through the model together."""
        return sum(self.packs)

    @property
    def decisions(self) -> int:
        """How often one candidate is decided about: every layer under every method, and the header."""
        return len(self.searched) * len(self.methods) + bool(self.header_ratios)

    @property
    def forwards_alone(self) -> int:
        """A candidate's forwards of one layer for one ratio's tokens: the searched layers, and all for a header."""
        return self.trials + self.header_ratios * self.sizes.layers

    @property
    def forwards_stacked(self) -> int:
        """The same for all ratios' tokens together: the layers above the searched one."""
        return self.ratios * sum(self.sizes.layers - 1 - layer for layer in self.searched)

    @property
    def trials(self) -> int:
        """How many merges of a layer are scored for one candidate, the header's not included."""
        return len(self.searched) * self.ratios

    @property
    def ratios(self) -> int:
        """How many merges of one layer that are."""
        return sum(ratios for _, ratios in self.methods)

    @property
    def stack(self) -> int:
        """The most ratios that go through the model at once."""
        return max((ratios for _, ratios in self.methods), default=1)


def plan_run(config: Config, models: Models, arithmetic: Arithmetic, sharing: int = 1) -> Plan:
    """The plan of a run whose models are open; no weight is read.

    arithmetic: to compute in. sharing: how many processes on this machine do the same; where they compute on the CPU,
    each has its share of the memory. Raises ConfigError if the device is absent, the base has no usable tokenizer or
    can't take a phrase.
    """
    base, dtype, stream = models.base, arithmetic.dtype, arithmetic.stream
    device = resolve_device(config.device)
    module = models.module
    sizes = sizes_of(module)
    tokenizer = load_tokenizer(base.path, base.companions)
    longest = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    encoded = encode_pairs(tokenizer, config.pairs, sizes.vocabulary, longest)
    texts = read_neutral_texts(config.neutral_texts)
    watched, guarding = neutral_windows(tokenizer, texts, sizes.vocabulary, longest, config.tokens_for_trials)
    config.layers_in(sizes.layers)  # all are there
    steps = config.joint.steps if config.search == "joint" else 0
    tried = config.merge_method if not steps else ()
    methods = tuple((method, len(ratios_for(method, config.merge_ratios))) for method in tried)
    stack = max((count for _, count in methods), default=1)
    weights = weights_of(module, dtype, config.merge_headers, _arriving(models, dtype))
    sharing = sharing if device.type == "cpu" else 1
    free = share_of(free_memory(device), sharing)
    lengths = [len(item.tokens) for item in encoded]
    most = layer_bytes(sizes, stream, min(TOKENS, sum(lengths)), stack)
    least = layer_bytes(sizes, stream, max(lengths), 1)  # one pair and one ratio at a time
    placement = placement_of(config.device, module, dtype, replace(weights, activations=most), least)
    kept = weights.searched if placement else weights.reserved
    budget = budget_of(sizes, stream, device, stack, None if free is None else free - kept)
    packs = build_packs(encoded, "forest", budget.tokens)
    tokens, columns = zip(
        *((pack.tokens, len({target.column for target in pack.targets})) for pack in packs), strict=True
    )
    activations = _activations(sizes, stream, stack, tokens, max(columns), budget, sizes.layers if steps else 1)
    return Plan(
        output=Path(config.directories.output_directory),
        device=device,
        arithmetic=arithmetic,
        sizes=sizes,
        methods=methods,
        header_ratios=len(config.merge_ratios) if config.merge_headers and not steps else 0,
        steps=steps,
        pairs=len(config.pairs),
        text_tokens=sum(len(item.tokens) for item in encoded),
        packs=tokens,
        columns=sum(columns),
        disk=_disk(config, models, module),
        memory=replace(weights, activations=activations),
        budget=budget,
        placement=None if placement is None else tuple(placement),
        sharing=sharing,
        neutral_tokens=sum(map(len, watched)),
        guarding_tokens=sum(map(len, guarding)),
        baselines=config.baselines,
        layers=config.layers,
        doubts=tuple(doubled_tokens(tokenizer, config.pairs)),
        weight_files=tuple(one.checkpoint.path / file for one in models.candidates for file in one.checkpoint.files),
    )


def share_of(free: int | None, sharing: int) -> int | None:
    """One process's share of free bytes; None: not known."""
    return None if free is None else free // sharing


def _arriving(models: Models, dtype: torch.dtype) -> int:
    """Bytes of the largest block of a candidate that is cast to the base's dtype once it is on the device."""
    conversions = [candidate.conversion for candidate in models.candidates]
    wide = ((one, name) for one in conversions for name in one if one.dtype(name) != dtype)
    return max((math.prod(one.shape(name)) * one.dtype(name).itemsize // BLOCKS for one, name in wide), default=0)


def _activations(
    sizes: Sizes, dtype: torch.dtype, stack: int, packs: Sequence[int], columns: int, budget: Budget, layers: int
) -> int:
    """Bytes of the hidden states that are cached, of a layer at work on the longest pack with all ratios, of the mask
    and of a chunk of logits. columns: at which the head is read, the most in a pack. layers: of how many hidden states
    are kept at a time."""
    cached = min(budget.cache, layers * sum(packs) * sizes.hidden * dtype.itemsize)
    logits = logits_bytes(sizes, stack, columns, budget)  # as the model has them, then in float32
    return cached + layer_bytes(sizes, dtype, max(packs), stack) + 2 * logits


def _disk(config: Config, models: Models, module: PreTrainedModel) -> Disk:
    """What is read and written."""
    base, every = models.base, range(len(find_layers(module)[1]))
    layers = config.layers_in(len(every))
    saved = None if config.dtype == "auto" else getattr(torch, config.dtype)
    decisions = len(models.candidates) * (len(layers) * len(config.merge_method) + config.merge_headers)
    index = index_file(local_files(base.path))
    beside = [*base.companions.published.values(), *([(base.path / index).stat().st_size] if index else [])]
    return Disk(
        base=_stored_bytes(base, None),
        candidates=tuple((c.name, _bytes_read(c, module, layers, config.merge_headers)) for c in models.candidates),
        output=_stored_bytes(base, saved) + sum(beside),
        downloads=bytes_needed(models.jobs, keep=True),
        whole=sum(_bytes_read(c, module, every, config.merge_headers) for c in models.candidates if config.baselines),
        records=2 * decisions * (RECORD + RECORD_OF_PAIR * len(config.pairs)),
    )


def _stored_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes of a checkpoint's tensors, its floating-point ones in another dtype if one is given."""
    return sum(
        math.prod(info.shape) * (dtype if dtype and info.dtype.is_floating_point else info.dtype).itemsize
        for info in checkpoint.tensors.values()
    )


def _bytes_read(candidate: Candidate, module: PreTrainedModel, layers: Sequence[int], with_header: bool) -> int:
    """Bytes of some of a candidate's layers and, if it is tried, of its header, as they are stored."""
    conversion, name_of_all = candidate.conversion, find_layers(module)[0]
    prefixes = tuple(f"{name_of_all}.{layer}." for layer in layers)
    header = {id(weight) for weight in header_weights(module)} if with_header else set()
    tried = {name for name, weight in module.named_parameters() if name.startswith(prefixes) or id(weight) in header}
    return sum(
        math.prod(conversion.shape(name)) * conversion.dtype(name).itemsize for name in conversion if name in tried
    )

"""LoRA adapters: the tensors of a model with an adapter applied while they are read.

Knows: PEFT's files, which kinds of adapters are nothing but sums. Refuses to know: layers, devices, scores.

Plain LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds s*B*A to a weight, with A (r, input), B (output, r)
and s = alpha/r. Rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) has s = alpha/sqrt(r). What
an adapter may hold besides are whole tensors that take the place of the model's (modules_to_save, biases).
"""

import json
import math
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.companions import ADAPTER_SETTINGS, Companions, find_companions
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.readers import Buffer, FilesReader, Reader, TensorInfo, new_buffer
from modules.checkpoints.sniff_format import sniff_format
from modules.checkpoints.weight_files import (
    LARGEST_SETTINGS,
    Fingerprint,
    fingerprint,
    is_there,
    open_reader,
    read_file,
)
from modules.config.fields import is_number
from modules.runtime.errors import CheckpointError, ConfigError, first_line

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # safetensors win

# Settings of PEFT under which an adapter is no sum of a weight and a product, or not of this model's weights.
_REFUSED = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"),
)
# How A and B began; under any other name (PiSSA, OLoRA, CorDA, LoftQ, ...) the model's own weights were changed too.
_HARMLESS_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")

_SECONDS = 5.0  # to match all patterns of alpha_pattern

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_WHOLE = re.compile(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)")


@dataclass(frozen=True)
class Product:
    """A and B of one weight, by their names in the adapter's file."""

    a: str  # (r, input)
    b: str  # (output, r)
    scale: float
    transposed: bool  # the weight is stored (input, output)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, by what they do to a model's weights; names are those that PEFT gives the model's modules."""

    path: Path
    name: str  # of the candidate
    trained_on: str  # as PEFT noted it
    reader: FilesReader
    whole: Mapping[str, str]  # the model's tensor -> the adapter's that takes its place
    products: Mapping[str, Product]  # the model's weight -> what is added to it
    companions: Companions  # as they were when it was opened
    ties: bool = False  # what it does to a tied model's embedding, it does to the head: ensure_weight_tying
    by_tying: Collection[str] = ()  # weights that it changes for that alone, and not of a model without ties


def read_settings(path: Path) -> dict[str, Any]:
    """An adapter's settings. Raises ConfigError if they are none, or those of a kind that can't be applied,
    CheckpointError if they can't be read."""
    content = read_file(path / ADAPTER_SETTINGS, LARGEST_SETTINGS)
    try:
        settings = json.loads(content.decode("utf-8"))
        alphas = [settings.get("lora_alpha", 8), *(settings.get("alpha_pattern") or {}).values()]
        valid = all(map(is_number, alphas)) and isinstance(settings.get("use_rslora", False), bool)
    except (ValueError, AttributeError, TypeError, RecursionError):
        valid = False
    if not valid:
        what = sniff_format(path / ADAPTER_SETTINGS) or "not a PEFT adapter configuration"
        raise ConfigError(f"{path / ADAPTER_SETTINGS}: {what}")
    refused = [key for key in _REFUSED if settings.get(key)]
    if settings.get("peft_type") != "LORA":
        refused = ["peft_type"]
    elif settings.get("init_lora_weights") not in _HARMLESS_BEGINNINGS:  # the model's own weights were changed then
        refused.append("init_lora_weights")
    if refused:
        key = refused[0]
        raise ConfigError(
            f"{path}: adapters with {key}: {settings.get(key)} are not supported; merge the adapter into its model "
            "with PEFT first"
        )
    return settings


def open_adapter(path: Path, name: str, trusted: bool = False) -> Adapter:
    """Read an adapter's settings and its file's header. Raises ConfigError if it is none that can be applied,
    CheckpointError if its settings can't be read."""
    settings = read_settings(path)
    file = next((file for file in WEIGHTS if is_there(path / file)), None)
    if file is None:
        raise ConfigError(f"{path}: no adapter weights found; looked for {', '.join(WEIGHTS)}")
    try:
        reader = open_reader(path, [file])
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    whole, sides = _whole_and_low_rank(path, reader.tensors)
    if not whole and not sides:
        raise ConfigError(f"{path / file}: the adapter contains no tensors")
    try:
        own_alphas = settings.get("alpha_pattern") or {}
        alphas = match_alphas(own_alphas, settings.get("lora_alpha", 8), [module for module, _ in sides])
    except Exception as error:  # what two libraries make of a pattern that is none
        problem = f"alpha_pattern has a pattern that can't be used ({first_line(error)}); use plain module names"
        raise ConfigError(f"{path / ADAPTER_SETTINGS}: {problem}") from None
    products = {}
    for (module, is_embedding), names in sides.items():
        if set(names) != {"A", "B"}:
            raise ConfigError(f"{path}: {module} has only one of lora_A and lora_B")
        a = reader.tensors[names["A"]].shape
        b = reader.tensors[names["B"]].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            raise ConfigError(
                f"{path}: lora_A {a} and lora_B {b} of {module} have incompatible shapes; save the adapter again"
            )
        scale = alphas[module] / (math.sqrt(a[0]) if settings.get("use_rslora") else a[0])
        products[f"{module}.weight"] = Product(names["A"], names["B"], scale, is_embedding)
    ties = bool(settings.get("ensure_weight_tying"))
    return Adapter(
        path,
        name,
        trained_on=str(settings.get("base_model_name_or_path") or ""),
        reader=reader,
        whole=whole,
        products=products,
        companions=find_companions(path, trusted),
        ties=ties,
        by_tying=[f"{module}.weight" for module, _ in sides if ties and not _is_target(settings, module)],
    )


def _is_target(settings: Mapping[str, Any], module: str) -> bool:
    """Whether an adapter's settings list a module among those that it changes; a pattern is taken to mean all."""
    targets = settings.get("target_modules")
    return not isinstance(targets, list) or any(f".{module}".endswith(f".{target}") for target in targets)


def _whole_and_low_rank(
    path: Path, names: Iterable[str]
) -> tuple[dict[str, str], dict[tuple[str, bool], dict[str, str]]]:
    """An adapter's tensors: those in the place of the model's, by the model's name; and of every module, and whether it
    is an embedding, the names of A and B. Raises ConfigError for any other."""
    whole: dict[str, str] = {}
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    for stored in names:
        name = stored.rpartition(_PREFIX)[2]  # a wrapper may have put something in front
        low_rank = _LOW_RANK.fullmatch(name)
        if low_rank:
            sides.setdefault((low_rank["module"], bool(low_rank["embedding"])), {})[low_rank["side"]] = stored
        elif "lora_" in stored or not stored.endswith((".weight", ".bias")):
            raise ConfigError(
                f"{path}: {stored} is not part of a plain LoRA adapter; merge the adapter with PEFT first"
            )
        elif ".original_module." not in stored:  # what a whole tensor took the place of
            whole[_WHOLE.sub("", name)] = stored
    return whole, sides


def match_alphas(patterns: Mapping[str, float], usual: float, modules: Sequence[str]) -> dict[str, float]:
    """Every module's alpha, as PEFT's get_pattern_key chooses it: that of the first pattern which a whole name, or what
    stands behind a dot, fits, else the usual one.

    patterns: alphas by pattern. The patterns are a stranger's: raises ValueError for one that may need all memory,
    TimeoutError if matching takes too long, and what `re` raises for no pattern at all.
    """
    deadline = time.monotonic() + _SECONDS
    alphas: dict[str, float] = {}
    for pattern, alpha in patterns.items():
        if "{" in pattern:
            raise ValueError(f"{pattern} has a repeat count")  # nested ones are expanded, which nothing limits
        whole = rf"(.*\.)?({pattern})$"
        re.compile(whole)  # what it refuses, PEFT refuses
        compiled = regex.compile(whole)  # unlike those of re, its matches can be stopped
        for module in modules:
            if module not in alphas and compiled.match(module, timeout=max(deadline - time.monotonic(), 0.001)):
                alphas[module] = alpha
    return dict.fromkeys(modules, usual) | alphas


# ---------------------------------------------------------------------------------------------------------------------
# Applied to a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


class LoraReader:
    """A `Reader` of another reader's tensors with an adapter applied, in the dtypes that are stored."""

    def __init__(
        self, plain: Reader, adapter: Adapter, tensors: Mapping[str, TensorInfo], copies: Mapping[str, str]
    ) -> None:
        """adapter: by the names of `plain`. copies: the half of a tied pair that is not stored -> the other."""
        self._plain = plain
        self._adapter = adapter
        self._copies = copies
        self.tensors = tensors

    def read(self, names: Iterable[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """See `Reader`."""
        adapter = self._adapter
        names = list(names)
        needed = {adapter.whole[name] for name in names if name in adapter.whole}
        for product in (adapter.products[name] for name in names if name in adapter.products):
            needed |= {product.a, product.b}
        lora = dict(adapter.reader.read(needed))
        made_of: dict[str, list[str]] = {}  # a stored tensor -> those that are made of it
        for name in names:
            if name in adapter.whole:
                yield name, self._changed(name, lora[adapter.whole[name]], lora)
            else:
                made_of.setdefault(self._copies.get(name, name), []).append(name)
        for stored, weight in self._plain.read(made_of, buffer):
            for name in made_of[stored]:
                yield name, self._changed(name, weight, lora)

    def _changed(self, name: str, weight: Tensor, lora: Mapping[str, Tensor]) -> Tensor:
        product = self._adapter.products.get(name)
        return weight if product is None else _sum(weight, lora[product.a], lora[product.b], product)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """See `Reader`."""
        whole = self._adapter.whole.get(name)
        product = self._adapter.products.get(name)
        if whole is None:
            weight = self._plain.rows(self._copies.get(name, name), rows)
        else:
            weight = self._adapter.reader.rows(whole, rows)
        if product is None:
            return weight
        lora = dict(self._adapter.reader.read([product.a, product.b]))
        if product.transposed:
            return _sum(weight, lora[product.a][:, rows], lora[product.b], product)
        return _sum(weight, lora[product.a], lora[product.b][rows], product)


def _sum(weight: Tensor, a: Tensor, b: Tensor, product: Product) -> Tensor:
    """W + s*B*A, computed in float32 and rounded once to the weight's dtype."""
    added = product.scale * (b.float() @ a.float())
    return (weight.float() + (added.T if product.transposed else added)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Adapted(Checkpoint):
    """A checkpoint that is read with an adapter applied."""

    adapter: Adapter

    @property
    def tokenizer_files(self) -> tuple[Path, Companions]:
        """The adapter's own tokenizer counts where it brings whole tensors along, which may be the vocabulary's."""
        brings_tokenizer = self.adapter.whole and "tokenizer_config.json" in self.adapter.companions.sizes
        return (self.adapter.path, self.adapter.companions) if brings_tokenizer else super().tokenizer_files

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the model's weight files; the adapter's own is no part of them."""
        stored = (info.file for name, info in self.tensors.items() if name not in self.adapter.whole)
        return tuple(dict.fromkeys(stored))

    def fingerprint(self) -> dict[str, Fingerprint]:
        """By which model and adapter are known again."""
        files = {ADAPTER_SETTINGS, *(info.file for info in self.adapter.reader.tensors.values())}
        return super().fingerprint() | {file: fingerprint(self.adapter.path / file) for file in sorted(files)}


def apply_adapter(
    adapter: Adapter,
    checkpoint: Checkpoint,
    conversion: Conversion,
    input_first: Collection[str],
    tied: Sequence[str | None] = (),
) -> Adapted:
    """The checkpoint with the adapter applied.

    conversion: the checkpoint's. input_first: stored names of weights (input, output). tied: names of embedding and
    head, if the checkpoint's configuration ties them. Raises ConfigError if the adapter changes what the checkpoint
    lacks, or what has another shape there.
    """
    adapter, copies = _untied(adapter, conversion, [name for name in tied if name])
    infos = adapter.reader.tensors
    whole = {}
    products = {}
    tensors = dict(checkpoint.tensors)
    tensors |= {name: tensors[stored] for name, stored in copies.items()}
    for name, brought in adapter.whole.items():
        # A tensor that the model knows and does not store is the adapter's own.
        stored = conversion.stored_name(name) or (name if conversion.knows(name) else None)
        if stored is None:
            raise ConfigError(f"{adapter.path}: the adapter contains {name}, which {checkpoint.name} does not have")
        if stored in tensors and tensors[stored].shape != infos[brought].shape:
            shapes = f"has shape {infos[brought].shape}, but {tensors[stored].shape} in {checkpoint.name}"
            raise ConfigError(f"{adapter.path}: {name} {shapes}; merge the adapter into its model with PEFT first")
        whole[stored] = brought
        tensors[stored] = infos[brought]
    for name, product in adapter.products.items():
        stored = name if name in copies else conversion.stored_name(name)
        if stored is None:
            raise ConfigError(f"{adapter.path}: the adapter changes {name}, which {checkpoint.name} does not store")
        product = replace(product, transposed=product.transposed or stored in input_first)
        added = infos[product.b].shape[:1] + infos[product.a].shape[1:]
        if tensors[stored].shape != (added[::-1] if product.transposed else added):
            shapes = f"{added} to {name}, which has shape {tensors[stored].shape} in {checkpoint.name}"
            raise ConfigError(f"{adapter.path}: the adapter adds a matrix {shapes}")
        products[stored] = product
    adapter = replace(adapter, whole=whole, products=products)
    return Adapted(
        checkpoint.repository,
        adapter.name,
        checkpoint.config,
        LoraReader(checkpoint.reader, adapter, tensors, copies),
        checkpoint.companions,
        adapter=adapter,
    )


def _untied(adapter: Adapter, conversion: Conversion, tied: Sequence[str]) -> tuple[Adapter, dict[str, str]]:
    """What an adapter does to embedding and head of a model that ties them, to each by itself, and which of the two is
    to be read from the other's stored tensor.

    PEFT changes one half of such a pair and leaves the other as it was, unless ensure_weight_tying says otherwise.
    tied: names of embedding and head, or none. Raises ConfigError if the adapter ties what it does not have.
    """
    whole = dict(adapter.whole)
    products = dict(adapter.products)
    if len(tied) < 2:
        for name in adapter.by_tying:
            products.pop(name)
            whole.pop(name, None)
        return replace(adapter, whole=whole, products=products), {}
    if not any(name in whole or name in products for name in tied):
        return adapter, {}
    embedding, head = tied
    stored = {name: conversion.stored_name(name) for name in tied}
    present = next((found for found in stored.values() if found), None)
    copies = {name: present for name, found in stored.items() if present and not found}
    bases = [whole[name] for name in tied if ".base_layer." in whole.get(name, "")]
    if copies and bases:  # PEFT loads what it saved beside its own tensors into the one that both halves are
        whole = {**dict.fromkeys(tied, bases[0]), **whole}
    if adapter.ties:
        if embedding not in whole and embedding not in products:
            raise ConfigError(f"{adapter.path}: ensure_weight_tying is set, but the adapter has no {embedding}")
        for kind in (whole, products):
            kind.pop(head, None)
            kind |= {head: kind[embedding]} if embedding in kind else {}
    return replace(adapter, whole=whole, products=products), copies

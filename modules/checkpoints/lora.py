"""LoRA adapters: applied to a model's tensors while these are read.

Knows: PEFT's files, which adapters only add a product to a weight. Refuses to know: layers, devices, scores.

Plain LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds s*B*A to a weight, with A (r, input), B (output, r)
and s = alpha/r. Rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) has s = alpha/sqrt(r). An
adapter may also hold whole tensors that replace the model's (modules_to_save, biases).
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

# Settings of PEFT that make an adapter more than weight plus product, or change which weights it is added to.
_REFUSED = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"),
)
# How A and B were initialised; the other ways (PiSSA, OLoRA, CorDA, LoftQ, ...) change the model's weights too.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_MATCH_SECONDS = 5.0  # to match all patterns of alpha_pattern

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
    """An adapter's files and what they change. Names of weights are PEFT's names of the model's modules."""

    path: Path
    name: str  # of the candidate
    trained_on: str  # as PEFT noted it
    reader: FilesReader
    whole: Mapping[str, str]  # the model's tensor -> the adapter's tensor that replaces it
    products: Mapping[str, Product]  # the model's weight -> the product that is added to it
    companions: Companions  # the files beside its weights when it was opened
    ties: bool = False  # ensure_weight_tying: a change of a tied model's embedding is one of its head too
    by_tying: Collection[str] = ()  # weights that it changes only because of the tie


def read_settings(path: Path) -> dict[str, Any]:
    """An adapter's settings. Raises ConfigError if they are invalid, or if this kind of adapter can't be applied;
    CheckpointError if they can't be read."""
    content = read_file(path / ADAPTER_SETTINGS, LARGEST_SETTINGS)
    try:
        settings = json.loads(content.decode("utf-8"))
        alphas = [settings.get("lora_alpha", 8), *(settings.get("alpha_pattern") or {}).values()]
        valid = all(map(is_number, alphas)) and isinstance(settings.get("use_rslora", False), bool)
    except (ValueError, AttributeError, TypeError, RecursionError):
        valid = False
    if not valid:
        problem = sniff_format(path / ADAPTER_SETTINGS) or "not a PEFT adapter configuration"
        raise ConfigError(f"{path / ADAPTER_SETTINGS}: {problem}")
    refused = [key for key in _REFUSED if settings.get(key)]
    if settings.get("peft_type") != "LORA":
        refused = ["peft_type"]
    elif (
        settings.get("init_lora_weights") not in _HARMLESS_INITIALISATIONS
    ):  # the model's own weights were changed then
        refused.append("init_lora_weights")
    if refused:
        key = refused[0]
        raise ConfigError(
            f"{path}: adapters with {key}: {settings.get(key)} are not supported; merge the adapter into its model "
            "with PEFT first"
        )
    return settings


def open_adapter(path: Path, name: str, trusted: bool = False) -> Adapter:
    """Read an adapter's settings and its file's header. Raises ConfigError if the adapter can't be applied,
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
        alpha_patterns = settings.get("alpha_pattern") or {}
        alphas = match_alphas(alpha_patterns, settings.get("lora_alpha", 8), [module for module, _ in sides])
    except Exception as error:  # of re or regex, for an invalid pattern
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
    """Whether target_modules lists a module; a pattern there counts as all modules."""
    targets = settings.get("target_modules")
    return not isinstance(targets, list) or any(f".{module}".endswith(f".{target}") for target in targets)


def _whole_and_low_rank(
    path: Path, names: Iterable[str]
) -> tuple[dict[str, str], dict[tuple[str, bool], dict[str, str]]]:
    """An adapter's tensors: the whole ones, by the name of the model's tensor that they replace; and the names of A and
    B, by module and whether it is an embedding. Raises ConfigError for any other tensor."""
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
        elif ".original_module." not in stored:  # that is the tensor that was replaced
            whole[_WHOLE.sub("", name)] = stored
    return whole, sides


def match_alphas(patterns: Mapping[str, float], usual: float, modules: Sequence[str]) -> dict[str, float]:
    """Every module's alpha, as PEFT's get_pattern_key chooses it: that of the first pattern that matches the whole name
    or the part behind a dot, else the usual one.

    patterns: alphas by pattern. The patterns are untrusted: raises ValueError for one that may need all memory,
    TimeoutError if matching takes too long, and the error of `re` for an invalid pattern.
    """
    deadline = time.monotonic() + _MATCH_SECONDS
    alphas: dict[str, float] = {}
    for pattern, alpha in patterns.items():
        if "{" in pattern:
            raise ValueError(f"{pattern} has a repeat count")  # nested ones are expanded, which nothing limits
        full_pattern = rf"(.*\.)?({pattern})$"
        re.compile(full_pattern)  # what it refuses, PEFT refuses
        compiled = regex.compile(full_pattern)  # unlike those of re, its matches can be stopped
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
        """adapter: by the names of `plain`. copies: the name of a tied pair that is not stored -> the stored one."""
        self._plain = plain
        self._adapter = adapter
        self._copies = copies
        self.tensors = tensors

    def read(self, names: Iterable[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """See `Reader`."""
        adapter = self._adapter
        names = list(names)
        adapter_names = {adapter.whole[name] for name in names if name in adapter.whole}
        for product in (adapter.products[name] for name in names if name in adapter.products):
            adapter_names |= {product.a, product.b}
        lora = dict(adapter.reader.read(adapter_names))
        derived_names: dict[str, list[str]] = {}  # a stored tensor -> the tensors made from it
        for name in names:
            if name in adapter.whole:
                yield name, self._with_adapter(name, lora[adapter.whole[name]], lora)
            else:
                derived_names.setdefault(self._copies.get(name, name), []).append(name)
        for stored, weight in self._plain.read(derived_names, buffer):
            for name in derived_names[stored]:
                yield name, self._with_adapter(name, weight, lora)

    def _with_adapter(self, name: str, weight: Tensor, lora: Mapping[str, Tensor]) -> Tensor:
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
    update = product.scale * (b.float() @ a.float())
    return (weight.float() + (update.T if product.transposed else update)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Adapted(Checkpoint):
    """A checkpoint that is read with an adapter applied."""

    adapter: Adapter

    @property
    def tokenizer_files(self) -> tuple[Path, Companions]:
        """See `Checkpoint`. The adapter's tokenizer if it has one and whole tensors, maybe the vocabulary's."""
        brings_tokenizer = self.adapter.whole and "tokenizer_config.json" in self.adapter.companions.sizes
        return (self.adapter.path, self.adapter.companions) if brings_tokenizer else super().tokenizer_files

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the model's weight files, without the adapter's."""
        stored = (info.file for name, info in self.tensors.items() if name not in self.adapter.whole)
        return tuple(dict.fromkeys(stored))

    def fingerprint(self) -> dict[str, Fingerprint]:
        """See `Checkpoint`; with the adapter's files."""
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
    head, if the checkpoint's configuration ties them. Raises ConfigError if the adapter changes a tensor that the
    checkpoint lacks or that has another shape there.
    """
    adapter, copies = _untied(adapter, conversion, [name for name in tied if name])
    infos = adapter.reader.tensors
    whole = {}
    products = {}
    tensors = dict(checkpoint.tensors)
    tensors |= {name: tensors[stored] for name, stored in copies.items()}
    for name, adapter_name in adapter.whole.items():
        # A tensor that the module has but the model does not store is taken from the adapter.
        stored = conversion.stored_name(name) or (name if conversion.knows(name) else None)
        if stored is None:
            raise ConfigError(f"{adapter.path}: the adapter contains {name}, which {checkpoint.name} does not have")
        if stored in tensors and tensors[stored].shape != infos[adapter_name].shape:
            shapes = f"has shape {infos[adapter_name].shape}, but {tensors[stored].shape} in {checkpoint.name}"
            raise ConfigError(f"{adapter.path}: {name} {shapes}; merge the adapter into its model with PEFT first")
        whole[stored] = adapter_name
        tensors[stored] = infos[adapter_name]
    for name, product in adapter.products.items():
        stored = name if name in copies else conversion.stored_name(name)
        if stored is None:
            raise ConfigError(f"{adapter.path}: the adapter changes {name}, which {checkpoint.name} does not store")
        product = replace(product, transposed=product.transposed or stored in input_first)
        update_shape = infos[product.b].shape[:1] + infos[product.a].shape[1:]
        if tensors[stored].shape != (update_shape[::-1] if product.transposed else update_shape):
            shapes = f"{update_shape} to {name}, which has shape {tensors[stored].shape} in {checkpoint.name}"
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
    """The adapter with separate changes for a tied model's embedding and head, and which of the two names is read from
    the other's stored tensor.

    PEFT changes one of the two and leaves the other unchanged, unless ensure_weight_tying is set. tied: names of
    embedding and head, or none. Raises ConfigError if ensure_weight_tying is set and the adapter has no embedding.
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
    source = next((stored_name for stored_name in stored.values() if stored_name), None)
    copies = {name: source for name, stored_name in stored.items() if source and not stored_name}
    bases = [whole[name] for name in tied if ".base_layer." in whole.get(name, "")]
    if copies and bases:  # PEFT loads a saved base_layer into the one tensor that is both
        whole = {**dict.fromkeys(tied, bases[0]), **whole}
    if adapter.ties:
        if embedding not in whole and embedding not in products:
            raise ConfigError(f"{adapter.path}: ensure_weight_tying is set, but the adapter has no {embedding}")
        for kind in (whole, products):
            kind.pop(head, None)
            kind |= {head: kind[embedding]} if embedding in kind else {}
    return replace(adapter, whole=whole, products=products), copies

"""A run's models opened, and the base loaded onto its device or devices, in its type.

Knows: which settings decide this, transformers' loading, placements. Refuses to know: phrases, layers' contents.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modules.checkpoints.architecture import find_layers, without_weights
from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.downloads import fetch_now
from modules.checkpoints.open_models import Models, open_base, open_models
from modules.config.schema import Config
from modules.model.arithmetic import FALLBACK, Arithmetic, arithmetics
from modules.model.base_model import ResidentModel
from modules.model.devices import accelerators, free_memory, own_device, resolve_device
from modules.model.memory import placement_of, weights_of
from modules.runtime.console import Console
from modules.runtime.distributed import Rank
from modules.runtime.errors import ConfigError, TooNarrow, first_line
from modules.runtime.oom import is_out_of_memory
from modules.runtime.text import in_memory

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelLoader:
    """How a run gets its models: made once, from its settings.

    All methods raise ConfigError for what can't be used, CheckpointError if a file can't be read or fetched.
    """

    config: Config
    console: Console  # on which is said what there is to say, and shown what is fetched
    rank: Rank = field(default_factory=Rank)
    compute: Arithmetic | None = None  # what to compute in; None: not known yet

    @property
    def device(self) -> str:
        """The configured name or, where several processes are to have a device each, that of this process's."""
        return own_device(self.config.device, self.rank)

    def open(self) -> Models:
        """The base and the candidates, opened and checked against each other."""
        models = open_models(self.config, partial(fetch_now, self.console), self.console.lines)
        sources = {models.base.name: models.base_where, **{source.name: source.where for source in models.candidates}}
        # The output does not state these.
        self.console.lines([], [f"{name} is {where}" for name, where in sources.items()])
        self.console.lines(models.notes)
        self.console.warnings(models.warnings)
        return models

    def open_base(self) -> Models:
        """The base alone, its weights fetched."""
        models = open_base(self.config, partial(fetch_now, self.console), self.console.lines)
        self.console.warnings(models.warnings)
        return models

    def fitting(self, models: Models, with_header: bool = False) -> "ModelLoader":
        """One that computes in what fits into memory with one layer at a time beside the base; if that is not what is
        best, a line has said so. with_header: see `weights_of`."""
        device = resolve_device(self.device)
        config = self.config
        best, *fallbacks = arithmetics(config.compute_dtype, config.dtype, models.base.main_dtype(), device)
        needed = weights_of(models.module, best.dtype, with_header).held
        free = free_memory(device)
        if not fallbacks or free is None or needed <= free:
            return replace(self, compute=best)
        self.console.warning(too_large_for(best, fallbacks[0], needed, free))
        return replace(self, compute=fallbacks[0])

    def placement(self, models: Models, with_header: bool) -> list[torch.device] | None:
        """Where each of the base's layers goes, if not all of them to the device. with_header: see `weights_of`."""
        assert self.compute is not None, "to be chosen before"
        weights = weights_of(models.module, self.compute.dtype, with_header)
        return placement_of(self.device, models.module, self.compute.dtype, weights)

    def layout(self, models: Models) -> ResidentModel:
        """The base without weights: how its tensors are called, tied and stored, and their types as they would be in
        memory."""
        assert self.compute is not None, "to be chosen before"
        return load_layout(models, self.config.dtype, self.compute)

    def load(self, models: Models, placement: Sequence[torch.device] | None) -> tuple[ResidentModel, Any]:
        """The base with its weights, and its tokenizer."""
        base = models.base
        self.console.timed(f"Loading {base.name}")
        model = load_model(base, self.device, self.config.dtype, self.compute, placement, self.may_widen)
        return model, load_tokenizer(base.path, base.companions)

    @property
    def may_widen(self) -> bool:
        """Whether FALLBACK may be taken where float16 is too narrow: where nobody asked for float16."""
        nobody_asked = self.config.compute_dtype == self.config.dtype == "auto"
        return nobody_asked and self.compute == Arithmetic(torch.float16)

    def in_range(self, work: Callable[["ModelLoader"], Result]) -> Result:
        """Do work that loads models with this loader or, where float16 turns out too narrow for them and FALLBACK may
        be taken, all of it again in that."""
        try:
            return work(self)
        except TooNarrow as error:
            if not self.may_widen:
                raise
            reason = error.args[0]
        # Not within the handler: there, the error still holds the model.
        release_memory()
        self.console.warning(f"{reason}; computing in {FALLBACK.name} instead")
        return work(replace(self, compute=FALLBACK))


def release_memory() -> None:
    """Give back what a model that is not referred to any more has held: there is no room for two."""
    gc.collect()
    for device in accelerators()[:1]:
        torch.get_device_module(device).empty_cache()


def too_large_for(best: Arithmetic, other: Arithmetic, needed: int, free: int) -> str:
    """What there is to say where memory decides what is computed in, and so the result. needed, free: bytes."""
    return (
        f"{best.name} needs {in_memory(needed)}, but {in_memory(free)} are free; computing in {other.name} instead "
        f"(set compute_dtype: {other.name} for the same result on every machine)"
    )


def load_model(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    compute: Arithmetic | None = None,
    placement: Sequence[torch.device] | None = None,
    may_widen: bool = False,
) -> ResidentModel:
    """Load a checkpoint's causal language model onto a device, ready to be searched.

    device, dtype: as in a configuration; compute: what to compute in, if it is not what is best for dtype; placement:
    where each layer goes, if not all of them to the device; those that go to the CPU are computed on the device all the
    same, to which accelerate then copies them; may_widen: see `ResidentModel`.
    Raises ConfigError if the device is absent or the checkpoint is no complete causal language model, TooNarrow if it
    does not fit what is computed in and may be widened.
    """
    target = resolve_device(device)
    computed = compute or arithmetics("auto", dtype, checkpoint.main_dtype(), target)[0]
    try:
        module, info = _load_module(checkpoint, target, computed.dtype, placement)
    except ConfigError:
        raise
    except Exception as error:  # whatever an architecture makes of a wrong configuration
        if is_out_of_memory(error):
            raise ConfigError(f"{checkpoint.path} does not fit into the memory of {target}") from None
        raise ConfigError(f"{checkpoint.path} can't be loaded: {first_line(error)}") from None
    _check_complete(checkpoint, info)
    module.eval().requires_grad_(False)
    module.config.return_dict = True  # its outputs are read by name, whatever its configuration says
    model = ResidentModel(module, checkpoint, _saved(dtype), computed, may_widen)
    model.check_weights()
    try:
        _ = model.tuples_returned  # a first token
        model.try_columns()
    except Exception as error:  # a setting that only matters once the model is used
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{checkpoint.path} can't be used: {first_line(error)}") from None
    return model


def load_layout(models: Models, dtype: str, compute: Arithmetic) -> ResidentModel:
    """The base as `load_model` makes it, without weights: on the meta device. Raises as that, for what can be seen."""
    checkpoint = models.base
    empty = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in checkpoint.tensors.items()
    }
    module, info = type(models.module).from_pretrained(
        None, state_dict=empty, device_map={"": "meta"}, **_how(checkpoint, compute.dtype)
    )
    _check_complete(checkpoint, info)
    module.requires_grad_(False)
    _tie(module, models)
    return ResidentModel(module, checkpoint, _saved(dtype), compute)


def _tie(module: PreTrainedModel, models: Models) -> None:
    """Tie what the base's configuration ties and its files hold twice, if it is the same, as transformers does where
    there are weights to be compared."""
    first_names = dict[int, str]()
    for name, tensor in models.module.state_dict(keep_vars=True).items():
        first_name = first_names.setdefault(id(tensor), name)
        first_tensor = module.get_parameter_or_buffer(first_name)
        tensor_copy = module.get_parameter_or_buffer(name)
        if first_tensor is not tensor_copy:
            stored = Conversion(module, models.base.tensors).load([first_name, name], models.base.stream)
            if torch.equal(stored[first_name].to(first_tensor.dtype), stored[name].to(tensor_copy.dtype)):
                parent, _, child_name = name.rpartition(".")
                setattr(module.get_submodule(parent), child_name, first_tensor)


def _check_complete(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raise ConfigError if, by transformers' account of loading it, a checkpoint is no complete model."""
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        shapes = f"has shape {tuple(stored)}, but config.json says {tuple(expected)}"
        raise ConfigError(f"{checkpoint.path}: {name} {shapes}")
    if info["missing_keys"]:
        raise ConfigError(f"{checkpoint.path}: missing weights {', '.join(sorted(info['missing_keys'])[:3])}")


def _saved(dtype: str) -> torch.dtype | None:
    return None if dtype == "auto" else getattr(torch, dtype)


def _how(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """What is said to transformers wherever it loads a module."""
    return {
        "config": checkpoint.config,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `_check_complete` reports them in our words
    }


def _load_module(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, placement: Sequence[torch.device] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The module with its weights, and what transformers has to say about loading them."""
    common = _how(checkpoint, dtype)
    if device.type == "cpu" and dtype == checkpoint.main_dtype():
        # transformers would map the files into memory. Weights that are changed must own their memory (a first write
        # to a mapped page is slow), and a file that changes during a long run must not pull it down.
        architecture = type(without_weights(checkpoint))
        return architecture.from_pretrained(None, state_dict=checkpoint.read(checkpoint.tensors), **common)
    device_map: dict[str, torch.device] | None = None if device.type == "cpu" else {"": device}
    if placement is not None:
        device_map = device_map_of(without_weights(checkpoint), device, placement)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        device_map=device_map,
        trust_remote_code=checkpoint.companions.trusted,
        local_files_only=True,
        **common,
    )


def device_map_of(
    module: PreTrainedModel, device: torch.device, placement: Sequence[torch.device]
) -> dict[str, torch.device]:
    """Accelerate's map from parts of a model to devices: its layers as placed, everything else on one device."""
    layers_name, layers = find_layers(module)
    device_map = {
        f"{layers_name}.{index}": layer_device
        for index, layer_device in zip(range(len(layers)), placement, strict=True)
    }
    for name, child in module.named_modules():
        if name == layers_name or name.startswith(f"{layers_name}."):
            continue
        if not any(child.children()):
            device_map[name] = device
        else:
            tensors = (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False))
            device_map.update({f"{name}.{tensor}".lstrip("."): device for tensor, _ in tensors})
    return device_map

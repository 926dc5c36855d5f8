"""Opening a run's models, and loading the base onto its device or devices, in its type.

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
    """Opens and loads a run's models. Made once, from the run's settings.

    All methods raise ConfigError for models or settings that can't be used, CheckpointError if a file can't be read or
    fetched.
    """

    config: Config
    console: Console  # for messages, and the progress of downloads
    rank: Rank = field(default_factory=Rank)
    compute: Arithmetic | None = None  # the one to compute in; None: not known yet

    @property
    def device(self) -> str:
        """The configured name of the device; if several processes have a device each, the name of this process's."""
        return own_device(self.config.device, self.rank)

    def open(self) -> Models:
        """The base and the candidates, opened and checked against each other."""
        models = open_models(self.config, partial(fetch_now, self.console), self.console.lines)
        sources = {models.base.name: models.base_where, **{source.name: source.where for source in models.candidates}}
        # For the log alone.
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
        """A loader with the best arithmetic if the base, and one layer at a time beside it, fit into memory in that;
        else with the next one, after a warning. with_header: see `weights_of`."""
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
        """The device of each of the base's layers; None if all go to one. with_header: see `weights_of`."""
        assert self.compute is not None, "to be chosen before"
        weights = weights_of(models.module, self.compute.dtype, with_header)
        return placement_of(self.device, models.module, self.compute.dtype, weights)

    def layout(self, models: Models) -> ResidentModel:
        """The base without weights: its tensors' names, ties and stored types, and the types they would have in
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
        """Whether FALLBACK may be taken if float16 is too narrow: only if the settings did not ask for float16."""
        nobody_asked = self.config.compute_dtype == self.config.dtype == "auto"
        return nobody_asked and self.compute == Arithmetic(torch.float16)

    def in_range(self, work: Callable[["ModelLoader"], Result]) -> Result:
        """Do work that loads models with this loader. If float16 is too narrow for them and FALLBACK may be taken, do
        all of it again in FALLBACK."""
        try:
            return work(self)
        except TooNarrow as error:
            if not self.may_widen:
                raise
            reason = error.args[0]
        # Not within the handler, where the error still holds the model.
        release_memory()
        self.console.warning(f"{reason}; computing in {FALLBACK.name} instead")
        return work(replace(self, compute=FALLBACK))


def release_memory() -> None:
    """Free the memory of a model that is not referred to any more: there is no room for two."""
    gc.collect()
    for device in accelerators()[:1]:
        torch.get_device_module(device).empty_cache()


def too_large_for(best: Arithmetic, fallback: Arithmetic, needed: int, free: int) -> str:
    """The warning that memory decides the compute type, and so the result. needed, free: bytes."""
    return (
        f"{best.name} needs {in_memory(needed)}, but {in_memory(free)} are free; computing in {fallback.name} instead "
        f"(set compute_dtype: {fallback.name} for the same result on every machine)"
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

    device, dtype: as in a configuration; compute: None for the best for dtype; placement: the device of each layer,
    None if all go to `device`; accelerate copies layers placed on the CPU to `device` for every forward; may_widen: see
    `ResidentModel`.
    Raises ConfigError if the device is absent or the checkpoint is no complete causal language model, TooNarrow if it
    does not fit the compute type and may be widened.
    """
    target = resolve_device(device)
    computed = compute or arithmetics("auto", dtype, checkpoint.main_dtype(), target)[0]
    try:
        module, info = _load_module(checkpoint, target, computed.dtype, placement)
    except ConfigError:
        raise
    except Exception as error:  # an architecture may raise anything for a wrong configuration
        if is_out_of_memory(error):
            raise ConfigError(f"{checkpoint.path} does not fit into the memory of {target}") from None
        raise ConfigError(f"{checkpoint.path} can't be loaded: {first_line(error)}") from None
    _check_complete(checkpoint, info)
    module.eval().requires_grad_(False)
    module.config.return_dict = True  # outputs are read by name
    model = ResidentModel(module, checkpoint, _saved_dtype(dtype), computed, may_widen)
    model.check_weights()
    try:
        _ = model.tuples_returned  # runs a first token
        model.try_columns()
    except Exception as error:  # a wrong setting may only fail in a forward
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{checkpoint.path} can't be used: {first_line(error)}") from None
    return model


def load_layout(models: Models, dtype: str, compute: Arithmetic) -> ResidentModel:
    """The base as `load_model` makes it, but on the meta device, without weights. Raises as `load_model` for errors
    that show without them."""
    checkpoint = models.base
    empty = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in checkpoint.tensors.items()
    }
    module, info = type(models.module).from_pretrained(
        None, state_dict=empty, device_map={"": "meta"}, **_loading_arguments(checkpoint, compute.dtype)
    )
    _check_complete(checkpoint, info)
    module.requires_grad_(False)
    _tie(module, models)
    return ResidentModel(module, checkpoint, _saved_dtype(dtype), compute)


def _tie(module: PreTrainedModel, models: Models) -> None:
    """Tie tensors that the configuration ties and the files hold twice, if both are equal. transformers does so if it
    has weights to compare."""
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
    """Raise ConfigError if a checkpoint is no complete model. info: transformers' account of loading it."""
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        shapes = f"has shape {tuple(stored)}, but config.json says {tuple(expected)}"
        raise ConfigError(f"{checkpoint.path}: {name} {shapes}")
    if info["missing_keys"]:
        raise ConfigError(f"{checkpoint.path}: missing weights {', '.join(sorted(info['missing_keys'])[:3])}")


def _saved_dtype(dtype: str) -> torch.dtype | None:
    return None if dtype == "auto" else getattr(torch, dtype)


def _loading_arguments(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of every `from_pretrained`."""
    return {
        "config": checkpoint.config,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `_check_complete` reports them in our words
    }


def _load_module(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, placement: Sequence[torch.device] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The module with its weights, and transformers' account of loading them."""
    common = _loading_arguments(checkpoint, dtype)
    if device.type == "cpu" and dtype == checkpoint.main_dtype():
        # transformers would map the files into memory. Weights that are changed must own their memory (a first write
        # to a mapped page is slow), and a file that changes during a long run must not crash it.
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

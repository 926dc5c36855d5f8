"""A run's models opened, and the base loaded onto its device or devices, in its type.

Knows: which settings decide this, transformers' loading, placements. Refuses to know: phrases, layers' contents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modules.checkpoints import (
    Checkpoint,
    Models,
    fetch_now,
    find_layers,
    load_tokenizer,
    open_base,
    open_models,
    without_weights,
)
from modules.config import Config
from modules.model.base_model import ResidentModel
from modules.model.devices import own_device, resolve_device, resolve_dtype
from modules.model.memory import placement_of, weights_of
from modules.runtime import ConfigError, Console, Rank, first_line, is_out_of_memory


@dataclass(frozen=True)
class ModelLoader:
    """How a run gets its models: made once, from its settings.

    All methods raise ConfigError for what can't be used, CheckpointError if a file can't be read or fetched.
    """

    config: Config
    console: Console  # on which is said what there is to say, and shown what is fetched
    rank: Rank = field(default_factory=Rank)
    compute: str | None = None  # what to compute in, if it is not what follows from the configured dtype

    @property
    def device(self) -> str:
        """The configured name or, where several processes are to have a device each, that of this process's."""
        return own_device(self.config.device, self.rank)

    def open(self) -> Models:
        """The base and the candidates, opened and checked against each other."""
        models = open_models(self.config, partial(fetch_now, self.console), self.console.lines)
        self.console.lines(models.notes)
        self.console.warnings(models.warnings)
        return models

    def open_base(self) -> Models:
        """The base alone, its weights fetched."""
        models = open_base(self.config, partial(fetch_now, self.console), self.console.lines)
        self.console.warnings(models.warnings)
        return models

    def placement(self, models: Models, with_header: bool) -> list[torch.device] | None:
        """Where each of the base's layers goes, if not all of them to the device. with_header: see `weights_of`."""
        device, dtype = resolve_device(self.device), self.compute or self.config.dtype
        computed = resolve_dtype(dtype, models.base.main_dtype(), device)
        return placement_of(self.device, models.module, computed, weights_of(models.module, computed, with_header))

    def load(self, models: Models, placement: Sequence[torch.device] | None) -> tuple[ResidentModel, Any]:
        """The base with its weights, and its tokenizer."""
        base = models.base
        model = load_model(base, self.device, self.config.dtype, self.compute, placement)
        return model, load_tokenizer(base.path, base.companions)


def load_model(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    compute: str | None = None,
    placement: Sequence[torch.device] | None = None,
) -> ResidentModel:
    """Load a checkpoint's causal language model onto a device, ready to be searched.

    device: as in a configuration; dtype: auto, float16, bfloat16 or float32 (see resolve_dtype); compute: what
    to compute in, if it is not what follows from dtype; placement: where each layer goes, if not all of them to the
    device; those that go to the CPU are computed on the device all the same, to which accelerate then copies them.
    Raises ConfigError if the device is absent or the checkpoint is no complete causal language model.
    """
    target = resolve_device(device)
    computed = resolve_dtype(compute or dtype, checkpoint.main_dtype(), target)
    try:
        module, info = _load_module(checkpoint, target, computed, placement)
    except ConfigError:
        raise
    except Exception as error:  # whatever an architecture makes of a wrong configuration
        if is_out_of_memory(error):
            raise ConfigError(f"{checkpoint.path} does not fit into the memory of {target}") from None
        raise ConfigError(f"{checkpoint.path} can't be loaded: {first_line(error)}") from None
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        shapes = f"has shape {tuple(stored)}, its config.json says {tuple(expected)}"
        raise ConfigError(f"{checkpoint.path}: {name} {shapes}")
    if info["missing_keys"]:
        raise ConfigError(f"{checkpoint.path}: the weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    module.eval().requires_grad_(False)
    module.config.return_dict = True  # its outputs are read by name, whatever its configuration says
    model = ResidentModel(module, checkpoint, None if dtype == "auto" else getattr(torch, dtype))
    model.check_weights()
    try:
        _ = model.tuples_returned  # a first token
        model.try_columns()
    except Exception as error:  # a setting that only matters once the model is used
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{checkpoint.path} can't be used: {first_line(error)}") from None
    checkpoint.release()
    return model


def _load_module(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, placement: Sequence[torch.device] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The module with its weights, and what transformers has to say about loading them."""
    common = {
        "config": checkpoint.config,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported by load_model, in our words
    }
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
    found = {f"{layers_name}.{index}": place for index, place in zip(range(len(layers)), placement, strict=True)}
    for name, child in module.named_modules():
        if name == layers_name or name.startswith(f"{layers_name}."):
            continue
        if not any(child.children()):
            found[name] = device
        else:
            own = (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False))
            found.update({f"{name}.{tensor}".lstrip("."): device for tensor, _ in own})
    return found

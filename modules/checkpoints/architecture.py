"""What a configuration's class says of a model without its weights: layers, their names, how weights lie.

Knows: torch modules on the meta device. Refuses to know: weight files, devices, merging.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modules.checkpoints.checkpoint import Checkpoint
from modules.runtime import ConfigError, first_line


def without_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    """A checkpoint's causal language model on the meta device: its names and shapes.

    Raises ConfigError if its configuration makes none.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=checkpoint.companions.trusted)
    except Exception as error:  # whatever an architecture makes of a wrong configuration
        raise ConfigError(f"{checkpoint.path} can't be loaded: {first_line(error)}") from None


def settle_attention(checkpoint: Checkpoint) -> list[str]:
    """Where a configuration asks for an attention implementation that can't be used here, take the usual one instead;
    a line about it."""
    wanted = checkpoint.config._attn_implementation
    if wanted is None:
        return []
    try:
        without_weights(checkpoint)
        return []
    except ConfigError as error:
        trouble = str(error)
    checkpoint.config._attn_implementation = None
    try:
        without_weights(checkpoint)
    except ConfigError:
        checkpoint.config._attn_implementation = wanted
        return []  # there is more than that; who makes the module says what
    return [
        f"{checkpoint.path}: its config.json asks for the attention implementation {wanted}, which can't be used here "
        f"({trouble.partition('loaded: ')[2]}); the usual one is taken"
    ]


def find_layers(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name: the list of num_hidden_layers modules with the most parameters."""
    count = module.config.get_text_config().num_hidden_layers
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if not lists:
        raise ConfigError(f"{type(module).__name__}: no list of {count} decoder layers found in this architecture")
    return max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def input_first_weights(module: PreTrainedModel) -> set[str]:
    """Names of the weights stored (input, output): GPT-2's Conv1D, and stacked experts that say so of themselves."""
    names = set()
    for prefix, child in module.named_modules():
        if isinstance(child, Conv1D):
            names.add(f"{prefix}.weight")
        elif getattr(child, "is_transposed", False):
            names.update(f"{prefix}.{name}" for name, _ in child.named_parameters(recurse=False))
    return names

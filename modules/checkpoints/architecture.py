"""Facts about a model that need no weights: its layers and their names, the axes of its weights, whether another
architecture computes the same with them.

Knows: torch modules, on the meta device or small ones. Refuses to know: weight files, devices, merging.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.config_file import parts_of
from modules.runtime.errors import ConfigError, first_line

_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
_SMALL_LAYERS = 8  # at most: in some architectures every fourth or sixth layer computes differently
_TOKENS = 16
_ROUNDING = 1e-4  # of two products in float32, relative


def empty_module(config: PreTrainedConfig, trusted: bool = False) -> PreTrainedModel:
    """A configuration's causal language model on the meta device. trusted: whether its own code may run."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)


def without_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    """A checkpoint's causal language model on the meta device: its names and shapes.

    Raises ConfigError if its configuration can't be built.
    """
    try:
        return empty_module(checkpoint.config, checkpoint.companions.trusted)
    except Exception as error:  # of an architecture, for a wrong configuration
        raise ConfigError(f"{checkpoint.text} can't be loaded: {first_line(error)}") from None


def with_buffers(config: PreTrainedConfig, trusted: bool) -> PreTrainedModel:
    """A configuration's causal language model without weights, but with the buffers computed from the configuration:
    rotary frequencies, masks. A wrong configuration may raise any error of its architecture."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted).eval()


def settle_attention(checkpoint: Checkpoint) -> list[str]:
    """Replace an attention implementation that does not come with PyTorch by the usual one; returns a line about it.
    If the requested package is missing, transformers would download one."""
    requested = {part._attn_implementation for part in parts_of(checkpoint.config)} - {None, "eager"}
    if not requested:
        return []
    checkpoint.config._attn_implementation = None  # PyTorch's, if the architecture supports it
    named = ", ".join(sorted(requested - {"sdpa"}))
    if not named:
        return []
    return [f"{checkpoint.text}: config.json requests the attention implementation {named}; using PyTorch's instead"]


def find_layers(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name: the list of num_hidden_layers modules with the most parameters."""
    count = module.config.get_text_config().num_hidden_layers
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if not lists:
        raise ConfigError(
            f"{type(module).__name__}: found no list of {count} decoder layers; this architecture can't be merged"
        )
    return max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def header_names(module: PreTrainedModel) -> tuple[str, str | None]:
    """The names of the weights of input embedding and output head, also in tied models; None without a head."""
    embedding = module.get_input_embeddings()
    head = module.get_output_embeddings()
    names = {id(child): f"{name}.weight" for name, child in module.named_modules()}
    return names[id(embedding)], names.get(id(head))


def input_first_weights(module: PreTrainedModel) -> set[str]:
    """Names of the weights stored (input, output): GPT-2's Conv1D, and stacked experts with is_transposed."""
    names = set()
    for prefix, child in module.named_modules():
        if isinstance(child, Conv1D):
            names.add(f"{prefix}.weight")
        elif getattr(child, "is_transposed", False):
            names.update(f"{prefix}.{name}" for name, _ in child.named_parameters(recurse=False))
    return names


def makes_the_same(config: PreTrainedConfig, other_config: PreTrainedConfig) -> bool:
    """Whether another configuration's class computes the same with the same tensors, given the first one's settings.

    Both classes build a small model with the same random weights; the same few tokens must give the same logits.
    Differences that show only in longer texts are not seen here; comparing the settings finds them.
    """
    text_config = config.get_text_config()
    other_text_config = other_config.get_text_config()
    try:
        settings = _small_settings(text_config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first_module, second_module = (
                _small_module(type(kind), settings) for kind in (text_config, other_text_config)
            )
            ids = torch.randint(_SMALL["vocab_size"], (1, _TOKENS))
            weights = {name: torch.randn(tensor.shape) / 4 for name, tensor in first_module.state_dict().items()}
        for module in (first_module, second_module):
            module.load_state_dict(weights, strict=True)
        with torch.no_grad():
            logits, other_logits = (module(input_ids=ids).logits for module in (first_module, second_module))
    except Exception:  # of a class, for another one's settings or weights
        return False
    return bool((logits - other_logits).abs().max() <= _ROUNDING * logits.abs().max())


def _small_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration's settings for a small model; the heads keep their size."""
    count = config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = min(count, _SMALL_LAYERS)
    settings = {
        key: value[:layers] if isinstance(value, list) and len(value) == count else value
        for key, value in config.to_dict().items()
        if key not in ("model_type", "architectures", "dtype", "quantization_config", "auto_map")
    }
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    small = {**_SMALL, "num_hidden_layers": layers}
    names = {config.attribute_map.get(key, key): value for key, value in small.items()}
    return {**settings, **tokens, **names, "head_dim": width}


def _small_module(kind: type[PreTrainedConfig], settings: dict[str, Any]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(kind.from_dict(settings), dtype=torch.float32).eval()

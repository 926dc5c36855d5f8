"""What a config.json asks for: read before transformers sees it, since some of its keys have code or files fetched.

Knows: the keys of config.json that fetch, or say how weights are quantised. Refuses to know: weights, modules, what the
other keys mean.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from modules.runtime.text import shortened

MOST_LAYERS = 2000  # more than any model has; each one takes time and memory before its weights are looked for
_QUANTISED = ("quantization_config", "compression_config")

# What comes with transformers or an installed package. Any other name may be one of native code at the hub, which
# transformers fetches and loads where the package `kernels` is installed.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_IMPLEMENTATIONS = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
}
_KERNELS = ("use_kernels", "kernel_config")  # any value that is not empty
_OTHER_MODELS = ("backbone", "architecture")  # of an image encoder: a name, unless it is that of a repository


def check_stated(stated: Any, trusted: bool) -> None:
    """Raise ValueError, naming the key, if a config.json is none of a model, or asks for more than is there.

    trusted: whether code that the model brings along may be run.
    """
    if _layers(stated) > MOST_LAYERS:
        raise ValueError(f"it claims {_layers(stated):.4g} layers")
    for key, value in _keys(stated):
        problem = _fetches(key.rpartition(".")[2], value, trusted)
        if problem:
            raise ValueError(f"{key} is '{shortened(str(value), 80, keep='start')}', {problem}; remove that key")


def check_implementations(config: PreTrainedConfig) -> None:
    """Raise ValueError if a configuration, read from a file that passed `check_stated`, asks for an implementation all
    the same, under a name that the file itself has made up for it."""
    for part in parts_of(config):
        for key in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, key, None)
            if value is not None and value not in _IMPLEMENTATIONS[key]:
                raise ValueError(f"it sets the implementation '{value}' under a key other than {key}")


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those of its parts, as of a text model in one that sees."""
    yield config
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            yield from parts_of(inner)


def quantised_by(stated: Any) -> str | None:
    """The key that says how a model is quantised, with those above it; None if none does."""
    for key, value in _keys(stated):
        if key.rpartition(".")[2] in _QUANTISED and value:
            return key
    return None


def _fetches(key: str, value: Any, trusted: bool) -> str | None:
    """What is wrong with a key's value if it would have something fetched."""
    allowed = _IMPLEMENTATIONS.get(key)
    if allowed and any(name is not None and name not in allowed for name in _leaves(value)):
        return f"which may load code from the hub (allowed: {', '.join(allowed)})"
    if key in _KERNELS and value:
        return "which would download code"
    if key in _OTHER_MODELS and isinstance(value, str) and ("/" in value or ":" in value):
        return "which would download another model"
    if key == "auto_map" and trusted and any("--" in str(name) for name in _leaves(value)):
        return "which loads code from another repository; copy that code into this folder"
    return None


def _keys(stated: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a JSON document with their values, also those within others, with dots between."""
    if isinstance(stated, Mapping):
        for key, value in stated.items():
            yield f"{above}{key}", value
            yield from _keys(value, f"{above}{key}.")
    elif isinstance(stated, list):
        for value in stated:
            yield from _keys(value, above)


def _leaves(value: Any) -> Iterator[Any]:
    """What stands in a value, however it is nested."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    else:
        for one in inner:
            yield from _leaves(one)


def _layers(stated: Any) -> float:
    """The largest number of layers that a configuration states (num_hidden_layers, n_layer, ...), in any part."""
    counts = (value for key, value in _keys(stated) if key.endswith(("layers", "n_layer")))
    return max((value for value in counts if isinstance(value, int | float)), default=0)

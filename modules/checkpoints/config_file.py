"""Checks of a config.json before transformers reads it: some keys make transformers download code or files.

Knows: the keys of config.json that cause downloads or say how weights are quantised. Refuses to know: weights,
modules, what the other keys mean.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from modules.runtime.text import shortened

MOST_LAYERS = 2000  # more than any model has; each takes time and memory even before weights are read
_QUANTISED = ("quantization_config", "compression_config")

# Implementations of transformers or an installed package. Any other name may be one of native code on the hub, which
# transformers downloads and loads if the package `kernels` is installed.
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
    """Raise ValueError, naming the key, if a config.json claims too many layers or would cause a download.

    stated: the parsed file. trusted: whether the model's own code may run.
    """
    if _layers(stated) > MOST_LAYERS:
        raise ValueError(f"it claims {_layers(stated):.4g} layers")
    for key, value in _keys(stated):
        problem = _fetch_problem(key.rpartition(".")[2], value, trusted)
        if problem:
            raise ValueError(f"{key} is '{shortened(str(value), 80, keep='start')}', {problem}; remove that key")


def check_implementations(config: PreTrainedConfig) -> None:
    """Raise ValueError if a configuration asks for an implementation although its file passed `check_stated`: the file
    can define another name for the key (attribute_map)."""
    for part in parts_of(config):
        for key in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, key, None)
            if value is not None and value not in _IMPLEMENTATIONS[key]:
                raise ValueError(f"it sets the implementation '{value}' under a key other than {key}")


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those of its parts, such as the text model in a multimodal one."""
    yield config
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            yield from parts_of(inner)


def quantised_by(stated: Any) -> str | None:
    """The full dotted key that says how a model is quantised; None if there is none."""
    for key, value in _keys(stated):
        if key.rpartition(".")[2] in _QUANTISED and value:
            return key
    return None


def _fetch_problem(key: str, value: Any, trusted: bool) -> str | None:
    """Why a key's value is refused, if it would cause a download; else None."""
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
    """All keys of a JSON document with their values; nested keys are joined with dots."""
    if isinstance(stated, Mapping):
        for key, value in stated.items():
            yield f"{above}{key}", value
            yield from _keys(value, f"{above}{key}.")
    elif isinstance(stated, list):
        for value in stated:
            yield from _keys(value, above)


def _leaves(value: Any) -> Iterator[Any]:
    """The innermost values of a nested value."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    else:
        for item in inner:
            yield from _leaves(item)


def _layers(stated: Any) -> float:
    """The largest number of layers that a configuration states (num_hidden_layers, n_layer, ...), in any part."""
    counts = (value for key, value in _keys(stated) if key.endswith(("layers", "n_layer")))
    return max((value for value in counts if isinstance(value, int | float)), default=0)

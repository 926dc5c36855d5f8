"""Candidates: a checkpoint, read under the base model's names, and whether it fits the base.

Knows: configurations, shapes, stored names. Refuses to know: devices, scores, what is done with a layer.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from modules.checkpoints.architecture import find_layers, header_names, input_first_weights, makes_the_same
from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.hub import Repository
from modules.checkpoints.leftovers import Leftovers, leftovers, number_of, without_number
from modules.checkpoints.lora import Adapted, Adapter, apply_adapter
from modules.checkpoints.meaning import clashes, differences, setting, ties_header
from modules.checkpoints.readers import Buffer, new_buffer
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize

_MUST_AGREE = {
    "num_hidden_layers": "number of layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "number of attention heads",
    "num_key_value_heads": "number of key and value heads",
}


@dataclass(frozen=True)
class Candidate:
    """A model that may be merged into the base, its tensors under the names of the base's module."""

    checkpoint: Checkpoint
    conversion: Conversion
    notes: Sequence[str] = ()  # lines for the person at the terminal
    warnings: Sequence[str] = ()  # the same, of what may spoil the merge
    otherwise: Sequence[str] = ()  # in what it computes by other settings than the base; a line for each
    repositories: Sequence[Repository] = ()  # from which its files come
    text: str = ""  # what the configuration calls it

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.checkpoint.name

    @property
    def where(self) -> str:
        """Absolute paths, ids of the hub with their commit."""
        return "+".join(repository.where for repository in self.repositories)

    def stream(self, names: Collection[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, in their stored dtype, each as soon as it is read; those that it lacks are
        absent. buffer: what they are read into. Raises CheckpointError if a file can't be read."""
        present = [name for name in names if name in self.conversion]
        return self.conversion.stream(present, partial(self.checkpoint.stream, buffer=buffer))

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a tensor, in the order of their numbers: (rows, ...), on the CPU, in its stored dtype.

        rows: (rows,), int64, on the CPU. Raises CheckpointError if a file can't be read.
        """
        stored = self.conversion.stored_alone(name)
        return self.read([name])[name][rows] if stored is None else self.checkpoint.rows(stored, rows)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """The same as `stream`, all together and in the order of the names."""
        return self.conversion.load([name for name in names if name in self.conversion], self.checkpoint.stream)


def open_candidate(checkpoint: Checkpoint, base: Checkpoint, module: PreTrainedModel) -> Candidate:
    """A checkpoint as a candidate for the base, whose module may be without weights.

    Raises ConfigError, naming both values, if it does not fit.
    """
    conversion = _conversion(checkpoint, base, module)
    other_meaning = differences(base.config, checkpoint.config)
    unused = leftovers(checkpoint, conversion, module)
    problem = _other_layers(checkpoint, conversion, module, unused)
    problems = [problem] if problem else list(_layer_differences(conversion, base, module, unused))
    if problems and _kind(checkpoint.config) != _kind(base.config):
        problems.insert(0, f"it is {_kind(checkpoint.config)}, the base is {_kind(base.config)}")
    _refuse(checkpoint.text, problems, other_meaning)
    warnings = []
    if other_meaning:
        warnings.append(
            f"{checkpoint.name}: its configuration means something else than the base's: {'; '.join(other_meaning)}; "
            "the merged model keeps the base's"
        )
    return Candidate(
        checkpoint,
        conversion,
        notes=[*_about_names(checkpoint, conversion, base), *unused.notes(checkpoint.name)],
        warnings=warnings,
        otherwise=[line for line in other_meaning if not line.startswith("tie_word_embeddings")],  # of the header
        repositories=[checkpoint.repository],
    )


def check_base(checkpoint: Checkpoint, module: PreTrainedModel) -> list[str]:
    """Lines about what a base stores beside its weights.

    Raises ConfigError if its tensors are not those of its own module, which may be without weights.
    """
    try:
        conversion = Conversion(module, checkpoint.tensors)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.text}: {error}") from None
    if conversion.wrappers:
        raise ConfigError(
            f"{checkpoint.text}: the names of its tensors have {_listed(conversion.wrappers)} in them, as a training "
            "wrapper leaves it, and transformers could not open them again; save the model without it first"
        )
    unused = leftovers(checkpoint, conversion, module)
    problem = _other_layers(checkpoint, conversion, module, unused)
    missing = [name for name in _layer_tensors(module) if name not in conversion]
    if problem is None and missing:
        problem = f"the weights lack {', '.join(missing[:3])}"
    if problem:
        raise ConfigError(f"{checkpoint.text}: {problem}")
    return unused.notes(checkpoint.name)


def adapt(checkpoint: Checkpoint, adapter: Adapter, base: Checkpoint, module: PreTrainedModel) -> Adapted:
    """A checkpoint that fits the base, with an adapter applied. Raises ConfigError if either does not fit."""
    conversion = _conversion(checkpoint, base, module)
    stored = (conversion.stored_name(name) for name in input_first_weights(module))
    header = header_names(module) if ties_header(checkpoint.config) else ()
    return apply_adapter(adapter, checkpoint, conversion, {name for name in stored if name}, header)


def check_configuration(text: str, config: PreTrainedConfig, base: Checkpoint) -> None:
    """Raise ConfigError, naming both values, if a model with this configuration can't fit the base. text: its name."""
    ours, theirs = base.config.get_text_config(), config.get_text_config()
    if ours.model_type != theirs.model_type and not makes_the_same(base.config, config):
        _refuse(text, [f"architecture is {_kind(config)}, the base's is {_kind(base.config)}"])
    both = [(words, setting(theirs, key), setting(ours, key)) for key, words in _MUST_AGREE.items()]
    found = [f"{words} is {their}, the base's is {our}" for words, their, our in both if their != our]
    _refuse(text, found or clashes(base.config, config))


def _conversion(checkpoint: Checkpoint, base: Checkpoint, module: PreTrainedModel) -> Conversion:
    check_configuration(checkpoint.text, checkpoint.config, base)
    try:
        return Conversion(module, checkpoint.tensors)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.text} does not fit the base: {error}") from None


def _refuse(text: str, differences: Sequence[str], causes: Sequence[str] = ()) -> None:
    """Raise ConfigError if there are differences. causes: what may have led to them."""
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        why = "".join(f"; {cause}" for cause in causes[:3])
        raise ConfigError(f"{text} does not fit the base: {'; '.join(differences[:3])}{more}{why}")


def _kind(config: PreTrainedConfig) -> str:
    text = config.get_text_config()
    part = f" (the text part of a multimodal {config.model_type})" if text is not config else ""
    return f"{text.model_type}{part}"


def _about_names(checkpoint: Checkpoint, conversion: Conversion, base: Checkpoint) -> Iterator[str]:
    """Lines about tensors that are read under other names than they have."""
    if conversion.wrappers:
        yield f"{checkpoint.name}: the names of its tensors have {_listed(conversion.wrappers)} in them: read without"
    if checkpoint.config.get_text_config() is not checkpoint.config and base.config.get_text_config() is base.config:
        yield f"{checkpoint.name}: is {_kind(checkpoint.config)}; only that part is merged"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(f"'{part}'" for part in parts)


def _layer_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """The floating-point tensors of a module's layers."""
    prefix = f"{find_layers(module)[0]}."
    return {name: t for name, t in module.state_dict().items() if name.startswith(prefix) and t.is_floating_point()}


def _other_layers(
    checkpoint: Checkpoint, conversion: Conversion, module: PreTrainedModel, unused: Leftovers
) -> str | None:
    """What is wrong if a checkpoint's layers are not as many as its own configuration says, or are none."""
    unmerged = [name for name in checkpoint.tensors if ".lora_A." in name or ".base_layer." in name]
    if unmerged:
        return f"an adapter is wrapped into its weights ({unmerged[0]}); merge it with PEFT's merge_and_unload first"
    prefix = f"{find_layers(module)[0]}."
    found = {name.removeprefix(prefix).split(".")[0] for name in conversion if name.startswith(prefix)}
    if not found:
        names = ", ".join(list(checkpoint.tensors)[:3])
        return f"none of its tensors is called like those of a {type(module).__name__}'s layers; there is {names}"
    stored = {without_number(name) for name in checkpoint.tensors if conversion.is_within(name, prefix[:-1])}
    found |= {number_of(name) for name in unused.others if without_number(name) in stored}
    config = checkpoint.config.get_text_config()
    if len(found) == config.num_hidden_layers or found != set(map(str, range(len(found)))):
        return None
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return f"its weights have {pluralize(len(found), 'layer')}, its config.json says {key}: {config.num_hidden_layers}"


def _layer_differences(
    conversion: Conversion, base: Checkpoint, module: PreTrainedModel, unused: Leftovers
) -> Iterator[str]:
    """Tensors of layers that one side lacks, or that differ in shape."""
    for name, ours in _layer_tensors(module).items():
        if name not in conversion:
            yield f"the tensor {name} is missing"
        elif not conversion.dtype(name).is_floating_point:
            yield f"{name} is stored as {conversion.dtype(name)}, not as a floating-point type"
        elif conversion.shape(name) != tuple(ours.shape):
            yield f"{name} has shape {conversion.shape(name)}, the base's has {tuple(ours.shape)}"
    for name in unused.others:
        is_layers = number_of(name) and conversion.stored[name].dtype.is_floating_point
        if is_layers and name.startswith(conversion.prefix) and name not in base.tensors:
            yield f"the base has no {name}"

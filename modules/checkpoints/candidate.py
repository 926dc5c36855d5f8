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
from modules.checkpoints.config_diff import clashes, differences, ties_header
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.hub import Repository
from modules.checkpoints.leftovers import Leftovers, leftovers, number_of
from modules.checkpoints.lora import Adapted, Adapter, apply_adapter
from modules.checkpoints.readers import Buffer, new_buffer
from modules.runtime.errors import ConfigError
from modules.runtime.text import listed


@dataclass(frozen=True)
class Candidate:
    """A model that may be merged into the base, its tensors under the names of the base's module."""

    checkpoint: Checkpoint
    conversion: Conversion
    notes: Sequence[str] = ()  # lines for the person at the terminal
    warnings: Sequence[str] = ()  # lines about what may spoil the merge
    otherwise: Sequence[str] = ()  # a line for each setting of its forward that differs from the base's
    repositories: Sequence[Repository] = ()  # those of its files; two for a model with an adapter
    text: str = ""  # its name in the configuration

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self.checkpoint.name

    @property
    def where(self) -> str:
        """Its absolute paths, or ids on the hub with their commits."""
        return "+".join(repository.where for repository in self.repositories)

    def stream(self, names: Collection[str], buffer: Buffer = new_buffer) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, in their stored dtype, each as soon as it is read. Names that it lacks are left
        out. buffer: gives the memory for each tensor. Raises CheckpointError if a file can't be read."""
        stored_names = [name for name in names if name in self.conversion]
        return self.conversion.stream(stored_names, partial(self.checkpoint.stream, buffer=buffer))

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a tensor, in the order of their numbers: (rows, ...), on the CPU, in its stored dtype.

        rows: (rows,), int64, on the CPU. Raises CheckpointError if a file can't be read.
        """
        stored = self.conversion.stored_alone(name)
        return self.read([name])[name][rows] if stored is None else self.checkpoint.rows(stored, rows)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """The tensors of `stream` as a dictionary, in the order of the names."""
        return self.conversion.load([name for name in names if name in self.conversion], self.checkpoint.stream)


def open_candidate(checkpoint: Checkpoint, base: Checkpoint, module: PreTrainedModel) -> Candidate:
    """A checkpoint as a candidate for the base. module: the base's, which may be without weights.

    Raises ConfigError, naming both values, if the checkpoint does not fit.
    """
    conversion = _conversion(checkpoint, base, module)
    other_meaning = differences(base.config, checkpoint.config)
    unused = leftovers(checkpoint, conversion, module)
    problems = _misfits(conversion, module, unused, base)
    if problems:
        kinds = [_kind(checkpoint.config), _kind(base.config)]
        if kinds[0] != kinds[1]:
            problems.insert(0, f"architecture is {kinds[0]}, the base's is {kinds[1]}")
        raise _refusal(checkpoint.text, [*problems, *other_meaning[:3]])
    notes = unused.notes(checkpoint.name)
    warnings = []
    if conversion.prefix:
        notes.append(f"{checkpoint.name}: ignoring the prefix '{conversion.prefix}' of its tensor names")
    if checkpoint.config.get_text_config() is not checkpoint.config and base.config.get_text_config() is base.config:
        notes.append(f"{checkpoint.name}: merging only {_kind(checkpoint.config)}")
    if other_meaning:
        warnings.append(
            f"{checkpoint.name}: config.json differs from the base's: {'; '.join(other_meaning)}; the merged model "
            "keeps the base's values"
        )
    return Candidate(
        checkpoint,
        conversion,
        notes,
        warnings,
        otherwise=[line for line in other_meaning if not line.startswith("tie_word_embeddings")],  # of the header
        repositories=[checkpoint.repository],
    )


def check_base(checkpoint: Checkpoint, module: PreTrainedModel) -> list[str]:
    """Lines about tensors of a base that its module does not use. module: may be without weights.

    Raises ConfigError if the base's tensors are not those of the module.
    """
    try:
        conversion = Conversion(module, checkpoint.tensors)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.text}: {error}") from None
    if conversion.prefix:
        raise ConfigError(
            f"{checkpoint.text}: its tensor names begin with '{conversion.prefix}', which transformers can't load; "
            "save the model without it"
        )
    unused = leftovers(checkpoint, conversion, module)
    problems = _misfits(conversion, module, unused, checkpoint)
    if problems:
        raise ConfigError(f"{checkpoint.text}: {'; '.join(problems)}")
    return unused.notes(checkpoint.name)


def adapt(checkpoint: Checkpoint, adapter: Adapter, base: Checkpoint, module: PreTrainedModel) -> Adapted:
    """A checkpoint that fits the base, with an adapter applied. Raises ConfigError if either does not fit."""
    conversion = _conversion(checkpoint, base, module)
    stored = (conversion.stored_name(name) for name in input_first_weights(module))
    header = header_names(module) if ties_header(checkpoint.config) else ()
    return apply_adapter(adapter, checkpoint, conversion, {name for name in stored if name}, header)


def check_configuration(text: str, config: PreTrainedConfig, base: Checkpoint) -> None:
    """Raise ConfigError, naming both values, if a model with this configuration can't fit the base. text: its name."""
    is_other = config.get_text_config().model_type != base.config.get_text_config().model_type
    if is_other and not makes_the_same(base.config, config):
        raise _refusal(text, [f"architecture is {_kind(config)}, the base's is {_kind(base.config)}"])
    problems = clashes(base.config, config)
    if problems:
        raise _refusal(text, problems)


def _conversion(checkpoint: Checkpoint, base: Checkpoint, module: PreTrainedModel) -> Conversion:
    check_configuration(checkpoint.text, checkpoint.config, base)
    try:
        return Conversion(module, checkpoint.tensors)
    except ConfigError as error:
        raise _refusal(checkpoint.text, [str(error)]) from None


def _refusal(text: str, problems: Sequence[str]) -> ConfigError:
    return ConfigError(f"{text} does not fit the base: {'; '.join(problems)}")


def _kind(config: PreTrainedConfig) -> str:
    text = config.get_text_config()
    part = f" (the text part of a multimodal {config.model_type})" if text is not config else ""
    return f"{text.model_type}{part}"


def _misfits(conversion: Conversion, module: PreTrainedModel, unused: Leftovers, base: Checkpoint) -> list[str]:
    """How the stored tensors of layers differ from the base's module: missing, unexpected, of other shape or dtype."""
    prefix = f"{find_layers(module)[0]}."
    missing = []
    problems = []
    for name, expected in module.state_dict().items():
        if not name.startswith(prefix) or not expected.is_floating_point():
            continue
        if name not in conversion:
            missing.append(name)
        elif not conversion.dtype(name).is_floating_point:
            problems.append(f"{name} is stored as {conversion.dtype(name)}, not as a floating-point type")
        elif conversion.shape(name) != tuple(expected.shape):
            problems.append(f"{name} has shape {conversion.shape(name)}, the base's has {tuple(expected.shape)}")
    problems = problems[:3]
    unplaced = [
        name
        for name in unused.others
        if missing or name in unused.surplus or (_is_of_layers(name, conversion) and name not in base.tensors)
    ]
    if unplaced:
        layers = module.config.get_text_config().num_hidden_layers
        why = f" (num_hidden_layers is {layers})" if unused.surplus else ""
        problems.insert(0, f"unexpected tensors {listed(unplaced)}{why}")
    if missing:
        problems.insert(0, f"missing tensors {listed(missing)}")
    return problems


def _is_of_layers(name: str, conversion: Conversion) -> bool:
    is_weight = conversion.stored[name].dtype.is_floating_point
    return is_weight and bool(number_of(name)) and name.startswith(conversion.prefix)

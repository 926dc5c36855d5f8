"""Converts stored tensors to a module's tensors and back: renames them, or fuses several into one.

Knows: transformers' own rules for loading an architecture's checkpoints. Refuses to know: files, devices, scores.

Most tensors are stored unchanged, under their name, with or without its first part ("model."). Some architectures
rename tensors (GPT-NeoX) or fuse them (the experts of Mixtral). The rules are those by which transformers loads a
whole model; here they are applied to the few tensors of one layer, and backwards when it is saved. A prefix that a
training wrapper or a larger model puts before all names is removed if the names fit without it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from modules.checkpoints.readers import TensorInfo
from modules.runtime.errors import ConfigError

Tensors = dict[str, Tensor]
Read = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]  # stored names -> each with its tensor, in any order


@dataclass(frozen=True)
class ConvertedTensor:
    """A group of stored tensors that become module tensors together. Most groups are one tensor, unchanged."""

    sources: tuple[str, ...]  # stored names, in the order in which they are fused
    patterns: tuple[str, ...]  # the rule's pattern that each of them matched; empty without a rule
    name: str  # the module's tensor, or the first of several
    rule: WeightConverter | None

    def convert(self, stored: Mapping[str, Tensor], module: PreTrainedModel) -> Tensors:
        """The group's module tensors, by name."""
        if self.rule is None:
            return {self.name: stored[self.sources[0]]}
        rule = deepcopy(self.rule)  # it collects tensors, and is good for one use
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            rule.add_tensor(self.name, source, pattern, stored[source])
        converted = rule.convert(self.name, model=module, config=module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class Conversion:
    """How one checkpoint's stored tensors become the tensors of a module of its architecture."""

    def __init__(self, module: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
        """module: may be on the meta device; only names and rules are taken from it.

        `prefix`, mostly empty, is removed from the stored names. `unused` are the stored tensors that the module does
        not use.

        Raises ConfigError if the stored tensors can't be fused by the architecture's rules.
        """
        self._module = module
        self.stored = stored
        self._rules = Rules(module)
        self.prefix = _foreign_prefix(self._rules, stored)
        self._groups, self.unused = _grouped(self._rules, stored, self.prefix)
        self._group_of: dict[str, ConvertedTensor] = {}  # by module name
        self._names_by_source: dict[str, list[str]] = {}
        self._meta_tensors: Tensors = {}  # every module tensor that is stored, without its data
        for group in self._groups:
            try:
                infos = {name: stored[name] for name in group.sources}
                empty = {n: torch.empty(info.shape, dtype=info.dtype, device="meta") for n, info in infos.items()}
                forms = group.convert(empty, module)
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
                raise ConfigError(
                    f"{', '.join(group.sources[:3])} can't be converted to {group.name} ({error})"
                ) from None
            self._meta_tensors.update(forms)
            self._group_of.update(dict.fromkeys(forms, group))
            for source in group.sources:
                self._names_by_source[source] = list(forms)

    def __contains__(self, name: str) -> bool:
        return name in self._meta_tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta_tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a stored tensor has in the module."""
        return tuple(self._meta_tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in; of several that are fused, the widest."""
        return self._meta_tensors[name].dtype

    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of all stored tensors that a module tensor is made of."""
        return {self.stored[source].dtype for source in self._group_of[name].sources}

    def stream(self, names: Collection[str], read: Read) -> Iterator[tuple[str, Tensor]]:
        """The named module tensors, each as soon as all of its stored tensors are read.

        `read` is called once, with the names of all stored tensors that are needed.
        """
        groups = {self._group_of[name].name: self._group_of[name] for name in names}
        group_of = {source: group for group in groups.values() for source in group.sources}
        stored: Tensors = {}
        for source, tensor in read(list(group_of)):
            stored[source] = tensor
            group = group_of[source]
            if all(part in stored for part in group.sources):
                converted = group.convert({part: stored.pop(part) for part in group.sources}, self._module)
                yield from ((name, value) for name, value in converted.items() if name in names)

    def load(self, names: Collection[str], read: Read) -> Tensors:
        """The named module tensors as a dictionary, in the order of the names."""
        tensors = dict(self.stream(names, read))
        return {name: tensors[name] for name in names}

    def stored_name(self, name: str) -> str | None:
        """The stored tensor of this name, else the one that becomes the module's tensor of this name. The
        architecture's rules are applied to the name. None if there is none, or if the
        module's tensor is fused from several."""
        if name in self.stored:
            return name
        group = self._group_of.get(self._rules.module_name(name)[0])
        return group.sources[0] if group is not None and group.rule is None else None

    def stored_alone(self, name: str) -> str | None:
        """The stored tensor that is the module's tensor unchanged; None if a rule makes it from one or several."""
        group = self._group_of[name]
        return group.sources[0] if group.rule is None else None

    def knows(self, name: str) -> bool:
        """Whether the module has a tensor of this name, after the rules are applied to it; it need not be stored."""
        return self._rules.module_name(name)[0] in self._rules

    def module_names(self, stored_name: str) -> list[str]:
        """The module tensors made from a stored one; none if the module does not use it."""
        return self._names_by_source.get(stored_name, [])

    def store(self, names: Collection[str], tensors: Mapping[str, Tensor]) -> Tensors:
        """Module tensors converted back to stored ones, by stored name. names: all module tensors of one of these."""
        group = self._group_of[next(iter(names))]
        if group.rule is None:
            return {group.sources[0]: tensors[group.name]}
        return revert_weight_conversion(self._module, {name: tensors[name] for name in names})

    def check_reversible(self) -> None:
        """Raise ConfigError if fused tensors can't be split into the stored ones again."""
        for group in self._groups:
            if group.rule is not None:
                names = self.module_names(group.sources[0])
                reverted = self.store(names, {name: self._meta_tensors[name] for name in names})
                shapes = {name: tuple(tensor.shape) for name, tensor in reverted.items()}
                if shapes != {name: self.stored[name].shape for name in group.sources}:
                    raise ConfigError(
                        f"{group.name} is fused from {', '.join(group.sources[:3])}, and this version of transformers "
                        "can't split it again"
                    )

    @property
    def groups(self) -> list[tuple[list[str], list[str]]]:
        """Pairs of stored names and module names: a group's stored tensors, and the module's tensors made from them. A
        stored tensor that the module does not use is a group without module names."""
        used_groups = [(list(group.sources), self.module_names(group.sources[0])) for group in self._groups]
        return used_groups + [([name], []) for name in self.unused]


class Rules:
    """transformers' rules that turn an architecture's stored names into module names."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._expected = module.state_dict(keep_vars=True)
        rules = get_model_conversion_mapping(module)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = module.base_model_prefix
        self.by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    def __contains__(self, name: str) -> bool:
        """Whether the module has a tensor of this name."""
        return name in self._expected

    def module_name(self, stored: str) -> tuple[str, str]:
        """The module's tensor that is made from a stored one, and the pattern of the fusing rule that matched, or "".
        If the module does not use the stored tensor, the name is none of the module's."""
        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._expected)
        if name not in self and stored in self:
            return stored, ""
        return name, pattern or ""


def _foreign_prefix(rules: Rules, stored: Collection[str]) -> str:
    """The prefix without which a checkpoint's names fit the module; mostly empty. Only looked for if no layer fits.

    Raises ConfigError if the names fit without any of several prefixes.
    """
    numbered = [name for name in stored if _number_at(name)]
    if any(rules.module_name(name)[0] in rules for name in numbered):
        return ""

    def fit(prefix: str) -> tuple[int, int, int]:
        """How many names fit the module without the prefix; how many of these exactly; the negative prefix length."""
        names = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
        return (
            sum(rules.module_name(name)[0] in rules for name in names),
            sum(name in rules for name in names),
            -len(prefix),
        )

    starts = (".".join(name.split(".")[:count]) for name in numbered for count in range(1, _number_at(name) + 1))
    fits = {f"{start}.": fit(f"{start}.") for start in dict.fromkeys(starts)}
    best = max(fits, key=lambda prefix: fits[prefix], default="")
    if not best or not fits[best][0]:
        return ""
    for rival in fits:
        if fits[rival][:2] == fits[best][:2] and not rival.startswith(best) and not best.startswith(rival):
            raise ConfigError(
                f"its tensor names match without the prefix '{best}' and without '{rival}'; keep one set of weights"
            )
    return best


def _number_at(name: str) -> int:
    """The number of parts before the first number in a name; 0 without a number."""
    return next((index for index, part in enumerate(name.split(".")) if part.isdecimal()), 0)


def _grouped(rules: Rules, stored: Mapping[str, TensorInfo], prefix: str) -> tuple[list[ConvertedTensor], list[str]]:
    """The groups of a checkpoint's tensors by the module's rules, and the tensors that the module does not use.

    prefix: is removed from the stored names.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    unused = []
    # Experts are fused in the order of their numbers: 2 before 10.
    for source in sorted(stored, key=dot_natural_key):
        name, pattern = rules.module_name(source.removeprefix(prefix))
        if name in rules:
            members.setdefault(name, []).append((source, pattern))
        else:
            unused.append(source)
    groups = []
    for name, matches in members.items():
        fused = [(source, pattern) for source, pattern in matches if pattern]
        if fused:
            rule = rules.by_pattern[fused[0][1]]
            groups.append(ConvertedTensor(tuple(s for s, _ in fused), tuple(p for _, p in fused), name, rule))
        else:
            groups.append(ConvertedTensor((matches[-1][0],), (), name, None))
            unused += [source for source, _ in matches[:-1]]
    return groups, unused

"""A module's tensors and the stored tensors that they are made of: other names, or several fused into one.

Knows: transformers' own rules for loading an architecture's checkpoints. Refuses to know: files, devices, scores.

Most tensors are stored as they are, under their name or under one with or without the first part ("model."). Some
architectures rename (GPT-NeoX) or fuse (the experts of Mixtral). The rules are those by which transformers loads a
whole model; here they are applied to the few tensors that one layer needs, and backwards when it is saved. What a
training wrapper or a larger model puts before all names is left out where they fit without it.
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
    """Stored tensors that become module tensors together. Mostly it is one that becomes one, unchanged."""

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
        found = rule.convert(self.name, model=module, config=module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class Conversion:
    """How one checkpoint's stored tensors become the tensors of a module of its architecture."""

    def __init__(self, module: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
        """module: may be on the meta device; only names and rules are taken from it.

        `prefix`, mostly empty, stands before the stored names and is left out; `unused` are those of no use to the
        module.

        Raises ConfigError if the stored tensors can't be fused by the architecture's rules.
        """
        self._module = module
        self.stored = stored
        self._rules = Rules(module)
        self.prefix = _foreign_prefix(self._rules, stored)
        self._groups, self.unused = _grouped(self._rules, stored, self.prefix)
        self._group_of: dict[str, ConvertedTensor] = {}  # by module name
        self._names_by_source: dict[str, list[str]] = {}
        self._forms: Tensors = {}  # every module tensor that is stored, without its data
        for group in self._groups:
            try:
                infos = {name: stored[name] for name in group.sources}
                empty = {n: torch.empty(info.shape, dtype=info.dtype, device="meta") for n, info in infos.items()}
                forms = group.convert(empty, module)
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
                raise ConfigError(
                    f"{', '.join(group.sources[:3])} can't be converted to {group.name} ({error})"
                ) from None
            self._forms.update(forms)
            self._group_of.update(dict.fromkeys(forms, group))
            for source in group.sources:
                self._names_by_source[source] = list(forms)

    def __contains__(self, name: str) -> bool:
        return name in self._forms

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a stored tensor has in the module."""
        return tuple(self._forms[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in; of several that are fused, the widest."""
        return self._forms[name].dtype

    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of all stored tensors that a module tensor is made of."""
        return {self.stored[source].dtype for source in self._group_of[name].sources}

    def stream(self, names: Collection[str], read: Read) -> Iterator[tuple[str, Tensor]]:
        """The named module tensors, each as soon as all is there that it is made of.

        `read` is asked once, for all the stored tensors that they are made of.
        """
        groups = {self._group_of[name].name: self._group_of[name] for name in names}
        group_of = {source: group for group in groups.values() for source in group.sources}
        stored: Tensors = {}
        for source, tensor in read(list(group_of)):
            stored[source] = tensor
            group = group_of[source]
            if all(other in stored for other in group.sources):
                made = group.convert({other: stored.pop(other) for other in group.sources}, self._module)
                yield from ((name, value) for name, value in made.items() if name in names)

    def load(self, names: Collection[str], read: Read) -> Tensors:
        """The named module tensors, all together."""
        tensors = dict(self.stream(names, read))
        return {name: tensors[name] for name in names}

    def stored_name(self, name: str) -> str | None:
        """The stored tensor that has this name, or that becomes the module's tensor of this name, or of the name that
        the architecture's rules make of it; None if there is none, or the module's is fused from several."""
        if name in self.stored:
            return name
        group = self._group_of.get(self._rules.module_name(name)[0])
        return group.sources[0] if group is not None and group.rule is None else None

    def stored_alone(self, name: str) -> str | None:
        """The stored tensor that a tensor of the module simply is; None if a rule makes it of one or of several."""
        group = self._group_of[name]
        return group.sources[0] if group.rule is None else None

    def knows(self, name: str) -> bool:
        """Whether the module has a tensor of this name, or of the name that the rules make of it, stored or not."""
        return self._rules.module_name(name)[0] in self._rules

    def module_names(self, stored_name: str) -> list[str]:
        """The module tensors that a stored one is a part of; none if the module has no use for it."""
        return self._names_by_source.get(stored_name, [])

    def store(self, names: Collection[str], tensors: Mapping[str, Tensor]) -> Tensors:
        """Module tensors as they are stored, by stored name. names: all module tensors of a stored one."""
        group = self._group_of[next(iter(names))]
        if group.rule is None:
            return {group.sources[0]: tensors[group.name]}
        return revert_weight_conversion(self._module, {name: tensors[name] for name in names})

    def check_reversible(self) -> None:
        """Raise ConfigError if what was fused can't be written as it was stored."""
        for group in self._groups:
            if group.rule is not None:
                names = self.module_names(group.sources[0])
                found = self.store(names, {name: self._forms[name] for name in names})
                shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
                if shapes != {name: self.stored[name].shape for name in group.sources}:
                    raise ConfigError(
                        f"{group.name} is fused from {', '.join(group.sources[:3])}, and this version of transformers "
                        "can't split it again"
                    )

    @property
    def groups(self) -> list[tuple[list[str], list[str]]]:
        """All stored tensors, those together that are made of the same, and the module's tensors that they are; none,
        for one that the module has no use for."""
        found = [(list(group.sources), self.module_names(group.sources[0])) for group in self._groups]
        return found + [([name], []) for name in self.unused]


class Rules:
    """What transformers calls a stored tensor of an architecture in its module."""

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
        """The module's tensor that a stored one becomes, or becomes a part of, and then the pattern of the rule by
        which it does; a name that is not the module's if it has no use for it."""
        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._expected)
        if name not in self and stored in self:
            return stored, ""
        return name, pattern or ""


def _foreign_prefix(rules: Rules, stored: Collection[str]) -> str:
    """What stands before the names of a checkpoint of which no layer would be found otherwise; mostly nothing.

    Raises ConfigError if several parts of the checkpoint would do.
    """
    numbered = [name for name in stored if _number_at(name)]
    if any(rules.module_name(name)[0] in rules for name in numbered):
        return ""

    def fit(prefix: str) -> tuple[int, int, int]:
        """How many names are the module's without it, then how many of them to the letter."""
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
    for other in fits:
        if fits[other][:2] == fits[best][:2] and not other.startswith(best) and not best.startswith(other):
            raise ConfigError(
                f"its tensor names match without the prefix '{best}' and without '{other}'; keep one set of weights"
            )
    return best


def _number_at(name: str) -> int:
    """How many parts of a name stand before its first number; 0 if it has none."""
    return next((place for place, part in enumerate(name.split(".")) if part.isdecimal()), 0)


def _grouped(rules: Rules, stored: Mapping[str, TensorInfo], prefix: str) -> tuple[list[ConvertedTensor], list[str]]:
    """The groups of a checkpoint's tensors by the module's rules, and the tensors that the module has no use for.

    prefix: stands before names, and is no part of them.
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
    for name, found in members.items():
        fused = [(source, pattern) for source, pattern in found if pattern]
        if fused:
            rule = rules.by_pattern[fused[0][1]]
            groups.append(ConvertedTensor(tuple(s for s, _ in fused), tuple(p for _, p in fused), name, rule))
        else:
            groups.append(ConvertedTensor((found[-1][0],), (), name, None))
            unused += [source for source, _ in found[:-1]]
    return groups, unused

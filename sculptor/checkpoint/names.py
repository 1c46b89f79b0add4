"""Names in the files matched to parameters of the model, by the rules transformers itself loads with."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.windows import Window
from sculptor.errors import CheckpointError


@dataclass(frozen=True, eq=False, slots=True)
class Conversion:
    """How one parameter is made of tensors of the checkpoint: (name, pattern that it matched), in order."""

    model: Any
    parameter: str
    converter: Any
    sources: tuple[tuple[str, str], ...]

    def make(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameters made of what `read` gives; a rule may make several at once."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.parameter, name, pattern, read(name))
        made = converter.convert(self.parameter, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def windows(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Window] | None:
        """Where in the parameter each tensor goes; None if loading does more than to lay matrices beside each other.

        Tried on small matrices of numbers, so that nothing of transformers' rules is assumed.

        Args:
            shapes: of the tensors.
        """
        if any(len(shapes[name]) != 2 for name, _ in self.sources):  # stacked already, and turned
            return None
        number = {name: i for i, (name, _) in enumerate(self.sources)}
        made = self.make(lambda name: torch.arange(6).view(2, 3) + 6 * number[name]).get(self.parameter)
        if made is None or made.ndim != 3 or made.numel() != 6 * len(number):
            return None
        parts = made.reshape(made.shape[0], -1, 6)
        order = (parts[..., 0] // 6).tolist()
        if not torch.equal(parts, torch.arange(6) + 6 * torch.tensor(order)[..., None]):
            return None
        names, found = list(number), {}
        for part, group in enumerate(order):
            start = 0
            for i in group:
                stop = start + shapes[names[i]][0]
                found[names[i]] = Window(part, None if len(group) == 1 else (start, stop))
                start = stop
        stacked = tuple(self.model.get_parameter(self.parameter).shape)
        sizes = {len(shapes[name]) == 2 and (len(order), *shapes[name][1:]) for name in names}
        rows = {sum(shapes[names[i]][0] for i in group) for group in order}
        return found if sizes == {(stacked[0], *stacked[2:])} and rows == {stacked[1]} else None


@dataclass(frozen=True, eq=False, slots=True)
class Origins:
    """What the parameters of a model are made of.

    Attributes:
        tensors: parameter -> the tensor of the checkpoint that it is.
        converted: parameter -> how it is made of several tensors, or of another one.
        shapes: of all tensors.
    """

    tensors: Mapping[str, str]
    converted: Mapping[str, Conversion]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> "Origins":
        """Those of a model whose checkpoint holds tensors of these shapes."""
        return cls(match_names(model, shapes), find_converted(model, shapes), shapes)


def match_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Parameter of the model -> name in `names`, by the rules transformers itself loads with.

    Tensors that loading would split, stack or otherwise convert have no single name and are left out.

    Raises:
        CheckpointError: if two names are those of one parameter.
    """
    found: dict[str, str] = {}
    for name, parameter, pattern, _ in _matches(model, names):
        if pattern is None:
            if parameter in found:
                raise CheckpointError(
                    f"tensors {found[parameter]} and {name} are both loaded into {parameter}; remove the one that is not meant"
                )
            found[parameter] = name
    return found


def find_converted(model: Any, names: Iterable[str]) -> dict[str, Conversion]:
    """Parameters that loading makes of several or other tensors (stacked experts), by transformers' own rules."""
    from transformers.core_model_loading import dot_natural_key

    converters: dict[str, Any] = {}
    collected: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, parameter, pattern, converter in _matches(model, sorted(names, key=dot_natural_key)):
        if pattern is not None:
            converters.setdefault(parameter, converter)
            collected[parameter].append((name, pattern))
    state = model.state_dict()
    found: dict[str, Conversion] = {}
    for parameter, sources in collected.items():
        made = Conversion(model, parameter, converters[parameter], tuple(sources))
        first, *others = getattr(converters[parameter], "target_patterns", None) or [parameter]
        siblings = (parameter.replace(first, other) for other in others)  # of a tensor that is split into several
        found |= {name: made for name in (parameter, *siblings) if name in state}
    return found


def _matches(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
    """Name, the parameter it is loaded into, and what converts it on the way: its pattern and rule, or None."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if parameter not in state and name in state:  # as loading has it: a rule for other layouts of the same family
            parameter, pattern = name, None
        if parameter in state:
            yield name, parameter, pattern, None if pattern is None else by_pattern.get(pattern)

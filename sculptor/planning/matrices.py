"""The matrices of a job that is planned."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculptor.checkpoint.architecture import Target
from sculptor.errors import SettingsError
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.methods.method import Plans
from sculptor.methods.rule import Rule, cost_of, is_open, num_free
from sculptor.methods.settings import AnalyzeSettings
from sculptor.methods.staircase import StaircaseRule
from sculptor.training.linear import reads_before_sum


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """One target, its rule, and the names of the rule's stored tensors, which matrices may share."""

    target: Target
    rule: Rule
    names: Mapping[str, str]

    @property
    def num_entries(self) -> int:
        """Of the matrix."""
        return self.target.shape[0] * self.target.shape[1]

    @property
    def is_linear(self) -> bool:
        """Whether its module is a linear map of torch's own, as far as that can be told of files."""
        return self.target.window.is_whole and not self.target.transposed

    def narrowing(self, tokens: float, kind: str) -> float | None:
        """Operations of reading free directions before gradients are summed over tokens, less those of a whole gradient.

        Args:
            tokens: of a micro-batch.
            kind: type of device.

        Returns:
            None where they are read after it.
        """
        if not (self.is_linear and is_open(self.rule) and reads_before_sum(self.rule, tokens, kind)):
            return None
        return 2 * (min(self.rule.multiplications(tokens).values()) - tokens * self.num_entries)

    @property
    def num_free(self) -> int:
        """Its coordinates."""
        return num_free(self.rule)


def basis_numbers(matrices: Sequence[PlannedMatrix]) -> dict[str, int]:
    """Numbers that the bases of a block hold, each shared one once."""
    found: dict[str, int] = {}
    for matrix in matrices:
        found |= cost_of(matrix.rule, matrix.names).numbers
    return found


def planned_matrices(
    targets: Sequence[Target], settings: AnalyzeSettings, kinds: Kinds | None = None
) -> list[PlannedMatrix]:
    """What an analysis would give every matrix.

    Raises:
        SettingsError: if the rule does not follow from shapes, or something does not go with it.
    """
    method = make_method(settings, known_kinds(kinds), [target.shape for target in targets])
    if not isinstance(method, Plans):
        raise SettingsError(f"rule {settings.rule} does not follow from shapes: pass --subspaces")
    rules = functools.cache(method.plan)
    return [PlannedMatrix(target, rules(target.shape), _names(target, rules(target.shape))) for target in targets]


def _names(target: Target, rule: Rule) -> dict[str, str]:
    """Of its stored tensors: what is measured of an input is there once for all that read it."""
    shared = isinstance(rule, StaircaseRule) and rule.moments
    return {
        name: f"{target.input_group if shared and name.startswith('input') else target.name}.{name}"
        for name in rule.stored()
    }

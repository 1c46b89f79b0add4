"""The matrices of a job that is planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculptor.checkpoint.architecture import Target
from sculptor.methods.rule import Rule, cost_of, is_open, num_free
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

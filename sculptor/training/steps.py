"""What the steps of a training are made of: how many rows, how long these are, and how many steps there are."""

from collections.abc import Callable
from dataclasses import dataclass

from sculptor.data.examples import Encoded
from sculptor.training.settings import TrainSettings

# So few updates teach next to nothing at any rate that is safe.
_FEW = 30


@dataclass(frozen=True, slots=True)
class Steps:
    """A function of the rows and the settings, the same in every process and however it is trained.

    Attributes:
        rows: of a step, all processes together.
        longest: tokens of the longest row, `mean` of one as an epoch has them.
        total: steps of the run.
    """

    rows: int
    longest: int
    mean: float
    total: int

    @classmethod
    def of(cls, encoded: Encoded, settings: TrainSettings) -> "Steps":
        """Those of a run on some rows."""
        lengths = [example.length for example in encoded.examples]
        rows = settings.rows_of_step(encoded.num_epoch)
        mean = sum(lengths) / max(1, len(lengths)) if encoded.mixture is None else encoded.mixture.mean(lengths)
        return cls(rows, max(lengths, default=1), mean, settings.total_steps(-(-encoded.num_epoch // rows)))

    def tell_few(self, epochs: float, notice: Callable[[str], object]) -> None:
        """Says, in a line, that a run takes hardly any steps, if it does."""
        if self.total < _FEW:
            notice(
                f"few steps to learn from: {self.total} in all, with --epochs {epochs:g} and {self.rows} rows in each; "
                "more epochs, or fewer rows (--batch-size), make more"
            )

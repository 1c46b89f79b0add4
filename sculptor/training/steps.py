"""What the steps of a training are made of: how many rows, how long these are, and how many steps there are."""

from collections.abc import Callable
from dataclasses import dataclass

from sculptor.data.examples import Encoded
from sculptor.training.settings import FEW_STEPS, TrainSettings


@dataclass(frozen=True, slots=True)
class Steps:
    """A function of the rows and the settings, the same in every process and however it is trained.

    Attributes:
        settings: with passes and rows of a step, where nothing was said.
        num_epoch: rows of an epoch.
        rows: of a step, all processes together.
        longest: tokens of the longest row, `mean` of one as an epoch has them.
        total: steps of the run.
    """

    settings: TrainSettings
    num_epoch: int
    rows: int
    longest: int
    mean: float
    total: int

    @classmethod
    def of(cls, encoded: Encoded, settings: TrainSettings, num_epoch: int | None = None) -> "Steps":
        """Those of a run on some rows; an epoch has `num_epoch` of them, if not all."""
        lengths = [example.length for example in encoded.examples]
        num_epoch = encoded.num_epoch if num_epoch is None else num_epoch
        mean = sum(lengths) / max(1, len(lengths)) if encoded.mixture is None else encoded.mixture.mean(lengths)
        return cls(
            settings.for_rows(num_epoch),
            num_epoch,
            settings.rows_of_step(num_epoch),
            max(lengths, default=1),
            mean,
            settings.total_steps(num_epoch),
        )

    def tell(self, asked: TrainSettings, notice: Callable[[str], object]) -> None:
        """Says, in a line each, how rows were divided where nothing was said, and that a run takes hardly any steps, if it does."""
        if asked.warmup >= 1 and asked.warmup > self.total - 1:
            notice(f"--warmup {asked.warmup:g}: of {self.total} steps the rate rises for {self.total - 1}")
        if asked.max_steps is not None:
            return
        epochs, rows = self.settings.epochs, self.settings.batch_size
        chosen = [f"--epochs {epochs:g}"] if asked.epochs is None else []
        chosen += [f"--batch-size {rows}"] if asked.batch_size is None else []
        if chosen:
            notice(f"chosen: {' '.join(chosen)}: {self.total:,} steps, for {self.num_epoch:,} rows")
        if self.total < FEW_STEPS:
            notice(
                f"few steps to learn from: {self.total} in all, with --epochs {epochs:g} and {self.rows} rows in each; "
                "more epochs, or fewer rows (--batch-size), make more"
            )

"""What `evaluate` was asked for, as one value that its steps hand on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sculptor.data.columns import Columns
from sculptor.data.rows import Data, as_items
from sculptor.errors import DataError, SettingsError
from sculptor.evaluation.rows import Generation
from sculptor.progress import Progress
from sculptor.training.settings import ReadOffload
from sculptor.world import World


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class EvaluateRequest:
    """The arguments of `sculptor.evaluate`, which says what they are."""

    model: str | Path
    data: Data
    labels: Sequence[str] | None
    watch: Data
    tasks: Sequence[str]
    include_path: str | Path | None
    num_fewshot: int | None
    chat: bool
    generation: Generation
    columns: str | Columns | None
    max_rows: int | None
    max_length: int | None
    chat_template: str | None
    batch_size: int | None
    attn_implementation: str | None
    device: str
    offload: ReadOffload
    bank: str | Path | None
    bank_top: int | None
    progress: Progress
    notice: Callable[[str], object]

    def check(self) -> None:
        """Refuses what cannot be, and what would have no effect, before anything is read.

        Raises:
            SculptorError: naming it.
        """
        self._check_numbers()
        if not as_items(self.data) and not as_items(self.watch) and not self.tasks:
            raise DataError("nothing to measure: pass data, texts to watch, or tasks")
        if not as_items(self.data) and (self.labels is not None or self.generation != Generation()):
            raise SettingsError(
                "--labels, --exact-match, --max-new-tokens and --show without effect: there is no --data"
            )
        if not self.tasks and (self.include_path is not None or self.num_fewshot is not None or self.chat):
            raise SettingsError("--include-path, --num-fewshot and --chat without effect: there is no --tasks")
        self._check_bank()

    def _check_numbers(self) -> None:
        for option, value in (
            ("--bank-top", self.bank_top),
            ("--batch-size", self.batch_size),
            ("--max-new-tokens", self.generation.max_new_tokens),
            ("--max-rows", self.max_rows),
        ):
            if value is not None and value < 1:
                raise SettingsError(f"{option} {value}: expected at least 1")

    def _check_bank(self) -> None:
        if self.bank is None and self.bank_top is not None:
            raise SettingsError("--bank-top without effect: there is no --bank")
        if self.bank is not None and self.tasks:
            raise SettingsError(
                "--tasks with --bank: lm-eval asks one model; export a task with `sculptor bank export`"
            )
        if self.bank is not None and self.offload in ("cpu", "disk"):
            raise SettingsError(
                f"--offload {self.offload} with --bank: weights change from row to row; use --offload none"
            )

    def check_world(self, world: World) -> None:
        """Refuses several processes where one has to do it.

        Raises:
            SettingsError: saying why.
        """
        if self.bank is not None and world.size > 1:
            raise SettingsError(
                f"--bank with {world.size} processes: rows have models of their own; start it without a launcher"
            )
        if self.tasks and world.size > 1:
            raise SettingsError(
                f"--tasks with {world.size} processes: lm-eval runs in one; start it without a launcher"
            )

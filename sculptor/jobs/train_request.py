"""What `train` was asked for, as one value that its steps hand on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sculptor.data.rows import Data, as_items, local_files
from sculptor.errors import SettingsError
from sculptor.jobs.trackers import Tracker
from sculptor.methods.kinds import Kinds
from sculptor.methods.settings import is_self
from sculptor.progress import Progress, silent
from sculptor.training.settings import TrainSettings


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class TrainRequest:
    """The arguments of `sculptor.train`, which says what they are."""

    model: str | Path
    subspaces: str | Path | None
    data: Data
    output: Path
    settings: TrainSettings
    eval_data: Data = ()
    protect_data: Data = ()
    report_to: Sequence[Tracker] = ()
    replay: Data = ()
    overwrite: bool = False
    resume: bool = False
    progress: Progress = silent
    notice: Callable[[str], object] = lambda _: None
    stop: Callable[[], int | None] = lambda: None
    rules: Kinds | None = None

    def check_used(self) -> None:
        """Refuses what would have no effect.

        Raises:
            SettingsError: naming it.
        """
        if self.settings.eval_every is not None and not as_items(self.eval_data):
            raise SettingsError("--eval-every without effect: there is no --eval-data")
        self.check_protected()

    def check_protected(self) -> None:
        """Refuses two answers to what is protected.

        Raises:
            SettingsError: if there are.
        """
        if self.subspaces is not None and as_items(self.protect_data):
            raise SettingsError("--protect-data without effect: --subspaces says what is protected")

    def files(self) -> list[str | Path]:
        """What is read beside checkpoint and archive."""
        replayed = [item for item in as_items(self.replay) if not (isinstance(item, str) and is_self(item))]
        rows: tuple[Data, ...] = (self.data, self.eval_data, replayed, self.protect_data)
        template = self.settings.chat_template
        return [*(file for part in rows for file in local_files(part)), *([] if template is None else [template])]

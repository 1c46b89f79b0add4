"""`--report-to`: the metrics of a training to an experiment tracker, through accelerate."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sculptor.checkpoint.staging import check_apart
from sculptor.errors import SettingsError

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PROJECT = "sculptor"
FOLDER = "runs"  # beside the output
# How a tracker is told the name of a run.
_NAMED: dict[str, Any] = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
_SHOWN = (
    *("loss", "eval_loss", "kl", "harm", "harm_scale"),
    *("learning_rate", "relative_rate", "grad_norm", "epoch", "tokens_per_second"),
)


def check_trackers(names: Sequence[Tracker]) -> None:
    """Asks for the packages, before any work.

    Raises:
        SettingsError: naming what to install.
    """
    for name in names:
        if name == "tensorboard" and importlib.util.find_spec("tensorboardX"):
            continue
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"--report-to {name}: its package is not installed; pip install {name}")


def check_folder(output: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses a run whose trackers would write into its own output, or into what it reads.

    Raises:
        SettingsError: if the output is the trackers' folder.
        OutputError: if an input is, or holds it.
    """
    folder = output.parent / FOLDER
    if output == folder:
        raise SettingsError(f"--report-to: its files go to {folder}, which is the output; choose another --output")
    check_apart(folder / output.name, inputs)


class Trackers:
    """Open trackers of one run; `log` takes a line of metrics.jsonl. The first process reports.

    Args:
        names: of them.
        output: of the run; its name is the run's, and files go to the folder `runs` beside it.
        settings: told once.
        device: of the training.

    Raises:
        SettingsError: if a tracker cannot be opened.
    """

    def __init__(
        self, names: Sequence[Tracker], output: Path, settings: Mapping[str, Any], device: torch.device
    ) -> None:
        from accelerate import Accelerator

        names = tuple(dict.fromkeys(names))
        folder = output.parent / FOLDER
        try:
            self._accelerator: Any = Accelerator(cpu=device.type == "cpu", log_with=list(names), project_dir=folder)
        except ValueError as cause:  # accelerate keeps one state per process
            raise SettingsError(
                f"--report-to: accelerate is set up in this process for another device than {device.type}; train in a process of "
                "its own"
            ) from cause
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        self._seconds: float | None = None
        try:
            self._accelerator.init_trackers(
                output.name if names == ("tensorboard",) else PROJECT,
                config=plain,
                init_kwargs={name: {_NAMED[name]: output.name} for name in names if name in _NAMED},
            )
        except Exception as cause:  # each of them raises its own
            reason = " ".join(str(cause).split())[:200]
            raise SettingsError(f"--report-to {', '.join(names)}: cannot be opened ({reason})") from cause

        if self._accelerator.is_main_process and len(self._accelerator.trackers) < len(names):
            raise SettingsError(
                f"--report-to {', '.join(names)}: accelerate does not take what is installed; upgrade it"
            )

    def log(self, values: Mapping[str, float]) -> None:
        """Metrics of a step or an evaluation."""
        found = dict(values)
        if "tokens" in found:
            before, self._seconds = self._seconds, found["seconds"]
            if before is not None and found["seconds"] > before:
                found["tokens_per_second"] = found["tokens"] / (found["seconds"] - before)
        self._accelerator.log({name: found[name] for name in _SHOWN if name in found}, step=int(found["step"]))

    def close(self) -> None:
        """Everything is written."""
        self._accelerator.end_training()

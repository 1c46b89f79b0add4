"""What is special about training a classifier: settings that mean nothing for it, and its head."""

from collections.abc import Sequence

from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.heads import head_parameters
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.rows import Data, as_items
from sculptor.errors import SettingsError
from sculptor.training.settings import TrainSettings


def check_task(architecture: Architecture, settings: TrainSettings, replay: Data = ()) -> None:
    """Refuses settings that mean nothing for what the model is trained to do.

    Raises:
        SettingsError: naming them.
    """
    if architecture.kind != "classifier":
        return
    if settings.task == "language-modeling":
        raise SettingsError(
            f"--task language-modeling: {architecture.model_class} says no text; it has a classifier's head"
        )
    faults = {
        "--add-tokens": bool(settings.add_tokens),
        "--replay": bool(as_items(replay)),
        "--kl-weight": settings.kl_weight is not None,
        "--max-harm": settings.max_harm is not None,
        "--harm-every": settings.harm_every is not None,
    }
    given = [option for option, is_fault in faults.items() if is_fault]
    if given:
        raise SettingsError(f"{', '.join(given)}: for language models; a classifier of sequences says no text")


def head_of(checkpoint: Checkpoint, architecture: Architecture, new: Sequence[str]) -> dict[str, str]:
    """What of a classifier is trained without protection: parameter of the model -> tensor of the checkpoint."""
    if architecture.kind != "classifier":
        return {}
    return {name: architecture.tensors[name] for name in (*new, *head_parameters(checkpoint))}

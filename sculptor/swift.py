"""ms-swift's tuner: a plugin of two lines calls `register`, then `--tuner_type sculptor --callbacks sculptor` protects the model.

ms-swift has tuners by name in `tuners_map` and callbacks in `callbacks_map`; a file named by `--external_plugins` may add to both.
"""

from pathlib import Path
from typing import Any

from swift.callbacks import callbacks_map
from swift.tuner_plugin import Tuner, tuners_map

from sculptor.errors import SettingsError
from sculptor.tasks.callback import SculptorCallback
from sculptor.training.protect import protect

NAME = "sculptor"


def register(
    model: str | Path, subspaces: str | Path, output: str | Path, *, soften: float | None = None, **options: Any
) -> None:
    """Tells ms-swift of the tuner and of the callback, both called sculptor.

    Args:
        model: the checkpoint that `--model` names.
        subspaces: its archive.
        output: directory of the merged checkpoint.
        soften: as for `sculptor.protect`.
        options: as for `sculptor.SculptorCallback`: data, carry, save_dtype, at_save, ...
    """

    class SculptorTuner(Tuner):  # type: ignore[misc]  # ms-swift is not installed where types are checked
        """Puts coordinates into the model; what is saved in between loads as a plain model, too."""

        @staticmethod
        def prepare_model(args: Any, model: Any) -> Any:
            """Protects a model, if what writes the output is there."""
            if NAME not in (args.callbacks or ()):
                raise SettingsError(
                    f"--tuner_type {NAME} without --callbacks {NAME}, which writes the output; give both"
                )
            return protect(model, subspaces, soften=soften)

        @staticmethod
        def save_pretrained(
            model: Any, save_directory: str, state_dict: Any = None, safe_serialization: bool = True, **given: Any
        ) -> None:
            """Saves the plain weights as trained so far beside the coordinates."""
            model.save_pretrained(save_directory)

        @staticmethod
        def from_pretrained(model: Any, model_id: str, **given: Any) -> Any:
            """Goes on with what `save_pretrained` left; the trainer loads the coordinates when it resumes.

            Raises:
                SettingsError: where the model is to be used and not trained.
            """
            if not given.get("is_trainable"):
                raise SettingsError(f"{model_id}: no adapter; use the merged checkpoint {output} as --model")
            return protect(model, subspaces, soften=soften)

    def make_callback(args: Any, trainer: Any) -> SculptorCallback:
        return SculptorCallback(model, subspaces, output, **options)

    tuners_map[NAME] = SculptorTuner
    callbacks_map[NAME] = make_callback

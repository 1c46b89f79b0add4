"""axolotl's plugin: `plugins: [sculptor.axolotl.SculptorPlugin]` in its YAML protects the model that it trains.

`post_model_load` is called for every model, whatever the trainer; `load_adapter`, axolotl's other entrance, is not, where
preferences are trained: it is asked for a PEFT configuration alone, and the model would go unprotected.
"""

from pathlib import Path
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from sculptor.errors import SettingsError
from sculptor.tasks.callback import SculptorCallback
from sculptor.training.protect import protect

# Of axolotl's settings, what cannot go together with coordinates in full-rank matrices.
_REFUSED = (
    "adapter",
    "load_in_4bit",
    "load_in_8bit",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "tokens",
    "added_tokens_overrides",
)


class SculptorArgs(BaseModel):
    """Keys of the YAML.

    Attributes:
        sculptor_subspaces: the archive of `base_model`.
        sculptor_output: directory of the merged checkpoint, by default `merged` in `output_dir`.
        sculptor_data: rows for an archive with moments, in the place of the trainer's own.
        sculptor_carry: how the archive goes on.
        sculptor_save_dtype: of the merged checkpoint.
        sculptor_soften: slows down free directions that matter; default as `sculptor train`.
    """

    sculptor_subspaces: str
    sculptor_output: str | None = None
    sculptor_data: list[str] = []  # pydantic copies it
    sculptor_carry: Literal["merge", "accumulate", "redecompose", "keep"] | None = None
    sculptor_save_dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    sculptor_soften: float | None = None


class SculptorPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not installed where types are checked
    """Protects models when they are loaded, and writes the verified output when training ends."""

    def register(self, cfg: Any) -> None:
        """Refuses what would not be protected, or not be written, before anything is loaded."""
        given = [name for name in _REFUSED if cfg.get(name)]
        if given:
            raise SettingsError(
                f"axolotl: {', '.join(given)} beside sculptor.axolotl.SculptorPlugin, which trains all matrices of the model "
                "as it is; leave it out"
            )
        if not cfg.get("sculptor_subspaces"):
            raise SettingsError("axolotl: sculptor_subspaces is missing; give the archive of base_model")

    def get_input_args(self) -> str:
        """Where axolotl finds the keys."""
        return f"{__name__}.{SculptorArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Protects a model that is trained, or is the reference of one, which then answers as its base does."""
        protect(model, cfg["sculptor_subspaces"], soften=cfg.get("sculptor_soften"))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[SculptorCallback]:
        """What writes the output."""
        return [
            SculptorCallback(
                cfg["base_model"],
                cfg["sculptor_subspaces"],
                cfg.get("sculptor_output") or Path(cfg["output_dir"]) / "merged",
                data=list(cfg.get("sculptor_data") or ()),
                carry=cfg.get("sculptor_carry"),
                save_dtype=cfg.get("sculptor_save_dtype") or "keep",
            )
        ]

"""axolotl's plugin and ms-swift's tuner, against what their 0.19 and 4.6 ask for; the programs themselves are not needed.

The fakes have the entrances as they are called there: `axolotl/integrations/base.py`, `loaders/model.py`, `core/builders/base.py`;
`swift/tuner_plugin`, `callbacks/mapping.py`, `trainers/mixin.py`, `pipelines/train/tuner.py`.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import save_checkpoint
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sculptor
from sculptor.errors import SettingsError, TrainingError
from sculptor.training.parallelism import check_device
from sculptor.training.protect import protected_matrices

COVERS = ["sculptor.axolotl"]


class BasePlugin:
    """axolotl's, as far as it is asked."""

    def __init__(self) -> None:
        """Nothing."""

    def register(self, cfg: Any) -> None:
        """Nothing."""


class Tuner:
    """ms-swift's."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with its archive, and the two programs."""
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "subspaces", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    monkeypatch.chdir(tmp_path)
    contents: dict[str, dict[str, Any]] = {
        "axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "swift": {}, "swift.callbacks": {"callbacks_map": {}}, "swift.tuner_plugin": {"Tuner": Tuner, "tuners_map": {}},
    }  # fmt: skip
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("sculptor.axolotl", "sculptor.swift"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def trains(model: Any, callbacks: list[Any], output: Path) -> None:
    """As both do: transformers' Trainer, given a loaded model."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ([4, 5, 6, 7, 0], [8, 9, 10, 11, 0])]
    settings = TrainingArguments(
        str(output),
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=model, args=settings, train_dataset=rows, callbacks=callbacks).train()


def test_axolotl(place: Path) -> None:
    cls = importlib.import_module("sculptor.axolotl").SculptorPlugin
    plugin = cls()
    module, _, name = plugin.get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(module), name)
    assert keys(sculptor_subspaces="a").model_dump()["sculptor_save_dtype"] == "keep"
    with pytest.raises(ValidationError):
        keys(sculptor_subspaces="a", sculptor_carry="all")
    cfg: dict[str, Any] = {"base_model": "model", "sculptor_subspaces": "subspaces", "output_dir": str(place / "run")}
    for wrong, said in (
        (cfg | {"adapter": "lora"}, "adapter beside sculptor.axolotl.SculptorPlugin"),
        (cfg | {"fsdp_config": {"version": 2}}, "fsdp_config beside"),
        (cfg | {"sculptor_subspaces": None}, "sculptor_subspaces is missing"),
    ):
        with pytest.raises(SettingsError, match=said):
            cls().register(wrong)
    plugin.register(cfg)
    # Once for the model, and for preferences once more for its reference.
    models = [AutoModelForCausalLM.from_pretrained("model") for _ in range(2)]
    for model in models:
        plugin.post_model_load(cfg, model)
        assert protected_matrices(model)
    trains(models[0], plugin.add_callbacks_post_trainer(cfg, SimpleNamespace(model=models[0])), place / "run")
    assert sculptor.verify("model", place / "run" / "merged", "subspaces", device="cpu").num_changed == 14
    assert not any(matrix.coordinates.values[0].detach().any() for matrix in protected_matrices(models[1]))


def test_swift(place: Path) -> None:
    importlib.import_module("sculptor.swift").register("model", "subspaces", "out", save_dtype="float32")
    tuner = sys.modules["swift.tuner_plugin"].tuners_map["sculptor"]
    make = sys.modules["swift.callbacks"].callbacks_map["sculptor"]
    assert issubclass(tuner, Tuner)
    model = AutoModelForCausalLM.from_pretrained("model")
    with pytest.raises(SettingsError, match="--tuner_type sculptor without --callbacks sculptor"):
        tuner.prepare_model(SimpleNamespace(callbacks=[]), model)
    found = tuner.prepare_model(SimpleNamespace(callbacks=["sculptor"]), model)
    trains(found, [make(SimpleNamespace(), SimpleNamespace(model=found))], place / "run")
    assert sculptor.verify("model", "out", "subspaces", device="cpu").cast is None
    tuner.save_pretrained(found, str(place / "saved"), state_dict=None, safe_serialization=True)
    again = AutoModelForCausalLM.from_pretrained(place / "saved")
    assert not protected_matrices(again), "plain weights"
    with pytest.raises(SettingsError, match="saved: no adapter; use the merged checkpoint out as --model"):
        tuner.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), str(place / "saved"))
    resumed = tuner.from_pretrained(
        AutoModelForCausalLM.from_pretrained("model"), str(place / "saved"), is_trainable=True
    )
    assert len(protected_matrices(resumed)) == 14


def test_a_device_without_float64_is_refused_in_the_first_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer moves models to an Apple GPU by itself."""
    import torch

    with pytest.raises(TrainingError, match=r"the model is on mps: Apple's GPUs have no float64.*use_cpu=True"):
        check_device(torch.device("mps"))
    model = sculptor.protect(AutoModelForCausalLM.from_pretrained("model"), "subspaces")
    monkeypatch.setattr("sculptor.numerics.precision.why_not", lambda device: None)
    monkeypatch.setattr("sculptor.training.parallelism.why_not", lambda device: f"{device.type} will not do")
    with pytest.raises(TrainingError, match="cpu will not do"):
        model(input_ids=torch.tensor([[4, 5]]))

"""What a model is multiplied in while it trains: which is chosen, and that bfloat16 on a CPU is training as on a GPU."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, EstimateSettings, TrainSettings, analyze, estimate, train, verify
from sculptor.benchmark.runner import continual
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import OutputError, SettingsError, Stopped
from sculptor.jobs import plan
from sculptor.numerics import precision as devices
from sculptor.training import passes
from sculptor.training import precision as module
from sculptor.training.precision import compute_dtype, decide_precision

COVERS = ["sculptor.training.passes"]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "large", "native", "expected"),
    [
        (torch.bfloat16, True, True, "bfloat16"),
        (torch.bfloat16, False, True, "float32"),
        (torch.bfloat16, True, False, "float32"),
        (torch.float32, True, True, "float32"),
        (torch.float16, True, True, "float32"),
    ],
)
def test_a_cpu_multiplies_what_it_is_fast_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, large: bool, native: bool, expected: str
) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", dtype=dtype))
    monkeypatch.setattr(module, "_LARGE", 1000 if large else 10**9)
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: native)
    assert decide_precision("auto", checkpoint, CPU) == expected
    assert decide_precision("auto", checkpoint, GPU) == "bfloat16"
    for asked in ("float32", "bfloat16"):
        assert decide_precision(asked, checkpoint, CPU) == asked
    with pytest.raises(SettingsError, match="--precision float32: a GPU trains in bfloat16"):
        decide_precision("float32", checkpoint, GPU)


def test_where_nothing_was_decided_a_gpu_alone_multiplies_bfloat16() -> None:
    found = [compute_dtype(asked, device) for asked in ("auto", "float32", "bfloat16") for device in (CPU, GPU)]
    narrow, wide = torch.bfloat16, torch.float32
    assert found == [wide, narrow, wide, wide, narrow, narrow]


def test_instructions_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(capabilities: dict[str, Any] | None, asked: bool) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: asked, raising=False)
            if capabilities is None:
                patch.delattr(torch.cpu, "get_capabilities", raising=False)
            else:
                patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
            return devices.multiplies_bfloat16(CPU)

    assert found({"avx512_bf16": True, "avx2": True}, asked=False)
    assert found({"bf16": True}, asked=False)
    assert not found({"avx512_bf16": False, "avx2": True}, asked=True), "the list says no"
    assert found(None, asked=True)
    assert not found(None, asked=False)
    assert devices.multiplies_bfloat16(GPU)


def run(place: Path, name: str, **changes: Any) -> Any:
    told = {"max_steps": 6, "batch_size": 4, "learning_rate": 3e-3, "device": "cpu", "offload": "none", "carry": "keep"}
    options = {key: changes.pop(key) for key in ("resume", "stop") if key in changes}
    settings = TrainSettings(**told | changes)
    return train(place / "model", place / "archive", [place / "rows.jsonl"], place / name, settings, **options)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    write_rows(tmp_path / "rows.jsonl", task_rows(count=10))
    analyze(tmp_path / "model", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return tmp_path


def test_bfloat16_on_a_cpu_teaches_as_float32_does(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = dtypes_of_products(patch)
        wide = run(place, "wide", precision="float32", save_dtype="float32")
        assert seen == {torch.float32}
        seen.clear()
        narrow = run(place, "narrow", precision="bfloat16", save_dtype="float32")
        assert torch.bfloat16 in seen
    assert narrow.loop.first_loss == pytest.approx(wide.loop.first_loss, rel=5e-3)
    assert narrow.loop.first_loss != wide.loop.first_loss
    assert narrow.loop.last_loss == pytest.approx(wide.loop.last_loss, rel=2e-2)
    assert narrow.loop.last_loss < 0.95 * narrow.loop.first_loss
    assert narrow.max_leak < 1e-6, "the update is added up and merged in full"
    assert verify(place / "model", place / "narrow", place / "archive", device="cpu").passed


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are large, and the CPU has the instructions."""
    monkeypatch.setattr(module, "_LARGE", 1000)
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)


def dtypes_of_products(patch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """What linear maps give from now on."""
    seen: set[torch.dtype] = set()
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found = plain(x, *rest)
        seen.add(found.dtype)
        return found

    patch.setattr(torch.nn.functional, "linear", linear)
    return seen


@pytest.mark.parametrize(("precision", "multiple"), [("bfloat16", 8), ("float32", 1)])
def test_rows_in_bfloat16_are_padded_to_shapes_that_come_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, precision: str, multiple: int
) -> None:
    seen: list[tuple[int, int, bool]] = []
    plain = passes.batch_loss

    def batch_loss(model: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        longest = int(batch.attention_mask.sum(dim=1).max())
        seen.append((batch.input_ids.shape[1], longest, torch.backends.cuda.flash_sdp_enabled()))
        return plain(model, batch, *rest, **named)

    monkeypatch.setattr(passes, "batch_loss", batch_loss)
    run(place, "out", precision=precision)
    assert any(longest % 8 for _, longest, _ in seen)
    assert {width for width, _, _ in seen} == {-(-longest // multiple) * multiple for _, longest, _ in seen}
    assert {flash for _, _, flash in seen} == {multiple == 1}


@pytest.mark.usefixtures("large")
def test_what_was_decided_is_planned_and_recorded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    plain = plan.footprints
    monkeypatch.setattr(plan, "footprints", lambda *given: planned.append(given[-1]) or plain(*given))
    run(place, "auto")
    assert {work.compute for work in planned} == {torch.bfloat16}
    record = json.loads((place / "auto" / "sculptor.json").read_text())
    assert record["settings"]["precision"] == "bfloat16"

    def bases() -> float:
        told = EstimateSettings(tflops=1, disk=1, device="cpu")
        return estimate(place / "model", told).modes["none"].plan.device["bases"]

    narrow = bases()
    monkeypatch.setattr(module, "_LARGE", 10**9)
    assert bases() == 2 * narrow


@pytest.mark.usefixtures("large")
def test_adapters_compute_as_protected_training_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "plan.toml").write_text(
        'model = "model"\n[train]\nmax_steps = 2\nbatch_size = 4\ndevice = "cpu"\n[evaluate]\nexact_match = false\n'
        '[[tasks]]\nname = "one"\ndata = ["rows.jsonl"]\ntest = ["rows.jsonl"]\n'
    )
    seen = dtypes_of_products(monkeypatch)
    continual(place / "plan.toml", place / "out", method="lora")
    assert torch.bfloat16 in seen


@pytest.mark.parametrize("optimizer", ["adamw", "bayes-adam"])
def test_bfloat16_goes_on_bit_for_bit(place: Path, optimizer: str) -> None:
    start = functools.partial(run, place, optimizer=optimizer)
    start("whole", precision="bfloat16")
    calls = iter((None, None, 15))
    with pytest.raises(Stopped):
        start("halted", precision="bfloat16", stop=lambda: next(calls))
    for other in ("float32", "auto"):
        with pytest.raises(OutputError, match="precision"):
            start("halted", precision=other, resume=True)
    start("halted", precision="bfloat16", resume=True)
    whole, halted = (sorted((place / name).glob("*.safetensors")) for name in ("whole", "halted"))
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in halted]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen2"}))
def test_every_family_trains_in_bfloat16(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("pairs" if family == "t5" else "text"))
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = TrainSettings(
        max_steps=3,
        batch_size=4,
        micro_batch_size=2,
        learning_rate=3e-3,
        device="cpu",
        carry="keep",
        precision="bfloat16",
    )
    losses = []
    for offload in ("none", "disk"):
        report = train(model, tmp_path / "archive", [rows], tmp_path / offload, replace(settings, offload=offload))
        losses.append(report.loop.last_loss)
        assert verify(model, tmp_path / offload, tmp_path / "archive", device="cpu").passed
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_is_trained_openly_and_new_rows_go_along(place: Path) -> None:
    told = {
        "precision": "bfloat16",
        "also_train": ("lm_head", "norm"),
        "add_tokens": ("<next>",),
        "save_dtype": "float32",
    }
    reports = [run(place, offload, offload=offload, **told) for offload in ("none", "cpu")]
    assert reports[0].loop.last_loss == pytest.approx(reports[1].loop.last_loss, rel=1e-3)
    assert reports[0].loop.last_loss < reports[0].loop.first_loss
    assert reports[0].also_trained

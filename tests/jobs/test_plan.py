"""How a training is done here: what is decided, on which machine, and what is planned for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze
from sculptor.errors import SettingsError
from sculptor.jobs import plan
from sculptor.jobs.job import TrainJob, open_job
from sculptor.jobs.plan import plan_job
from sculptor.jobs.train_request import TrainRequest
from sculptor.planning import placement, splits
from sculptor.world import ALONE, World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Two(World):
    """The first of two processes that see the same."""

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def from_first(self, value: Any) -> Any:
        return value


TWO = Two(0, 2)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    path = tmp_path_factory.mktemp("plan")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, samples=False, device="cpu"))
    return open_job(
        TrainRequest(
            model=path / "model",
            subspaces=path / "archive",
            data=[rows],
            output=path / "out",
            settings=TrainSettings(batch_size=16),
        )
    )


@pytest.fixture
def decided(opened: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings, what was said, and which ways were planned, on a device with some memory."""
    planned: list[tuple[str, splits.Split]] = []
    ways = plan._ways

    def noted(job: TrainJob, device: torch.device, split: splits.Split, world: World) -> Any:
        planned.append((job.settings.parallel, split))
        return ways(job, device, split, world)

    def run(device: torch.device, world: World = ALONE, memory: float = 1e9, **changes: Any) -> Any:
        monkeypatch.setattr(plan, "_ways", noted)
        monkeypatch.setattr(splits, "_memory", lambda _: memory)
        for module in (plan, placement):
            monkeypatch.setattr(module, "available_memory", lambda _: (memory, 1e10))
        said: list[str] = []
        job = replace(opened, settings=replace(opened.settings, **changes))
        found = plan_job(job, device, tmp_path / "out", world, said.append)
        return found.settings, said, list(planned)

    return run


def test_where_everything_fits_nothing_is_said(decided: Any) -> None:
    settings, said, _ = decided(CUDA)
    assert (settings.offload, settings.parallel, settings.micro_batch_size) == ("none", "auto", 16)
    assert settings.checkpoint_activations is False
    assert said == []


def needed(job: TrainJob, way: str, world: World = ALONE, **changes: Any) -> float:
    """Bytes of the device that a way takes at least, with as much as a plan may take of what is free."""
    job = replace(job, settings=replace(job.settings, **changes))
    return sum(plan._ways(job, CUDA, splits.Split(1, True), world)[way].device.values()) / placement.SHARE


def test_a_small_device_streams_and_says_why(opened: TrainJob, decided: Any) -> None:
    memory = (needed(opened, "none") + needed(opened, "cpu")) / 2
    settings, said, _ = decided(CUDA, memory=memory)
    assert settings.offload == "cpu"
    (line,) = said
    assert line.startswith("--offload auto picks cpu: none needs ")
    assert settings.checkpoint_activations is None, "its blocks are always computed again"


def test_what_has_no_effect_there_is_named_and_undone(decided: Any) -> None:
    settings, said, _ = decided(CPU, offload="auto", optimizer_on="device", offload_inputs=True)
    assert said == ["--offload auto picks none: everything fits; without effect there: --offload-inputs"]
    assert (settings.optimizer_on, settings.offload_inputs) == ("auto", None)


def test_several_processes_hold_all_where_that_fits_and_it_is_planned_once(decided: Any) -> None:
    settings, said, planned = decided(CUDA, TWO)
    assert (settings.parallel, settings.offload, settings.micro_batch_size) == ("replicate", "none", 8)
    assert said == []
    assert {parallel for parallel, _ in planned} == {"replicate"}
    assert len(planned) == 2, "the first split fits, and its ways are looked at"


def test_else_they_divide_it(opened: TrainJob, decided: Any) -> None:
    """Of a model as small as this one that lowers what a device holds only as blocks wait in host memory."""
    whole, parts = needed(opened, "none"), needed(opened, "cpu", TWO, parallel="shard")
    settings, said, planned = decided(CUDA, TWO, memory=(whole + parts) / 2)
    assert settings.offload == "cpu"
    assert settings.parallel == "shard"
    assert said[0].endswith("--parallel shard")
    assert [parallel for parallel, _ in planned] == sorted((p for p, _ in planned), key=["replicate", "shard"].index)
    assert settings.checkpoint_activations is None


@pytest.mark.parametrize(
    ("device", "world", "changes", "message"),
    [
        (CPU, ALONE, {"parallel": "shard"}, r"--parallel shard without effect in one process"),
        (CPU, TWO, {"offload": "disk"}, r"--offload disk with 2 processes that hold all .* --offload cpu divides"),
        (CPU, TWO, {"offload": "cpu", "parallel": "replicate"}, r"--offload cpu with 2 .* use --parallel shard"),
        (
            CPU,
            TWO,
            {"parallel": "shard", "checkpoint_activations": False},
            r"--keep-activations: not with --parallel shard",
        ),
        (CPU, ALONE, {"offload": "cpu", "kl_weight": 0.1}, r"--kl-weight: the base's forward needs all of the model"),
    ],
)
def test_what_cannot_be_done_is_refused(
    decided: Any, device: torch.device, world: World, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        decided(device, world, **changes)

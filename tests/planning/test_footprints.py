"""Arithmetic of a step: which parts grow with what, and that shared things are counted once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.methods.rule import cost_of
from sculptor.planning.footprints import RUNTIME, Footprint, Workload, footprints
from sculptor.planning.matrices import PlannedMatrix
from sculptor.planning.placement import plan_archive

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORK = Workload(256, 1, micro_rows=8, row=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and archives with and without shared inputs."""
    path = tmp_path_factory.mktemp("footprints")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    analyze(path / "model", path / "inputs", AnalyzeSettings(basis="inputs", data=(str(rows),), device="cpu"))
    return path


def parts(made: Path, basis: str = "weights") -> tuple[Checkpoint, Architecture, list[PlannedMatrix]]:
    checkpoint = open_checkpoint(made / "model")
    architecture = inspect_architecture(checkpoint)
    return checkpoint, architecture, plan_archive(Archive(made / basis), architecture)


def plans(
    made: Path, device: torch.device = GPU, basis: str = "weights", work: Workload = WORK
) -> dict[str, Footprint]:
    return footprints(*parts(made, basis), device, work)


def test_a_planned_matrix_counts_its_entries_and_coordinates(made: Path) -> None:
    archive = Archive(made / "weights")
    planned = parts(made)[2]
    assert [matrix.target.name for matrix in planned] == list(archive)
    assert sum(matrix.num_entries for matrix in planned) == sum(r.shape[0] * r.shape[1] for r in archive.values())
    assert sum(matrix.num_free for matrix in planned) == archive.num_free


def test_scores_that_are_written_out_grow_with_the_square_of_a_row(made: Path) -> None:
    """Six bytes each in bf16 in every block whose activations are kept, eight more in the one that is worked on."""
    work = Workload(4096, 1, micro_rows=2, row=2048, recompute=False)
    plain = plans(made, work=work)["none"].device["activations"]
    checkpoint = open_checkpoint(made / "model", "eager")
    architecture = inspect_architecture(checkpoint)
    config = checkpoint.config
    heads, blocks = config["num_attention_heads"], config["num_hidden_layers"]
    assert (architecture.heads, architecture.writes_scores) == (heads, True)
    planned = plan_archive(Archive(made / "weights"), architecture)
    eager = footprints(checkpoint, architecture, planned, GPU, work)
    scores = heads * 2 * 2048**2
    assert eager["none"].device["activations"] - plain == pytest.approx((6 * blocks + 8) * scores, rel=0.05)
    assert eager["cpu"].device["activations"] > plans(made, work=work)["cpu"].device["activations"]


def test_scores_of_short_rows_in_bfloat16_on_a_cpu_are_written_out(made: Path) -> None:
    def activations(row: int, compute: torch.dtype) -> float:
        work = Workload(1024, 1, micro_rows=1024 // row, row=row, recompute=False, compute=compute)
        return plans(made, CPU, work=work)["none"].device["activations"]

    config = open_checkpoint(made / "model").config
    heads, blocks = config["num_attention_heads"], config["num_hidden_layers"]
    narrow, wide = torch.bfloat16, torch.float32
    assert activations(128, wide) == pytest.approx(activations(256, wide), rel=1e-3)
    apart = activations(128, narrow) - activations(256, narrow)
    assert apart == pytest.approx((6 * blocks + 8) * heads * 1024 * 128, rel=0.1)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_coordinates_take_sixteen_bytes_each(made: Path, device: torch.device) -> None:
    """Themselves, their gradients, and AdamW's two moments, float32."""
    found = plans(made, device)
    free = Archive(made / "weights").num_free
    assert found["none"].device["coordinates, gradients, AdamW"] == 16 * free
    assert found["cpu"].host["coordinates, gradients, AdamW"] == 16 * free
    assert found["disk"].disk["coordinates, gradients, AdamW"] == 16 * free
    assert sum(found["cpu"].device.values()) < sum(found["none"].device.values()) + RUNTIME[device.type]


def test_what_waits_is_in_host_memory_or_in_files(made: Path) -> None:
    found = plans(made)
    assert found["none"].disk == {}
    assert found["cpu"].disk == {}
    assert {"weights", "bases", "coordinates, gradients, AdamW"} <= found["disk"].disk.keys()
    assert "weights" not in found["disk"].host
    assert found["cpu"].host["pristine weights"] == 4 * sum(matrix.num_entries for matrix in parts(made)[2])
    assert found["cpu"].read == found["cpu"].written == 0
    assert found["disk"].read > 0 < found["disk"].written


def test_a_basis_that_several_share_is_counted_once(made: Path) -> None:
    checkpoint, architecture, planned = parts(made, "inputs")
    shared = footprints(checkpoint, architecture, planned, GPU, WORK)["cpu"].host["bases"]
    alone = [replace(matrix, names={key: f"{matrix.target.name} {key}" for key in matrix.names}) for matrix in planned]
    apart = footprints(checkpoint, architecture, alone, GPU, WORK)["cpu"].host["bases"]
    assert shared < apart
    expected: dict[tuple[str, str], int] = {}
    for matrix in planned:
        expected |= {(matrix.target.block, name): n for name, n in cost_of(matrix.rule, matrix.names).numbers.items()}
    assert shared == 2 * sum(expected.values())


def test_without_an_archive_nothing_is_trained(made: Path) -> None:
    checkpoint, architecture, _ = parts(made)
    found = footprints(checkpoint, architecture, (), GPU, WORK)
    assert found["none"].device["coordinates, gradients, AdamW"] == 0
    assert found["none"].folding == 0
    assert found["disk"].disk == {}, "what does not change is read where it is"


def test_states_and_output_are_what_a_run_leaves_on_disk(made: Path) -> None:
    free = Archive(made / "weights").num_free
    states = "saved state"
    second = "second state, then output and archive"
    found = {
        (saves, evaluates): plans(made, work=replace(WORK, saves=saves, evaluates=evaluates, written=5.0))["none"].disk
        for saves in (0, 1, 2, 9)
        for evaluates in (False, True)
    }
    assert found[0, False] == {second: 5.0}
    assert found[1, False] == {states: 12 * free, second: 5.0}
    assert found[2, False] == found[9, False] == {states: 12 * free, second: 12 * free}
    assert found[2, True] == {states: 16 * free, second: 16 * free}
    assert found[0, True] == {states: 4 * free, second: 4 * free}


def test_openly_trained_numbers_are_on_the_device_in_any_way(made: Path) -> None:
    before, after = plans(made, CPU), plans(made, CPU, work=replace(WORK, num_extra=1000))
    for name in ("none", "cpu", "disk"):
        added = sum(after[name].device.values()) - sum(before[name].device.values())
        assert added == pytest.approx(12 * 1000), "beside the float32 value that a CPU has anyway"


def test_gradients_that_are_never_whole_take_less_than_projecting_them(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than plain training's where few directions are free."""
    narrow = plans(made, CPU)
    monkeypatch.setattr(PlannedMatrix, "narrowing", lambda *_: None)
    whole = plans(made, CPU)
    for name in ("none", "cpu", "disk"):
        assert narrow[name].folding < whole[name].folding
        assert narrow[name].operations == whole[name].operations


def test_more_micro_batches_take_less_room_and_more_ways(made: Path) -> None:
    one = plans(made, work=Workload(1024, 1))
    four = plans(made, work=Workload(1024, 4))
    assert four["none"].device["activations"] < one["none"].device["activations"]
    assert four["none"].operations == one["none"].operations
    assert four["none"].folding > one["none"].folding
    assert four["cpu"].loaded > one["cpu"].loaded
    assert four["cpu"].stored > one["cpu"].stored
    fused = plans(made, work=Workload(1024, 1, fused=True))
    assert fused["cpu"].stored < one["cpu"].stored


def test_kept_inputs_wait_on_the_device(made: Path) -> None:
    away, kept = plans(made)["cpu"], plans(made, work=replace(WORK, keep_inputs=True))["cpu"]
    assert "activation checkpoints" in away.host
    assert "activation checkpoints" not in kept.host
    assert kept.loaded < away.loaded
    assert "activation checkpoints" not in plans(made, CPU)["cpu"].host, "a CPU has no other place"


def test_moments_that_stay_on_the_host_do_not_travel(made: Path) -> None:
    free = Archive(made / "weights").num_free
    plain, on_host = plans(made), plans(made, work=replace(WORK, on_host=True))
    assert plain["cpu"].loaded - on_host["cpu"].loaded == 12 * free
    assert plain["cpu"].stored - on_host["cpu"].stored == 12 * free
    assert on_host["disk"] == plain["disk"], "files are no place to compute"
    assert on_host["none"] == plain["none"]

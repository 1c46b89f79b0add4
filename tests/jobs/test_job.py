"""What a training takes of its archive: defaults by method, refusals by name, and archives that are kept as they are."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, slowly, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train, verify
from sculptor.errors import CapacityError, DataError, SettingsError
from sculptor.jobs.job import MEMORY_ROWS, cast_to, open_job, resolve_settings
from sculptor.jobs.train_request import TrainRequest
from sculptor.training.rates import default_relative_rate

BASES = ("weights", "random", "inputs", "curvature")
CARRIES = {
    "weights": ("accumulate", "retake", "keep"),
    "random": ("accumulate", "retake", "keep"),
    "inputs": ("merge", "keep"),
    "curvature": ("merge", "keep"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and an archive of every basis."""
    path = tmp_path_factory.mktemp("job")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    for basis in BASES:
        if basis in ("weights", "random"):
            settings = AnalyzeSettings(basis=basis, preserve=0.5, device="cpu")  # type: ignore[arg-type]
        else:
            settings = AnalyzeSettings(basis=basis, data=(str(rows),), device="cpu")  # type: ignore[arg-type]
        analyze(path / "model", path / basis, settings)
    return path


@pytest.mark.parametrize("basis", BASES)
def test_defaults_are_those_of_the_method(made: Path, basis: str) -> None:
    archive = Archive(made / basis)
    found = resolve_settings(TrainSettings(), archive)
    assert found.carry == CARRIES[basis][0]
    assert found.soften == (3.0 if basis == "curvature" else 0.0)
    assert found.relative_rate == default_relative_rate(archive)
    assert found.learning_rate is None
    measured = (MEMORY_ROWS, 1.0) if basis in ("inputs", "curvature") else (None, None)
    assert (found.memory_rows, found.memory_weight) == measured


@pytest.mark.parametrize("basis", BASES)
def test_what_is_given_stays(made: Path, basis: str) -> None:
    archive = Archive(made / basis)
    absolute = resolve_settings(TrainSettings(learning_rate=1e-3), archive)
    assert (absolute.learning_rate, absolute.relative_rate) == (1e-3, None)
    assert resolve_settings(TrainSettings(relative_rate=0.5), archive).relative_rate == 0.5
    assert resolve_settings(TrainSettings(soften=0.0), archive).soften == 0.0, "asking for none is no fault"
    for carry in CARRIES[basis]:
        assert resolve_settings(TrainSettings(carry=carry), archive).carry == carry  # type: ignore[arg-type]
    if basis in ("inputs", "curvature"):
        found = resolve_settings(TrainSettings(soften=1.5, memory_rows=7, memory_weight=0.25), archive)
        assert (found.soften, found.memory_rows, found.memory_weight) == (1.5, 7, 0.25)


@pytest.mark.parametrize("basis", BASES)
def test_resolving_twice_changes_nothing(made: Path, basis: str) -> None:
    """But for what it would refuse when asked for."""
    archive = Archive(made / basis)
    found = resolve_settings(TrainSettings(), archive)
    if CARRIES[basis][0] == "merge":
        assert resolve_settings(found, archive) == found


@pytest.mark.parametrize("basis", BASES)
def test_ways_to_go_on_that_do_not_suit_are_refused(made: Path, basis: str) -> None:
    archive = Archive(made / basis)
    for carry in {"merge", "accumulate", "retake"} - set(CARRIES[basis]):
        with pytest.raises(SettingsError) as caught:
            resolve_settings(TrainSettings(carry=carry), archive)  # type: ignore[arg-type]
        expected = f"--carry {carry}: an archive with basis {basis} goes on by {' or '.join(CARRIES[basis])}"
        assert str(caught.value) == expected


@pytest.mark.parametrize("basis", ["weights", "random"])
def test_settings_without_effect_are_all_named(made: Path, basis: str) -> None:
    settings = TrainSettings(soften=1.0, memory_rows=5, memory_weight=2.0)
    with pytest.raises(SettingsError) as caught:
        resolve_settings(settings, Archive(made / basis))
    assert str(caught.value) == (
        f"--soften, --memory-rows, --memory-weight without effect: an archive with basis {basis} has no moments; analyze "
        "with --basis inputs or curvature"
    )


@pytest.mark.parametrize("basis", ["inputs", "curvature"])
@pytest.mark.parametrize("change", [{"memory_rows": 5}, {"memory_weight": 2.0}])
def test_an_archive_that_is_kept_measures_nothing(made: Path, basis: str, change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_settings(TrainSettings(carry="keep", **change), Archive(made / basis))
    message = str(caught.value)
    option = "--" + next(iter(change)).replace("_", "-")
    assert message.startswith(f"{option} without effect: an archive with basis {basis} goes on by keep")
    assert "analyze with --basis" not in message, "it was; what would help is another --carry"


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["weights", "curvature"])
@pytest.mark.parametrize("dtype", ["bfloat16", *slowly("float32", "float64")])
def test_keep_leaves_the_archive_as_it_is(
    cli: Callable[..., Result], made: Path, basis: str, dtype: str, tmp_path: Path
) -> None:
    made_for = Archive(made / basis).manifest.settings
    data = (str(made / "rows.jsonl"),) if made_for.data else ()  # the archive has the name alone
    analyze(made / "model", tmp_path / "archive", replace(made_for, dtype=dtype, data=data))  # type: ignore[arg-type]
    before = Archive(tmp_path / "archive")
    rows, settings = [made / "rows.jsonl"], TrainSettings(max_steps=3, carry="keep", device="cpu")
    report = train(made / "model", before.path, rows, tmp_path / "one", settings)
    assert report.carry == "keep"
    assert not any(matrix.outputs_added or matrix.inputs_added or matrix.frozen for matrix in report.matrices.values())
    after = Archive(tmp_path / "one" / "subspaces")
    for name, stored in before.manifest.tensors.items():
        assert after.manifest.tensors[name].sha256 == stored.sha256, name
        assert after.tensor(name).view(torch.uint8).equal(before.tensor(name).view(torch.uint8))
    assert sorted(after.manifest.tensors) == sorted(before.manifest.tensors), "and what is shared is stored once"
    assert after.num_bytes == pytest.approx(before.num_bytes, abs=4096), (
        "another number of files, and headers are padded"
    )
    for name, record in before.items():
        assert after[name].rule == record.rule
        assert after[name].base_digest != record.base_digest
    assert after.manifest.source_weights == before.manifest.source_weights
    assert [(task.name, task.kind) for task in after.manifest.tasks] == [("analysis", "analysis"), ("rows", "training")]
    assert after.manifest.tasks[1].details["carry"] == "keep"
    assert verify(made / "model", tmp_path / "one", before.path, device="cpu").passed
    train(tmp_path / "one", after.path, rows, tmp_path / "two", settings)
    assert verify(tmp_path / "one", tmp_path / "two", after.path, device="cpu").passed
    assert verify(made / "model", tmp_path / "two", before.path, device="cpu").passed, "of both tasks together"
    found = cli("inspect", tmp_path / "two" / "subspaces", "--model", tmp_path / "two", "--json")
    assert found.code == 0, found.err
    assert len(found.json["tasks"]) == 3


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_the_last_words_of_a_run_say_that_it_was_kept(
    cli: Callable[..., Result], made: Path, basis: str, tmp_path: Path
) -> None:
    arguments = ("--data", made / "rows.jsonl", "-o", tmp_path / "out", "--max-steps", 1, "--device", "cpu")
    found = cli("train", made / "model", "--subspaces", made / basis, *arguments, "--carry", "keep")
    assert found.code == 0, found.err
    assert "The archive protects what it protected before (--carry keep)." in found.out
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["settings"]["carry"] == "keep"


def test_after_a_kept_task_the_next_may_be_merged(made: Path, tmp_path: Path) -> None:
    rows = [made / "rows.jsonl"]
    settings = TrainSettings(max_steps=2, carry="keep", device="cpu")
    train(made / "model", made / "curvature", rows, tmp_path / "one", settings)
    kept = Archive(tmp_path / "one" / "subspaces")
    train(tmp_path / "one", kept.path, rows, tmp_path / "two", TrainSettings(max_steps=2, device="cpu"))
    after = Archive(tmp_path / "two" / "subspaces")
    assert after.manifest.source_weights == (1.0, 1.0)
    assert [len(task.weights) for task in after.manifest.tasks] == [1, 0, 1]
    assert verify(tmp_path / "one", tmp_path / "two", kept.path, device="cpu").passed


def opened(made: Path, *data: Path, **changes: Any) -> Any:
    settings = TrainSettings(device="cpu", **changes)
    return open_job(
        TrainRequest(
            model=made / "model", subspaces=made / "weights", data=data, output=made / "out", settings=settings
        )
    )


def test_a_task_is_called_by_its_first_file(made: Path, tmp_path: Path) -> None:
    (tmp_path / "poems").mkdir()
    plain = write_rows(tmp_path / "poems" / "rhymes.jsonl", task_rows())
    inner = write_rows(tmp_path / "poems" / "train.jsonl", task_rows())
    assert opened(made, plain).name == "rhymes"
    assert opened(made, inner).name == "poems", "every folder has a train.jsonl"
    assert opened(made, plain, inner).name == "rhymes"
    assert opened(made, inner, plain).name == "poems"


def test_a_job_without_data_or_capacity_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data: pass at least one file"):
        opened(made)
    rows = made / "rows.jsonl"
    settings = AnalyzeSettings(preserve=0.97, device="cpu")
    analyze(made / "model", tmp_path / "tight", settings)
    current, archive = made / "model", tmp_path / "tight"
    for i in range(4):
        train(current, archive, [rows], tmp_path / str(i), TrainSettings(max_steps=1, device="cpu"))
        current, archive = tmp_path / str(i), tmp_path / str(i) / "subspaces"
        if not Archive(archive).open_names:
            break
    with pytest.raises(CapacityError, match=r"no capacity left: all 14 matrices are frozen"):
        open_job(
            TrainRequest(
                model=current,
                subspaces=archive,
                data=[rows],
                output=tmp_path / "out",
                settings=TrainSettings(device="cpu"),
            )
        )


def test_rows_and_lengths_are_resolved(made: Path) -> None:
    job = opened(made, made / "rows.jsonl", max_rows=5)
    assert len(job.encoded.examples) == 5
    assert job.settings.max_length == 64, "the model's limit"
    assert job.evaluation is None
    assert job.extra == {}
    assert opened(made, made / "rows.jsonl", max_length=16).settings.max_length == 16
    with pytest.raises(SettingsError, match="max-length"):
        opened(made, made / "rows.jsonl", max_length=65)


def test_save_dtypes_are_torch_s(made: Path) -> None:
    assert cast_to(TrainSettings()) is None
    assert cast_to(TrainSettings(save_dtype="bfloat16")) == torch.bfloat16
    assert cast_to(TrainSettings(save_dtype="float32")) == torch.float32

"""`analyze` as a whole: which matrices, what is noted of them, what it says by role, and what it refuses."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import CheckpointError, OutputError, SettingsError

COVERS = ["sculptor.jobs.analyze_report"]
WEIGHTS = AnalyzeSettings(preserve=0.5, device="cpu")
ROLES = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


def spoil(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"],
)
def test_a_tensor_that_is_not_finite_is_named(model: Path, name: str, value: float, tmp_path: Path) -> None:
    """Also one that is not decomposed: the model runs on all of them."""
    spoil(model, name, value)
    with pytest.raises(CheckpointError, match=name):
        analyze(model, tmp_path / "archive", WEIGHTS)
    assert not list(tmp_path.glob("archive*"))


def test_a_matrix_that_is_not_targeted_has_to_be_finite_too(model: Path, tmp_path: Path) -> None:
    spoil(model, "model.layers.0.self_attn.q_proj.weight", float("nan"))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj"):
        analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, targets=("mlp.*",), device="cpu"))


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ((), (), ROLES),
        (("q_proj",), (), ["self_attn.q_proj"]),
        (("mlp.*",), (), ROLES[4:]),
        ((), ("mlp.*",), ROLES[:4]),
        (("self_attn.*",), ("o_proj", "k_proj"), ["self_attn.q_proj", "self_attn.v_proj"]),
        (("down_proj", "q_proj"), (), ["self_attn.q_proj", "mlp.down_proj"]),
    ],
)
def test_patterns_choose_what_is_protected(
    model: Path, targets: tuple[str, ...], exclude: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    settings = AnalyzeSettings(preserve=0.5, targets=targets, exclude=exclude, device="cpu")
    report = analyze(model, tmp_path / "archive", settings)
    assert [role.role for role in report.roles] == expected, "in the order of the model"
    archive = Archive(tmp_path / "archive")
    assert [record.role for record in archive.values()] == 2 * expected
    assert all(role.num_matrices == 2 for role in report.roles)


def test_one_layer_can_be_chosen(model: Path, tmp_path: Path) -> None:
    analyze(model, tmp_path / "a", AnalyzeSettings(preserve=0.5, targets=("*.layers.1.*",), device="cpu"))
    assert {record.index for record in Archive(tmp_path / "a").values()} == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("proj",)}, r"--targets 'proj' matches none of the 14 matrices; roles: mlp.down_proj"),
        ({"exclude": ("lm_head",)}, r"--exclude 'lm_head' matches none"),
        ({"targets": ("q_proj",), "exclude": ("self_attn.*",)}, r"--targets and --exclude leave none of the 14"),
        ({"device": "tpu"}, r"tpu"),
        ({"chat": True}, r"--chat without effect"),
        ({"budget": 0.5}, r"--budget without effect with --basis weights"),
    ],
)
def test_what_does_not_suit_is_refused_before_any_work(
    model: Path, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        analyze(model, tmp_path / "archive", AnalyzeSettings(**({"preserve": 0.5, "device": "cpu"} | change)))
    assert not list(tmp_path.glob("archive*"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_record_knows_its_matrix(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", family, dtype=dtype)
    analyze(model, tmp_path / "archive", WEIGHTS)
    checkpoint = open_checkpoint(model)
    for record in Archive(tmp_path / "archive").values():
        weight = checkpoint.matrix(record).double()
        assert record.base_rms == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-12)
        assert record.base_dtype == str(dtype).removeprefix("torch.")
        assert record.stored_shape == tuple(weight.shape)
        assert record.transposed == (family == "gpt2")


def test_a_matrix_of_zeros_has_an_rms_of_0(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    analyze(model, tmp_path / "archive", WEIGHTS)
    assert Archive(tmp_path / "archive")[name].base_rms == 0


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_the_report_sums_by_role(model: Path, basis: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    chosen = WEIGHTS if basis == "weights" else AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu")
    report = analyze(model, tmp_path / "archive", chosen)
    archive = Archive(tmp_path / "archive")
    by_role = defaultdict(list)
    for record in archive.values():
        by_role[record.role].append(record)
    assert [role.role for role in report.roles] == list(by_role) == ROLES
    for role in report.roles:
        records = by_role[role.role]
        figures = [record.rule.figures() for record in records]
        assert role.num_matrices == len(records)
        assert role.num_parameters == sum(m * n for m, n in (record.shape for record in records))
        assert role.num_free == sum(math.prod(shape) for record in records for shape in record.rule.shapes)
        assert role.preserved == pytest.approx(sum(f.preserved for f in figures) / len(figures))
        assert role.energy == pytest.approx(sum(f.held for f in figures) / len(figures))
        assert 0 < role.energy <= 1.001
    assert report.num_matrices == 14
    assert sum(role.num_free for role in report.roles) == archive.num_free
    assert (report.archive_bytes, report.checkpoint_bytes) == (archive.num_bytes, open_checkpoint(model).num_bytes)
    assert report.basis == basis
    if basis == "weights":
        assert (report.calibration, report.most_directions) == ((), 0)
    else:
        assert [source.rows for source in report.calibration] == [24]
        assert report.most_directions == 24, "half of the widest side of a matrix"


def test_an_archive_is_the_same_every_time(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        analyze(model, tmp_path / name, WEIGHTS)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_existing_archives_and_inputs_are_spared(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    rows = write_rows(tmp_path / "rows" / "rows.jsonl", task_rows())
    analyze(model, tmp_path / "archive", WEIGHTS)
    before = (tmp_path / "archive" / "archive.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(OutputError, match="exists already"):
            analyze(model, tmp_path / "archive", WEIGHTS, resume=resume)
    with pytest.raises(OutputError, match="is or holds the input"):
        analyze(model, tmp_path / "model", WEIGHTS, overwrite=True)
    moments = AnalyzeSettings(basis="inputs", data=(str(rows),), device="cpu")
    with pytest.raises(OutputError, match="is or holds the input"):
        analyze(model, tmp_path / "rows", moments, overwrite=True)
    assert (tmp_path / "archive" / "archive.json").read_bytes() == before
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.25, device="cpu"), overwrite=True)
    assert (tmp_path / "archive" / "archive.json").read_bytes() != before


def test_the_history_begins_with_the_analysis(model: Path, tmp_path: Path) -> None:
    analyze(model, tmp_path / "archive", WEIGHTS)
    (task,) = Archive(tmp_path / "archive").manifest.tasks
    assert (task.name, task.kind, task.weights, task.details) == ("analysis", "analysis", (), {"model": "model"})


def test_the_command_prints_a_row_for_every_role(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    found = cli(
        "analyze", model, "-o", tmp_path / "archive", "--preserve", 0.5, "--exclude", "mlp.*", "--device", "cpu"
    )
    assert found.code == 0, found.err
    for role in ROLES[:4]:
        assert sum(line.startswith(role) for line in found.out.splitlines()) == 1
    assert "mlp" not in found.out
    assert found.out.rstrip().endswith(f"Wrote {tmp_path / 'archive'}.")


@pytest.mark.parametrize(("budget", "keep"), [(0.3, 0.5), (0.6, 0.25), (0.6, 0.9)])
def test_a_budget_that_is_missed_is_said(
    cli: Callable[..., Result], tmp_path: Path, budget: float, keep: float
) -> None:
    """What is not stored freezes in blocks; how much is free then is told, and within what was asked for or more."""
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    found = cli(
        "analyze", model, "--basis", "curvature", "--budget", budget, "--keep", keep, "--data", rows, "--output", tmp_path / "a",
        "--device", "cpu",
    )  # fmt: skip
    assert found.code == 0
    archive = Archive(tmp_path / "a")
    free = archive.num_free / sum(record.shape[0] * record.shape[1] for record in archive.values())
    assert free >= budget - 1e-9
    assert ("Asked for" in found.out) == (free - budget > 0.005)
    assert max(map(len, found.out.split("Wrote")[0].splitlines())) <= 100


@pytest.mark.parametrize("rule", [{"basis": "curvature"}, {"rule": "lowrank"}])
def test_files_of_one_name_in_two_folders(model: Path, tmp_path: Path, rule: dict[str, str]) -> None:
    """The archive keeps names, and is read by them."""
    files = []
    for folder in ("news", "law"):
        (tmp_path / folder).mkdir()
        files.append(str(write_rows(tmp_path / folder / "train.jsonl", task_rows(folder, 6))))
    settings = AnalyzeSettings(**rule, data=tuple(files), calibration_tokens=400, device="cpu")
    report = analyze(model, tmp_path / "archive", settings)
    assert [source.source for source in report.calibration] == ["train.jsonl"] * 2
    assert Archive(tmp_path / "archive").method.terms.basis
    with pytest.raises(SettingsError, match="is given twice"):
        analyze(model, tmp_path / "again", AnalyzeSettings(**rule, data=(files[0],) * 2, device="cpu"))

"""`sculptor edit prune` by its command: exactly the share of every matrix, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from edited import tensors_of

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.edits.prune import importance_of
from sculptor.edits.prune import prune as prune_matrix


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bf16 model of tied weights, with an archive of its curvature and one of its weights."""
    path = tmp_path_factory.mktemp("prune")
    save_checkpoint(path / "model", "llama-tied", dtype=torch.bfloat16, max_shard_size="15KB")
    write_rows(path / "text.jsonl", task_rows("text"))
    curvature = AnalyzeSettings(basis="curvature", data=(str(path / "text.jsonl"),), device="cpu")
    analyze(path / "model", path / "archive", curvature)
    analyze(path / "model", path / "weights", AnalyzeSettings(preserve=0.5, targets=("q_proj",), device="cpu"))
    return path


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_exactly_that_share_of_least_curvature(
    sparsity: float, cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    arguments = ("--subspaces", made / "archive", "--sparsity", sparsity, "-o", tmp_path / "out", "--json")
    found = cli("edit", "prune", made / "model", *arguments)
    assert (found.code, found.err) == (0, "")
    before, after, archive = tensors_of(made / "model"), tensors_of(tmp_path / "out"), Archive(made / "archive")
    removed = total = 0.0
    for name, value in after.items():
        if name not in archive:
            assert torch.equal(value, before[name])
            continue
        importance = importance_of(archive.read(name))
        assert importance is not None
        assert torch.equal(value, prune_matrix(before[name], sparsity, importance))
        assert int((value == 0).sum()) == max(round(sparsity * value.numel()), int((before[name] == 0).sum()))
        costs = importance * before[name].double().square()
        removed += float(costs[value == 0].sum())
        total += float(costs.sum())
    assert found.json["all"]["curvature"] == pytest.approx(removed / total, rel=1e-9)
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert (record["command"], record["method"]) == ("edit prune", "EsaCL-style")
    assert record["settings"] == {"sparsity": sparsity, "by": "curvature"}
    assert str(made) not in json.dumps(record)
    assert {f.name for f in (tmp_path / "out").glob("*.safetensors")} == {
        f.name for f in (made / "model").glob("*.safetensors")
    }


@pytest.mark.parametrize("subspaces", [None, "weights", "archive"])
def test_by_magnitude_in_the_matrices_of_the_archive_or_all(
    subspaces: str | None, cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    more = () if subspaces is None else ("--subspaces", made / subspaces)
    arguments = ("--sparsity", 0.25, "--by", "magnitude", *more, "-o", tmp_path / "out")
    found = cli("edit", "prune", made / "model", *arguments)
    assert (found.code, found.err) == (0, "")
    before, after = tensors_of(made / "model"), tensors_of(tmp_path / "out")
    expected = {target.name for target in inspect_architecture(open_checkpoint(made / "model")).targets}
    chosen = {"weights": {name for name in expected if "q_proj" in name}}.get(str(subspaces), expected)
    assert {name for name in after if not torch.equal(after[name], before[name])} == chosen
    for name in chosen:
        assert torch.equal(after[name], prune_matrix(before[name], 0.25))


def test_a_dry_run_counts_and_writes_nothing(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    before = sorted(made.rglob("*"))
    arguments = (made / "model", "--subspaces", made / "archive", "--sparsity", 0.5)
    dry = cli("edit", "prune", *arguments, "--dry-run", "--json")
    wet = cli("edit", "prune", *arguments, "-o", tmp_path / "out", "--json")
    by_role = [{role["role"]: role for role in found.json["roles"]} for found in (dry, wet)]
    assert by_role[0] == by_role[1]
    assert dry.json["output"] is None
    text = cli("edit", "prune", *arguments, "--dry-run")
    assert "EsaCL-style" in text.out
    assert "Nothing was written." in text.out
    assert max(map(len, text.out.splitlines())) <= 100
    assert sorted(made.rglob("*")) == before


def test_bad_options_and_inputs_are_one_line(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    model, out = made / "model", ("-o", tmp_path / "out")
    other = save_checkpoint(tmp_path / "other", "llama-tied", seed=4)
    curvature, weights = ("--subspaces", made / "archive"), ("--subspaces", made / "weights")
    cases: list[tuple[tuple[object, ...], str, int]] = [
        ((model, *curvature, *out), "--sparsity", 2),
        ((model, *curvature, "--sparsity", 1.5, *out), "1.5", 2),
        ((model, "--sparsity", 0.5, *out), "--subspaces is needed", 2),
        ((model, *curvature, "--sparsity", 0.5, "--by", "size", *out), "'size' is not one of", 2),
        ((model, *curvature, "--sparsity", 0.5), "--output is needed", 2),
        (
            (model, *weights, "--sparsity", 0.5, *out),
            "no curvature of model.layers.0.self_attn.q_proj.weight (basis weights)",
            1,
        ),
        ((other, *curvature, "--sparsity", 0.5, *out), "archive of another checkpoint", 1),
        ((tmp_path / "nowhere", *curvature, "--sparsity", 0.5, *out), "no such directory", 1),
        ((model, *curvature, "--sparsity", 0.5, "-o", made / "archive", "--overwrite"), "is or holds the input", 1),
    ]
    for arguments, needle, code in cases:
        found = cli("edit", "prune", *arguments)
        assert found.code == code, found.err
        (line,) = found.err.strip().splitlines()
        assert line.startswith("error: ")
        assert needle in line
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("*.partial"))

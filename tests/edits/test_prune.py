"""Which weights go, against a sort in float64; how many; and curvature against dense moments."""

from pathlib import Path

import pytest
import torch
from conftest import factors, save_checkpoint, slowly, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.edits.prune import importance_of, prune


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_scores_go_and_exactly_that_share(
    sparsity: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = torch.randn(13, 17, generator=generator).to(dtype)
    importance = torch.rand(13, 17, generator=generator, dtype=torch.float64)
    for h in (None, importance):
        pruned = prune(weight, sparsity, h)
        count = round(sparsity * weight.numel())
        gone = pruned == 0
        assert int(gone.sum()) == count
        assert torch.equal(pruned[~gone], weight[~gone])
        scores = 0.5 * weight.double().square() * (1.0 if h is None else h)
        if 0 < count < weight.numel():
            assert float(scores[gone].max()) <= float(scores[~gone].min())


def test_ties_do_not_remove_more_or_less() -> None:
    weight = torch.ones(4, 5)
    assert int((prune(weight, 0.35) == 0).sum()) == 7
    weight[2, 3] = 0
    unreached = torch.zeros(4, 5, dtype=torch.float64)
    assert int((prune(weight, 0.35, unreached) == 0).sum()) == 7, "a weight that is 0 already is the first to go"
    assert float(weight.sum()) == 19, "the input stays as it was"


@pytest.mark.parametrize("family", ["gpt2", *slowly("llama")])
def test_importance_is_the_diagonal_of_the_moments(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text"))
    analyze(model, tmp_path / "archive", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    archive = Archive(tmp_path / "archive")
    for name, record in archive.items():
        g, c = factors(archive, name)
        expected = torch.outer(g.dense().diagonal(), c.dense().diagonal())
        found = importance_of(archive.read(name))
        assert found is not None
        torch.testing.assert_close(found, expected.T if record.transposed else expected, rtol=1e-10, atol=0)
        assert found.shape == record.stored_shape


def test_without_curvature_there_is_no_importance(tmp_path: Path) -> None:
    analyze(save_checkpoint(tmp_path / "model"), tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    archive = Archive(tmp_path / "archive")
    assert all(importance_of(archive.read(name)) is None for name in archive)


def test_inputs_alone_weigh_columns(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text"))
    analyze(model, tmp_path / "archive", AnalyzeSettings(basis="inputs", data=(str(rows),), device="cpu"))
    archive = Archive(tmp_path / "archive")
    name = next(iter(archive))
    _, c = factors(archive, name)
    found = importance_of(archive.read(name))
    assert found is not None
    torch.testing.assert_close(found, c.dense().diagonal().expand_as(found), rtol=1e-10, atol=0)

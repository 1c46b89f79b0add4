"""What an archive allows of a finished difference, against complete bases in float64."""

from pathlib import Path

import pytest
import torch
from conftest import factors, save_checkpoint, task_rows, write_rows
from methods.toys.rotation import Rotation

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.archive.store import Entry
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.edits.project import project
from sculptor.errors import EditError
from sculptor.numerics.linalg import complement

KINDS = {
    "double": AnalyzeSettings(preserve=0.5, device="cpu"),
    "input": AnalyzeSettings(preserve=0.75, constraint="input", device="cpu"),
    "core": AnalyzeSettings(preserve=0.25, constraint="core", device="cpu"),
    "all": AnalyzeSettings(preserve=0.0, device="cpu"),
    "curvature": AnalyzeSettings(basis="curvature", data=("rows.jsonl",), device="cpu"),
    "inputs": AnalyzeSettings(basis="inputs", data=("rows.jsonl",), device="cpu"),
}


def archive_of(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch, family: str = "llama") -> tuple[Path, Archive]:
    monkeypatch.chdir(path)
    model = save_checkpoint(path / "model", family)
    write_rows(path / "rows.jsonl", task_rows("text"))
    analyze(model, path / "archive", KINDS[kind])
    return model, Archive(path / "archive")


def complete(entry: Entry, name: str, dim: int) -> torch.Tensor:
    """All directions of a side, the stored ones in their place."""
    side = getattr(entry.rule, name)
    if side is None:
        return torch.eye(dim, dtype=torch.float64)
    stored = entry.tensors[name].double()
    rest = complement(stored)
    return torch.cat([stored, rest] if side.form == "leading" else [rest, stored], dim=1)


def reference(entry: Entry, update: torch.Tensor, soft: float, gains: torch.Tensor | None) -> torch.Tensor:
    """dW in complete bases, its frozen pairs 0, the free ones shrunk, and back."""
    m, n = entry.rule.shape
    qu, qv = complete(entry, "output", m), complete(entry, "input", n)
    pairs = qu.T @ update @ qv
    start = 0
    for stop, reach in entry.rule.steps:  # type: ignore[attr-defined]
        pairs[start:stop, :reach] = 0
        start = stop
    if gains is not None:
        pairs = pairs / (1 + soft * gains)
    return qu @ pairs @ qv.T


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_free_pairs_twice_is_once_and_what_is_allowed_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model, archive = archive_of(kind, tmp_path, monkeypatch)
    checkpoint = open_checkpoint(model)
    for name, record in archive.items():
        entry, base = archive.read(name), checkpoint.matrix(record)
        difference = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        found = project(entry, base, difference)
        torch.testing.assert_close(found, reference(entry, difference, 0.0, None), atol=1e-6, rtol=0)
        torch.testing.assert_close(project(entry, base, found), found, atol=1e-6, rtol=0)
        rest = difference - found
        assert abs(float((rest * found).sum())) < 1e-6 * float(difference.square().sum()), "the nearest there is"


@pytest.mark.parametrize("soft", [0.3, 10.0])
def test_soft_shrinks_free_pairs_by_their_importance(
    soft: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model, archive = archive_of("curvature", tmp_path, monkeypatch)
    checkpoint = open_checkpoint(model)
    for name, record in archive.items():
        entry, base = archive.read(name), checkpoint.matrix(record)
        g, c = factors(archive, name)
        mean = g.spectrum().mean() * c.spectrum().mean()
        gains = torch.outer(g.spectrum(), c.spectrum()) / mean
        difference = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        found = project(entry, base, difference, soft)
        torch.testing.assert_close(found, reference(entry, difference, soft, gains), atol=1e-5, rtol=0)
        assert float(found.norm()) < float(project(entry, base, difference).norm())


def test_a_layer_that_is_stored_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model, archive = archive_of("curvature", tmp_path, monkeypatch, "gpt2")
    checkpoint = open_checkpoint(model)
    name, record = next((name, record) for name, record in archive.items() if record.shape[0] != record.shape[1])
    assert record.transposed
    difference = torch.randn(record.stored_shape, generator=generator, dtype=torch.float64)
    found = project(archive.read(name), checkpoint.matrix(record), difference)
    torch.testing.assert_close(found, reference(archive.read(name), difference.T, 0.0, None).T, atol=1e-6, rtol=0)


def test_where_everything_is_frozen_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    _, archive = archive_of("curvature", tmp_path, monkeypatch)
    entry = archive.read(next(iter(archive)))
    from dataclasses import replace

    closed = replace(entry.record, rule=replace(entry.rule, steps=(entry.rule.shape,)))  # type: ignore[type-var]
    difference = torch.randn(closed.shape, generator=generator, dtype=torch.float64)
    assert not bool(project(Entry(closed, entry.tensors), difference, difference).any())


def test_a_rule_that_cannot_say_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    _, archive = archive_of("all", tmp_path, monkeypatch)
    from dataclasses import replace

    record = archive[next(iter(archive))]
    turned = replace(record, rule=Rotation(record.shape))
    difference = torch.zeros(record.shape, dtype=torch.float64)
    with pytest.raises(EditError, match=rf"^{record.name}: a rule of kind rotation-2 cannot be projected onto"):
        project(Entry(turned, {}), difference, difference)

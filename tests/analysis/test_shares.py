"""How tasks share what is protected: figures by hand, for archives that know and for those that do not."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train
from sculptor.analysis.shares import task_shares
from sculptor.archive.manifest import TaskRecord
from sculptor.methods.rule import TaskShares
from sculptor.methods.staircase import StaircaseRule


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after one task, with the moments of that and of an analysis."""
    path = tmp_path_factory.mktemp("shares")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    text = write_rows(path / "text.jsonl", task_rows("text"))
    analyze(path / "model", path / "archive", AnalyzeSettings(basis="curvature", data=(str(text),), device="cpu"))
    train(path / "model", path / "archive", [rows], path / "one", TrainSettings(max_steps=3, device="cpu"))
    return path


@dataclass(frozen=True)
class Told:
    """Stands for an entry whose rule says what it is told to."""

    rule: Any
    tensors: Any = None


def told(archive: Archive, found: list[TaskShares | None], monkeypatch: pytest.MonkeyPatch) -> Archive:
    """An archive whose matrices share as told, in order; the rest know nothing."""
    answers = dict(zip(archive, [*found, *[None] * (len(archive) - len(found))], strict=True))
    names = {id(record.rule): name for name, record in archive.items()}
    monkeypatch.setattr(StaircaseRule, "shares", lambda self, _: answers[names[id(self)]])
    return archive


def shares(held: list[float], cosine: float) -> TaskShares:
    overlaps = torch.full((len(held), len(held)), cosine, dtype=torch.float64)
    return TaskShares(torch.tensor(held, dtype=torch.float64), overlaps.fill_diagonal_(1.0))


def with_weights(archive: Archive, *weights: tuple[float, ...]) -> Archive:
    tasks = tuple(TaskRecord(f"t{i}", "training", weights=found) for i, found in enumerate(weights))
    archive.manifest = replace(archive.manifest, tasks=tasks)
    return archive


def test_figures_are_means_over_matrices(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = with_weights(Archive(made / "archive"), (1.0,), (3.0,))
    told(archive, [shares([0.8, 0.2], 0.5), shares([0.4, 0.6], 0.1)], monkeypatch)
    one, two = task_shares(archive)
    assert (one.name, two.name) == ("t0", "t1")
    assert (one.protected, two.protected) == pytest.approx((0.6, 0.4))
    # Of all that is protected: 0.8 against 3 x 0.2, and 0.4 against 3 x 0.6.
    first = (0.8 / 1.4 + 0.4 / 2.2) / 2
    assert (one.own, two.own) == pytest.approx((first, 1 - first))
    assert one.overlaps == pytest.approx((1.0, 0.3))
    assert two.overlaps == pytest.approx((0.3, 1.0))


def test_several_sources_of_one_task_add_up(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = with_weights(Archive(made / "archive"), (1.0, 1.0, 2.0), (4.0,))
    told(archive, [shares([0.5, 0.5], 0.0)], monkeypatch)
    assert [share.own for share in task_shares(archive)] == pytest.approx([0.5, 0.5])


def test_nothing_protected_is_nobody_s(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = with_weights(Archive(made / "archive"), (1.0,), (1.0,))
    told(archive, [shares([0.0, 0.0], 0.0)], monkeypatch)
    assert [(share.protected, share.own) for share in task_shares(archive)] == [(0.0, 0.0), (0.0, 0.0)]


def test_matrices_that_know_of_other_tasks_are_left_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = with_weights(Archive(made / "archive"), (1.0,), (1.0,))
    told(archive, [shares([0.25, 0.75], 0.5), shares([0.9], 0.0), shares([0.1, 0.1, 0.1], 0.0)], monkeypatch)
    assert [share.protected for share in task_shares(archive)] == pytest.approx([0.25, 0.75])
    told(archive, [shares([0.9], 0.0)], monkeypatch)
    assert task_shares(archive) == ()


def test_a_real_archive_says_what_its_tensors_say(made: Path) -> None:
    archive = Archive(made / "one" / "subspaces")
    first, second = task_shares(archive)
    assert (first.name, second.name) == ("analysis", "rows")
    assert first.own + second.own == pytest.approx(1)
    assert (first.overlaps[0], second.overlaps[1]) == pytest.approx((1, 1))
    assert first.overlaps[1] == second.overlaps[0]
    assert 0 < first.overlaps[1] < 1
    held = torch.zeros(2, dtype=torch.float64)
    for name in archive:
        entry = archive.read(name)
        assert isinstance(entry.rule, StaircaseRule)
        found = entry.rule.shares(entry.tensors)
        assert found is not None
        held += found.held
    assert (first.protected, second.protected) == pytest.approx((held / len(archive)).tolist())


def test_one_task_owns_everything(made: Path) -> None:
    (only,) = task_shares(Archive(made / "archive"))
    assert only.own == pytest.approx(1)
    assert only.overlaps == pytest.approx((1.0,))
    assert 0.4 < only.protected <= 1


def test_archives_without_moments_do_not_know(made: Path, tmp_path: Path) -> None:
    analyze(made / "model", tmp_path / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    assert task_shares(Archive(tmp_path / "weights")) == ()


def test_a_task_that_left_the_archive_as_it_was_has_no_share(made: Path, tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=2, carry="keep", device="cpu")
    train(made / "model", made / "archive", [made / "rows.jsonl"], tmp_path / "kept", settings)
    assert task_shares(Archive(tmp_path / "kept" / "subspaces")) == ()

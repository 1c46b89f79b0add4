"""Rules into an archive: what is there already is not made again, and only methods that decide are asked to."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from torch import Tensor

from sculptor import AnalyzeSettings
from sculptor.analysis import derive as module
from sculptor.analysis.derive import Measurement, decide, write_measured
from sculptor.analysis.evidence import Source, measure_evidence
from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Target
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import DataError
from sculptor.jobs.analyze_job import _new_record
from sculptor.methods.kinds import make_method
from sculptor.methods.method import Decides, Derived, Evidence
from sculptor.methods.rule import Rule
from sculptor.methods.weights import Weights
from sculptor.model.load import LoadedModel, load_model
from sculptor.progress import silent

COVERS = ["sculptor.jobs.analyze_job"]
CPU = torch.device("cpu")
SETTINGS = AnalyzeSettings(basis="curvature", data=("x",), device="cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model to measure."""
    return load_model(open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("derive") / "model")), CPU)


def source(count: int = 4) -> Source:
    drawn = torch.randint(4, 44, (count, 7), generator=torch.Generator().manual_seed(1)).tolist()
    return Source("rows", tuple(Example(tuple(ids), (IGNORED, *ids[1:])) for ids in drawn))


def records(loaded: LoadedModel) -> dict[str, MatrixRecord]:
    return {target.name: _new_record(loaded.checkpoint, target) for target in loaded.architecture.targets}


def write(
    loaded: LoadedModel, writer: ArchiveWriter, make: Callable[[Evidence], Derived], task: int = 0, **changes: Any
) -> None:
    settings = replace(SETTINGS, **changes)
    write_measured(loaded, measurement(loaded, make, settings=settings, task=task), writer, silent)


def measurement(loaded: LoadedModel, make: Callable[[Evidence], Derived], **changes: Any) -> Measurement:
    usual = Measurement(
        records=records(loaded),
        targets=loaded.architecture.targets,
        sources=[source()],
        measures="gradients",
        settings=SETTINGS,
        make=make,
    )
    return replace(usual, **changes)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The matrices of every measurement, from now on."""
    calls: list[list[str]] = []

    def noted(loaded: LoadedModel, targets: Sequence[Target], *more: Any) -> Any:
        calls.append([target.name for target in targets])
        return measure_evidence(loaded, targets, *more)

    monkeypatch.setattr(module, "measure_evidence", noted)
    return calls


def test_every_matrix_gets_its_rule(loaded: LoadedModel, tmp_path: Path) -> None:
    method, seen = make_method(SETTINGS), []

    def make(evidence: Evidence) -> Derived:
        seen.append((evidence.name, evidence.task))
        return method.derive(evidence)

    writer = ArchiveWriter(tmp_path, torch.float32, {})
    write(loaded, writer, make, task=2)
    names = [target.name for target in loaded.architecture.targets]
    assert seen == [(name, 2) for name in names]
    found = {record.name: record for record in writer.all_records()}
    assert list(found) == names
    for name, record in records(loaded).items():
        assert replace(found[name], rule=record.rule, tensors={}) == record, "all other facts are those given"
        assert found[name].rule.shape == record.shape
    writer.close()


def test_it_goes_on_by_what_the_writer_has(loaded: LoadedModel, measured: list[list[str]], tmp_path: Path) -> None:
    method, names = make_method(SETTINGS), [target.name for target in loaded.architecture.targets]
    stop_at = names[10]  # in the second block

    def until(evidence: Evidence) -> Derived:
        if evidence.name == stop_at:
            raise KeyboardInterrupt
        return method.derive(evidence)

    killed = ArchiveWriter(tmp_path, torch.float32, {"a": 1}, max_shard_bytes=1)
    with pytest.raises(KeyboardInterrupt):
        write(loaded, killed, until)
    killed.close()
    again = ArchiveWriter(tmp_path, torch.float32, {"a": 1}, max_shard_bytes=1)
    again.resume()
    assert list(again.records) == names[:10]
    made: list[str] = []

    def noted(evidence: Evidence) -> Derived:
        made.append(evidence.name)
        return make_method(SETTINGS).derive(evidence)

    write(loaded, again, noted)
    assert measured == [names, names[7:]], "whole blocks, and those only that something is missing of"
    assert made == names[10:], "but nothing is made twice"
    write(loaded, again, noted)
    assert len(measured) == 2, "nothing is missing any more"
    assert made == names[10:]
    again.close()


def test_what_went_on_is_what_would_have_been(loaded: LoadedModel, tmp_path: Path) -> None:
    whole = ArchiveWriter(tmp_path, torch.float32, {})
    write(loaded, whole, make_method(SETTINGS).derive)
    (tmp_path / "parts").mkdir()
    parts = ArchiveWriter(tmp_path / "parts", torch.float32, {}, max_shard_bytes=1)
    first = loaded.architecture.targets[:3]
    write_measured(loaded, measurement(loaded, make_method(SETTINGS).derive, targets=first), parts, silent)
    parts.all_records()
    write(loaded, parts, make_method(SETTINGS).derive)
    for one, two in zip(whole.all_records(), parts.all_records(), strict=True):
        assert (one.name, one.rule, one.tensors) == (two.name, two.rule, two.tensors)
        if one.name not in {target.name for target in first}:  # these were weighed by fewer gradients
            for stored in one.tensors.values():
                if not stored.split(".weight.")[0].endswith(("q_proj", "k_proj", "v_proj")):
                    torch.testing.assert_close(whole.read(stored), parts.read(stored))
    whole.close()
    parts.close()


def test_what_goes_wrong_with_rows_is_said_of_the_rows(loaded: LoadedModel, tmp_path: Path) -> None:
    def wrong(evidence: Evidence) -> Derived:
        raise ValueError("the moment is not finite")

    writer = ArchiveWriter(tmp_path, torch.float32, {})
    with pytest.raises(DataError, match=r"calibration failed .the moment is not finite.; look at --data"):
        write(loaded, writer, wrong)
    writer.close()


class Deciding(Weights):
    """A method whose rules depend on each other: each learns how many there are."""

    def __init__(self, settings: AnalyzeSettings) -> None:
        super().__init__(settings)
        self.asked: list[tuple[list[Rule], list[float]]] = []
        self.read: list[Tensor] = []

    def decide(
        self, rules: Sequence[Rule], weights: Sequence[float], read: Callable[[int, str], Tensor]
    ) -> Sequence[Rule]:
        self.asked.append((list(rules), list(weights)))
        self.read = [read(i, "input") for i in range(len(rules))]
        return [replace(rule, retention=len(rules) + i) for i, rule in enumerate(rules)]  # type: ignore[type-var]


def filled(loaded: LoadedModel, method: Weights, directory: Path, size: int) -> ArchiveWriter:
    writer = ArchiveWriter(directory, torch.float32, {}, max_shard_bytes=size)
    for name, record in records(loaded).items():
        weight = loaded.checkpoint[record.tensor].double()
        writer.add(record, method.derive(Evidence(name, record.shape, lambda weight=weight: weight)))  # type: ignore[misc]
    return writer


@pytest.mark.parametrize("size", [1, 2**30])
def test_only_a_method_that_decides_is_asked(loaded: LoadedModel, size: int, tmp_path: Path) -> None:
    plain, deciding = Weights(AnalyzeSettings(preserve=0.5)), Deciding(AnalyzeSettings(preserve=0.5))
    assert not isinstance(plain, Decides)
    assert isinstance(deciding, Decides)
    writer = filled(loaded, plain, tmp_path, size)
    before = writer.all_records()
    decide(writer, plain, [1.0])
    assert writer.all_records() == before
    decide(writer, deciding, [1.0, 0.5])
    after = writer.all_records()
    ((rules, weights),) = deciding.asked
    assert rules == [record.rule for record in before]
    assert weights == [1.0, 0.5]
    assert [record.rule.retention for record in after] == [14 + i for i in range(14)]  # type: ignore[attr-defined]
    assert [replace(record, rule=old.rule) for record, old in zip(after, before, strict=True)] == before
    for found, record in zip(deciding.read, before, strict=True):
        assert torch.equal(found, writer.read(record.tensors["input"]))
    writer.close()


def test_what_is_shared_is_read_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method = make_method(SETTINGS)
    writer = ArchiveWriter(tmp_path, torch.float32, {}, max_shard_bytes=1)
    write(loaded, writer, method.derive)
    read: list[str] = []
    plain = ArchiveWriter.read
    monkeypatch.setattr(ArchiveWriter, "read", lambda self, name: read.append(name) or plain(self, name))
    closed = writer.all_records()
    assert not any(record.rule.shapes for record in closed), "until it is decided all is frozen"
    decide(writer, method, [1.0])
    assert len(read) == len(set(read))
    assert any(record.rule.shapes for record in writer.all_records())
    writer.close()

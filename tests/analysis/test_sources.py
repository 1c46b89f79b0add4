"""Archives with moments by their commands: analyze, train, verify, a second task, and what the archive then holds."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, factors, save_checkpoint, slowly, task_rows, write_rows
from torch import Tensor

from sculptor import Archive
from sculptor.analysis.calibration import measure_moments
from sculptor.analysis.sources import spread
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import Example, encode
from sculptor.data.rows import read_rows
from sculptor.methods.settings import Weighting
from sculptor.model.load import load_model
from sculptor.progress import silent

COVERS = ["sculptor.methods.moments"]
BUDGET = 0.7
TRAIN = ("--max-steps", 6, "--batch-size", 8, "--learning-rate", "1e-2", "--device", "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def unit_trace(moment: torch.Tensor) -> torch.Tensor:
    """The moment over its trace, float64."""
    return moment.double() / moment.double().trace()


def rows_of(path: Path, family: str, count: int = 24) -> Path:
    return write_rows(path, task_rows("text" if family == "bert" else "pairs", count))


def analyze(cli: Callable[..., Result], model: Path, output: Path, basis: str, data: object, *more: object) -> Archive:
    found = cli("analyze", model, "-o", output, "--basis", basis, "--data", data, "--device", "cpu", "--json", *more)
    assert found.code == 0, found.err
    assert found.json["basis"] == basis
    return Archive(output)


def train(cli: Callable[..., Result], model: Path, archive: Path, data: Path, output: Path, *more: object) -> Archive:
    found = cli("train", model, "--subspaces", archive, "--data", data, "-o", output, *TRAIN, *more)
    assert found.code == 0, found.err
    return Archive(output / "subspaces")


def verifies(cli: Callable[..., Result], base: Path, tuned: Path, archive: Path) -> None:
    found = cli("verify", base, tuned, "--subspaces", archive, "--device", "cpu", "--json")
    assert found.code == 0, found.out + found.err
    assert found.json["passed"]
    assert found.json["num_targets"] == len(Archive(archive))
    experts = any("experts" in name for name in Archive(archive))  # which few rows may leave alone
    assert found.json["num_changed"] == found.json["num_targets"] or experts


def has_budget(archive: Archive, budget: float) -> None:
    """At least the budget is free, in every matrix or in all together, more by less than one column of a row group."""
    sizes = [record.shape[0] * record.shape[1] for record in archive.values()]
    free = [record.rule.staircase.num_free for record in archive.values()]
    if archive.manifest.settings.basis == "curvature":
        sizes, free = [sum(sizes)], [sum(free)]
    for size, open_pairs, record in zip(sizes, free, archive.values(), strict=False):
        rows = (
            record.shape[0]
            if record.rule.output is None
            else max(r.shape[0] - r.shape[0] // 2 for r in archive.values())
        )
        assert budget - 1e-9 <= open_pairs / size < budget + (rows + 1) / size


def shapes(archive: Archive) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in archive.manifest.tensors.items()}


@pytest.mark.parametrize("family", ["llama", *slowly("t5", "gpt2", "bert", "mixtral")])
@pytest.mark.parametrize("basis", ["curvature", *slowly("inputs")])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_tasks_on_moments(cli: Callable[..., Result], tmp_path: Path, family: str, basis: str, dtype: str) -> None:
    model = save_checkpoint(tmp_path / "model", family, dtype=DTYPES[dtype], max_shard_size="30KB")
    calibration = rows_of(tmp_path / "calibration.jsonl", family, 12)
    first = rows_of(tmp_path / "first.jsonl", family)
    second = rows_of(tmp_path / "second.jsonl", family, 16)

    before = analyze(cli, model, tmp_path / "archive", basis, calibration, "--budget", BUDGET)
    assert before.method.terms.constraint == ("staircase" if basis == "curvature" else "input")
    has_budget(before, BUDGET)

    after = train(cli, model, before.path, first, tmp_path / "one")
    verifies(cli, model, tmp_path / "one", before.path)
    has_budget(after, BUDGET)
    assert [task.name for task in after.manifest.tasks] == ["analysis", "first"]
    assert after.manifest.tasks[1].details["carry"] == "merge"
    assert all(len(record.rule.traces) == 2 for record in after.values())

    # Only each task's profile is added: 65 numbers a side, which is next to nothing in a model of real size.
    profiled = {name for name in shapes(before) if name.endswith(".profiles")}
    assert profiled
    for name, shape in shapes(before).items():
        assert shapes(after)[name] == ((2, *shape[1:]) if name in profiled else shape)
    growth = sum(4 * shapes(before)[name][1] for name in profiled)
    assert after.num_bytes - growth == pytest.approx(before.num_bytes, rel=0.01)

    last = train(cli, tmp_path / "one", after.path, second, tmp_path / "two")
    verifies(cli, tmp_path / "one", tmp_path / "two", after.path)
    has_budget(last, BUDGET)
    inspected = cli("inspect", last.path, "--model", tmp_path / "two", "--json")
    assert inspected.code == 0, inspected.err
    assert inspected.json["belongs"] is True
    assert [task["name"] for task in inspected.json["tasks"]] == ["analysis", "first", "second"]
    loaded = load_model(open_checkpoint(tmp_path / "two"), torch.device("cpu"))
    assert open_checkpoint(tmp_path / "two").infos[next(iter(last))].dtype == DTYPES[dtype]
    assert loaded.architecture.model_class == last.manifest.model_class


def examples_of(checkpoint: Path, data: Path) -> tuple[Example, ...]:
    loaded = load_model(open_checkpoint(checkpoint), torch.device("cpu"))
    return encode(read_rows([data]), loaded.tokenizer, loaded.kind, 64).examples


def unit_moments(checkpoint: Path, data: Path, gradients: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unit-trace moments (by input group, by matrix) of all rows on a checkpoint."""
    loaded = load_model(open_checkpoint(checkpoint), torch.device("cpu"))
    examples = encode(
        read_rows([data]), loaded.tokenizer, loaded.kind, 1024 if loaded.kind == "seq2seq" else 64
    ).examples
    bar = silent(total=1, desc="", unit="")
    weighting: Weighting = "gradients" if gradients else "tokens"
    found = measure_moments(
        loaded, loaded.architecture.targets, examples, gradients=gradients, weighting=weighting, bar=bar
    )
    return {k: unit_trace(v) for k, v in found.inputs.items()}, {k: unit_trace(v) for k, v in found.outputs.items()}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", *slowly("gpt2", "t5", "bert")])
@pytest.mark.parametrize(("basis", "weight"), [("curvature", 1.0), ("curvature", 2.5), ("inputs", 1.0)])
def test_a_finished_task_adds_its_moments(
    cli: Callable[..., Result], tmp_path: Path, family: str, basis: str, weight: float
) -> None:
    """New factor = old factor + weight * the task's moment of unit trace, measured on the trained model."""
    model = save_checkpoint(tmp_path / "model", family)
    calibration, data = (
        rows_of(tmp_path / "calibration.jsonl", family, 10),
        rows_of(tmp_path / "task.jsonl", family, 16),
    )
    more = ("--keep", 1.0, "--budget", 0.5)
    old = analyze(cli, model, tmp_path / "archive", basis, calibration, *more)
    new = train(cli, model, old.path, data, tmp_path / "tuned", "--memory-weight", weight)
    at_analysis = unit_moments(model, calibration, basis == "curvature")
    at_task = unit_moments(tmp_path / "tuned", data, basis == "curvature")
    for name, record in new.items():
        for archive, expected_trace in ((old, 1.0), (new, 1.0 + weight)):
            for factor in factors(archive, name):
                assert factor is None or factor.trace == pytest.approx(expected_trace, rel=1e-6)
        group = record.input_group
        before, after = factors(old, name), factors(new, name)
        close(before[1].dense(), at_analysis[0][group])
        close(after[1].dense(), before[1].dense() + weight * at_task[0][group])
        assert (after[0] is None) == (basis == "inputs")
        if before[0] is not None and after[0] is not None:
            close(before[0].dense(), at_analysis[1][name])
            close(after[0].dense(), before[0].dense() + weight * at_task[1][name])


def test_every_file_counts_the_same(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Two sources: the sum of their moments, each of unit trace, whatever their sizes; a source is a task's weight."""
    model = save_checkpoint(tmp_path / "model")
    small, large = rows_of(tmp_path / "small.jsonl", "llama", 4), rows_of(tmp_path / "large.jsonl", "llama", 30)
    archive = analyze(cli, model, tmp_path / "a", "curvature", small, "--data", large, "--keep", 1.0, "--budget", 0.5)
    parts = [unit_moments(model, data, True) for data in (small, large)]
    assert archive.manifest.tasks[0].weights == (1.0, 1.0)
    for name, record in archive.items():
        output, input = factors(archive, name)
        assert output is not None
        close(input.dense(), parts[0][0][record.input_group] + parts[1][0][record.input_group])
        close(output.dense(), parts[0][1][name] + parts[1][1][name])


@pytest.mark.parametrize("basis", ["curvature", "inputs"])
def test_the_same_analysis_gives_the_same_archive(cli: Callable[..., Result], tmp_path: Path, basis: str) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    first, second = (analyze(cli, model, tmp_path / name, basis, data) for name in ("a", "b"))
    assert (first.path / "archive.json").read_bytes() == (second.path / "archive.json").read_bytes()
    for name in first.manifest.files:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_the_same_training_gives_the_same_archive(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    analyze(cli, model, tmp_path / "a", "curvature", data)
    first, second = (train(cli, model, tmp_path / "a", data, tmp_path / name) for name in ("one", "two"))
    assert (first.path / "archive.json").read_bytes() == (second.path / "archive.json").read_bytes()


@pytest.mark.parametrize("carry", ["accumulate", "retake"])
def test_moments_go_on_by_merging_only(cli: Callable[..., Result], tmp_path: Path, carry: str) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    archive = analyze(cli, model, tmp_path / "a", "curvature", data)
    found = cli("train", model, "--subspaces", archive.path, "--data", data, "-o", tmp_path / "b", "--carry", carry)
    refused(found, f"--carry {carry}: an archive with basis curvature goes on by merge")
    assert not (tmp_path / "b").exists()


def test_directions_of_weights_cannot_be_merged(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    assert cli("analyze", model, "-o", tmp_path / "a", "--preserve", 0.5, "--device", "cpu").code == 0
    found = cli("train", model, "--subspaces", tmp_path / "a", "--data", data, "-o", tmp_path / "b", "--carry", "merge")
    refused(found, "--carry merge: an archive with basis weights goes on by accumulate or retake")
    assert not (tmp_path / "b").exists()


def refused(found: Result, *needles: str, code: int = 2) -> None:
    assert found.code == code, (found.code, found.err)
    lines = found.err.strip().splitlines()
    assert len(lines) == 1, found.err
    assert all(needle in lines[0] for needle in needles), lines[0]


@pytest.mark.parametrize(("basis", "least"), [("curvature", "0.562"), ("inputs", "0.750")])
def test_too_small_a_budget_names_what_is_kept(
    cli: Callable[..., Result], tmp_path: Path, basis: str, least: str
) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    more = ("--basis", basis, "--data", data, "--budget", 0.3, "--keep", 0.25, "--device", "cpu")
    found = cli("analyze", model, "-o", tmp_path / "a", *more)
    refused(found, "--budget 0.3", "--keep 0.25", least)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.partial").exists()


def test_the_whole_budget_freezes_nothing(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    archive = analyze(cli, model, tmp_path / "a", "curvature", data, "--budget", 1.0)
    assert all(record.rule.staircase.num_frozen == 0 and record.rule.energy == 0 for record in archive.values())


def test_one_threshold_for_the_whole_model(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Together the budget is free, one by one it is not; a second task keeps that."""
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    archive = analyze(cli, model, tmp_path / "a", "curvature", data, "--budget", 0.7, "--threshold", "model")
    for found in (archive, train(cli, model, archive.path, data, tmp_path / "b")):
        pairs = sum(record.shape[0] * record.shape[1] for record in found.values())
        free = sum(record.rule.staircase.num_free for record in found.values()) / pairs
        assert 0.7 <= free + 1e-9 < 0.71
        assert len({round(record.rule.staircase.frozen_share, 2) for record in found.values()}) > 3
    verifies(cli, model, tmp_path / "b", archive.path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--fisher", "sampled"), ("--weighting", "tokens"), ("--row-groups", 1)])
def test_other_measures_verify_too(cli: Callable[..., Result], tmp_path: Path, options: tuple[object, ...]) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    plain = analyze(cli, model, tmp_path / "plain", "curvature", data)
    archive = analyze(cli, model, tmp_path / "a", "curvature", data, *options)
    assert {name: record.rule.steps for name, record in archive.items()} != {n: r.rule.steps for n, r in plain.items()}
    after = train(cli, model, archive.path, data, tmp_path / "b")
    verifies(cli, model, tmp_path / "b", archive.path)
    assert after.manifest.settings == archive.manifest.settings


@pytest.mark.parametrize("basis", ["curvature", *slowly("inputs")])
def test_a_causal_model_calibrates_on_itself(cli: Callable[..., Result], tmp_path: Path, basis: str) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    more = ("--calibration-tokens", 300)
    archive = analyze(cli, model, tmp_path / "a", basis, "self", *more)
    again = analyze(cli, model, tmp_path / "b", basis, "self", *more)
    other = analyze(cli, model, tmp_path / "c", basis, "self", "--seed", 1, *more)
    assert archive.manifest.tensors == again.manifest.tensors != other.manifest.tensors
    has_budget(archive, 0.6)
    after = train(cli, model, archive.path, data, tmp_path / "tuned")
    verifies(cli, model, tmp_path / "tuned", archive.path)
    assert [task.name for task in after.manifest.tasks] == ["analysis", "task"]


def test_what_the_model_says_beside_a_file(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    more = ("--calibration-tokens", 300)
    both = analyze(cli, model, tmp_path / "a", "inputs", data, "--data", "self", *more)
    assert both.manifest.tasks[0].weights == (1.0, 1.0)
    alone = analyze(cli, model, tmp_path / "b", "inputs", data, *more)
    assert both.manifest.tensors != alone.manifest.tensors


@pytest.mark.parametrize(
    ("family", "needle"), [("bert", "only a causal model can sample text"), ("t5", "only a causal model can sample")]
)
def test_other_models_do_not_calibrate_on_themselves(
    cli: Callable[..., Result], tmp_path: Path, family: str, needle: str
) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    more = ("--basis", "curvature", "--data", "self", "--device", "cpu")
    refused(cli("analyze", model, "-o", tmp_path / "a", *more), needle, code=1)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.partial").exists()


def test_chat_without_a_template_is_refused(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    more = ("--basis", "curvature", "--data", "self", "--chat", "--device", "cpu")
    refused(cli("analyze", model, "-o", tmp_path / "a", *more), "--chat needs a chat template", code=1)


def test_a_decoder_reads_its_own_labels(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, data = save_checkpoint(tmp_path / "model", "t5"), rows_of(tmp_path / "task.jsonl", "t5")
    more = ("--basis", "curvature", "--data", data, "--fisher", "sampled", "--device", "cpu")
    refused(cli("analyze", model, "-o", tmp_path / "a", *more), "--fisher sampled", "encoder-decoder")


def test_memory_rows_are_spread_over_the_task(cli: Callable[..., Result], tmp_path: Path) -> None:
    """One row in the middle, instead of all: another archive, but the same model."""
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    archive = analyze(cli, model, tmp_path / "a", "inputs", data, "--keep", 1.0)
    few = train(cli, model, archive.path, data, tmp_path / "few", "--memory-rows", 1)
    middle = write_rows(tmp_path / "middle.jsonl", [task_rows()[12]])
    task = unit_moments(tmp_path / "few", middle, False)[0]
    for name, record in few.items():
        close(factors(few, name)[1].dense(), factors(archive, name)[1].dense() + task[record.input_group])


def test_rows_are_spread_evenly_up_to_the_tokens(tmp_path: Path) -> None:
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama", 40)
    examples = examples_of(model, data)
    length = examples[0].length
    assert {example.length for example in examples} == {length}
    assert spread(examples, 40 * length) == examples
    assert spread(examples, 10 * length) == examples[2::4]
    assert spread(examples, 1) == (examples[20],)


@pytest.mark.parametrize("basis", ["curvature", "inputs"])
def test_energy_is_the_curvature_that_is_protected(cli: Callable[..., Result], tmp_path: Path, basis: str) -> None:
    """The record's share against the sum of frozen eigenvalue pairs, by hand."""
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    archive = analyze(cli, model, tmp_path / "a", basis, data)
    for name, record in archive.items():
        output, input = factors(archive, name)
        m, n = record.shape
        g = torch.ones(m, dtype=torch.float64) if output is None else output.spectrum()
        pairs = g[:, None] * input.spectrum()[None]
        frozen = torch.zeros(m, n, dtype=torch.bool)
        for start, stop, reach in record.rule.staircase.groups:
            frozen[start:stop, :reach] = True
        assert record.rule.energy == pytest.approx(float(pairs[frozen].sum() / pairs.sum()), rel=1e-6)
        assert record.rule.energy > record.rule.staircase.frozen_share


def test_a_moment_says_of_which_task_it_is(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Profiles: a row per task, each summing to its trace, and traces that are the task's own."""
    model, data = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "task.jsonl", "llama")
    archive = analyze(cli, model, tmp_path / "a", "curvature", data)
    after = train(cli, model, archive.path, data, tmp_path / "b", "--memory-weight", 3)
    for name, record in after.items():
        assert record.rule.traces[0] == archive[name].rule.traces[0]
        assert all(value > 0 for pair in record.rule.traces for value in pair)
        for side in ("output", "input"):
            profiles = after.read(name).tensors[f"{side}.profiles"]
            assert profiles.shape[0] == 2
            torch.testing.assert_close(profiles.sum(dim=1), torch.tensor([1.0, 3.0]), rtol=1e-4, atol=0)
    record = json.loads((tmp_path / "b" / "sculptor.json").read_text())
    assert record["settings"]["memory_weight"] == 3


def test_an_earlier_archive_reports_a_leak_and_what_was_kept(cli: Callable[..., Result], tmp_path: Path) -> None:
    """The exact guarantee is for the archive a task was trained with."""
    model, rows = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "rows.jsonl", "llama")
    other = write_rows(tmp_path / "other.jsonl", task_rows("text"))
    analyze(cli, model, tmp_path / "a", "curvature", rows)
    train(cli, model, tmp_path / "a", rows, tmp_path / "first")
    train(cli, tmp_path / "first", tmp_path / "first" / "subspaces", other, tmp_path / "second")
    found = cli("verify", model, tmp_path / "second", "--subspaces", tmp_path / "a", "--device", "cpu")
    assert found.code == 1
    assert "curvature spared" in found.out
    assert "this one is of an earlier state" in found.out
    told = cli("verify", model, tmp_path / "second", "--subspaces", tmp_path / "a", "--device", "cpu", "--json").json
    assert not told["passed"]
    assert told["leak"] > 1e-3
    assert 0 < told["kept"] < 1
    own = cli("verify", tmp_path / "first", tmp_path / "second", "--subspaces", tmp_path / "first" / "subspaces")
    assert own.code == 0, own.out


def test_inspect_tells_how_tasks_share_what_is_protected(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "rows.jsonl", "llama")
    analyze(cli, model, tmp_path / "a", "curvature", rows)
    other = write_rows(tmp_path / "other.jsonl", task_rows("text"))
    train(cli, model, tmp_path / "a", other, tmp_path / "first", "--memory-weight", 2)
    found = cli("inspect", tmp_path / "first" / "subspaces", "--json").json
    analysis, task = found["shares"]
    assert (analysis["name"], task["name"]) == ("analysis", "other")
    assert analysis["own"] + task["own"] == pytest.approx(1)
    assert task["own"] > analysis["own"]  # of twice the weight
    for i, share in enumerate((analysis, task)):
        assert 0 < share["protected"] < 1
        assert share["overlaps"][i] == pytest.approx(1)
        assert 0 < share["overlaps"][1 - i] < 1
    text = cli("inspect", tmp_path / "first" / "subspaces").out
    assert "1 other" in text
    assert "free capacity left: 6" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100


def test_an_analysis_goes_on_behind_its_last_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after some matrices and taken up again, it gives the same archive as in one go."""
    from sculptor import AnalyzeSettings
    from sculptor import analyze as run
    from sculptor.archive.shards import ShardWriter
    from sculptor.archive.writer import ArchiveWriter

    model, rows = save_checkpoint(tmp_path / "model"), rows_of(tmp_path / "rows.jsonl", "llama")
    settings = AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu")
    plain, write, added = ArchiveWriter.__init__, ShardWriter.add, itertools.count()

    def in_small_shards(self: ArchiveWriter, *arguments: object) -> None:
        plain(self, *arguments, max_shard_bytes=8000)  # type: ignore[arg-type]

    def stopped(self: ShardWriter, *arguments: object) -> None:
        if next(added) == 9:
            raise KeyboardInterrupt
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ArchiveWriter, "__init__", in_small_shards)
    run(model, tmp_path / "whole", settings)
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "parts", settings)
    assert (tmp_path / "parts.partial" / "progress.json").is_file()
    run(model, tmp_path / "parts", settings, resume=True)
    whole, parts = Archive(tmp_path / "whole"), Archive(tmp_path / "parts")
    assert dict(whole) == dict(parts)
    for name, stored in whole.manifest.tensors.items():
        assert parts.manifest.tensors[name].sha256 == stored.sha256, name


def test_every_source_weighs_the_same_between_matrices(tmp_path: Path) -> None:
    """One threshold for the model: a source with a larger loss does not decide alone which matrices matter."""
    from sculptor.methods.moments import curvature_scales

    first = ((1.0, 1.0), (1.0, 100.0)), True
    second = ((1.0, 1.0), (1.0, 300.0)), True
    assert curvature_scales([first, second], [1.0, 1.0]) == pytest.approx([1.5, 2.5])
    assert curvature_scales([first, second], [1.0, 2.0]) == pytest.approx([2.0, 4.0])

"""Sculptor's own kinds of rules beside staircases go through every job: resident, streamed, stopped, merged, carried on."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import losses_of_a_plain_loop, save_checkpoint, slowly, task_rows, write_rows
from safetensors.torch import load_file, save_file

import sculptor
from sculptor.archive.places import OPENED
from sculptor.benchmark.plan import RULES_OF
from sculptor.errors import ArchiveError, OutputError, SettingsError, Stopped
from sculptor.methods.kinds import KINDS, TABLE, make_method
from sculptor.methods.method import carries_of
from sculptor.methods.rule import OuterProduct, Rule, Working, num_free
from sculptor.methods.settings import RULES, AnalyzeSettings, Basis
from sculptor.numerics.staircase import Constraint

COVERS = [
    "sculptor.analysis.lineage",
    "sculptor.jobs.opening",
    "sculptor.methods.kinds",
    "sculptor.methods.method",
    "sculptor.methods.rule",
]
CPU64 = Working(torch.device("cpu"), torch.float64)
# What an analysis is told; `data` stands for rows.
CASES: dict[str, dict[str, Any]] = {
    "lowrank": {"rule": "lowrank", "rank": 4},
    "lowrank-data": {"rule": "lowrank", "rank": 4, "energy": 0.6, "data": True},
    "lowrank-random": {"rule": "lowrank", "rank": 4, "basis": "random"},
    "mask": {"rule": "mask", "free": 0.2},
    "mask-random": {"rule": "mask", "basis": "random"},
    "rotation": {"rule": "rotation", "block_size": 5},
    "rotation-inside": {"rule": "rotation", "block_size": 8, "preserve": 0.4},
    "rotation-free": {"rule": "rotation", "block_size": 8, "preserve": 0.8, "basis": "random"},
}
OPENING = ("lowrank", "lowrank-data")
MAIN = ("lowrank", "mask", "rotation-inside")
each = pytest.mark.parametrize("case", [*MAIN, *slowly(*(case for case in CASES if case not in MAIN))])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows."""
    path = tmp_path_factory.mktemp("rules")
    save_checkpoint(path / "model")
    write_rows(path / "rows.jsonl", task_rows())
    return path


@pytest.fixture
def made(place: Path, request: pytest.FixtureRequest) -> Path:
    """The same, with the archives that a test asks for."""
    chosen = getattr(request.node, "callspec", None)
    case = chosen.params.get("case") if chosen else None
    for name in [case] if case else MAIN:
        if not (place / name).exists():
            sculptor.analyze(place / "model", place / name, analysis(name, place))
    return place


def analysis(case: str, path: Path, **changes: Any) -> AnalyzeSettings:
    values = {"device": "cpu"} | CASES[case] | changes
    if values.get("data"):
        values["data"] = (str(path / "rows.jsonl"),)
    return AnalyzeSettings(**values)


def settings(**changes: Any) -> sculptor.TrainSettings:
    values: dict[str, Any] = {"max_steps": 4, "batch_size": 8, "micro_batch_size": 4, "device": "cpu", "clip": 0.5}
    return sculptor.TrainSettings(**(values | changes))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def trained(made: Path, case: str, output: Path, **changes: Any) -> Any:
    return sculptor.train(made / "model", made / case, [made / "rows.jsonl"], output, settings(**changes))


@each
def test_streamed_is_resident_and_two_tasks_verify(made: Path, case: str, tmp_path: Path) -> None:
    tuned = {}
    for offload in ("none", "bases", "cpu", "disk"):
        report = trained(made, case, tmp_path / offload, offload=offload)
        assert report.loop.last_loss < report.loop.first_loss
        assert report.num_trainable == sculptor.Archive(made / case).num_free
        tuned[offload] = weights(tmp_path / offload)
    for name, tensor in tuned["none"].items():
        assert torch.equal(tensor, tuned["cpu"][name])
        assert torch.equal(tensor, tuned["disk"][name])
    check_pair(made / "model", tmp_path / "none", made / case, case)

    carried = tmp_path / "none" / "subspaces"
    inspected = sculptor.inspect(carried, model=tmp_path / "none")
    assert inspected.rule == CASES[case]["rule"]
    assert [task.name for task in inspected.tasks] == ["analysis", "rows"]
    sculptor.train(tmp_path / "none", carried, [made / "rows.jsonl"], tmp_path / "two", settings())
    check_pair(tmp_path / "none", tmp_path / "two", carried, case)


def check_pair(base: Path, tuned: Path, archive: Path, case: str) -> None:
    """`verify`, and the properties of the written files, in float64 and by hand."""
    opened = tuned / OPENED
    assert opened.is_dir() == (case in OPENING)
    found = sculptor.verify(base, tuned, opened if case in OPENING else archive, device="cpu")
    assert found.passed
    assert found.num_changed == found.num_targets == len(sculptor.Archive(archive))
    rule = CASES[case]["rule"]
    before, after, opened_archive = weights(base), weights(tuned), sculptor.Archive(archive)
    for name in opened_archive:
        PROPERTIES[rule](opened_archive.read(name), before[name], after[name])


def check_mask(entry: Any, before: torch.Tensor, after: torch.Tensor) -> None:
    """Frozen entries are byte-identical."""
    mask = entry.rule.mask(entry.tensors)
    assert torch.equal(before[~mask].view(torch.int32), after[~mask].view(torch.int32))
    assert float((after != before)[mask].float().mean()) > 0.9


def check_rotation(entry: Any, before: torch.Tensor, after: torch.Tensor) -> None:
    """W'^T W' = W^T W, and protected outputs have not moved."""
    w, new = before.double(), after.double()
    assert float((new - w).norm()) > 1e-3 * float(w.norm())
    assert float((new.T @ new - w.T @ w).norm()) < 1e-6 * float((w.T @ w).norm())
    protected, _ = entry.rule.directions(entry.tensors)
    if protected is not None:
        assert protected.shape[1] == entry.rule.protected > 0
        assert float((protected.double().T @ (new - w)).norm()) < 1e-6 * float(w.norm())


def check_lowrank(entry: Any, before: torch.Tensor, after: torch.Tensor) -> None:
    """dW m = 0 for every m in the memory, and dW has no more directions than asked for."""
    update = after.double() - before.double()
    values = torch.linalg.svdvals(update)
    assert float(values[entry.rule.rank :].norm()) < 1e-5 * float(values[0])
    _, memory = entry.rule.directions(entry.tensors)
    if memory is not None:
        assert memory.shape[1] == entry.rule.protected > 0
        assert float((update @ memory.double()).norm()) < 1e-5 * float(update.norm())


PROPERTIES = {"mask": check_mask, "rotation": check_rotation, "lowrank": check_lowrank}


@pytest.mark.parametrize("case", ["mask"])
def test_small_weights_begin_where_they_are_signs_and_all(made: Path, case: str, tmp_path: Path) -> None:
    trained(made, case, tmp_path / "out", max_steps=2, relative_rate=1e-4)
    before, after, archive = weights(made / "model"), weights(tmp_path / "out"), sculptor.Archive(made / case)
    for name, record in archive.items():
        assert record.base_rms is not None
        assert float((after[name] - before[name]).abs().max()) < 3e-4 * record.base_rms
        seen = before[name].abs() > 3e-4 * record.base_rms
        assert torch.equal(after[name].sign()[seen], before[name].sign()[seen])


@pytest.mark.slow
@pytest.mark.parametrize("case", MAIN)
@pytest.mark.parametrize("offload", ["none", *slowly("disk")])
def test_a_stopped_run_goes_on_bit_for_bit(made: Path, case: str, offload: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"offload": offload, "save_every": 2, "max_steps": 5}
    trained(made, case, tmp_path / "whole", **changes)
    polls = iter([None, None, 15])
    job = [made / "model", made / case, [made / "rows.jsonl"], tmp_path / "cut", settings(**changes)]
    with pytest.raises(Stopped):
        sculptor.train(*job, stop=lambda: next(polls))
    sculptor.train(*job, resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@each
def test_verify_sees_what_the_rule_forbids(made: Path, case: str, tmp_path: Path, generator: torch.Generator) -> None:
    trained(made, case, tmp_path / "out", max_steps=2)
    tensors = weights(tmp_path / "out")
    archive = tmp_path / "out" / OPENED if case in OPENING else made / case
    name = list(sculptor.Archive(archive))[1]
    tensors[name] += 0.01 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    found = sculptor.verify(made / "model", tmp_path / "out", archive, device="cpu")
    assert not found.passed
    assert [matrix.name for matrix in found.matrices if not matrix.holds] == [name]


@pytest.mark.parametrize("case", MAIN)
def test_bf16_checkpoints_and_transposed_layers(made: Path, case: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "gpt2", "gpt2", dtype=torch.bfloat16)
    sculptor.analyze(tmp_path / "gpt2", tmp_path / "a", analysis(case, made))
    sculptor.train(tmp_path / "gpt2", tmp_path / "a", [made / "rows.jsonl"], tmp_path / "t", settings(max_steps=2))
    archive = tmp_path / "t" / OPENED if case in OPENING else tmp_path / "a"
    assert sculptor.verify(tmp_path / "gpt2", tmp_path / "t", archive, device="cpu").passed


@pytest.mark.parametrize("case", ["lowrank-random", "mask", "rotation-inside"])
def test_a_loop_of_ones_own(made: Path, case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "model")
    sculptor.protect(model, made / case)
    losses = losses_of_a_plain_loop(model)
    assert losses[-1] < losses[0]
    sculptor.merge(model).save_pretrained(tmp_path / "merged")
    assert sculptor.verify(made / "model", tmp_path / "merged", made / case, device="cpu").passed


def test_directions_that_wait_for_rows_are_asked_for(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "model")
    with pytest.raises(ArchiveError, match="directions follow a task's rows with --rule lowrank"):
        sculptor.protect(model, made / "lowrank")


def entries_of(made: Path, case: str, tmp_path: Path) -> list[Any]:
    """Of four matrices, opened where that is needed."""
    path = made / case
    if case in OPENING:
        trained(made, case, tmp_path / "opened", max_steps=1)
        path = tmp_path / "opened" / OPENED
    archive = sculptor.Archive(path)
    return [archive.read(name) for name in list(archive)[:4]]


@each
def test_gradients_are_those_of_the_update(made: Path, case: str, tmp_path: Path, generator: torch.Generator) -> None:
    """Against autograd through the update, in float64; for one matrix and for a stack of two."""
    for entry in entries_of(made, case, tmp_path):
        rule: Rule = entry.rule
        m, n = rule.shape
        prepared = rule.prepare(entry.tensors, CPU64).tensors
        for lead in ((), (2,)):
            tensors = {name: tensor.expand(*lead, *tensor.shape) for name, tensor in prepared.items()}
            weight = torch.randn(*lead, m, n, dtype=torch.float64, generator=generator)
            values = [torch.randn(*lead, *shape, dtype=torch.float64, generator=generator) for shape in rule.shapes]
            x, dy = (torch.randn(*lead, 6, d, dtype=torch.float64, generator=generator) for d in (n, m))
            asked = [a.clone().requires_grad_(True) for a in values]
            expected = torch.autograd.grad((rule.update(weight, tensors, asked) * (dy.mT @ x)).sum(), asked)
            for gradient in (dy.mT @ x, OuterProduct(x, dy)):
                for a, b in zip(rule.project(weight, tensors, values, gradient), expected, strict=True):
                    assert a.is_contiguous()
                    torch.testing.assert_close(a, b)
            assert not bool(rule.update(weight, tensors, [torch.zeros_like(a) for a in values]).any())
        assert num_free(rule) == sum(torch.Size(shape).numel() for shape in rule.shapes)


@each
def test_what_an_estimate_plans_is_what_an_archive_has(made: Path, case: str) -> None:
    archive = sculptor.Archive(made / case)
    method: Any = make_method(analysis(case, made))
    for record in archive.values():
        assert method.plan(record.shape).shapes == record.rule.shapes
    told = {name: value for name, value in CASES[case].items() if name not in ("data", "energy", "basis")}
    planned = sculptor.estimate(made / "model", sculptor.EstimateSettings(**told, tflops=1, disk=1, device="cpu"))
    real = sculptor.estimate(
        made / "model", sculptor.EstimateSettings(tflops=1, disk=1, device="cpu"), subspaces=made / case
    )
    assert planned.num_trainable == real.num_trainable == archive.num_free
    if case not in OPENING:
        assert planned.archive_bytes == archive.num_bytes - sum(
            (archive.path / name).stat().st_size - stored for name, stored in stored_bytes(archive).items()
        )


def stored_bytes(archive: sculptor.Archive) -> dict[str, int]:
    """Of tensors, by shard."""
    found: dict[str, int] = {}
    for stored in archive.manifest.tensors.values():
        size = getattr(torch, stored.dtype).itemsize * torch.Size(stored.shape).numel()
        found[stored.file] = found.get(stored.file, 0) + size
    return found


def test_the_table_has_every_kind_and_the_command_line_too() -> None:
    assert tuple(TABLE) == RULES == tuple(KINDS)
    assert all(rule in RULES for rule, _ in RULES_OF.values())
    for rule, rows in TABLE.items():
        assert set(rows) <= set(get_args(Basis))
        assert AnalyzeSettings(rule=rule).resolved_basis in rows


def test_the_table_is_what_methods_take() -> None:
    needed: dict[str, dict[str, Any]] = {"staircase": {"data": ("rows",)}, "rotation": {"preserve": 0.5}}
    for rule, rows in TABLE.items():
        for basis, row in rows.items():
            told = {} if rule == "staircase" and basis in ("weights", "random") else needed.get(rule, {})
            method = make_method(AnalyzeSettings(rule=rule, basis=basis, **told))
            assert carries_of(method) == row.carries
            for constraint in get_args(Constraint):
                settings = AnalyzeSettings(rule=rule, basis=basis, constraint=constraint, **told)
                if constraint in row.constraints:
                    make_method(settings)
                else:
                    with pytest.raises(SettingsError, match="--constraint"):
                        make_method(settings)


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    found = {
        (rule, basis): (constraint, carries)
        for rule, basis, constraint, carries in re.findall(
            r"^\| `(\w+)` \| `(\w+)` \| ([^|]+?) \| ([^|]+?) \|", text, re.MULTILINE
        )
    }
    expected = {
        (rule, basis): (
            ", ".join(f"`{name}`" for name in row.constraints) or "-",
            ", ".join(f"`{name}`" for name in row.carries),
        )
        for rule, rows in TABLE.items()
        for basis, row in rows.items()
    }
    assert found == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"rule": "mask", "basis": "curvature"},
            "--basis curvature does not go with --rule mask: use weights or random",
        ),
        (
            {"rule": "lowrank", "basis": "weights"},
            "--basis weights does not go with --rule lowrank: use inputs or random",
        ),
        (
            {"rule": "rotation", "basis": "inputs"},
            "--basis inputs does not go with --rule rotation: use weights or random",
        ),
        ({"rule": "mask", "constraint": "input"}, "--constraint without effect with --rule mask"),
        ({"rule": "rotation", "constraint": "core"}, "--constraint without effect with --rule rotation"),
        ({"rule": "mask", "rank": 4}, "--rank without effect with --rule mask; --rank goes with lowrank"),
        ({"free": 0.2}, "--free without effect with --rule staircase; --free goes with mask"),
        ({"block_size": 8}, "--block-size without effect with --rule staircase; --block-size goes with rotation"),
        ({"rule": "lowrank", "budget": 0.5}, "--budget without effect with --rule lowrank"),
        ({"rule": "lowrank", "preserve": 0.5}, "--preserve without effect with --rule lowrank"),
        ({"rule": "lowrank", "calibration_tokens": 9}, "--calibration-tokens without effect: there is no --data"),
        ({"rule": "mask", "dtype": "bfloat16"}, "--dtype without effect with --rule mask"),
        ({"rule": "mask", "data": ("a",)}, "--data without effect with --rule mask"),
        (
            {"rule": "rotation", "dtype": "bfloat16"},
            "--dtype without effect with --rule rotation: --preserve protects no",
        ),
        ({"rule": "rotation", "basis": "random"}, "--basis random without effect with --rule rotation: --preserve"),
        ({"rule": "rotation", "preserve": 1.0}, "--preserve 1: no direction would be left to train"),
        ({"rule": "rotation", "block_size": 1}, "--block-size 1: expected at least 2"),
        ({"rule": "mask", "free": 0.0}, r"--free 0\.0: expected more than 0"),
        ({"rule": "lowrank", "rank": 0}, "--rank 0: expected at least 1"),
        ({"rule": "lowrank", "energy": 1.5}, r"--energy 1\.5: expected at most 1"),
    ],
)
def test_what_does_not_go_together_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        make_method(AnalyzeSettings(**wrong))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_rank_above_the_inputs_is_refused() -> None:
    with pytest.raises(SettingsError, match="--rank 64: a matrix has 32 inputs"):
        make_method(AnalyzeSettings(rule="lowrank", rank=64), shapes=[(100, 48), (48, 32)])


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "mask",
            {"carry": "merge"},
            r"--carry merge: an archive with rule mask goes on by retake or accumulate or keep",
        ),
        (
            "rotation",
            {"carry": "retake"},
            r"--carry retake: an archive with rule rotation goes on by keep or accumulate",
        ),
        ("lowrank", {"carry": "retake"}, r"--carry retake: an archive with rule lowrank goes on by accumulate or keep"),
        ("lowrank", {"memory_weight": 2.0}, r"--memory-weight without effect: an archive with rule lowrank adds up no"),
        ("mask", {"memory_rows": 5}, r"--memory-rows without effect: an archive with rule mask has no moments"),
        ("rotation", {"soften": 1.0}, r"--soften without effect: an archive with rule rotation has no moments"),
    ],
)
def test_how_rules_go_on_is_checked(made: Path, case: str, changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        trained(made, case, tmp_path / "out", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", RULES_OF)
def test_continual(made: Path, method: Any, tmp_path: Path) -> None:
    rows = str(made / "rows.jsonl")
    tasks = "".join(f'[[tasks]]\nname = "{name}"\ndata = "{rows}"\ntest = "{rows}"\n' for name in ("one", "two"))
    train = '[train]\nmax_steps = 3\ndevice = "cpu"\n[evaluate]\nexact_match = false\n[adapter]\nblock_size = 8\n'
    (tmp_path / "plan.toml").write_text(f'model = "{made / "model"}"\n[analyze]\ndevice = "cpu"\n{train}{tasks}')
    report = sculptor.continual(tmp_path / "plan.toml", tmp_path / "run", method=method)
    assert len(report.matrix) == 3
    archive = sculptor.Archive(tmp_path / "run" / "model" / "subspaces")
    assert archive.manifest.settings.rule == RULES_OF[method][0]
    assert [task.kind for task in archive.manifest.tasks] == ["analysis", "training", "training"]


@pytest.mark.parametrize("case", ["lowrank"])
def test_what_other_rows_opened_is_not_taken_up(
    made: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed between its rules were opened and its first state, with something else at --resume."""
    from sculptor.tasks import train as task

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    other = write_rows(tmp_path / "other.jsonl", [row | {"prompt": "w3 w4 w5"} for row in task_rows()])
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(task, "_run", killed)
        patched.setattr("sculptor.checkpoint.staging.discard", lambda _: None)  # as SIGKILL leaves it
        with pytest.raises(Killed):
            sculptor.train(made / "model", made / case, [made / "rows.jsonl"], out, settings())
    assert (tmp_path / "out.partial" / "opened" / "archive.json").is_file()
    with pytest.raises(
        OutputError, match=r"left by a run with other inputs or settings \(rows; the data files hold other"
    ):
        sculptor.train(made / "model", made / case, [other], out, settings(), resume=True)
    sculptor.train(made / "model", made / case, [made / "rows.jsonl"], out, settings(), resume=True)
    assert not (out / "opened" / "progress.json").exists()
    whole = tmp_path / "whole"
    sculptor.train(made / "model", made / case, [made / "rows.jsonl"], whole, settings())
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["lowrank"])
def test_what_could_not_be_placed_is_resumed_with_its_rules(
    made: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = (made / "model", made / case, [made / "rows.jsonl"], tmp_path / "out", settings()), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        with pytest.raises(OutputError, match="Device or resource busy"):
            sculptor.train(*job)
    sculptor.train(*job, resume=True)
    assert sculptor.Archive(out / "opened").open_names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

"""A sequence of two tasks by every method: the matrix, the model, what resumes, and what is refused."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, slowly, task_rows, write_rows
from huggingface_hub import metadata_load
from plans import two_tasks
from safetensors.torch import load_file

from sculptor import Archive
from sculptor.benchmark.inputs import digests_beside, files_of
from sculptor.benchmark.plan import read_plan
from sculptor.benchmark.results import ContinualReport
from sculptor.benchmark.runner import continual
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.staging import NotPlacedError
from sculptor.errors import OutputError, Stopped
from sculptor.evaluation.matrix import continual_metrics
from sculptor.model.load import load_model
from sculptor.model.protected import read_protected
from sculptor.model.samples import draw_samples, read_samples
from sculptor.progress import Bar, silent

COVERS = ["sculptor.benchmark.inputs", "sculptor.benchmark.stages", "sculptor.report.continual"]
PLAN = two_tasks(
    watch=["general.jsonl"],
    held_out=True,
    analyze={"basis": "curvature", "data": ["general.jsonl"], "budget": 0.7},
    train={"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "save_every": 1},
    adapter={"rank": 2, "alpha": 4},
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A small model, two tasks with other labels, a general text and a plan."""
    save_checkpoint(tmp_path / "base")
    rows = task_rows(count=24)
    turned = [{"prompt": row["prompt"], "completion": f"w{9 - int(row['completion'][1:])}"} for row in rows]
    write_rows(tmp_path / "first.jsonl", rows[:16])
    write_rows(tmp_path / "first-test.jsonl", rows[16:])
    write_rows(tmp_path / "second.jsonl", turned[:16])
    write_rows(tmp_path / "second-test.jsonl", turned[16:])
    write_rows(tmp_path / "general.jsonl", task_rows("text", 6))
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


def run(cli: Callable[..., Result], place: Path, name: str, *more: object) -> Any:
    found = cli("continual", place / "plan.toml", "-o", place / name, "--json", *more)
    assert found.code == 0, found.err
    return found.json


def consistent(place: Path, name: str, report: Any, rows: int) -> None:
    """Report, file and scores say the same, and the model is a checkpoint."""
    output = place / name
    written = json.loads((output / "continual.json").read_text())
    assert {key: written[key] for key in report} == report | {"output": name}
    assert report["tasks"] == ["first", "second"]
    assert len(report["matrix"]) == len(report["stages"]) == rows
    assert all(len(row) == 2 for row in report["matrix"])
    metric, sign = report["metric"], -1 if report["metric"] == "loss" else 1
    for row, stage in zip(report["matrix"], report["stages"], strict=True):
        assert row == [sign * stage["scores"][task][metric] for task in report["tasks"]]
        assert all(score["exact_match"] is None for score in stage["scores"].values())
    figures = continual_metrics(report["matrix"])
    for key in ("average", "backward", "learning", "forward"):
        assert report["metrics"][key] == getattr(figures, key)
    general = [stage["watch_loss"] for stage in report["stages"]]
    assert report["watch_rise"] == pytest.approx(general[-1] - general[0])
    harms = [stage["harm"]["nats"] for stage in report["stages"]]
    assert harms[0] == pytest.approx(0, abs=1e-6)  # the base
    assert min(harms[1:]) > 1e-5
    assert report["harm"] == report["stages"][-1]["harm"]
    assert sorted(path.name for path in output.iterdir()) == [".sculptor", "continual.json", "model", "sculptor.json"]
    assert not (place / f"{name}.partial").exists()
    loaded = load_model(open_checkpoint(output / "model"), torch.device("cpu"))
    assert loaded.architecture.model_class == "LlamaForCausalLM"
    assert changed(place / "base", output / "model")


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def changed(base: Path, model: Path) -> list[str]:
    before, after = weights(base), weights(model)
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def figures_of(report: Any) -> Any:
    """Everything but time."""
    report = json.loads(json.dumps(report))
    for stage in report["stages"]:
        stage.pop("seconds")
    return {key: value for key, value in report.items() if key not in ("output", "plan", "created_by")}


def check_readme(place: Path, name: str, report: Any) -> None:
    """The model's card is of the whole sequence, and nothing says where anything was."""
    card = place / name / "model" / "README.md"
    assert metadata_load(card)["base_model"] == "base"
    text = card.read_text()
    assert text.partition("---\n\n")[2].startswith("# `base`, taught `first`, `second`\n")
    scale = -1 if report["metric"] == "loss" else 100
    for i, task in enumerate(report["tasks"]):
        first, last = (f"{scale * report['matrix'][row][i]:.3f}" for row in (0, -1))
        assert f"of `{task}`, base and now | {first}, {last} " in text
    assert f"{scale * report['metrics']['average']:.3f}" in text
    written = [file for file in (place / name).rglob("*") if file.is_file()]
    assert [file.name for file in written if str(place).encode() in file.read_bytes()] == []


def test_sculptor_follows_the_plan(cli: Callable[..., Result], place: Path) -> None:
    report = run(cli, place, "out")
    consistent(place, "out", report, 3)
    assert (report["method"], report["basis"], report["split"], report["seed"]) == ("sculptor", "curvature", "test", 0)
    check_readme(place, "out", report)
    assert [stage["name"] for stage in report["stages"]] == ["base", "first", "second"]
    assert report["metric"] == "accuracy"
    archive = Archive(place / "out" / "model" / "subspaces")
    assert [task.name for task in archive.manifest.tasks] == ["analysis", "first", "second"]
    assert archive.manifest.settings.basis == "curvature"
    assert report["stages"][0]["archive_bytes"] is None
    assert report["stages"][2]["archive_bytes"] == archive.num_bytes
    assert set(changed(place / "base", place / "out" / "model")) == set(archive)


def test_it_is_the_commands_one_after_another(cli: Callable[..., Result], place: Path) -> None:
    run(cli, place, "out")
    general = place / "general.jsonl"
    more = ("--basis", "curvature", "--data", general, "--budget", 0.7, "--device", "cpu")
    assert cli("analyze", place / "base", "-o", place / "archive", *more).code == 0
    last = in_a_row(cli, place, place / "archive", "--save-every", 1)
    same_weights(place / "out" / "model", last)
    first, second = Archive(place / "out" / "model" / "subspaces"), Archive(last / "subspaces")
    assert first.manifest.tensors == second.manifest.tensors
    assert first.manifest.matrices == second.manifest.matrices


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["disk", "bases"])
def test_a_sequence_is_streamed_with_the_same_result(cli: Callable[..., Result], place: Path, offload: str) -> None:
    whole, streamed = run(cli, place, "out"), run(cli, place, "streamed", "--set", f'train.offload="{offload}"')
    same_weights(place / "out" / "model", place / "streamed" / "model")
    assert streamed["matrix"] == whole["matrix"]
    assert streamed["watch_rise"] == whole["watch_rise"]


def test_harm_is_the_divergence_on_samples_that_nothing_saw(cli: Callable[..., Result], place: Path) -> None:
    """The same text for every method, none of it in the archive; against the definition, in float64."""
    plain, own = run(cli, place, "plain", "--method", "full"), run(cli, place, "out")
    base = load_model(open_checkpoint(place / "base"), torch.device("cpu"))
    samples = draw_samples(base, 1024, 2, silent).all
    kept = read_samples(Archive(place / "out" / "model" / "subspaces"), 64)
    assert kept is not None
    assert not {each.example.input_ids for each in samples} & {each.example.input_ids for each in kept.all}
    for report in (plain, own):
        new = load_model(open_checkpoint(place / report["output"].split("/")[-1] / "model"), torch.device("cpu"))
        total, count = 0.0, 0
        for sample in samples:
            ids = torch.tensor([sample.example.input_ids])
            p, q = (m.model(ids).logits[0, :-1].detach().double().log_softmax(-1) for m in (base, new))
            carries = torch.tensor(sample.example.labels[1:]) != -100
            total += float((p.exp() * (p - q)).sum(-1)[carries].sum())
            count += int(carries.sum())
        assert (report["harm"]["num_samples"], report["harm"]["num_tokens"]) == (len(samples), count)
        assert report["harm"]["nats"] == pytest.approx(total / count, rel=1e-3, abs=1e-6)
        assert report["harm"]["error"] > 0


def in_a_row(cli: Callable[..., Result], place: Path, archive: Path, *more: object) -> Path:
    """`sculptor train` on both tasks."""
    model = place / "base"
    options = ("--max-steps", 3, "--batch-size", 8, "--learning-rate", "1e-2", "--device", "cpu", *more)
    for task in ("first", "second"):
        output = place / f"train-{task}"
        data = place / f"{task}.jsonl"
        found = cli("train", model, "--subspaces", archive, "--data", data, "-o", output, *options)
        assert found.code == 0, found.err
        model, archive = output, output / "subspaces"
    return model


def same_weights(first: Path, second: Path) -> None:
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_full_is_training_with_nothing_preserved(cli: Callable[..., Result], place: Path) -> None:
    report = run(cli, place, "out", "--method", "full")
    consistent(place, "out", report, 3)
    assert report["basis"] is None
    assert all(stage["archive_bytes"] is None for stage in report["stages"])
    assert cli("analyze", place / "base", "-o", place / "archive", "--preserve", 0, "--device", "cpu").code == 0
    same_weights(place / "out" / "model", in_a_row(cli, place, place / "archive", "--carry", "retake"))


def test_joint_learns_everything_at_once(cli: Callable[..., Result], place: Path) -> None:
    report = run(cli, place, "out", "--method", "joint")
    consistent(place, "out", report, 2)
    assert [stage["name"] for stage in report["stages"]] == ["base", "joint"]
    assert report["metrics"] == {"average": sum(report["matrix"][1]) / 2} | dict.fromkeys(
        ("backward", "learning", "forward")
    )
    # The same as one training on both files.
    assert cli("analyze", place / "base", "-o", place / "archive", "--preserve", 0, "--device", "cpu").code == 0
    options = ("--max-steps", 3, "--batch-size", 8, "--learning-rate", "1e-2", "--device", "cpu")
    data = ("--data", place / "first.jsonl", "--data", place / "second.jsonl")
    trained = cli("train", place / "base", "--subspaces", place / "archive", *data, "-o", place / "both", *options)
    assert trained.code == 0, trained.err
    same_weights(place / "out" / "model", place / "both")


@pytest.mark.slow
def test_random_directions_follow_the_seed(cli: Callable[..., Result], place: Path) -> None:
    reports = [run(cli, place, f"out{i}", "--method", "random", "--seed", seed) for i, seed in enumerate((1, 1, 2))]
    for i, report in enumerate(reports):
        consistent(place, f"out{i}", report, 3)
    assert reports[0]["basis"] == "random"
    assert figures_of(reports[0]) == figures_of(reports[1])
    same_weights(place / "out0" / "model", place / "out1" / "model")
    assert changed(place / "out0" / "model", place / "out2" / "model")
    archive = Archive(place / "out0" / "model" / "subspaces")
    assert archive.manifest.settings.basis == "random"
    assert archive.manifest.settings.preserve == 0.5


@pytest.mark.parametrize("method", ["lora", "olora", "osf"])
def test_methods_of_peft(cli: Callable[..., Result], place: Path, method: str) -> None:
    pytest.importorskip("peft")
    report = run(cli, place, "out", "--method", method)
    consistent(place, "out", report, 3)
    again = run(cli, place, "again", "--method", method)
    assert figures_of(report) == figures_of(again)
    same_weights(place / "out" / "model", place / "again" / "model")
    matrices = {name for name in weights(place / "base") if "_proj" in name}
    assert set(changed(place / "base", place / "out" / "model")) == matrices
    earlier = place / "out" / "model" / "earlier_adapters.safetensors"
    assert earlier.exists() == (method == "olora")
    if method == "olora":  # the A of both tasks, rank 2 each
        stacked = load_file(earlier)
        assert len(stacked) == len(matrices)
        assert {a.shape[0] for a in stacked.values()} == {4}


@pytest.mark.parametrize("method", ["lora", "olora"])
def test_adapters_change_by_their_rank(cli: Callable[..., Result], place: Path, method: str) -> None:
    """Two tasks of rank 2 each, merged, and nothing else."""
    pytest.importorskip("peft")
    run(cli, place, "out", "--method", method)
    before, after = weights(place / "base"), weights(place / "out" / "model")
    for name in changed(place / "base", place / "out" / "model"):
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert float(values[4:].max()) < 1e-5 * float(values[0])


@pytest.mark.slow
def test_the_validation_split(cli: Callable[..., Result], place: Path) -> None:
    found = cli("continual", place / "plan.toml", "-o", place / "out", "--split", "validation")
    refused(found, "task second: no validation files in the plan", code=2)
    nothing_left(place)
    plan = PLAN + 'validation = ["first-test.jsonl"]\n'  # of the last task
    (place / "plan.toml").write_text(plan)
    swapped, plain = run(cli, place, "out", "--split", "validation"), run(cli, place, "plain")
    assert swapped["split"] == "validation"
    for one, other in zip(swapped["matrix"], plain["matrix"], strict=True):  # each task has the other's rows here
        assert one == other[::-1]
    same_weights(place / "out" / "model", place / "plain" / "model")


def refused(found: Result, *needles: str, code: int = 1) -> None:
    assert found.code == code, (found.code, found.err)
    lines = found.err.strip().splitlines()
    assert len(lines) == 1, found.err
    assert all(needle in lines[0] for needle in needles), lines[0]


def nothing_left(place: Path) -> None:
    assert not (place / "out").exists()
    assert not (place / "out.partial").exists()


def test_an_output_that_exists_is_refused(cli: Callable[..., Result], place: Path) -> None:
    run(cli, place, "out", "--method", "full")
    before = (place / "out" / "continual.json").read_bytes()
    refused(cli("continual", place / "plan.toml", "-o", place / "out"), "exists already", "--overwrite")
    refused(cli("continual", place / "plan.toml", "-o", place / "out", "--resume"), "nothing to resume")
    assert (place / "out" / "continual.json").read_bytes() == before
    report = run(cli, place, "out", "--overwrite", "--method", "joint")
    consistent(place, "out", report, 2)


@pytest.mark.parametrize("name", ["base", "first.jsonl", "plan.toml"])
def test_an_input_is_no_output(cli: Callable[..., Result], place: Path, name: str) -> None:
    before = sorted(path.name for path in place.iterdir())
    refused(cli("continual", place / "plan.toml", "-o", place / name, "--overwrite"), "is or holds the input")
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_page_or_a_picture_is_in_no_input_and_no_output(cli: Callable[..., Result], place: Path) -> None:
    pytest.importorskip("matplotlib")
    (place / "texts").mkdir()
    write_rows(place / "texts" / "general.jsonl", task_rows("text", 6))
    before = sorted(place.rglob("*"))
    for option, name in (("--html", "page.html"), ("--plot", "matrix.png")):
        for folder, message, code in (
            ("base", "lies in the input", 1),
            ("texts", "lies in the input", 1),
            ("out", "lies in the output", 2),
            ("nowhere", "there is no folder", 1),
        ):
            more = (option, place / folder / name, "--set", 'watch=["texts"]')
            refused(cli("continual", place / "plan.toml", "-o", place / "out", *more), message, code=code)
    assert sorted(place.rglob("*")) == before


def test_overwriting_spares_calibration_rows(cli: Callable[..., Result], place: Path) -> None:
    """`analyze.data` is an input like any other."""
    run(cli, place, "out", "--method", "full")
    rows = place / "out" / "calibration.jsonl"
    write_rows(rows, task_rows("text", 4))
    found = cli(
        "continual",
        place / "plan.toml",
        "-o",
        place / "out",
        "--overwrite",
        "--set",
        'analyze.data=["out/calibration.jsonl"]',
    )
    refused(found, "is or holds the input")
    assert rows.exists()


@pytest.mark.parametrize(
    ("more", "code", "needles"),
    [
        (("--set", "train.learning_rate=-1"), 2, ("plan.toml [train]", "learning_rate -1")),
        (("--set", "trian.learning_rate=1"), 2, ("unknown 'trian'",)),
        (("--set", "watch=['nowhere.jsonl']"), 1, ("nowhere.jsonl", "no such data file")),
        (("--set", "replay=['nowhere.jsonl']"), 1, ("nowhere.jsonl", "no such data file")),
        (("--set", "replay=['self:0.6', 'general.jsonl:0.5']"), 2, ("--replay: shares of 1.1", "leave nothing")),
        (("--set", "replay=self", "--method", "lora"), 2, ("replay without effect with --method lora",)),
        (("--set", "model=nowhere"), 1, ("nowhere",)),
        (("--method", "sculpter"), 2, ("sculpter",)),
    ],
)
def test_wrong_plans_leave_nothing(
    cli: Callable[..., Result], place: Path, more: tuple[str, ...], code: int, needles: tuple[str, ...]
) -> None:
    refused(cli("continual", place / "plan.toml", "-o", place / "out", *more), *needles, code=code)
    nothing_left(place)


def test_overrides_change_the_run(cli: Callable[..., Result], place: Path) -> None:
    more = ("--set", "train.max_steps=1", "--set", "evaluate.exact_match=true", "--set", "watch=[]")
    more += ("--set", "evaluate.harm=false", "--set", 'analyze.protect=["tools=second.jsonl"]')
    report = run(cli, place, "out", *more)
    written = json.loads((place / "out" / "continual.json").read_text())
    assert written["plan"]["train"]["max_steps"] == 1
    assert written["plan"]["analyze"]["protect"] == ["tools=second.jsonl"]
    (kept,) = read_protected(Archive(place / "out" / "model" / "subspaces"))
    assert kept.name == "tools"
    assert report["watch_rise"] is report["harm"] is None
    assert all(score["exact_match"] is not None for stage in report["stages"] for score in stage["scores"].values())


@pytest.mark.parametrize("method", ["sculptor", *slowly("full")])
def test_rows_are_mixed_into_every_task(cli: Callable[..., Result], place: Path, method: str) -> None:
    more = ("--set", 'replay=["general.jsonl:0.2"]', "--method", method)
    found = cli("continual", place / "plan.toml", "-o", place / "out", "--json", *more)
    assert found.code == 0, found.err
    mixed = [line for line in found.err.splitlines() if "mixes in" in line]
    assert [line.split(":")[0] for line in mixed] == ["first", "second"]
    assert all("16 rows of the task and mixes in 4 from general.jsonl" in line for line in mixed)
    plain = run(cli, place, "plain", "--method", method)
    assert plain["stages"][1]["scores"] != found.json["stages"][1]["scores"]
    written = json.loads((place / "out" / "continual.json").read_text())
    assert written["plan"]["replay"] == ["general.jsonl:0.2"], "without its place"


@pytest.mark.slow
@pytest.mark.parametrize("section", ["train", "analyze"])
def test_a_seed_in_the_plan_is_not_silently_dropped(cli: Callable[..., Result], place: Path, section: str) -> None:
    """`--seed` sets both; a plan's own is used, or refused with a word."""
    found = cli("continual", place / "plan.toml", "-o", place / "out", "--set", f"{section}.seed=5")
    if found.code:
        refused(found, "seed", code=2)
    else:
        written = json.loads((place / "out" / "continual.json").read_text())
        assert written["plan"][section]["seed"] == 5


@pytest.mark.slow
def test_what_is_decided_for_a_run_is_said(cli: Callable[..., Result], place: Path) -> None:
    arguments = ("continual", place / "plan.toml", "--method", "full", "--set", "train.optimizer_on=host")
    found = cli(*arguments, "-o", place / "out", "--set", "train.soften=1", "--set", "train.memory_rows=2")
    assert found.code == 0, found.err
    first, *rest = found.err.splitlines()
    assert first == "without effect with --method full: train.soften, train.memory_rows"
    assert [line.split(":")[0] for line in rest] == ["first", "second"]
    assert all("--offload auto picks none" in line and "--optimizer-on" in line for line in rest)
    quiet = cli("continual", place / "plan.toml", "-o", place / "second", "--set", "train.soften=1")
    assert (quiet.code, quiet.err) == (0, "")


def test_a_task_s_own_learning_rate(cli: Callable[..., Result], place: Path) -> None:
    (place / "plan.toml").write_text(PLAN + "learning_rate = 3e-3\n")
    run(cli, place, "out", "--method", "full")
    record = json.loads((place / "out" / "model" / "sculptor.json").read_text())
    assert record["settings"]["learning_rate"] == 3e-3


def test_answers_that_are_no_labels_are_compared_by_loss(cli: Callable[..., Result], place: Path) -> None:
    """More distinct completions than can be labels, and no generation: the loss, turned so that more is better."""
    rows = [{"prompt": f"w{i}", "completion": f"w{i} w{(7 * i) % 40}"} for i in range(36)]
    write_rows(place / "first-test.jsonl", rows)
    report = run(cli, place, "out", "--method", "full", "--html", place / "page.html")
    consistent(place, "out", report, 3)
    assert report["metric"] == "loss"
    assert all(value < 0 for row in report["matrix"] for value in row)
    text = (place / "page.html").read_text()
    assert all(f"after {row['name']}" in text for row in report["stages"])
    assert all(f">{-value:.3f}</td>" in text for row in report["matrix"] for value in row)


def test_conversations_are_answered_too(cli: Callable[..., Result], place: Path) -> None:
    """Their exact matches are what tasks are compared by; watched texts are not answered."""
    template = "{% for m in messages %}{{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
    (place / "base" / "chat_template.jinja").write_text(template)

    def talk(asked: str, said: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}

    for name in ("first", "second"):
        for file in (name, f"{name}-test"):
            write_rows(place / f"{file}.jsonl", [talk(f"w{i} w{3 + i % 5}", f"w{i % 4}") for i in range(8)])
    write_rows(place / "general.jsonl", [talk("w3 w4", "w5")])
    found = run(cli, place, "out", "--method", "full", "--set", "evaluate.exact_match=true")
    assert found["metric"] == "exact_match"
    assert all(score["exact_match"] is not None for stage in found["stages"] for score in stage["scores"].values())
    quiet = run(cli, place, "quiet", "--method", "full")
    assert quiet["metric"] == "loss"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_the_matrix(cli: Callable[..., Result], place: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    picture = place / f"matrix.{suffix}"
    found = cli("continual", place / "plan.toml", "-o", place / "out", "--method", "full", "--plot", picture)
    assert found.code == 0, found.err
    assert picture.read_bytes()[:4] == {"png": b"\x89PNG", "svg": b"<?xm"}[suffix]
    assert all(word in found.out for word in ("first", "second", "base"))
    before = picture.read_bytes()
    again = cli("continual", place / "plan.toml", "-o", place / "other", "--method", "full", "--plot", picture)
    refused(again, "exists already")
    assert picture.read_bytes() == before
    assert not (place / "other").exists()


def test_an_unknown_picture_format_is_refused_first(cli: Callable[..., Result], place: Path) -> None:
    pytest.importorskip("matplotlib")
    found = cli("continual", place / "plan.toml", "-o", place / "out", "--plot", place / "matrix.xyz")
    refused(found, "unknown picture format '.xyz'", code=2)
    nothing_left(place)


class StopAt:
    """Asks for the end at the given training step of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.polls = 0

    def __call__(self) -> int | None:
        self.polls += 1
        return signal.SIGTERM if self.polls == self.step else None


def continue_after(place: Path, name: str, method: Any, *steps: int) -> ContinualReport:
    """Stops a run at some steps, each counted from the start before, and goes on until it is done."""
    for i, step in enumerate(steps):
        with pytest.raises(Stopped) as stopped:
            continual(place / "plan.toml", place / name, method=method, resume=i > 0, stop=StopAt(step))
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        assert not (place / name).exists()
        assert (place / f"{name}.partial" / "scores.json").is_file()
    return continual(place / "plan.toml", place / name, method=method, resume=True)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("sculptor", (2, 3)),  # in the first, and in the second
        ("lora", (5,)),
        *slowly(
            ("full", (5,)),
            ("sculptor", (5,)),
            ("random", (4,)),
            ("full", (1, 1)),
            ("joint", (2,)),
            ("olora", (5,)),
            ("osf", (4,)),
        ),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(place: Path, method: Any, steps: tuple[int, ...]) -> None:
    if method in ("lora", "olora", "osf"):
        pytest.importorskip("peft")
    whole = continual(place / "plan.toml", place / "whole", method=method)
    same_end(place, whole, continue_after(place, "cut", method, *steps))


def same_end(place: Path, whole: ContinualReport, resumed: ContinualReport) -> None:
    """The same figures, and the same bytes of weights and bases."""
    assert resumed.matrix == whole.matrix
    assert resumed.metrics == whole.metrics
    assert resumed.watch_rise == whole.watch_rise
    assert [stage.scores for stage in resumed.stages] == [stage.scores for stage in whole.stages]
    assert [stage.archive_bytes for stage in resumed.stages] == [stage.archive_bytes for stage in whole.stages]
    files = [sorted(p.relative_to(place / n) for p in (place / n).rglob("*")) for n in ("whole", "cut")]
    assert files[0] == files[1]
    for file in files[0]:
        if file.suffix == ".safetensors":
            assert (place / "whole" / file).read_bytes() == (place / "cut" / file).read_bytes(), file
    if (place / "whole" / "model" / "subspaces").is_dir():
        archives = [Archive(place / name / "model" / "subspaces") for name in ("whole", "cut")]
        assert archives[0].manifest.matrices == archives[1].manifest.matrices
    assert not (place / "cut.partial").exists()


class CutAt:
    """Progress bars, of which the given one ends the run as a kill would: nothing is saved then."""

    def __init__(self, desc: str, count: int) -> None:
        self.desc, self.left = desc, count

    def __call__(self, *, total: int, desc: str, unit: str, initial: int = 0) -> Bar:
        if desc == self.desc:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return silent(total=total, desc=desc, unit=unit, initial=initial)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "desc", "count"),
    [
        ("sculptor", "evaluate", 2),  # the base
        ("sculptor", "calibrate", 1),  # the first archive
        ("sculptor", "write", 1),  # the first model
        ("sculptor", "measure the task", 1),  # its moments
        ("sculptor", "evaluate", 5),  # after the first task
        ("sculptor", "measure the task", 2),  # the last task's moments
        ("sculptor", "evaluate", 9),  # after the last
        ("full", "analyze", 2),
        ("full", "evaluate", 5),
        ("olora", "write", 2),
        ("olora", "evaluate", 8),
    ],
)
def test_a_run_cut_anywhere_goes_on_to_the_same_end(place: Path, method: Any, desc: str, count: int) -> None:
    if method == "olora":
        pytest.importorskip("peft")
    whole = continual(place / "plan.toml", place / "whole", method=method)
    with pytest.raises(KeyboardInterrupt):
        continual(place / "plan.toml", place / "cut", method=method, progress=CutAt(desc, count))
    assert not (place / "cut").exists()
    same_end(place, whole, continual(place / "plan.toml", place / "cut", method=method, resume=True))


def test_a_stopped_run_is_not_started_over_by_mistake(place: Path) -> None:
    plan = place / "plan.toml"
    with pytest.raises(Stopped):
        continual(plan, place / "cut", method="full", stop=StopAt(5))
    with pytest.raises(OutputError, match="--resume to go on or --overwrite to start anew"):
        continual(plan, place / "cut", method="full")
    with pytest.raises(OutputError, match=r"left by a run of another plan \(method\)"):
        continual(plan, place / "cut", method="joint", resume=True)
    with pytest.raises(OutputError, match=r"another plan \(analyze.seed, train.seed\)"):
        continual(plan, place / "cut", method="full", seed=1, resume=True)
    with pytest.raises(OutputError, match=r"another plan \(train.max_steps\)"):
        continual(plan, place / "cut", method="full", overrides=["train.max_steps=9"], resume=True)
    assert continual(plan, place / "cut", method="full", resume=True).stages[1].name == "first"


def test_other_rows_are_not_mixed_into_a_resumed_matrix(place: Path) -> None:
    """The rows of the matrix that stand are of the files as they were."""
    with pytest.raises(Stopped):
        continual(place / "plan.toml", place / "cut", method="full", stop=StopAt(5))
    known = (place / "first-test.jsonl").read_text()
    rows = task_rows(count=24)[:3]
    write_rows(place / "first-test.jsonl", rows)
    with pytest.raises(OutputError, match="--overwrite"):
        continual(place / "plan.toml", place / "cut", method="full", resume=True)

    # And of the tokens that the model read, and how it was asked.
    (place / "first-test.jsonl").write_text(known)
    for name in ("tokenizer.json", "generation_config.json"):
        file = place / "base" / name
        known = file.read_text()
        file.write_text(known.replace("{", '{"w": 1, ', 1))
        with pytest.raises(OutputError, match="tokenizer and generation"):
            continual(place / "plan.toml", place / "cut", method="full", resume=True)
        file.write_text(known)


@pytest.mark.slow
@pytest.mark.parametrize("replaced", ["second.jsonl", "model", *slowly("first.jsonl", "general.jsonl", "mixed.jsonl")])
def test_what_was_trained_on_may_not_change_before_a_resume(place: Path, replaced: str) -> None:
    write_rows(place / "mixed.jsonl", task_rows("text", 4))
    (place / "plan.toml").write_text('replay = "mixed.jsonl"\n' + PLAN)
    with pytest.raises(Stopped):
        continual(place / "plan.toml", place / "cut", stop=StopAt(5))
    if replaced == "model":
        (place / "base").rename(place / "old")
        save_checkpoint(place / "base", seed=7)
    else:
        write_rows(place / replaced, task_rows("pairs" if replaced in ("first.jsonl", "second.jsonl") else "text", 5))
    with pytest.raises(OutputError, match=r"another plan .*(files|rows)"):
        continual(place / "plan.toml", place / "cut", resume=True)


def test_what_is_read_beside_models_and_rows_is_told_by_content(place: Path) -> None:
    template, like = place / "talk.jinja", place / "like"
    template.write_text("{{ messages }}")
    like.mkdir()
    (like / "continual.json").write_text("{}")
    plan = read_plan(place / "plan.toml", [f"train.chat_template={template}", f"adapter.like={like}"])
    before = digests_beside(plan)
    assert before.keys() == {"train.chat_template", "adapter.like"}
    assert {str(template), str(like), str(place / "base")} <= set(files_of(plan))
    for file in (template, like / "continual.json"):
        file.write_text("{} ")
        assert digests_beside(plan) != before
        before = digests_beside(plan)


def test_what_was_of_use_on_the_way_does_not_reach_the_output(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after a task was put in its place and before its states were removed, and then nothing can be removed."""
    with pytest.raises(Stopped):
        continual(place / "plan.toml", place / "cut", method="full", stop=StopAt(5))
    left = place / "cut.partial" / "02-second.partial"
    assert left.is_dir()
    shutil.copytree(place / "cut.partial" / "01-first", place / "cut.partial" / "02-second")
    for module in ("benchmark.runner", "benchmark.learning", "checkpoint.staging"):
        name = "discard" if module == "checkpoint.staging" else "remove"
        monkeypatch.setattr(f"sculptor.{module}.{name}", lambda _: None)
    continual(place / "plan.toml", place / "cut", method="full", resume=True)
    assert sorted(path.name for path in (place / "cut").iterdir()) == [
        ".sculptor",
        "continual.json",
        "model",
        "sculptor.json",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sculptor", "slm"])
def test_a_run_that_cannot_be_put_in_its_place_is_finished_later(
    place: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are there and so is the model, as after a kill at the very end."""
    whole = continual(place / "plan.toml", place / "whole", method=method)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == place / "cut":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(NotPlacedError, match=r"complete in .*, or pass --resume"):
            continual(place / "plan.toml", place / "cut", method=method)
    assert not (place / "cut").exists()
    same_end(place, whole, continual(place / "plan.toml", place / "cut", method=method, resume=True))


def test_a_plan_of_one_task(cli: Callable[..., Result], place: Path) -> None:
    (place / "plan.toml").write_text(PLAN.partition('[[tasks]]\nname = "second"')[0])
    report = run(cli, place, "out")
    assert len(report["matrix"]) == 2
    assert report["metrics"]["average"] == report["metrics"]["learning"] == report["matrix"][1][0]
    assert report["metrics"]["backward"] is report["metrics"]["forward"] is None


def test_the_table_shows_the_figures(cli: Callable[..., Result], place: Path) -> None:
    found = cli("continual", place / "plan.toml", "-o", place / "out", "--method", "full")
    assert found.code == 0, found.err
    for word in ("first", "second", "base", "AA", "BWT", "LA", "FWT", "harm"):
        assert word in found.out
    assert max(len(line) for line in found.out.splitlines() if not line.startswith("Wrote ")) <= 100


def test_watched_texts_of_one_name_are_told_apart_by_folders(cli: Callable[..., Result], place: Path) -> None:
    for folder in ("a", "b"):
        (place / folder).mkdir()
        write_rows(place / folder / "text.jsonl", task_rows("text", 2))
    plan = (place / "plan.toml").read_text()
    assert plan.count("watch = [") == 1
    (place / "two.toml").write_text(re.sub(r"watch = \[.*\]", 'watch = ["a/text.jsonl", "b/text.jsonl"]', plan))
    found = cli("continual", place / "two.toml", "-o", place / "two", "--method", "full")
    assert found.code == 0, found.err
    content = (place / "two" / "continual.json").read_text()
    assert str(place) not in content
    assert list(json.loads(content)["stages"][0]["watched"]) == ["a/text.jsonl", "b/text.jsonl"]
    assert "a/text" in found.out
    assert "b/text" in found.out
    assert "-0.0000" not in found.out

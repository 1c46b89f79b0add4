"""The loop against an independent one, and its invariances."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tokenizer, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, evaluate, train
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import BatchPlan
from sculptor.errors import SculptorError, SettingsError, Stopped, TrainingError
from sculptor.training.schedule import learning_rate
from sculptor.training.state import StateStore

COVERS = ["sculptor.training.stepping.resident"]
STEPS = 20


def losses_of(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def full_fine_tuning(path: Path, family: str, settings: TrainSettings, targets: list[str]) -> list[float]:
    """Plain AdamW on the same matrices, written without anything of the trainer but the order of rows."""
    model = type(FAMILIES[family]()).from_pretrained(path)
    model.requires_grad_(False)
    parameters = [model.get_parameter(name).requires_grad_(True) for name in targets]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    tokenizer = make_tokenizer()
    rows = [(tokenizer(r["prompt"]).input_ids, [*tokenizer(r["completion"]).input_ids, 0]) for r in task_rows()]
    plan = BatchPlan([len(prompt) + len(completion) for prompt, completion in rows], settings.batch_size, settings.seed)
    losses = []
    for step in range(STEPS):
        summed, count = torch.zeros(()), 0
        for row in plan.rows(step):
            prompt, completion = rows[row]
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            summed = summed - log_probs.gather(1, torch.tensor(completion)[:, None]).sum()
            count += len(completion)
        loss = summed / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, STEPS, settings.learning_rate or 0.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_preserve_0_is_full_fine_tuning(tmp_path: Path, family: str) -> None:
    path = save_checkpoint(tmp_path / "model", family)
    config = json.loads((path / "config.json").read_text())
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (path / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "task.jsonl", task_rows())
    analyze(path, tmp_path / "open", AnalyzeSettings(preserve=0, device="cpu"))
    settings = TrainSettings(max_steps=STEPS, batch_size=8, micro_batch_size=3, learning_rate=3e-3, device="cpu")
    train(path, tmp_path / "open", [data], tmp_path / "out", settings)
    archive = Archive(tmp_path / "open")
    assert archive.num_free == sum(r.shape[0] * r.shape[1] for r in archive.values())
    expected = full_fine_tuning(path, family, settings, [record.parameter for record in archive.values()])
    assert losses_of(tmp_path / "out") == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 1


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    path = save_checkpoint(tmp_path / "model")
    analyze(path, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return {
        "model": path,
        "subspaces": tmp_path / "archive",
        "data": [write_rows(tmp_path / "task.jsonl", task_rows())],
    }


def settings(**changes: Any) -> TrainSettings:
    values = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "device": "cpu"} | changes
    return TrainSettings(**values)


def test_the_split_into_micro_batches_does_not_matter(task: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for size in (8, 3, 1):
        train(**task, output=tmp_path / f"out{size}", settings=settings(micro_batch_size=size))
        runs.append(losses_of(tmp_path / f"out{size}"))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert runs[2] == pytest.approx(runs[0], abs=1e-5)


def test_weight_decay_pulls_towards_the_base(task: dict[str, Any], tmp_path: Path) -> None:
    norms = []
    for decay in (0.0, 50.0):
        report = train(**task, output=tmp_path / f"out{decay}", settings=settings(weight_decay=decay))
        norms.append(sum(matrix.update for matrix in report.matrices.values()))
    assert norms[1] < 0.8 * norms[0]


def test_a_stopped_run_goes_on_bit_for_bit(task: dict[str, Any], tmp_path: Path) -> None:
    whole = settings(save_every=2, eval_every=2)
    evaluation = {"eval_data": [write_rows(tmp_path / "eval.jsonl", task_rows(count=5))]}
    train(**task, **evaluation, output=tmp_path / "whole", settings=whole)
    polls = iter([None, None, 15, None, None, None])
    with pytest.raises(Stopped, match=r"after step 3 of 6; the state is saved") as stopped:
        train(**task, **evaluation, output=tmp_path / "cut", settings=whole, stop=lambda: next(polls))
    assert stopped.value.exit_code == 143
    assert not (tmp_path / "cut").exists()
    train(**task, **evaluation, output=tmp_path / "cut", settings=whole, resume=True)
    assert not (tmp_path / "cut.partial").exists()
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


def assert_same_output(first: Path, second: Path) -> None:
    """Weights, archive and metrics of two runs are the same, timings aside."""
    for folder in (".", "subspaces"):
        files = sorted((first / folder).glob("*.safetensors"))
        assert files
        for file in files:
            assert file.read_bytes() == (second / folder / file.name).read_bytes(), file.name
    archives = [json.loads((path / "subspaces" / "archive.json").read_text()) for path in (first, second)]
    assert archives[0]["matrices"] == archives[1]["matrices"]
    metrics = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (first / "metrics.jsonl", second / "metrics.jsonl")
    ]
    assert metrics[0] == metrics[1]


def test_resume_with_other_settings_is_refused(task: dict[str, Any], tmp_path: Path) -> None:
    polls = iter([None, 15])
    with pytest.raises(Stopped):
        train(**task, output=tmp_path / "out", settings=settings(), stop=lambda: next(polls))
    with pytest.raises(ValueError, match=r"other settings .learning_rate"):
        train(**task, output=tmp_path / "out", settings=settings(learning_rate=1e-3), resume=True)
    with pytest.raises(ValueError, match="left over from a run that did not finish"):
        train(**task, output=tmp_path / "out", settings=settings())


def test_the_best_evaluation_is_kept(task: dict[str, Any], tmp_path: Path) -> None:
    harmful = write_rows(tmp_path / "eval.jsonl", [{"prompt": "w1 w2", "completion": f"w{30 + i}"} for i in range(5)])
    report = train(
        **task,
        eval_data=[harmful],
        output=tmp_path / "out",
        settings=settings(max_steps=30, eval_every=1, learning_rate=5e-2),
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert len(evaluations) == 30
    best = min(evaluations, key=evaluations.__getitem__)
    assert best < 30
    assert (report.loop.best_step, report.loop.best_loss) == (best, evaluations[best])
    assert evaluate(tmp_path / "out", [harmful], device="cpu").loss == pytest.approx(evaluations[best], abs=1e-4)


def test_further_parameters_train_openly_and_are_declared(task: dict[str, Any], tmp_path: Path) -> None:
    report = train(**task, output=tmp_path / "out", settings=settings(also_train=("lm_head", "*layernorm*")))
    assert "lm_head.weight" in report.also_trained
    assert len(report.also_trained) == 5
    before, after = open_checkpoint(task["model"]), open_checkpoint(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.also_trained) | set(report.matrices)
    with pytest.raises(SettingsError, match="--also-train 'nothing' matches no unprotected parameter"):
        train(**task, output=tmp_path / "other", settings=settings(also_train=("nothing",)))
    with pytest.raises(SettingsError, match="matches no unprotected"):
        train(**task, output=tmp_path / "other", settings=settings(also_train=("q_proj",)))


def test_a_run_that_diverges_says_so(task: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step \d+: not finite; lower --learning-rate"):
        train(**task, output=tmp_path / "out", settings=settings(learning_rate=1e30, clip=0, schedule="constant"))
    assert not (tmp_path / "out").exists()


def test_save_dtype_decides_the_files(task: dict[str, Any], tmp_path: Path) -> None:
    train(**task, output=tmp_path / "out", settings=settings(save_dtype="bfloat16"))
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_head_that_stands_in_the_files_twice_is_written_twice(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "llama-tied")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    analyze(path, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    data = [write_rows(tmp_path / "task.jsonl", task_rows())]
    for patterns in (("embed_tokens",), ("embed_tokens", "lm_head")):
        output = tmp_path / f"out{len(patterns)}"
        train(path, tmp_path / "archive", data, output, settings(also_train=patterns))
        after = load_file(output / "model.safetensors")
        assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
        assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


def test_a_symlinked_output_is_followed(task: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    train(**task, output=tmp_path / "link", settings=settings())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_folders_inside_the_model_directory_do_not_travel(task: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(task["subspaces"], task["model"] / "archive")
    train(**task, output=tmp_path / "out", settings=settings())
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["subspaces"]


def test_options_without_effect_are_refused(task: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--eval-every without effect"):
        train(**task, output=tmp_path / "out", settings=settings(eval_every=2))


@pytest.mark.parametrize(("every", "steps"), [(None, [2]), (2, [*range(2, 21, 2)])])
def test_saving_takes_little_of_the_time(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, steps: list[int]
) -> None:
    """A state that takes as long to save as all steps together is saved once, before that is known."""
    clock, saved, plain = [0.0], [], StateStore.save

    def now() -> float:
        clock[0] += 0.1
        return clock[0]

    def save(store: StateStore, position: Any, tensors: Any) -> None:
        saved.append(position.step)
        clock[0] += 100
        plain(store, position, tensors)

    monkeypatch.setattr("sculptor.training.saves.time.perf_counter", now)
    monkeypatch.setattr(StateStore, "save", save)
    train(**task, output=tmp_path / "out", settings=settings(max_steps=20, save_every=every))
    assert saved == steps


def test_a_changed_mask_token_is_no_resume(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "bert")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text"))
    analyze(path, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    chosen = settings(max_steps=4, save_every=1)
    stop = iter([None, 15]).__next__
    with pytest.raises(Stopped):
        train(path, tmp_path / "archive", [rows], tmp_path / "out", chosen, stop=stop)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token": "<unk>"}))
    with pytest.raises(SculptorError, match="mask"):
        train(path, tmp_path / "archive", [rows], tmp_path / "out", chosen, resume=True)


@pytest.mark.parametrize("steps", [6, 30])
def test_the_last_loss_is_that_of_the_last_tenth(task: dict[str, Any], tmp_path: Path, steps: int) -> None:
    """One step's says what its rows are like; a halted run has the same."""
    told = settings(max_steps=steps, batch_size=2, learning_rate=3e-3, save_every=2)
    given = (task["model"], task["subspaces"], task["data"])
    whole = train(*given, tmp_path / "whole", told).loop
    losses = losses_of(tmp_path / "whole")
    count = max(1, steps // 10)
    assert whole.last_loss == pytest.approx(sum(losses[-count:]) / count)
    assert whole.first_loss == losses[0]
    polls = iter([*[None] * (steps - 2), 15])
    with pytest.raises(Stopped):
        train(*given, tmp_path / "cut", told, stop=lambda: next(polls))
    assert train(*given, tmp_path / "cut", told, resume=True).loop.last_loss == pytest.approx(whole.last_loss)

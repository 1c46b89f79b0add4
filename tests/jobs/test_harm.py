"""Harm through the commands: kept in archives, measured, bounded; the same streamed, resumed and with nothing changed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sculptor
from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train
from sculptor.errors import ArchiveError, SettingsError, Stopped
from sculptor.model.samples import SECTION, SUFFIX, read_samples
from sculptor.report.train import train_text
from sculptor.training.harm import ADDED

FILE = SECTION + SUFFIX
HOT = TrainSettings(max_steps=8, batch_size=8, learning_rate=3e-2, device="cpu", carry="keep")
CURVED = AnalyzeSettings(basis="curvature", data=("self",), calibration_tokens=400, max_length=16, device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its archive with samples, and rows."""
    path = tmp_path_factory.mktemp("harm")
    save_checkpoint(path / "model")
    analyze(path / "model", path / "archive", CURVED)
    write_rows(path / "rows.jsonl", task_rows())
    return path


def run(made: Path, output: Path, settings: TrainSettings = HOT, **more: Any) -> Any:
    return train(made / "model", made / "archive", [made / "rows.jsonl"], output, settings, **more)


def lines(output: Path, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def test_samples_stay_with_the_lineage_and_no_samples_leaves_them_out(
    cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    archive = Archive(made / "archive")
    samples = read_samples(archive, 64)
    assert samples is not None
    assert len(samples.steering) >= len(samples.reporting) > 2
    train(made / "model", made / "archive", [made / "rows.jsonl"], tmp_path / "first", HOT)
    train(tmp_path / "first", tmp_path / "first" / "subspaces", [made / "rows.jsonl"], tmp_path / "second", HOT)
    kept = [(path / FILE).read_bytes() for path in (made / "archive", tmp_path / "second" / "subspaces")]
    assert kept[0] == kept[1]
    analyze(made / "model", tmp_path / "without", replace(CURVED, samples=False))
    assert not (tmp_path / "without" / FILE).exists()
    weights = ("analyze", made / "model", "--preserve", 0.5, "--device", "cpu", "-o")
    for name, asked, there in (("plain", (), False), ("asked", ("--samples",), True)):
        assert cli(*weights, tmp_path / name, *asked).code == 0
        assert (tmp_path / name / FILE).exists() is there
    for option in (("--max-harm", 0.1), ("--harm-every", 2)):
        found = cli("train", made / "model", "--subspaces", tmp_path / "plain", "--data", made / "rows.jsonl", "-o",
                    tmp_path / "out", "--device", "cpu", *option)  # fmt: skip
        assert found.code == 2
        assert f"{option[0]}: {tmp_path / 'plain'} keeps no samples" in found.err
    bert = save_checkpoint(tmp_path / "bert", "bert")
    found = cli("analyze", bert, "--preserve", 0.5, "--samples", "-o", tmp_path / "no", "--device", "cpu")
    assert (found.code, "no causal model" in found.err) == (2, True)


def test_of_two_samples_nothing_is_said(
    cli: Callable[..., Result], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sculptor.model.samples.TOKENS", 32)
    for name, fewest, code in (("few", 4, 1), ("older", 2, 0)):  # as an earlier version kept them
        monkeypatch.setattr("sculptor.model.samples._FEWEST", fewest)
        found = cli("analyze", made / "model", "--preserve", 0.5, "--samples", "-o", tmp_path / name, "--device", "cpu")
        assert (found.code, (tmp_path / name / FILE).exists(), "too little" in found.err) == (
            code,
            not code,
            bool(code),
        )
    monkeypatch.undo()
    found = cli("train", made / "model", "--subspaces", tmp_path / "older", "--data", made / "rows.jsonl", "--max-steps", 1,
                "--device", "cpu", "-o", tmp_path / "out")  # fmt: skip
    assert found.code == 0, found.err


def test_harm_is_measured_and_told_everywhere(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = cli("train", made / "model", "--subspaces", made / "archive", "--data", made / "rows.jsonl", "-o", out, "--harm-every",
                3, "--max-steps", 8, "--batch-size", 8, "--learning-rate", 3e-2, "--carry", "keep", "--device", "cpu",
                "--max-harm", 0)  # fmt: skip
    assert found.code == 0, found.err
    measured = lines(out, "harm")
    assert [line["step"] for line in measured] == [3, 6, 8]
    assert measured[-1]["harm"] > 1e-3
    record = json.loads((out / "sculptor.json").read_text())
    harm = record["result"]["harm"]
    assert record["result"]["steering_harm"] == measured[-1]["harm"]
    assert 0 < harm["error"] < harm["nats"]
    assert f"{harm['nats']:.4f} ± {harm['error']:.4f} nats a token" in found.out
    assert "Other answers have changed" in found.out or harm["nats"] <= 0.05
    assert f"{harm['nats']:.4f} ± {harm['error']:.4f}" in (out / "README.md").read_text(encoding="utf-8")
    verified = cli(
        "verify", made / "model", out, "--subspaces", made / "archive", "--harm", "--device", "cpu", "--json"
    ).json
    assert verified["harm"]["nats"] == pytest.approx(harm["nats"], rel=1e-4)
    shown = cli("verify", made / "model", out, "--subspaces", made / "archive", "--harm", "--device", "cpu")
    assert "KL(base || new), on" in shown.out
    assert (
        cli("verify", made / "model", out, "--subspaces", made / "archive", "--device", "cpu", "--json").json["harm"]
        is None
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    model.train()
    model.model.layers[0].eval()  # as somebody has set it
    by_hand = sculptor.harm(model, made / "archive")
    assert by_hand.nats == pytest.approx(harm["nats"], rel=1e-4)
    assert model.training
    assert not any(module.training for module in model.model.layers[0].modules())
    assert model.model.layers[1].training
    steering = sculptor.harm(model, Archive(made / "archive"), samples="steering")
    assert steering.nats == pytest.approx(measured[-1]["harm"], rel=1e-4)
    base = AutoModelForCausalLM.from_pretrained(made / "model")
    assert abs(sculptor.harm(sculptor.protect(base, made / "archive"), made / "archive").nats) < 1e-6


@pytest.mark.parametrize("also", [(), ("lm_head", "norm")])
def test_a_limit_holds_streamed_and_resident_alike(made: Path, tmp_path: Path, also: tuple[str, ...]) -> None:
    limit = 0.02
    settings = replace(HOT, max_harm=limit, harm_every=2, also_train=also, micro_batch_size=8)
    plain = run(made, tmp_path / "plain", replace(HOT, also_train=also))
    assert plain.loop.steering_harm > 2 * limit
    outputs = []
    for offload in ("none", "cpu"):
        report = run(made, tmp_path / offload, replace(settings, offload=offload))
        assert 0.5 * limit < report.loop.steering_harm <= 1.0001 * limit
        assert report.loop.harm.nats < 2 * limit
        outputs.append(load_file(tmp_path / offload / "model.safetensors"))
        measured = lines(tmp_path / offload, "harm")
        assert min(line["harm_scale"] for line in measured) < 1
        assert all(line["harm"] <= limit for line in measured)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_a_stopped_run_with_a_limit_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    settings = replace(HOT, max_harm=0.02, harm_every=3, save_every=1)
    run(made, tmp_path / "whole", settings)
    polls = iter([0, 0, 0, 15])
    with pytest.raises(Stopped):
        run(made, tmp_path / "halves", settings, stop=lambda: next(polls))
    run(made, tmp_path / "halves", settings, resume=True)
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert lines(tmp_path / "whole", "harm") == lines(tmp_path / "halves", "harm")


def test_what_is_evaluated_satisfies_the_limit(made: Path, tmp_path: Path) -> None:
    settings = replace(HOT, max_harm=0.02, harm_every=8, eval_every=2)
    report = run(made, tmp_path / "out", settings, eval_data=[made / "rows.jsonl"])
    assert [line["step"] for line in lines(tmp_path / "out", "harm")] == [2, 4, 6, 8]
    assert report.loop.steering_harm <= 0.02


TALK = (
    "{% for m in messages %}w1 {{ m['role'] == 'user' and 'w2' or 'w3' }} {{ m['content'] }} w4 {% endfor %}"
    "{% if add_generation_prompt %}w1 w3 {% endif %}"
)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a model that talks."""
    path = tmp_path_factory.mktemp("talking")
    save_checkpoint(path / "model")
    (path / "model" / "chat_template.jinja").write_text(TALK)
    analyze(path / "model", path / "archive", replace(CURVED, chat=True, max_length=32))
    analyze(path / "model", path / "text", replace(CURVED, max_length=32))
    write_rows(path / "rows.jsonl", task_rows())
    return path


def test_a_task_of_a_model_that_talks_may_add_so_much(talking: Path, tmp_path: Path) -> None:
    """Beyond what was there when it began, and whatever way it is trained; others have no limit."""
    free = run(talking, tmp_path / "free", replace(HOT, max_harm=0.0))
    assert (free.max_harm, free.loop.scaled) == (None, 0)
    assert free.loop.steering_harm > 3 * ADDED
    outputs = []
    for offload in ("none", "cpu"):
        held = run(talking, tmp_path / offload, replace(HOT, offload=offload))
        assert held.max_harm == pytest.approx(ADDED, abs=1e-5)
        assert held.loop.scaled > 0
        assert 0.5 * ADDED < held.loop.steering_harm <= held.max_harm
        outputs.append(load_file(tmp_path / offload / "model.safetensors"))
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert f"of {ADDED:g} allowed (--max-harm)" in train_text(held)
    first = tmp_path / "none"
    second = train(first, first / "subspaces", [talking / "rows.jsonl"], tmp_path / "second", HOT)
    assert second.max_harm == pytest.approx(held.loop.steering_harm + ADDED, rel=1e-3)
    other = train(talking / "model", talking / "text", [talking / "rows.jsonl"], tmp_path / "other", HOT)
    assert (other.max_harm, other.loop.scaled) == (None, 0)


def test_a_limit_that_nobody_gave_is_the_same_for_a_run_that_goes_on(talking: Path, tmp_path: Path) -> None:
    settings = replace(HOT, harm_every=3, save_every=1)
    run(talking, tmp_path / "whole", settings)
    polls = iter([0, 0, 0, 15])
    with pytest.raises(Stopped):
        run(talking, tmp_path / "halves", settings, stop=lambda: next(polls))
    report = run(talking, tmp_path / "halves", settings, resume=True)
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert report.loop.scaled == sum(line["harm_scale"] < 1 for line in lines(tmp_path / "whole", "harm"))


def test_a_gentle_run_is_the_one_without_a_limit(talking: Path, tmp_path: Path) -> None:
    gentle = replace(HOT, learning_rate=1e-4)
    run(talking, tmp_path / "held", gentle)
    run(talking, tmp_path / "free", replace(gentle, max_harm=0.0))
    held, free = (load_file(tmp_path / name / "model.safetensors") for name in ("held", "free"))
    assert all(torch.equal(held[name], free[name]) for name in held)


def test_damaged_samples_are_refused(made: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load, save

    from sculptor.archive.writer import ArchiveWriter

    archive = Archive(made / "archive")
    content = archive.section("samples")
    assert content is not None
    tensors = load(content)
    of_predictions = ("top_ids", "log_probabilities", "drawn_ids", "log_shares")
    faults = {
        "of another form": {**tensors, "lengths": tensors["lengths"].float()},
        "lengths do not": {**tensors, "lengths": tensors["lengths"][1:].contiguous()},
        "the model has 64": {**tensors, "top_ids": tensors["top_ids"] + 60},
        "add up to 1": {**tensors, "log_probabilities": tensors["log_probabilities"] - 1},
        "predictions": {**tensors, **{k: tensors[k][1:].contiguous() for k in of_predictions}},
        "go with each other": {**tensors, "drawn_ids": tensors["drawn_ids"][1:].contiguous()},
        "shares": {**tensors, "log_shares": tensors["log_shares"] + 9},
        "ids from": {**tensors, "drawn_ids": tensors["drawn_ids"] - 99},
        "unknown": {**tensors, "more": torch.zeros(1)},
    }
    for i, (message, changed) in enumerate(faults.items()):
        shutil.copytree(made / "archive", tmp_path / str(i))
        writer = ArchiveWriter(tmp_path / str(i), torch.float32, {})
        writer.add_section("samples", save(changed), ".safetensors")
        manifest = replace(archive.manifest, sections=writer._sections)
        (tmp_path / str(i) / "archive.json").write_text(json.dumps(manifest.to_json()))
        writer.close()
        with pytest.raises(ArchiveError, match=message):
            read_samples(Archive(tmp_path / str(i)), 64)
    (tmp_path / "0" / FILE).write_bytes(b"x" * len(save(faults["of another form"])))
    with pytest.raises(ArchiveError, match="has changed since"):
        read_samples(Archive(tmp_path / "0"), 64)
    with pytest.raises(SettingsError, match="reporting or steering"):
        sculptor.harm(torch.nn.Linear(1, 1), made / "archive", samples="all")  # type: ignore[arg-type]


@pytest.mark.slow
def test_several_processes_keep_the_limit_of_one(made: Path, tmp_path: Path) -> None:
    from together import together

    settings = replace(HOT, max_harm=0.02, harm_every=2, also_train=("norm",), kl_weight=0.5)
    inputs = (made / "model", made / "archive", [made / "rows.jsonl"])
    one = train(*inputs, tmp_path / "one", settings)
    found = together(2, train, *inputs, tmp_path / "two", settings)
    assert found[0] == found[1]
    assert found[0].loop.steering_harm == pytest.approx(one.loop.steering_harm, rel=0.05)
    assert found[0].loop.steering_harm <= 0.02
    first, second = (lines(tmp_path / name, "harm") for name in ("one", "two"))
    assert [line["step"] for line in first] == [line["step"] for line in second]
    assert [line["harm_scale"] < 1 for line in first] == [line["harm_scale"] < 1 for line in second]
    kl = [lines(tmp_path / name, "kl")[-1]["kl"] for name in ("one", "two")]
    assert kl[0] == pytest.approx(kl[1], rel=0.05)

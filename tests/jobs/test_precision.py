"""`train --optimizer bayes-adam`: its steps against float64, and what it knows from task to task."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Result, make_tokenizer, save_checkpoint, slowly, task_rows, write_rows
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train, verify
from sculptor.errors import ArchiveError
from sculptor.jobs.job import resolve_settings
from sculptor.methods.settings import RULES

SETTINGS = TrainSettings(
    optimizer="bayes-adam", evidence=0.3, max_steps=4, batch_size=8, learning_rate=1e-2, schedule="constant", warmup=0,
    offload="none", device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("precision")
    save_checkpoint(root / "model")
    write_rows(root / "a.jsonl", task_rows(count=16))
    write_rows(root / "b.jsonl", [row | {"completion": "w5"} for row in task_rows(count=16)])
    analyze(root / "model", root / "free", AnalyzeSettings(preserve=0.0, device="cpu"))
    analyze(root / "model", root / "half", AnalyzeSettings(preserve=0.5, basis="weights", device="cpu"))
    train(root / "model", root / "half", [str(root / "a.jsonl")], root / "first", SETTINGS)
    return root


def known(archive: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_file(archive / "optimizer.safetensors").items() if n.endswith(".precision")}


def reference(place: Path, settings: TrainSettings) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """W and (sigma / sigma_0)^2 of a run on whole batches, where nothing is protected, in float64."""
    model = transformers.LlamaForCausalLM.from_pretrained(place / "model").double()
    model.requires_grad_(False)
    trained = {name: p.requires_grad_(True) for name, p in model.named_parameters() if "_proj" in name}
    first = {name: torch.zeros_like(p) for name, p in trained.items()}
    second = {name: torch.zeros_like(p) for name, p in trained.items()}
    share = {name: torch.ones_like(p) for name, p in trained.items()}
    count, tokenizer = sum(p.numel() for p in trained.values()), make_tokenizer()
    rows = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    for step in range(1, settings.max_steps + 1):  # type: ignore[operator]
        losses = []
        for row in rows:
            prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
            answer = [*tokenizer.encode(row["completion"], add_special_tokens=False), 0]
            logs = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            losses += [-logs[i, token] for i, token in enumerate(answer)]
        torch.stack(losses).mean().backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()  # type: ignore[union-attr]
        with torch.no_grad():
            for name, p in trained.items():
                g = p.grad / max(1.0, float(norm) + 1e-6)  # type: ignore[operator]
                p.grad = None
                first[name], second[name] = 0.9 * first[name] + 0.1 * g, 0.95 * second[name] + 0.05 * g**2
                move = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
                p -= 1e-2 * share[name] * move
                sigma, e = share[name].sqrt(), share[name].sqrt() * 0.3 * count * g**2
                share[name] = (sigma * (1 + (sigma * e / 2) ** 2).sqrt() - sigma**2 * e / 2) ** 2
    return {name: p.detach() for name, p in trained.items()}, share


def test_steps_are_those_of_the_formula(place: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch_size=16, micro_batch_size=16)
    train(place / "model", place / "free", [str(place / "a.jsonl")], tmp_path / "tuned", settings)
    weights, shares = reference(place, settings)
    start, found = load_file(place / "model/model.safetensors"), load_file(tmp_path / "tuned/model.safetensors")
    precision = known(tmp_path / "tuned/subspaces")
    fell = 0.0
    for name, expected in weights.items():
        update = expected - start[name].double()
        assert float((found[name].double() - expected).norm()) <= 2e-3 * float(update.norm()), name
        share = 1 / (1 + precision[f"{name}.A0.precision"].double())
        torch.testing.assert_close(share, shares[name], atol=2e-3, rtol=0)
        fell = max(fell, 1 - float(share.min()))
    assert fell > 0.5  # or nothing is measured


@pytest.mark.parametrize("offload", ["cpu", *slowly("disk", "fused")])
def test_streamed_equals_resident(place: Path, tmp_path: Path, offload: str) -> None:
    settings = replace(SETTINGS, offload=offload if offload != "fused" else "cpu", micro_batch_size=8)
    resident = replace(SETTINGS, micro_batch_size=8)
    if offload == "fused":
        settings, resident = replace(settings, optimizer_mode="fused", clip=0), replace(resident, clip=0)
    for name, each in (("streamed", settings), ("resident", resident)):
        train(place / "first", place / "first/subspaces", [str(place / "b.jsonl")], tmp_path / name, each)
    for file in ("model.safetensors", "subspaces/optimizer.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("streamed", "resident"))
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_what_is_known_goes_on(place: Path, tmp_path: Path) -> None:
    before = known(place / "first/subspaces")
    assert before
    assert all(float(value.min()) >= 0 for value in before.values())
    assert any(float(value.max()) > 1 for value in before.values())
    train(place / "first", place / "first/subspaces", [str(place / "b.jsonl")], tmp_path / "second", SETTINGS)
    after = known(tmp_path / "second/subspaces")
    assert all(bool((after[name] >= value).all()) for name, value in before.items())  # it only grows
    assert any(float((after[name] - value).max()) > 0 for name, value in before.items())
    assert verify(place / "first", tmp_path / "second", place / "first/subspaces", device="cpu").passed
    plain = replace(SETTINGS, optimizer="adamw", evidence=None, carry="keep")
    train(place / "first", place / "first/subspaces", [str(place / "b.jsonl")], tmp_path / "plain", plain)
    assert known(tmp_path / "plain/subspaces").keys() == before.keys()  # rules are kept, so what is known is, too
    retaken = replace(plain, carry="retake")
    train(place / "first", place / "first/subspaces", [str(place / "b.jsonl")], tmp_path / "retaken", retaken)
    assert "optimizer" not in Archive(tmp_path / "retaken/subspaces").manifest.sections


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, save_every=1)
    data, archive = [str(place / "b.jsonl")], place / "first/subspaces"
    train(place / "first", archive, data, tmp_path / "whole", settings)
    polls = iter([None, 15])
    with pytest.raises(Exception, match="go on with --resume"):
        train(place / "first", archive, data, tmp_path / "cut", settings, stop=lambda: next(polls))
    train(place / "first", archive, data, tmp_path / "cut", settings, resume=True)
    for file in ("model.safetensors", "subspaces/optimizer.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_a_damaged_section_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "first/subspaces", tmp_path / "archive")
    file = tmp_path / "archive/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArchiveError, match="has changed since it was written"):
        train(place / "first", tmp_path / "archive", [str(place / "b.jsonl")], tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_refused(cli: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    def said(*arguments: Any, archive: Path = place / "half") -> str:
        result = cli("train", place / "model", "--subspaces", archive, "--data", place / "a.jsonl", "-o", tmp_path / "o",
                     "--device", "cpu", *arguments)  # fmt: skip
        assert result.code in (1, 2)
        assert len(result.err.strip().splitlines()) == 1
        return result.err

    assert "--evidence without effect with --optimizer adamw" in said("--evidence", "0.1")
    assert "use --carry keep" in said("--optimizer", "bayes-adam", "--carry", "accumulate")
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    (row,) = re.findall(r"^\| `bayes-adam` \| ([^|]+) \| `keep` \|", page, re.MULTILINE)
    goes = set(re.findall(r"`(\w+)`", row))
    assert goes == {"staircase", "mask"}
    for rule in RULES:
        if rule in goes:
            opened = tmp_path / f"{rule}-goes"
            analyze(place / "model", opened, AnalyzeSettings(rule=rule, basis="weights", device="cpu"))
            resolved = resolve_settings(TrainSettings(optimizer="bayes-adam"), Archive(opened))
            assert (resolved.carry, resolved.evidence) == ("keep", 0.01)
            continue
        archive = tmp_path / rule
        analyze(place / "model", archive, AnalyzeSettings(rule=rule, device="cpu"))
        assert f"does not go with an archive with rule {rule}" in said("--optimizer", "bayes-adam", archive=archive)


def test_what_is_known_is_of_what_is_kept(place: Path, tmp_path: Path) -> None:
    """Steps behind the best one are thrown away, and what they have decided with them."""
    others = write_rows(tmp_path / "others.jsonl", [{"text": "w9 w11 w13 w15 w17 w19 w11 w9 w19"} for _ in range(4)])
    longer = replace(SETTINGS, max_steps=6, eval_every=1, learning_rate=0.1)
    data = [str(place / "a.jsonl")]
    report = train(place / "model", place / "half", data, tmp_path / "best", longer, eval_data=[str(others)])
    step = report.loop.best_step
    assert step is not None
    assert step < 6
    train(place / "model", place / "half", data, tmp_path / "short", replace(longer, max_steps=step, eval_every=None))
    kept, expected = known(tmp_path / "best" / "subspaces"), known(tmp_path / "short" / "subspaces")
    assert kept.keys() == expected.keys()
    for name, value in kept.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("best", "short")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

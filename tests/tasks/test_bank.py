"""A bank of two tasks: what comes back of each, which rows go where, alone and in mixed company, and what is refused."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, Interpolate, TrainSettings, add_to_bank, analyze, edit, evaluate, route, train
from sculptor.checkpoint.written import LOCK_NAME
from sculptor.edits.compact import Compact
from sculptor.errors import BankError, OutputError
from sculptor.jobs.bank_files import Bank, bank_to_add_to, write_task
from sculptor.numerics.rounding import rounding_variance
from sculptor.numerics.routing import Key

COVERS = ["sculptor.jobs.bank_files", "sculptor.tasks.routed"]


def other_rows(count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"w30 w31 w{i % 5 + 32} w33", "completion": f"w{i % 3 + 20}"} for i in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bank")
    save_checkpoint(root / "model", dtype=torch.bfloat16)
    write_rows(root / "a.jsonl", task_rows())
    write_rows(root / "b.jsonl", other_rows())
    mixed = [row for pair in zip(task_rows(), other_rows(), strict=True) for row in pair]
    write_rows(root / "both.jsonl", mixed)
    told = TrainSettings(max_steps=6, batch_size=12, learning_rate=3e-3, device="cpu")
    analyze(root / "model", root / "few", AnalyzeSettings(rule="lowrank", basis="random", rank=2, device="cpu"))
    analyze(root / "model", root / "all", AnalyzeSettings(preserve=0.0, device="cpu"))
    for name, archive in (("a", "few"), ("b", "all")):
        train(root / "model", root / archive, [str(root / f"{name}.jsonl")], root / f"tuned-{name}", told)
        add_to_bank(root / "bank", root / "model", root / f"tuned-{name}", [str(root / f"{name}.jsonl")], name=name)
    return root


def test_a_task_comes_back_to_rounding(cli: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    factored = [name for name in load_file(place / "bank/a.safetensors") if name.endswith(".right")]
    assert len(factored) == len([name for name in load_file(place / "model/model.safetensors") if "_proj" in name])
    for name in ("a", "b"):
        found = cli("bank", "export", place / "bank", place / "model", "--task", name, "-o", tmp_path / name)
        assert found.code == 0, found.err
        assert f"what {name} changed is rounded to bfloat16, the base's dtype" in found.err
        back, tuned = (load_file(path / "model.safetensors") for path in (tmp_path / name, place / f"tuned-{name}"))
        for key, value in tuned.items():
            apart = float((back[key].double() - value.double()).norm())
            assert apart <= 1.5 * float(rounding_variance(value).sum()) ** 0.5, key
    export = ("bank", "export", place / "bank", place / "model", "--task", "a", "--save-dtype", "float32")
    assert "rounded to" not in cli(*export, "-o", tmp_path / "wide").err
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "a"))
    assert all(value.dtype == torch.float32 for value in wide.values())
    assert all(torch.allclose(value, narrow[key].float(), rtol=2**-8) for key, value in wide.items())
    assert any(not torch.equal(value, narrow[key].float()) for key, value in wide.items())
    record = json.loads((tmp_path / "a" / "sculptor.json").read_text())
    assert record["task"]["name"] == "a"


@pytest.mark.slow
def test_rows_find_their_task_alone_and_together(place: Path, cli: Callable[..., Result]) -> None:
    told = cli(
        "bank", "route", place / "bank", place / "model", "--data", place / "a.jsonl", "--json", "--device", "cpu"
    )
    assert [one["chosen"] for one in json.loads(told.out)] == [{"a": 24, "b": 0}]
    found = route(place / "bank", place / "model", [str(place / name) for name in ("a.jsonl", "b.jsonl")])
    assert [dict(one.chosen) for one in found] == [{"a": 24, "b": 0}, {"a": 0, "b": 24}]
    by_task = {}
    for name in ("a", "b"):
        by_task[name] = evaluate(place / f"tuned-{name}", [str(place / f"{name}.jsonl")], device="cpu")
    for size in (1, 16):
        both = evaluate(
            place / "model", [str(place / "both.jsonl")], bank=place / "bank", batch_size=size, device="cpu"
        )
        assert dict(both.routed) == {"a": 24, "b": 24}
        tokens = sum(one.num_tokens for one in by_task.values())
        assert both.num_tokens == tokens
        expected = sum(one.loss * one.num_tokens for one in by_task.values()) / tokens  # type: ignore[operator]
        assert both.loss == pytest.approx(expected, rel=0.02)
    assert both.accuracy is not None


@pytest.mark.slow
def test_tasks_that_are_mixed(place: Path) -> None:
    one, two = (
        evaluate(place / "model", [str(place / "a.jsonl")], bank=place / "bank", bank_top=top, max_rows=4, device="cpu")
        for top in (1, 2)
    )
    assert dict(two.routed) == {"a": 4, "b": 0}
    assert two.loss == pytest.approx(one.loss, rel=0.2)


def test_what_has_no_sense_is_refused(cli: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    edit(place / "model", place / "tuned-a", tmp_path / "other", Interpolate(alpha=0.5), device="cpu")

    def said(*arguments: Any) -> str:
        result = cli(*arguments)
        assert result.code in (1, 2)
        assert len(result.err.strip().splitlines()) == 1, result.err
        return result.err

    rows, before = ("--data", place / "a.jsonl"), (place / "bank" / "bank.json").read_bytes()
    add = ("bank", "add", place / "bank", place / "model", place / "tuned-a")
    assert "has a task a already" in said(*add, "--name", "a", *rows)
    assert "--rank" in said(*add, "--name", "c", *rows, "--rank", "0")
    assert "nothing to add" in said(
        "bank", "add", place / "bank", place / "model", place / "model", "--name", "c", *rows
    )
    assert "another checkpoint" in said(
        "bank", "add", place / "bank", tmp_path / "other", place / "tuned-a", "--name", "c", *rows
    )
    assert "name" in said(*add, "--name", "a/b", *rows)
    assert "no task 'c'; there are a, b" in said(
        "bank", "export", place / "bank", place / "model", "--task", "c", "-o", tmp_path / "c"
    )
    ask = ("evaluate", place / "model", *rows, "--device", "cpu")
    assert "--bank-top without effect" in said(*ask, "--bank-top", "2")
    assert "use --offload none" in said(*ask, "--bank", place / "bank", "--offload", "disk")
    assert "no bank.json" in said(*ask, "--bank", tmp_path)
    assert "another checkpoint" in said(
        "evaluate", tmp_path / "other", *rows, "--bank", place / "bank", "--device", "cpu"
    )
    assert (place / "bank" / "bank.json").read_bytes() == before
    assert not list((place / "bank").glob("c*"))


def test_a_damaged_bank_is_refused(cli: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    for name in ("bank.json", "a.safetensors"):
        copy = tmp_path / name.replace(".", "-")
        copy.mkdir()
        for file in (place / "bank").iterdir():
            content = bytearray(file.read_bytes())
            if file.name == name:
                content[len(content) // 2] ^= 1
            (copy / file.name).write_bytes(content)
        found = cli("bank", "export", copy, place / "model", "--task", "a", "-o", tmp_path / "out")
        assert found.code == 1
        assert name in found.err
        assert len(found.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_two_at_once_and_one_that_broke_off_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, bank = Key(2, torch.zeros(1, 2), torch.zeros(1, 2, 2)), tmp_path / "bank"

    def add(name: str) -> None:
        write_task(bank, "0" * 64, name, key, {"w": Compact(torch.ones(2, 2), None)}, 1.0)

    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sculptor.jobs.bank_files.file_digest", full)
        with pytest.raises(OutputError, match="No space left"):
            add("a")
    assert not bank.exists()
    bank.mkdir()
    for left in (LOCK_NAME, "a.safetensors.tmp"):  # killed
        (bank / left).write_text("")
    ours = {"key.mean": torch.zeros(1, 2), "key.scatter": torch.zeros(1, 2, 2), "w.left": torch.zeros(2, 2)}
    save_file(ours, bank / "task-0.safetensors")  # killed before the bank listed it
    names = [f"task-{i}" for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, names))
    assert sorted(Bank(bank).names) == names
    with pytest.raises(BankError, match="has a task task-1 already"):
        add("task-1")
    assert len(Bank(bank).keys()) == 6
    for name, content in (("mine", {"w": torch.ones(2)}), ("empty", {})):  # somebody's
        save_file(content, bank / f"{name}.safetensors")
        before = (bank / f"{name}.safetensors").read_bytes()
        with pytest.raises(BankError, match="no task that was added; move it"):
            add(name)
        assert ((bank / f"{name}.safetensors").read_bytes(), len(Bank(bank).names)) == (before, 6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match=r"no bank\.json"):
        bank_to_add_to(tmp_path / "mine", "a")

"""CrispEdit's mask: the threshold against counting, gradients against the definition, and the leak that AdamW makes of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.benchmark.crispedit import KIND, CrispRule, lowest_threshold, masked_share, num_below
from sculptor.methods.rule import OuterProduct, Working

RULES = {"crispedit": KIND}
PLAN = """
model = "base"
[train]
max_steps = 3
batch_size = 8
learning_rate = 1e-2
device = "cpu"
[evaluate]
exact_match = false
[analyze]
budget = 0.5
data = ["general.jsonl"]
device = "cpu"
[[tasks]]
name = "first"
data = ["first.jsonl"]
test = ["first.jsonl"]
[[tasks]]
name = "second"
data = ["second.jsonl"]
test = ["second.jsonl"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crispedit")
    save_checkpoint(path / "base")
    write_rows(path / "general.jsonl", task_rows("text", 6))
    write_rows(path / "first.jsonl", task_rows(count=12))
    write_rows(path / "second.jsonl", [row | {"completion": "w33"} for row in task_rows(count=12)])
    (path / "plan.toml").write_text(PLAN)
    return path


@pytest.mark.parametrize("budget", [0.03, 0.6, 1.0])
def test_the_threshold_leaves_the_budget_free(generator: torch.Generator, budget: float) -> None:
    values = [
        (
            torch.rand(m, generator=generator).double() ** 9,
            torch.rand(n, generator=generator).double().sort().values ** 9,
        )
        for m, n in ((7, 30), (40, 5))
    ]
    found = lowest_threshold(values, budget)
    products = [torch.outer(g, c) for g, c in values]
    free = sum(int((p <= found).sum()) for p in products)
    assert free == sum(num_below(g, c, found) for g, c in values)
    fewer = sum(int((p <= found * (1 - 1e-9)).sum()) for p in products)
    assert fewer / 410 < budget <= free / 410
    for (g, c), p in zip(values, products, strict=True):
        assert masked_share(g, c, found) == pytest.approx(float(p[p > found].sum() / p.sum()), abs=1e-9)


def test_a_gradient_keeps_what_is_below_the_threshold(place: Path, tmp_path: Path, generator: torch.Generator) -> None:
    settings = AnalyzeSettings(
        rule="crispedit",
        basis="curvature",
        budget=0.5,
        data=(str(place / "general.jsonl"),),
        samples=False,
        device="cpu",
    )
    analyze(place / "base", tmp_path / "a", settings, rules=RULES)
    archive = Archive(tmp_path / "a", rules=RULES)
    free = pairs = 0.0
    for name, record in archive.items():
        rule, tensors = record.rule, archive.read(name).tensors
        assert isinstance(rule, CrispRule)
        u, v = tensors["output"].double(), tensors["input"].double()
        curvature = (
            torch.outer(tensors["output.values"].double(), tensors["input.values"].double()) * rule.factors.scale
        )
        inputs, outputs = (torch.randn(5, d, generator=generator) for d in reversed(rule.shape))
        gradient = (outputs.mT @ inputs).double()
        expected = u @ torch.where(curvature <= rule.threshold, u.mT @ gradient @ v, 0.0) @ v.mT
        made = rule.prepare(tensors, Working(torch.device("cpu"), torch.float64)).tensors
        (found,) = rule.project(torch.empty(0), made, (), OuterProduct(inputs, outputs))
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(rule.project(torch.empty(0), made, (), found)[0], found, atol=1e-6), "twice is once"
        assert rule.violation(tensors, gradient, found, torch.zeros(rule.shape).double()).norm < 1e-5 * float(
            found.norm()
        )
        free, pairs = free + rule.free * gradient.numel(), pairs + gradient.numel()
    assert free / pairs == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_a_sequence_goes_on_by_the_tasks_moments(cli: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    """And says what it leaked: AdamW turns a projected gradient out of the free pairs again."""
    found = cli("continual", place / "plan.toml", "-o", tmp_path / "out", "--method", "crispedit", "--json")
    assert found.code == 0, found.err
    report = found.json
    assert [stage["name"] for stage in report["stages"]] == ["base", "first", "second"]
    assert report["harm"]["nats"] > 0
    archive = Archive(tmp_path / "out" / "model" / "subspaces", rules=RULES)
    assert [task.name for task in archive.manifest.tasks] == ["analysis", "first", "second"]
    rules = [record.rule for record in archive.values()]
    assert all(isinstance(rule, CrispRule) and len(rule.factors.traces) == 3 for rule in rules)
    record = (tmp_path / "out" / "model" / "sculptor.json").read_text()
    assert '"leak": 0.0,' not in record

"""Many staircases as one: what the stack gives is what each rule gives by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.methods.rule import Working, is_open
from sculptor.methods.sides import Side
from sculptor.methods.staircase import StaircaseRule
from sculptor.numerics import reflectors

GENERATOR_SEED = 7


def rules_of(kind: str) -> list[StaircaseRule]:
    """Rules of one key: of the same steps, of different ones, of sides that hold the free directions."""
    m, n = 12, 10
    leading = Side("leading", 5), Side("leading", 4)
    if kind == "alike":
        steps: list[Any] = [((5, n), (m, 4))] * 3
    elif kind == "core":
        steps = [((5, 4), (m, 0))] * 3
    elif kind == "stairs":
        steps = [((2, n), (4, 3), (m, 1)), ((5, 4), (m, 2)), ((1, n), (3, 4), (m, 0))]
        return [StaircaseRule((m, n), s, *leading, moments=True) for s in steps]
    elif kind == "late":  # so few free that they are written out
        steps = [((9, n), (m, 7))] * 2
        return [StaircaseRule((m, n), s, Side("free", 9), Side("free", 7)) for s in steps]
    else:
        return [StaircaseRule((m, n), ((m, 0),))] * 2
    return [StaircaseRule((m, n), s, *leading) for s in steps]


def stored(rule: StaircaseRule, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors as an archive would hold them."""
    found = {}
    for name, side, dim in rule._sides():
        columns = torch.randn(dim, side.columns(dim), dtype=torch.float64, generator=generator)
        found[name] = torch.linalg.qr(columns)[0]
        found[f"{name}.values"] = torch.rand(side.directions, dtype=torch.float64, generator=generator)
    return found


@pytest.mark.parametrize("kind", ["alike", "core", "stairs", "late", "open"])
@pytest.mark.parametrize("soften", [0.0, 3.0])
@pytest.mark.parametrize("multiple", [1, 4, 5])
def test_a_stack_gives_what_each_gives(
    kind: str, soften: float, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflectors, "ALIGNED", multiple)  # boxes are larger than what is free in them
    monkeypatch.setattr(reflectors, "WIDE", 2)
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    rules = rules_of(kind)
    if soften and not rules[0].moments:
        return
    working = Working(torch.device("cpu"), torch.float64, soften)
    tensors = [rule.prepare(stored(rule, generator), working).tensors for rule in rules]
    assert len({rule.stack_key(each) for rule, each in zip(rules, tensors, strict=True)}) == 1
    coordinates = [
        [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in rule.shapes] for rule in rules
    ]
    weights, gradients = torch.randn(2, len(rules), *rules[0].shape, dtype=torch.float64, generator=generator)
    stack = rules[0].stack(rules[1:])
    together = stack.prepare(tensors)
    updates = stack.update(together, coordinates)
    projected = stack.project(together, coordinates, gradients)
    for i, rule in enumerate(rules):
        expected = rule.update(weights[i], tensors[i], coordinates[i])
        torch.testing.assert_close(updates[i], expected, rtol=1e-12, atol=1e-12)
        parts = rule.project(weights[i], tensors[i], coordinates[i], gradients[i])
        assert len(projected[i]) == len(parts)
        for found, part in zip(projected[i], parts, strict=True):
            torch.testing.assert_close(found, part, rtol=1e-12, atol=1e-12)
        # <dW(A), G> = <A, project(G)>: the one is the other's transpose.
        inner = sum(float((a * g).sum()) for a, g in zip(coordinates[i], projected[i], strict=True))
        assert inner == pytest.approx(float((updates[i] * gradients[i]).sum()), rel=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_archives_have_matrices_that_go_together(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(model, tmp_path / "archive", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    archive = Archive(tmp_path / "archive")
    keys = []
    for name, record in archive.items():
        rule = record.rule
        assert isinstance(rule, StaircaseRule)
        if is_open(rule):
            prepared = rule.prepare(archive.read(name).tensors, Working(torch.device("cpu"), torch.float32, 3.0))
            keys.append(rule.stack_key(prepared.tensors))
    assert len(set(keys)) < len(keys)

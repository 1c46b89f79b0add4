"""Three rules that no file of sculptor knows go through every job: what a rule of somebody's own may rely on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses_of_a_plain_loop, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from toys import frozen_rows, mask, rotation

import sculptor
from sculptor.errors import ArchiveError, SettingsError, Stopped
from sculptor.methods.method import measures_of
from sculptor.methods.rule import OuterProduct, Rule, Working, num_free

RULES = {"frozen-rows": frozen_rows.KIND, "few": mask.KIND, "rotation-2": rotation.KIND}
CPU64 = Working(torch.device("cpu"), torch.float64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows."""
    path = tmp_path_factory.mktemp("toys")
    save_checkpoint(path / "model")
    write_rows(path / "rows.jsonl", task_rows())
    return path


def settings(**changes: Any) -> sculptor.TrainSettings:
    values: dict[str, Any] = {"max_steps": 5, "batch_size": 8, "micro_batch_size": 4, "device": "cpu", "clip": 0.5}
    return sculptor.TrainSettings(**(values | changes))


def analyzed(made: Path, kind: str, output: Path, family: str = "model") -> sculptor.Archive:
    chosen = sculptor.AnalyzeSettings(rule=kind, device="cpu")
    sculptor.analyze(made / family, output, chosen, rules=RULES)
    return sculptor.Archive(output, rules=RULES)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_of_ones_own_goes_through_every_job(made: Path, kind: str, tmp_path: Path) -> None:
    rows = [made / "rows.jsonl"]
    archive = analyzed(made, kind, tmp_path / "a")
    assert {record.rule.kind for record in archive.values()} == {kind}

    tuned = {}
    for offload in ("none", "bases", "cpu", "disk"):
        report = sculptor.train(
            made / "model", tmp_path / "a", rows, tmp_path / offload, settings(offload=offload), rules=RULES
        )
        assert report.num_trainable == archive.num_free
        assert report.loop.last_loss < report.loop.first_loss
        tuned[offload] = weights(tmp_path / offload)
    for name, tensor in tuned["none"].items():
        assert torch.equal(tensor, tuned["cpu"][name])
        assert torch.equal(tensor, tuned["disk"][name])

    found = sculptor.verify(made / "model", tmp_path / "none", tmp_path / "a", device="cpu", rules=RULES)
    assert found.passed
    assert found.num_changed == len(archive)

    inspected = sculptor.inspect(tmp_path / "none" / "subspaces", model=tmp_path / "none", rules=RULES)
    assert inspected.rule == kind
    assert inspected.num_free == archive.num_free
    assert [task.name for task in inspected.tasks] == ["analysis", "rows"]

    again = sculptor.train(
        tmp_path / "none", tmp_path / "none" / "subspaces", rows, tmp_path / "two", settings(), rules=RULES
    )
    assert again.carry == "keep"
    assert sculptor.verify(
        tmp_path / "none", tmp_path / "two", tmp_path / "none" / "subspaces", device="cpu", rules=RULES
    ).passed


@pytest.mark.parametrize("kind", RULES)
def test_verify_sees_what_the_rule_forbids(made: Path, kind: str, tmp_path: Path, generator: torch.Generator) -> None:
    from safetensors.torch import save_file

    archive = analyzed(made, kind, tmp_path / "a")
    sculptor.train(made / "model", tmp_path / "a", [made / "rows.jsonl"], tmp_path / "out", settings(), rules=RULES)
    tensors = weights(tmp_path / "out")
    name = next(iter(archive))
    tensors[name] += 0.01 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    found = sculptor.verify(made / "model", tmp_path / "out", tmp_path / "a", device="cpu", rules=RULES)
    assert [matrix.name for matrix in found.matrices if not matrix.holds] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_stopped_run_goes_on_bit_for_bit(made: Path, kind: str, offload: str, tmp_path: Path) -> None:
    rows, chosen = [made / "rows.jsonl"], settings(offload=offload, save_every=2)
    analyzed(made, kind, tmp_path / "a")
    sculptor.train(made / "model", tmp_path / "a", rows, tmp_path / "whole", chosen, rules=RULES)
    polls = iter([None, None, 15])
    with pytest.raises(Stopped):
        sculptor.train(
            made / "model", tmp_path / "a", rows, tmp_path / "cut", chosen, rules=RULES, stop=lambda: next(polls)
        )
    sculptor.train(made / "model", tmp_path / "a", rows, tmp_path / "cut", chosen, rules=RULES, resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("kind", RULES)
def test_a_loop_of_ones_own(made: Path, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    analyzed(made, kind, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    sculptor.protect(model, tmp_path / "a", rules=RULES)
    losses = losses_of_a_plain_loop(model)
    assert losses[-1] < losses[0]
    sculptor.merge(model).save_pretrained(tmp_path / "merged")
    assert sculptor.verify(made / "model", tmp_path / "merged", tmp_path / "a", device="cpu", rules=RULES).passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_continual(made: Path, kind: str, tmp_path: Path) -> None:
    rows = str(made / "rows.jsonl")
    tasks = "".join(f'[[tasks]]\nname = "{name}"\ndata = "{rows}"\ntest = "{rows}"\n' for name in ("one", "two"))
    train = '[train]\nmax_steps = 3\ndevice = "cpu"\n[evaluate]\nexact_match = false\n'
    plan = f'model = "{made / "model"}"\n[analyze]\nrule = "{kind}"\ndevice = "cpu"\n{train}{tasks}'
    (tmp_path / "plan.toml").write_text(plan)
    report = sculptor.continual(tmp_path / "plan.toml", tmp_path / "run", rules=RULES)
    assert len(report.matrix) == 3
    assert (tmp_path / "run" / "model" / "subspaces" / "archive.json").is_file()


@pytest.mark.parametrize("kind", RULES)
def test_a_transposed_layer_is_seen_the_right_way_round(made: Path, kind: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "gpt2", "gpt2")
    write_rows(tmp_path / "rows.jsonl", task_rows())
    analyzed(tmp_path, kind, tmp_path / "a", "gpt2")
    chosen = settings(max_steps=2)
    sculptor.train(tmp_path / "gpt2", tmp_path / "a", [tmp_path / "rows.jsonl"], tmp_path / "t", chosen, rules=RULES)
    assert sculptor.verify(tmp_path / "gpt2", tmp_path / "t", tmp_path / "a", device="cpu", rules=RULES).passed


@pytest.mark.parametrize("kind", RULES)
def test_gradients_are_those_of_the_update(made: Path, kind: str, tmp_path: Path, generator: torch.Generator) -> None:
    """Against autograd through the update, in float64; a gradient may come as what it is the sum of."""
    archive = analyzed(made, kind, tmp_path / "a")
    for name in list(archive)[:4]:
        entry = archive.read(name)
        rule: Rule = entry.rule
        m, n = rule.shape
        tensors = rule.prepare(entry.tensors, CPU64).tensors
        weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
        coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in rule.shapes]
        x, dy = (torch.randn(6, d, dtype=torch.float64, generator=generator) for d in (n, m))
        asked = [a.clone().requires_grad_(True) for a in coordinates]
        expected = torch.autograd.grad((rule.update(weight, tensors, asked) * (dy.T @ x)).sum(), asked)
        for gradient in (dy.T @ x, OuterProduct(x, dy)):
            for a, b in zip(rule.project(weight, tensors, coordinates, gradient), expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        assert num_free(rule) == sum(a.numel() for a in coordinates)
        zero = [torch.zeros_like(a) for a in coordinates]
        assert not bool(rule.update(weight, tensors, zero).any())


@pytest.mark.parametrize("kind", [*RULES, "double", "input", "core"])
def test_matrices_of_one_shape_are_taken_as_a_stack(
    made: Path, kind: str, tmp_path: Path, generator: torch.Generator
) -> None:
    if kind in RULES:
        archive = analyzed(made, kind, tmp_path / "a")
    else:
        chosen: Any = {"constraint": kind, "preserve": 0.5, "device": "cpu"}
        sculptor.analyze(made / "model", tmp_path / "a", sculptor.AnalyzeSettings(**chosen))
        archive = sculptor.Archive(tmp_path / "a")
    role = next(iter(archive.values())).role
    entries = [archive.read(name) for name, record in archive.items() if record.role == role]
    assert len(entries) > 1
    rule: Rule = entries[0].rule
    assert [entry.rule.shapes for entry in entries] == [rule.shapes] * len(entries)
    prepared = [entry.rule.prepare(entry.tensors, CPU64).tensors for entry in entries]
    tensors = {name: torch.stack([one[name] for one in prepared]) for name in prepared[0]}
    lead = (len(entries),)
    weight, gradient = (torch.randn(lead + rule.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    coordinates = [torch.randn(lead + shape, dtype=torch.float64, generator=generator) for shape in rule.shapes]
    updates = rule.update(weight, tensors, coordinates)
    gradients = rule.project(weight, tensors, coordinates, gradient)
    for i, one in enumerate(prepared):
        own = [a[i] for a in coordinates]
        torch.testing.assert_close(updates[i], rule.update(weight[i], one, own))
        for a, b in zip(gradients, rule.project(weight[i], one, own, gradient[i]), strict=True):
            torch.testing.assert_close(a[i], b)


def test_what_a_rule_leaves_alone_keeps_its_bytes(made: Path, tmp_path: Path) -> None:
    """Also entries that are -0, which adding 0 would turn."""
    base = weights(made / "model")
    archive = analyzed(made, "few", tmp_path / "a")
    sculptor.train(made / "model", tmp_path / "a", [made / "rows.jsonl"], tmp_path / "out", settings(), rules=RULES)
    tuned = weights(tmp_path / "out")
    for name, record in archive.items():
        changed = base[name].view(torch.int32) != tuned[name].view(torch.int32)
        assert 0 < int(changed.sum()) <= num_free(record.rule)


def test_a_rule_that_is_not_given_is_named(made: Path, tmp_path: Path) -> None:
    analyzed(made, "few", tmp_path / "a")
    with pytest.raises(ArchiveError, match=r"rule of kind 'few': expected one of lowrank, mask, rotation, staircase"):
        sculptor.Archive(tmp_path / "a")
    with pytest.raises(SettingsError, match=r"rule 'fews': expected few, frozen-rows, lowrank, mask, "):
        sculptor.analyze(made / "model", tmp_path / "b", sculptor.AnalyzeSettings(rule="fews"), rules=RULES)
    with pytest.raises(SettingsError, match=r"'staircase' is a kind of sculptor's own"):
        sculptor.analyze(made / "model", tmp_path / "b", rules={"staircase": mask.KIND})
    content = json.loads((tmp_path / "a" / "archive.json").read_text())
    assert "toys" not in json.dumps(content), "an archive names kinds, never import paths"


def test_each_toy_is_short() -> None:
    for toy in (frozen_rows, mask, rotation):
        assert toy.__file__ is not None
        assert len(Path(toy.__file__).read_text().splitlines()) < 60


class Opened(frozen_rows.FirstRows):
    """Freezes the more rows the less the new task's rows say: it looks at them before the first step."""

    def measures(self, step: str, carry: str | None = None) -> str:
        return "inputs" if step == "open" else "nothing"

    def open(self, previous: Any, evidence: Any) -> Any:
        from sculptor.methods.method import Derived

        assert evidence.inputs.value.shape == (evidence.shape[1],) * 2
        assert evidence.task == 1
        return Derived(frozen_rows.FrozenRows(evidence.shape, evidence.shape[0] // 2), {})


class Measured(frozen_rows.FirstRows):
    """Looks at rows when it is made."""

    def measures(self, step: str, carry: str | None = None) -> str:
        return "inputs"


def test_a_method_that_measures_needs_rows(made: Path, tmp_path: Path) -> None:
    rules = {"frozen-rows": sculptor.Kind(frozen_rows.FrozenRows, Measured)}
    with pytest.raises(SettingsError, match=r"rule frozen-rows measures rows: pass data"):
        sculptor.analyze(made / "model", tmp_path / "a", sculptor.AnalyzeSettings(rule="frozen-rows"), rules=rules)
    assert not (tmp_path / "a").exists()


def test_cosines_are_for_an_analysis_alone() -> None:
    class Wants(Measured):
        carries = ("accumulate",)

        def measures(self, step: str, carry: str | None = None) -> str:
            return "cosines"

    method: Any = Wants(None)
    assert measures_of(method, "derive") == "cosines"
    assert measures_of(method, "carry", "keep") == "nothing"
    with pytest.raises(ValueError, match="cosines are measured for an analysis alone, not to carry rules"):
        measures_of(method, "carry", "accumulate")


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_rule_may_follow_the_new_tasks_rows(made: Path, offload: str, tmp_path: Path) -> None:
    rules = {"frozen-rows": sculptor.Kind(frozen_rows.FrozenRows, Opened)}
    chosen = settings(offload=offload, save_every=2)
    sculptor.analyze(made / "model", tmp_path / "a", sculptor.AnalyzeSettings(rule="frozen-rows"), rules=rules)
    archive, rows = sculptor.Archive(tmp_path / "a", rules=rules), [made / "rows.jsonl"]
    report = sculptor.train(made / "model", tmp_path / "a", rows, tmp_path / "whole", chosen, rules=rules)
    entries = sum(record.shape[0] * record.shape[1] for record in archive.values())
    assert report.num_trainable == entries // 2 < archive.num_free == 3 * entries // 4
    polls = iter([None, None, 15])
    with pytest.raises(Stopped):
        sculptor.train(
            made / "model", tmp_path / "a", rows, tmp_path / "cut", chosen, rules=rules, stop=lambda: next(polls)
        )
    sculptor.train(made / "model", tmp_path / "a", rows, tmp_path / "cut", chosen, rules=rules, resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not (tmp_path / "cut.partial").exists()
    opened = sculptor.Archive(tmp_path / "cut" / "opened", rules=rules)
    assert opened.num_free == entries // 2
    assert sculptor.verify(made / "model", tmp_path / "cut", opened.path, device="cpu", rules=rules).passed
    assert sculptor.verify(made / "model", tmp_path / "whole", tmp_path / "a", device="cpu", rules=rules).passed

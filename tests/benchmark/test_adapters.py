"""Methods of PEFT in this loop: what they are told, what they change, and what is refused."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file

from sculptor import TrainSettings
from sculptor.benchmark import adapters
from sculptor.benchmark.adapters import _overlap, require_peft, train_adapter
from sculptor.benchmark.plan import AdapterSettings, Contender
from sculptor.errors import OutputError, SettingsError, Stopped
from sculptor.progress import silent

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
SETTINGS = TrainSettings(max_steps=3, batch_size=8, device="cpu")
ADAPTER = AdapterSettings(rank=2, alpha=4)
METHODS: tuple[Contender, ...] = ("lora", "olora", "osf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows."""
    path = tmp_path_factory.mktemp("adapters")
    save_checkpoint(path / "model")
    write_rows(path / "rows.jsonl", task_rows())
    return path


def run(made: Path, output: Path, method: Contender = "lora", settings: TrainSettings = SETTINGS, **more: Any) -> Path:
    arguments: dict[str, Any] = {"model": made / "model", "adapter": ADAPTER, "progress": silent, "stop": lambda: None}
    arguments |= more
    model, adapter = arguments.pop("model"), arguments.pop("adapter")
    train_adapter(model, [made / "rows.jsonl"], output, settings, adapter, method, **arguments)
    return output


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_without_peft_it_is_said_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"this --method needs PEFT: pip install 'sculptor-subspaces\[baselines\]'"):
        require_peft()


@needs_peft
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"relative_rate": 0.1}, "relative_rate"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"also_train": ("norm",)}, "also_train"),
        ({"offload": "cpu"}, "offload"),
        ({"optimizer_mode": "fused", "clip": 0, "micro_batch_size": 8}, "optimizer_mode"),
        ({"weight_decay": 0.1, "also_train": ("norm",)}, "weight_decay, also_train"),
    ],
)
def test_settings_without_effect_are_named(made: Path, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"\[train\] {named} without effect with --method lora; leave it out"):
        run(made, tmp_path / "out", settings=replace(SETTINGS, **change))
    assert not list(tmp_path.iterdir())


@needs_peft
@pytest.mark.parametrize("method", METHODS)
def test_all_targets_change_and_nothing_else(made: Path, method: Contender, tmp_path: Path) -> None:
    before, after = weights(made / "model"), weights(run(made, tmp_path / "out", method))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert all(before[name].dtype == after[name].dtype for name in before)
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["method"] == method
    assert record["adapter"]["rank"] == 2
    assert record["result"]["steps"] == 3
    assert record["settings"]["learning_rate"] == 5e-4, "adapters start from nothing, so there is a rate for them"
    assert not (tmp_path / "out.partial").exists()


@needs_peft
def test_a_rate_that_is_given_is_taken(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", settings=replace(SETTINGS, learning_rate=1e-2))
    assert json.loads((tmp_path / "out" / "sculptor.json").read_text())["settings"]["learning_rate"] == 1e-2


@needs_peft
def test_the_rank_is_the_adapter_s(made: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, learning_rate=1e-2)
    run(made, tmp_path / "out", settings=settings, adapter=AdapterSettings(rank=3, alpha=4))
    before, after = weights(made / "model"), weights(tmp_path / "out")
    for name in before:
        if "_proj" in name:
            values = torch.linalg.svdvals((after[name] - before[name]).double())
            assert float(values[2]) > 1e-4 * float(values[0])
            assert float(values[3]) < 1e-5 * float(values[0])


@needs_peft
def test_the_seed_decides_where_adapters_start(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    found = [
        weights(run(made, tmp_path / f"{i}", settings=replace(SETTINGS, seed=seed))) for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(torch.get_rng_state(), before), "and the caller's own randomness stays as it was"
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])


@needs_peft
def test_a_model_in_bfloat16_is_saved_in_what_was_asked_for(made: Path, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    for dtype, expected in (("keep", torch.bfloat16), ("float32", torch.float32)):
        settings = replace(SETTINGS, save_dtype=dtype, learning_rate=1e-2)  # type: ignore[arg-type]
        output = run(made, tmp_path / dtype, "osf", settings, model=model)
        assert {tensor.dtype for tensor in weights(output).values()} == {expected}


@needs_peft
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_end(made: Path, method: Contender, tmp_path: Path) -> None:
    run(made, tmp_path / "whole", method)
    polls = iter([None, 15])
    with pytest.raises(Stopped):
        run(made, tmp_path / "out", method, stop=lambda: next(polls))
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"other settings .rank; rank was 2, now 1"):
        run(made, tmp_path / "out", method, adapter=AdapterSettings(rank=1, alpha=4))
    run(made, tmp_path / "out", method)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@needs_peft
def test_the_a_of_earlier_tasks_waits_beside_the_checkpoint(made: Path, tmp_path: Path) -> None:
    name = adapters._EARLIER
    run(made, tmp_path / "one", "olora")
    first = load_file(tmp_path / "one" / name)
    run(made, tmp_path / "two", "olora", model=tmp_path / "one")
    second = load_file(tmp_path / "two" / name)
    assert first.keys() == second.keys()
    for key, a in second.items():
        assert a.shape == (4, first[key].shape[1])
        assert torch.equal(a[:2], first[key])
    run(made, tmp_path / "three", "lora", model=tmp_path / "one")
    assert not (tmp_path / "three" / name).exists(), "LoRA has no use for it"


@needs_peft
def test_a_large_lambda_keeps_new_directions_apart(made: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=15, learning_rate=2e-2)
    run(made, tmp_path / "one", "olora", settings)
    overlaps = {}
    for weight in (0.0, 100.0):
        adapter = AdapterSettings(rank=2, alpha=4, orthogonality=weight)
        output = run(made, tmp_path / f"two{weight}", "olora", settings, model=tmp_path / "one", adapter=adapter)
        found = load_file(output / adapters._EARLIER)
        overlaps[weight] = sum(float((a[:2] @ a[2:].T).square().sum()) for a in found.values())
    assert overlaps[100.0] < 0.1 * overlaps[0.0]


def test_the_penalty_is_the_squared_overlap(generator: torch.Generator) -> None:
    a, b = (torch.nn.Parameter(torch.randn(2, 5, generator=generator)) for _ in range(2))
    earlier = {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(2, 5, generator=generator)}
    penalty = _overlap({"a": a, "b": b, "c": torch.nn.Parameter(torch.zeros(3))}, earlier, 0.5)
    expected = 0.5 * sum(
        float((earlier[name][i] @ value[j].detach()) ** 2)
        for name, value in (("a", a), ("b", b))
        for i in range(earlier[name].shape[0])
        for j in range(2)
    )
    found = penalty()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, 0.5 * 2 * (a.detach() @ earlier["a"].T) @ earlier["a"])

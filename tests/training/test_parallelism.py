"""protect under other programs' parallelism: it works, or is refused in one line, and never goes on without protection."""

from pathlib import Path
from typing import Any

import guests
import pytest
import torch
from conftest import save_checkpoint, slowly
from safetensors.torch import load_file
from together import Failed, together
from torch import nn
from transformers import AutoModelForCausalLM

import sculptor
from sculptor import AnalyzeSettings
from sculptor.errors import TrainingError
from sculptor.training.protect import protected_matrices


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("guests")
    save_checkpoint(path / "model")
    sculptor.analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return path / "model", path / "archive"


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same rows."""
    output = tmp_path_factory.mktemp("alone") / "tuned"
    guests.alone(*made, output)
    return output


def load(made: tuple[Path, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(made[0])


def run(model: Any) -> Any:
    ids = guests.rows_of(0)[0]
    return model(input_ids=ids, labels=ids).loss


def assert_same_update(made: tuple[Path, Path], one: Path, other: Path) -> None:
    base, expected, found = (load_file(path / "model.safetensors") for path in (made[0], one, other))
    for name in sculptor.Archive(made[1]):
        update = (expected[name].double() - base[name].double()).norm()
        assert update > 0
        assert (found[name].double() - expected[name].double()).norm() <= 1e-4 * update, name
    checked = sculptor.verify(made[0], other, made[1], device="cpu")
    assert checked.passed
    assert checked.leak <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *slowly({"find_unused_parameters": True, "gradient_as_bucket_view": True})])
def test_ddp_trains_as_one_process(made: Any, alone: Path, options: dict[str, Any], tmp_path: Path) -> None:
    found = together(2, guests.ddp, *made, tmp_path / "tuned", **options)
    assert found[0] == found[1], "every process has merged the same"
    assert found[0][1] == [], "bases are not sent around"
    assert_same_update(made, alone, tmp_path / "tuned")


def test_accelerate_trains_as_one_process(made: Any, alone: Path, tmp_path: Path) -> None:
    found = together(2, guests.accelerated, *made, tmp_path / "tuned")
    assert found[0] == found[1]
    expected = guests.in_one(guests.accelerated, *made, tmp_path / "one")
    assert expected != found[0], "the order of sums tells"
    assert_same_update(made, tmp_path / "one", tmp_path / "tuned")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_the_trainer_trains_as_one_process(made: Any, options: dict[str, Any], tmp_path: Path) -> None:
    guests.trainer(*made, tmp_path / "one")
    found = together(2, guests.trainer, *made, tmp_path / "tuned", **options)
    assert found[0] == found[1]
    assert_same_update(made, tmp_path / "one", tmp_path / "tuned")


def refused(call: Any, *args: Any) -> str:
    """The line that every process is told."""
    with pytest.raises(Failed) as found:
        together(2, call, *args)
    for error in found.value.errors:
        assert error is not None
        assert error[0] == "TrainingError", found.value
        assert "\n" not in error[1]
    first = found.value.errors[0]
    assert first is not None
    return first[1]


def test_ddp_that_came_first_is_refused(made: Any) -> None:
    assert "sculptor.protect before" in refused(guests.wrapped_first, *made)


@pytest.mark.parametrize(
    ("when", "fold"), [("before", "automatic"), ("blocks", "automatic"), *slowly(("whole", "manual"))]
)
def test_fsdp2_is_refused(made: Any, when: str, fold: str) -> None:
    line = refused(guests.sharded, *made, when, fold)
    assert "sharded by FSDP2" in line
    assert "`sculptor train`" in line


def test_fsdp1_is_refused(made: Any) -> None:
    assert "sharded by FSDP1" in refused(guests.flattened, *made)


def test_wrapped_models_are_refused(made: Any) -> None:
    model = load(made)
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model, backend="eager"),
        nn.ModuleList([nn.DataParallel(model)]),
    ):
        with pytest.raises(TrainingError, match="wrap it then"):
            sculptor.protect(wrapped, made[1])
    assert not protected_matrices(model)


@pytest.mark.parametrize("which", ["weight", "coordinates"])
def test_zero_3_is_refused(made: Any, which: str) -> None:
    """DeepSpeed leaves its mark on every parameter, whether it is gathered or not."""
    model = load(made)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.ds_id = 7
    with pytest.raises(TrainingError, match=r"layers.1.mlp.up_proj.weight: sharded by DeepSpeed ZeRO-3"):
        sculptor.protect(model, made[1])
    del weight.ds_id
    sculptor.protect(model, made[1])
    run(model)
    matrix = protected_matrices(model)[3]
    (matrix.pristine if which == "weight" else matrix.coordinates.values[0]).ds_id = 7
    with pytest.raises(TrainingError, match=rf"{matrix.coordinates.name}: sharded by DeepSpeed ZeRO-3"):
        run(model)
    with pytest.raises(TrainingError, match="ZeRO-3"):
        sculptor.merge(model)


def test_offloaded_weights_are_refused(made: Any, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    for offload in (cpu_offload, lambda model: disk_offload(model, str(tmp_path / "offloaded"))):
        model = load(made)
        offload(model)
        with pytest.raises(TrainingError, match="offloaded"):
            sculptor.protect(model, made[1])
    later = sculptor.protect(load(made), made[1])
    cpu_offload(later)
    with pytest.raises(TrainingError, match="offloaded"):
        run(later)


def test_several_devices_in_one_process_go_well(made: Any) -> None:
    """Accelerate's hooks on every module, as `device_map` puts them there; all devices are the CPU here."""
    from accelerate import dispatch_model

    plain, dispatched = load(made), load(made)
    parts = {name: "cpu" for name, child in dispatched.named_modules() if not list(child.children())}
    dispatched = dispatch_model(dispatched, parts, main_device="cpu", force_hooks=True)
    assert hasattr(dispatched.model.layers[0].mlp.up_proj, "_hf_hook")
    for model in (plain, dispatched):
        sculptor.protect(model, made[1])
        stepper = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            run(model).backward()
            stepper.step()
        sculptor.merge(model)
    for name, tensor in plain.state_dict().items():
        # Hooks that were there before keep linear maps from giving X and dY, so sums have another order.
        torch.testing.assert_close(dispatched.state_dict()[name], tensor, rtol=0, atol=1e-6)


def replicas(module: nn.Module) -> nn.Module:
    """What nn.DataParallel runs on a GPU, without one."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replicas(child)
    for name, parameter in module._parameters.items():
        setattr(copied, name, parameter)
    return copied


def test_data_parallel_is_refused(made: Any) -> None:
    model = sculptor.protect(load(made), made[1])
    with pytest.raises(TrainingError, match=r"nn.DataParallel .* torchrun"):
        run(replicas(model))
    with pytest.raises(TrainingError, match=r"nn.DataParallel .* torchrun"):
        replicas(model.model.layers[0].mlp.up_proj)(torch.ones(1, 32))
    run(model).backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_go_well(made: Any, backend: str) -> None:
    results = []
    for compiled in (False, True):
        model = sculptor.protect(load(made), made[1])
        called = torch.compile(model, backend=backend) if compiled else model
        stepper = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            run(called).backward()
            stepper.step()
            stepper.zero_grad()
        results.append(sculptor.merge(model).state_dict())
    torch._dynamo.reset()
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_nothing_is_left_behind(made: Any) -> None:
    model = load(made)
    model._ddp_params_and_buffers_to_ignore = ["somebody.else"]
    sculptor.protect(model, made[1])
    names = dict(model.named_buffers())
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored == {"somebody.else", *(name for name in names if "parametrizations" in name)}
    sculptor.merge(model)
    assert model._ddp_params_and_buffers_to_ignore == ["somebody.else"]
    assert not model._forward_pre_hooks


def test_a_wrapped_model_is_merged(made: Any) -> None:
    """`merge` is often given what the loop had."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model = sculptor.protect(load(made), made[1])
    sculptor.merge(Wrapper(model))
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    run(model)

"""A protected model under other programs' parallelism: what goes well, and what is refused in one line.

A matrix is folded from the whole of its W0 and its coordinates. DistributedDataParallel leaves them whole and adds up the
gradients of the coordinates; what shards, empties or copies parameters is refused. Nothing of these programs is imported for
that: what they leave on tensors and modules tells.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sculptor.errors import TrainingError
from sculptor.numerics.precision import why_not

_INSTEAD = "leave parameters whole (DistributedDataParallel, ZeRO 1 or 2), or run `sculptor train` in several processes"
# What wraps a model, by the name of its class.
_WRAPPERS = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DataParallel",
    "DeepSpeedEngine",
    "OptimizedModule",
)
# Where DistributedDataParallel looks for names that it leaves alone.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def check_unwrapped(model: nn.Module) -> None:
    """Refuses to protect what is wrapped: the wrapper has listed the parameters already, and would not know the new ones.

    Raises:
        TrainingError: naming the wrapper.
    """
    for module in model.modules():
        classes = {cls.__name__ for cls in type(module).__mro__}
        found = next((name for name in _WRAPPERS if name in classes), None)
        if found is not None:
            raise TrainingError(f"the model is in a {found} already; call sculptor.protect first, and wrap it then")


def check_device(device: torch.device) -> None:
    """Refuses a model on a device that its matrices could not be merged on: trainers choose one by themselves.

    Raises:
        TrainingError: saying why not.
    """
    reason = None if device.type == "meta" else why_not(device)  # meta: they wait elsewhere, which is told by itself
    if reason is not None:
        raise TrainingError(
            f"the model is on {device.type}: {reason}; train on the CPU (use_cpu=True in TrainingArguments, model.to('cpu') before "
            "a loop of your own) or on a GPU of CUDA or ROCm"
        )


def check_held(name: str, tensors: Iterable[Tensor]) -> None:
    """Refuses tensors of which this process holds a part, or nothing.

    Args:
        name: of the matrix that they belong to.
        tensors: its weight and coordinates.

    Raises:
        TrainingError: saying who has taken them.
    """
    for tensor in tensors:
        fault = _fault(tensor)
        if fault is not None:
            raise TrainingError(f"{name}: {fault}")


def _fault(tensor: Tensor) -> str | None:
    if type(tensor) is nn.Parameter and not tensor.is_meta and "ds_id" not in tensor.__dict__:
        return None  # nearly always, and this is asked of every matrix in every forward pass
    if hasattr(tensor, "device_mesh"):
        return f"sharded by FSDP2 or tensor parallelism, and matrices are folded whole; {_INSTEAD}"
    if hasattr(tensor, "ds_id"):
        return f"sharded by DeepSpeed ZeRO-3, and matrices are folded whole; {_INSTEAD}"
    if tensor.is_meta:
        return "offloaded (on the meta device), and matrices are folded whole; keep the model on devices, or use sculptor.stream"
    return None


def check_whole(name: str, pristine: Tensor, values: nn.ParameterList, shapes: Sequence[Sequence[int]]) -> None:
    """Refuses to fold a matrix of which this process does not hold everything, or not always.

    Args:
        name: of the matrix.
        pristine: its W0.
        values: its coordinates.
        shapes: that these have.

    Raises:
        TrainingError: saying what has become of them.
    """
    held = list(values._parameters.values())
    check_held(name, [pristine, *(value for value in held if value is not None)])
    same = len(held) == len(shapes) and all(
        value is not None and value.shape == shape for value, shape in zip(held, shapes, strict=True)
    )
    if "_is_fsdp_managed_module" in values.__dict__ or not same:
        raise TrainingError(f"{name}: sharded by FSDP1, and matrices are folded whole; {_INSTEAD}")


def check_copied(module: nn.Module) -> None:
    """Refuses the copies that nn.DataParallel makes: they share what has been folded, on one of the devices.

    Raises:
        TrainingError: if it is one.
    """
    if "_is_replica" in module.__dict__:
        raise TrainingError(
            "nn.DataParallel copies a model without what protects it; set CUDA_VISIBLE_DEVICES to one GPU, or start a process "
            "for each with torchrun"
        )


def check_added_up(model: nn.Module, parameter: nn.Parameter) -> None:
    """Refuses a DistributedDataParallel that wrapped the model before it was protected: every process would go its own way.

    Raises:
        TrainingError: if it does not know the coordinates.
    """
    active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if active is None:
        return
    known = [each for each in active._module_parameters if each is parameter]
    if not known and any(module is model for module in active.modules()):
        raise TrainingError(
            "DistributedDataParallel does not know the coordinates; call sculptor.protect before the model is wrapped in it"
        )


def ignore_in_broadcasts(model: nn.Module, names: Iterable[str]) -> None:
    """Has DistributedDataParallel leave buffers alone that are the same in all processes: it sends all others at every pass."""
    setattr(model, _IGNORED, [*getattr(model, _IGNORED, ()), *names])


def heed_in_broadcasts(model: nn.Module, names: Iterable[str]) -> None:
    """Undoes `ignore_in_broadcasts`."""
    gone = set(names)
    rest = [name for name in getattr(model, _IGNORED, ()) if name not in gone]
    setattr(model, _IGNORED, rest) if rest else delattr(model, _IGNORED)

"""`protect`: coordinates put into a loaded model."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils import parametrize

from sculptor.archive.places import remedy
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import find_blocks
from sculptor.checkpoint.names import match_names
from sculptor.checkpoint.tensors import digest
from sculptor.errors import ArchiveError
from sculptor.methods.kinds import Kinds
from sculptor.training.coordinates import Coordinates
from sculptor.training.experts import leaf_of, run_in_pieces
from sculptor.training.linear import can_hand_over
from sculptor.training.parallelism import (
    check_added_up,
    check_copied,
    check_device,
    check_held,
    check_unwrapped,
    ignore_in_broadcasts,
)
from sculptor.training.rates import default_relative_rate, matrix_scales
from sculptor.training.saved import save_plain
from sculptor.training.stack import FoldMode, Member, Stack, make_stacks

# Where a module that holds stacked matrices has their coordinates.
EXPERTS = "expert_coordinates"


@dataclass(frozen=True, eq=False, slots=True)
class ProtectedMatrix:
    """A module whose weight is parametrized, or that holds stacked matrices, and the coordinates of one.

    Attributes:
        path: of the module.
        coordinates: of the matrix, `place` where in the model they are.
    """

    path: str
    module: nn.Module
    coordinates: Coordinates
    place: str

    @property
    def pristine(self) -> Tensor:
        """W0, as the module stores it."""
        return self.coordinates.pristine(self.module)

    def refresh(self) -> None:
        """Has the weight folded again when it is next read."""
        self.coordinates.source.expire()


@dataclass(frozen=True, eq=False, slots=True)
class ProtectedBlock:
    """One transformer block as a unit: its module, its matrices, their parameters (and so their optimizer state)."""

    path: str
    module: nn.Module
    matrices: tuple[ProtectedMatrix, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The coordinates of the block."""
        return [a for matrix in self.matrices for a in matrix.coordinates.values]


def protect(
    model: Any,
    archive: str | Path | Archive,
    *,
    compute_dtype: torch.dtype | None = None,
    fold: FoldMode = "automatic",
    soften: float | None = None,
    rules: Kinds | None = None,
    full_gradients: bool = False,
) -> Any:
    """Makes the coordinates of the archive's matrices the only trainable parameters of a model, in place.

    They are ordinary float32 `nn.Parameter`s, for any optimizer and any loop; then call `merge`. Until they move, outputs do not.
    Wrap it in DistributedDataParallel afterwards; what shards parameters is refused. What is saved loads as a plain model, too.

    Args:
        model: a transformers model, loaded in the dtype of the archive's base checkpoint or a wider one.
        archive: the subspace archive of its checkpoint, or its path.
        compute_dtype: dtype of the folded weights; default each weight's own.
        fold: "manual" if the caller refreshes the matrices after each optimizer step.
        soften: with moments, slow free pairs down by 1 / sqrt(1 + soften * their importance over the mean); default as `train`.
        rules: kinds of rules beside sculptor's own.
        full_gradients: give autograd the gradient of every weight as a whole, which takes longer; for gradients of gradients.

    Returns:
        `model`.

    Raises:
        ArchiveError: if the archive does not belong to the model, or the model is protected already.
        CapacityError: if no matrix has a free direction left.
        TrainingError: if the model is wrapped, sharded or offloaded already.
    """
    check_unwrapped(model)
    archive = archive if isinstance(archive, Archive) else Archive(archive, rules=rules)
    if protected_matrices(model):
        raise ArchiveError("the model is protected already; call sculptor.merge(model) first")
    parameters = find_parameters(model, archive)
    for name, parameter in parameters.items():
        check_held(name, [model.get_parameter(parameter)])
    for name, parameter in parameters.items():  # what says most first
        _check_shape(archive, name, model.get_parameter(parameter))
    for name, parameter in parameters.items():
        _check_bytes(archive, name, archive[name].window.of(model.get_parameter(parameter)), model)
    for name, parameter in parameters.items():
        archive.note_rms(name, archive[name].window.of(model.get_parameter(parameter)))
    gentle = (archive.method.defaults.soften or 0.0) if soften is None else soften
    attach_coordinates(
        model, archive, compute_dtype=compute_dtype, fold=fold, soften=gentle, full_gradients=full_gradients
    )
    matrices = protected_matrices(model)
    model.register_forward_pre_hook(functools.partial(look_at_it, matrices))
    ignore_in_broadcasts(model, buffers_of(matrices))
    save_plain(model, protected_matrices)
    _tell_of_new_head(model, archive)
    return model


def _tell_of_new_head(model: Any, archive: Archive) -> None:
    """A head that the archive's base has not is frozen at its random start values, unless somebody says otherwise."""
    inside = getattr(model, "base_model_prefix", "") + "."
    says = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    if says or archive.manifest.model_class in {kind.__name__ for kind in type(model).__mro__}:
        return
    names = [name for name, _ in model.named_parameters()]
    new = [name for name in names if not name.startswith(inside)]
    if 0 < len(new) < len(names):  # a base model alone has nothing that is inside
        warnings.warn(
            f"{new[0]} is new to {archive.manifest.model_class}, of which the archive is, and frozen as it is; to train it: "
            f'model.get_submodule("{new[0].rpartition(".")[0]}").requires_grad_(True)',
            stacklevel=3,
        )


@_disable_dynamo
def look_at_it(matrices: Sequence[ProtectedMatrix], model: nn.Module, inputs: Any) -> None:
    """A forward pass of the model begins: other programs may have done something to it since."""
    check_copied(model)
    check_device(matrices[0].coordinates.values[0].device)
    for matrix in matrices:
        matrix.coordinates.check(matrix.pristine)
    check_added_up(model, matrices[0].coordinates.values[0])


def buffers_of(matrices: Sequence[ProtectedMatrix]) -> list[str]:
    """Names of what `protect` adds to a model and never saves."""
    return [f"{matrix.place}.{name}" for matrix in matrices for name in matrix.coordinates.tensors]


def attach_coordinates(
    model: Any,
    archive: Archive,
    *,
    compute_dtype: torch.dtype | None = None,
    fold: FoldMode = "automatic",
    soften: float = 0.0,
    full_gradients: bool = False,
    done: Callable[[], object] = lambda: None,
) -> Any:
    """`protect` for a model whose weights are known to be those of the archive's base; `done` hears of each matrix."""
    parameters = find_parameters(model, archive)
    check_softening(archive, soften)
    archive.check_capacity()
    rate, scales, identity = default_relative_rate(archive), matrix_scales(archive), archive.identity
    known: dict[Any, Any] = {}  # matrices that read the same input share its basis
    prepared = []  # all of them before the model is touched: an error leaves it as it was
    with archive.ahead(archive.open_names):
        for name in archive.open_names:
            module = model.get_submodule(parameters[name].rpartition(".")[0])
            weight = archive[name].window.of(model.get_parameter(parameters[name]))
            coordinates = Coordinates(functools.partial(archive.read, name), weight, compute_dtype, known, soften)
            coordinates.relative_rate, coordinates.scale, coordinates.archive = rate, scales[name], identity
            prepared.append((module, coordinates))
            done()
    model.requires_grad_(False)
    for module, coordinates in prepared:
        if coordinates.record.window.is_whole:
            parametrize.register_parametrization(module, "weight", coordinates, unsafe=True)
            module.parametrizations.weight.original.requires_grad_(False)
            if can_hand_over(module) and not full_gradients:
                type(module).forward = _multiply  # of this module alone, until its parametrization is removed
        else:
            _experts_in(module).append(coordinates)
    for module in dict.fromkeys(module for module, coordinates in prepared if not coordinates.record.window.is_whole):
        run_in_pieces(module, [(leaf_of(own.record), own.record.window, own) for own in _experts_in(module)])
    stacks = make_stacks((Member(module, coordinates) for module, coordinates in prepared), fold)
    if fold == "automatic":
        model.register_forward_pre_hook(functools.partial(begin_pass, stacks))
    return model


def _multiply(module: Any, x: Tensor) -> Tensor:
    """The forward of a protected linear map; others may keep it beyond that.

    Asks the coordinates themselves: what torch's modules and parametrizations do to find them takes longer than the map of a small
    model.
    """
    held = None if torch.compiler.is_dynamo_compiling() else module._modules.get("parametrizations")
    if held is not None and "weight" in held._modules:
        own = held._modules["weight"]
        coordinates = own._modules["0"]
        if len(own._modules) == 1 and isinstance(coordinates, Coordinates):
            return coordinates.multiply(own.original, x, module.bias)
    return nn.functional.linear(x, module.weight, module.bias)


@_disable_dynamo
def begin_pass(stacks: Sequence[Stack], model: nn.Module, inputs: Any) -> None:
    """A forward pass of the model begins: an optimizer may have stepped."""
    for stack in stacks:
        stack.doubt()


class ExpertCoordinates(nn.ModuleList):
    """The coordinates of stacked matrices, in the module that holds these."""


def _experts_in(module: nn.Module) -> Any:
    """The coordinates of a module's experts, which are made room for."""
    if EXPERTS not in module._modules:
        module.add_module(EXPERTS, ExpertCoordinates())
    return module._modules[EXPERTS]


def check_softening(archive: Archive, soften: float) -> None:
    """Refuses what would have no effect.

    Raises:
        ArchiveError: if the archive's rules weigh nothing that could be slowed down.
    """
    if soften and archive.method.defaults.soften is None:
        basis = archive.method.terms.basis
        raise ArchiveError(f"{archive.path}: basis {basis} has no moments to soften by; analyze with --basis curvature")


def find_parameters(model: Any, archive: Archive) -> dict[str, str]:
    """Archive name -> parameter of the model that the matrix is, or is a part of."""
    known = {name: record.tensor if record.window.is_whole else record.parameter for name, record in archive.items()}
    parameters = {name: parameter for parameter, name in match_names(model, set(known.values())).items()}
    found = {name: parameters[wanted] for name, wanted in known.items() if wanted in parameters}
    absent = [name for name in archive if name not in found]
    if absent:
        raise ArchiveError(
            f"{archive.path}: archive covers {len(archive)} matrices, {type(model).__name__} lacks {len(absent)} of them, "
            f"first {absent[0]}; run `sculptor analyze` on this model's checkpoint"
        )
    return found


def _check_shape(archive: Archive, name: str, parameter: Tensor) -> None:
    expected, window = archive[name].stored_shape, archive[name].window
    inside = window.is_whole or (parameter.ndim == 3 and window.part is not None and window.part < len(parameter))
    weight = window.of(parameter) if inside else parameter
    if tuple(weight.shape) != expected:
        raise ArchiveError(
            f"{archive.path}: {name} is {list(expected)} in the archive, {list(weight.shape)} in the model"
        )


def _check_bytes(archive: Archive, name: str, weight: Tensor, model: nn.Module) -> None:
    record = archive[name]
    base = getattr(torch, record.base_dtype)
    if torch.promote_types(base, weight.dtype) != weight.dtype:
        raise ArchiveError(
            f"{archive.path}: the archive's base is {record.base_dtype}, {name} was loaded in {weight.dtype}, in which "
            f"it cannot be told; load the model with dtype=torch.{record.base_dtype}"
        )
    if digest(weight.detach().to(base)) != record.base_digest:
        raise ArchiveError(
            f"{archive.path}: archive of another model: {name} differs from the weights that were analyzed; "
            f"{remedy(archive.path, _place_of(model))}"
        )


def _place_of(model: Any) -> Path | None:
    """The directory that transformers has loaded a model from, as far as it says."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, str) and name else None


def protected_matrices(model: nn.Module) -> list[ProtectedMatrix]:
    """The parametrized matrices of a model, in its order."""
    found = []
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            coordinates = module.parametrizations.weight[0]
            if isinstance(coordinates, Coordinates):
                found.append(ProtectedMatrix(path, module, coordinates, f"{path}.parametrizations.weight.0"))
        experts = module._modules.get(EXPERTS)
        if isinstance(experts, ExpertCoordinates):
            places = [f"{path}.{EXPERTS}.{i}" for i in range(len(experts))]
            found += [ProtectedMatrix(path, module, own, at) for own, at in zip(experts, places, strict=True)]  # type: ignore[arg-type]
    return found


def protected_blocks(model: nn.Module) -> list[ProtectedBlock]:
    """The blocks that hold protected matrices: what a streaming engine moves as a unit."""
    matrices = protected_matrices(model)
    blocks = []
    for path, module in find_blocks(model).items():
        inside = tuple(matrix for matrix in matrices if matrix.path.startswith(path + "."))
        if inside:
            blocks.append(ProtectedBlock(path, module, inside))
    return blocks

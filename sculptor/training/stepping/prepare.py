"""The blocks of a streamed model made ready for training: bases read, room made for everything that waits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.archive.store import Archive
from sculptor.errors import SettingsError
from sculptor.methods.rule import Rule, cost_of, num_free
from sculptor.streaming.layout import Layout
from sculptor.streaming.regions import MemoryRegion
from sculptor.streaming.waiting import WaitingBlocks
from sculptor.training.coordinates import prepare_training
from sculptor.training.rates import Peaks
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.block import StreamedBlock, StreamedMatrix
from sculptor.training.stepping.gradients import GradientSource, source_of
from sculptor.training.stepping.optimizer import Group, make_optimizer, moments_of


@dataclass(frozen=True, eq=False, slots=True)
class PreparedBlocks:
    """What is trained of a streamed model.

    Attributes:
        blocks: by index, with the matrices that are held here.
        sources: of each block that is trained, where gradients come from, by matrix, whoever owns it.
        owners: of matrices, by name, where several processes divide them.
        num_coordinates: how many numbers of all of them are trained.
    """

    blocks: Mapping[int, StreamedBlock]
    sources: Mapping[int, Mapping[str, GradientSource]]
    owners: Mapping[str, int]
    num_coordinates: int


def held_bytes(rule: Rule, names: Mapping[str, str], num_pristine_bytes: int, device_kind: str, kept: int) -> float:
    """What the owner of a matrix holds for it beside its weight: W0, bases, A with its gradient and moments.

    `kept` are the bytes of the moments of a number.
    """
    size = 2 if device_kind == "cuda" else 4  # of a number of a basis in training
    return num_pristine_bytes + size * sum(cost_of(rule, names).numbers.values()) + (8.0 + kept) * num_free(rule)


def prepare_blocks(
    waiting: WaitingBlocks,
    archive: Archive,
    parameters: Mapping[str, str],
    peaks: Peaks,
    settings: TrainSettings,
    optimizer_device: torch.device,
    num_trained: int,
    tick: Callable[[int], object],
) -> PreparedBlocks:
    """All that an archive leaves something free of; `parameters` are those of its matrices, `tick` is called after each block.

    `num_trained` are all numbers that are trained.

    Raises:
        CapacityError: if there are none.
        SettingsError: if one is left out.
        MemoryError: if the host does not give enough memory.
    """
    owners = waiting.weights.owners
    blocks: dict[int, StreamedBlock] = {}
    sources: dict[int, dict[str, GradientSource]] = {}
    held_by: dict[str, int] = {}
    shares: list[dict[str, str]] = []
    for i, found in enumerate(waiting.parameters):
        names = {name: parameters[name] for name in archive.open_names if parameters[name] in found}
        shares.append({name: p for name, p in names.items() if owners is None or owners.mine(i, p)})
        if names:
            sources[i] = {name: source_of(waiting.model, archive[name], found[p], p) for name, p in names.items()}
        held_by |= dict.fromkeys(names, i)
    with archive.ahead(name for mine in shares for name in mine):
        for i, mine in enumerate(shares):
            if mine:
                blocks[i] = prepare_block(i, waiting, archive, mine, peaks, settings, optimizer_device, num_trained)
            tick(1)
    check_all_held(archive, held_by)
    return PreparedBlocks(
        blocks,
        sources,
        {} if owners is None else {name: owners.blocks[i][parameters[name]] for name, i in held_by.items()},
        sum(torch.Size(shape).numel() for name in archive.open_names for shape in archive[name].rule.shapes),
    )


def prepare_block(
    index: int,
    waiting: WaitingBlocks,
    archive: Archive,
    names: Mapping[str, str],
    peaks: Peaks,
    settings: TrainSettings,
    optimizer_device: torch.device,
    num_trained: int,
) -> StreamedBlock:
    """Reads the bases of a block and makes room for everything else; coordinates begin at 0.

    Args:
        index: of the block.
        waiting: the blocks of the model.
        archive: of its checkpoint.
        names: matrix of the archive -> parameter of the model, for the matrices with free pairs.
        peaks: learning rates.
        settings: resolved settings.
        optimizer_device: where AdamW runs.
        num_trained: how many numbers are trained in all blocks, and openly.

    Raises:
        ArchiveError: if a basis is damaged.
        MemoryError: if the host does not give enough memory.
    """
    moments = moments_of(settings)
    known: dict[Any, Any] = {}
    unique: dict[int, tuple[str, Tensor]] = {}  # a basis that several matrices read is there once
    matrices = []
    for name, parameter_name in names.items():
        record = archive[name]
        dtype = waiting.layouts[index][parameter_name].dtype
        prepared = prepare_training(archive.read(name), waiting.device, dtype, settings.soften or 0.0, known)
        bases = {}
        for key, tensor in prepared.tensors.items():
            bases[key] = unique.setdefault(tensor.data_ptr(), (str(len(unique)), tensor))[0]
        keys = [f"{name}.A{i}" for i in range(len(record.rule.shapes))]
        parameter = waiting.parameters[index][parameter_name]
        coordinates = [nn.Parameter(torch.empty(0, device=optimizer_device)) for _ in keys]
        shapes = [*zip(keys, record.rule.shapes, strict=True)]
        entries = [(key, torch.float32, shape) for key, shape in shapes]
        info = waiting.weights.files.checkpoint.info_of(record)
        group = Group(coordinates, peaks.matrices[name], settings.weight_decay)
        matrices.append(
            StreamedMatrix(
                record,
                parameter,
                parameter_name,
                bases,
                prepared.fingerprint,
                keys,
                coordinates,
                make_optimizer([group], optimizer_device, settings, num_trained),
                tuple(moments),
                state=Layout(
                    [
                        *entries,
                        *(
                            (f"{key}.{moment}", kept, shape)
                            for moment, kept in moments.items()
                            for key, shape in shapes
                        ),
                    ]
                ),
                gradients=Layout(entries),
                pristine=Layout([("pristine", info.dtype, info.shape)]),
            )
        )
    return _make_room(index, waiting, matrices, dict(unique.values()))


def _make_room(
    index: int, waiting: WaitingBlocks, matrices: list[StreamedMatrix], tensors: dict[str, Tensor]
) -> StreamedBlock:
    state, gradients = (
        Layout((name, span.dtype, span.shape) for part in parts for name, span in part.items())
        for parts in ([matrix.state for matrix in matrices], [matrix.gradients for matrix in matrices])
    )
    at, last = 0, {matrix.parameter_name: matrix for matrix in matrices}
    for matrix in matrices:
        matrix.state_start, matrix.gradient_start = state[matrix.keys[0]].start, gradients[matrix.keys[0]].start
        matrix.pristine_start, matrix.is_last = at, matrix is last[matrix.parameter_name]
        at += matrix.pristine.num_bytes
    bases = Layout.of(tensors)
    scratch, constants, files = waiting.weights.scratch, waiting.weights.constants, waiting.weights.files
    pristine = constants.region(f"pristine-{index}", at) if constants.in_memory else None
    if pristine is not None:
        assert isinstance(pristine, MemoryRegion)
        for matrix in matrices:
            files.read(matrix.record, matrix.pristine.view(pristine.memory[matrix.pristine_start :], "pristine"))
    whole = _whole(matrices, waiting.layouts[index])
    block = StreamedBlock(
        matrices,
        bases,
        state,
        gradients,
        bases=constants.region(f"bases-{index}", bases.num_bytes),
        state=scratch.region(f"state-{index}", state.num_bytes),  # new memory and new files hold zeros
        gradients=scratch.region(f"gradients-{index}", gradients.num_bytes),
        pristine=pristine,
        others=[name for name in waiting.weights.names(index) if name not in whole],
        shares=whole < last.keys(),
    )
    for name, tensor in tensors.items():
        span = bases[name]
        block.bases.store(tensor.contiguous().view(-1).view(torch.uint8), span.start)
    if waiting.device.type == "cuda":
        torch.cuda.synchronize(waiting.device)
    return block


def _whole(matrices: Sequence[StreamedMatrix], layout: Layout) -> set[str]:
    """The parameters that all of is in trained matrices."""
    rest = {matrix.parameter_name: prod(layout[matrix.parameter_name].shape) for matrix in matrices}
    for matrix in matrices:
        rest[matrix.parameter_name] -= prod(matrix.record.shape)
    return {name for name, numbers in rest.items() if not numbers}


def check_all_held(archive: Archive, blocks: Mapping[str, int]) -> None:
    """Checks that every matrix with free pairs is trained with some block; `blocks` are by matrix.

    Raises:
        CapacityError: if there are none.
        SettingsError: if one is left out.
    """
    archive.check_capacity()
    left = [name for name in archive.open_names if name not in blocks]
    if left:
        raise SettingsError(
            f"{archive.path}: {len(left)} matrices are not one block's own, first {left[0]}; use --offload none"
        )

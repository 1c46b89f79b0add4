"""One block's matrices in streamed training: where their things wait, and how they are laid out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sculptor.archive.store import Archive
from sculptor.errors import CapacityError, SettingsError
from sculptor.numerics.free_space import FreeSpace
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.layout import Layout
from sculptor.streaming.regions import HostRegion, Region
from sculptor.streaming.weights import TensorFiles
from sculptor.training.coordinates import KnownSides, training_space
from sculptor.training.protect import softening
from sculptor.training.settings import TrainSettings
from sculptor.training.updates import MOMENTS, make_optimizer


@dataclass(eq=False, slots=True)
class StreamedMatrix:
    """One matrix with free pairs.

    Attributes:
        name: the tensor in the checkpoint, `parameter_name` the parameter of the model.
        form: its free space, without data; `bases` says which of the block's bases its tensors are.
        keys: the names of its coordinates A, as they are saved.
        coordinates: A, holding nothing while they wait.
        optimizer: AdamW over them alone.
        state: of A and its moments, as they lie together in the block's state, from byte `state_start` on.
        gradients: of the gradients of A, from byte `gradient_start` of the block's on.
        pristine: W0 as the checkpoint stores it, from byte `pristine_start` of the block's on.
        touched: whether a gradient has reached it in this step: what none reaches is not stepped.
    """

    name: str
    parameter: nn.Parameter
    parameter_name: str
    transposed: bool
    form: FreeSpace
    bases: dict[str, str]
    fingerprint: list[float]
    keys: list[str]
    coordinates: list[nn.Parameter]
    optimizer: torch.optim.AdamW
    state: Layout
    gradients: Layout
    pristine: Layout
    state_start: int = 0
    gradient_start: int = 0
    pristine_start: int = 0
    touched: bool = False

    @property
    def num_coordinate_bytes(self) -> int:
        """Of A, which comes first in the state."""
        return self.state[self.keys[0] + "." + MOMENTS[0]].start

    def num_bytes(self, stepping: bool) -> int:
        """What an update on the device brings there: to fold A and the pristine weight, to step moments and gradients too."""
        state = self.state.num_bytes + self.gradients.num_bytes if stepping else self.num_coordinate_bytes
        return state + self.pristine.num_bytes

    def views(self, memory: Tensor, stepping: bool) -> dict[str, Tensor]:
        """All of it, by name: A, `pristine`, and to step `A.exp_avg`, `A.exp_avg_sq`, `A.grad`."""
        found = self.pristine.views(memory[self.num_bytes(stepping) - self.pristine.num_bytes :])
        if not stepping:
            return found | {key: self.state.view(memory, key) for key in self.keys}
        return found | self.state.views(memory) | self.gradient_views(memory[self.state.num_bytes :])

    def gradient_views(self, memory: Tensor) -> dict[str, Tensor]:
        """Gradients, by the name of their coordinates and `.grad`."""
        return {key + ".grad": view for key, view in self.gradients.views(memory).items()}

    def load(self, block: "StreamedBlock", files: TensorFiles, memory: Tensor, stepping: bool, gradients: bool) -> None:
        """Fills device memory from where things wait, on the current stream."""
        state = self.state.num_bytes if stepping else self.num_coordinate_bytes
        block.state.load(memory[:state], self.state_start)
        if stepping and gradients:
            block.gradients.load(memory[state : state + self.gradients.num_bytes], self.gradient_start)
        pristine = memory[self.num_bytes(stepping) - self.pristine.num_bytes : self.num_bytes(stepping)]
        if block.pristine is not None:
            block.pristine.load(pristine, self.pristine_start)
        else:
            files.read(self.name, self.pristine.view(pristine, "pristine"))

    def step(self, views: Mapping[str, Tensor], rate: float, divisor: Tensor | None) -> None:
        """AdamW, in place, on views that are the optimizer's only for now; gradients are divided by `divisor` first."""
        if divisor is not None and divisor.device.type == "cpu" and float(divisor) == 1:
            divisor = None  # saves writing gradients again: memory is what AdamW on the host waits for
        for key, a in zip(self.keys, self.coordinates, strict=True):
            a.data = views[key]
            a.grad = views[key + ".grad"]
            kept = self.optimizer.state[a]
            if "step" not in kept:
                kept["step"] = torch.zeros((), dtype=torch.float32, device=a.device)
            kept |= {moment: views[f"{key}.{moment}"] for moment in MOMENTS}
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # as GradScaler has it: no passage of its own
        self.optimizer.step()
        for a in self.coordinates:
            a.data, a.grad = a.data.new_empty(0), None
            for moment in MOMENTS:
                del self.optimizer.state[a][moment]

    def store_state(self, block: "StreamedBlock", memory: Tensor) -> None:
        """Keeps A and its moments, on the current stream."""
        block.state.store(memory[: self.state.num_bytes], self.state_start)


@dataclass(eq=False, slots=True)
class StreamedBlock:
    """The matrices of one block, and the regions where their things wait, matrix after matrix.

    `pristine` is None where W0 is read from the checkpoint; `norms` are those of the step's gradients, by coordinate, and
    `divisors` what gradients are divided by in a fused update, by matrix, kept until it is over.
    """

    matrices: list[StreamedMatrix]
    bases_layout: Layout
    state_layout: Layout
    gradient_layout: Layout
    bases: Region
    state: Region
    gradients: Region
    pristine: Region | None
    norms: dict[str, Tensor] = field(default_factory=dict)
    divisors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_coordinates(self) -> int:
        """How many numbers are trained."""
        return sum(torch.Size(shape).numel() for matrix in self.matrices for shape in matrix.form.shapes)

    def touched(self) -> set[str]:
        """The matrices that a gradient has reached in this step."""
        return {matrix.name for matrix in self.matrices if matrix.touched}

    def space(self, matrix: StreamedMatrix, memory: Tensor) -> FreeSpace:
        """The free space of a matrix in device memory that holds the block's bases."""
        return matrix.form.at({key: self.bases_layout.view(memory, name) for key, name in matrix.bases.items()})

    def load_state(self, saved: Mapping[str, Tensor], optimizer: bool) -> None:
        """Puts back A, and with `optimizer` its moments, as far as they were saved."""
        for matrix in self.matrices:
            for key, a in zip(matrix.keys, matrix.coordinates, strict=True):
                self._write(key, saved[key])
                if not optimizer or f"{key}.step" not in saved:  # no gradient ever reached it
                    continue
                matrix.optimizer.state[a]["step"] = saved[f"{key}.step"].to(a.device)
                for moment in MOMENTS:
                    self._write(f"{key}.{moment}", saved[f"{key}.{moment}"])

    def _write(self, name: str, value: Tensor) -> None:
        self.state.store(value.contiguous().view(-1).view(torch.uint8), self.state_layout[name].start)

    def close(self) -> None:
        """Gives back what it holds."""
        for region in (self.bases, self.state, self.gradients, self.pristine):
            if region is not None:
                region.close()


def prepare_block(
    index: int,
    stream: BlockStream,
    archive: Archive,
    names: Mapping[str, str],
    settings: TrainSettings,
    optimizer_device: torch.device,
) -> StreamedBlock:
    """Reads the bases of a block and makes room for everything else; coordinates begin at 0.

    Args:
        index: of the block.
        stream: of the model.
        archive: of its checkpoint.
        names: matrix of the archive -> parameter of the model, for the matrices with free pairs.
        settings: resolved settings.
        optimizer_device: where AdamW runs.

    Raises:
        ArchiveError: if a basis is damaged.
        MemoryError: if the host does not give enough memory.
    """
    known: KnownSides = {}
    unique: dict[int, tuple[str, Tensor]] = {}  # a basis that several matrices read is there once
    matrices = []
    for name, parameter_name in names.items():
        soft = settings.soften or 0.0
        gains = partial(softening, archive, strength=soft, device=stream.device) if soft else None
        dtype = stream.layouts[index][parameter_name].dtype
        space, fingerprint = training_space(archive.read(name), stream.device, dtype, known, gains)
        bases = {}
        for key, tensor in space.tensors().items():
            bases[key] = unique.setdefault(tensor.data_ptr(), (str(len(unique)), tensor))[0]
        keys = [f"{name}.A{i}" for i in range(len(space.shapes))]
        parameter = stream.parameters[index][parameter_name]
        parameter.requires_grad_(True)
        coordinates = [nn.Parameter(torch.empty(0, device=optimizer_device)) for _ in keys]
        entries = [(key, torch.float32, shape) for key, shape in zip(keys, space.shapes, strict=True)]
        info = stream.weights.files.checkpoint.infos[name]
        matrices.append(
            StreamedMatrix(
                name,
                parameter,
                parameter_name,
                archive[name].transposed,
                space.to("meta"),
                bases,
                fingerprint,
                keys,
                coordinates,
                make_optimizer([coordinates], [], settings, optimizer_device),
                state=Layout(
                    (key + suffix, dtype, shape)
                    for suffix in ("", *("." + moment for moment in MOMENTS))
                    for key, dtype, shape in entries
                ),
                gradients=Layout(entries),
                pristine=Layout([("pristine", info.dtype, info.shape)]),
            )
        )
    return _make_room(index, stream, matrices, dict(unique.values()))


def _make_room(
    index: int, stream: BlockStream, matrices: list[StreamedMatrix], tensors: dict[str, Tensor]
) -> StreamedBlock:
    state, gradients = (
        Layout((name, place.dtype, place.shape) for part in parts for name, place in part.items())
        for parts in ([matrix.state for matrix in matrices], [matrix.gradients for matrix in matrices])
    )
    at = 0
    for matrix in matrices:
        matrix.state_start, matrix.gradient_start = state[matrix.keys[0]].start, gradients[matrix.keys[0]].start
        matrix.pristine_start = at
        at += matrix.pristine.num_bytes
    bases = Layout.of(tensors)
    scratch, files = stream.weights.scratch, stream.weights.files
    pristine = HostRegion(at, scratch.pinned) if scratch.tier == "cpu" else None
    if pristine is not None:
        for matrix in matrices:
            files.read(matrix.name, matrix.pristine.view(pristine.memory[matrix.pristine_start :], "pristine"))
    block = StreamedBlock(
        matrices,
        bases,
        state,
        gradients,
        bases=scratch.region(f"bases-{index}", bases.num_bytes),
        state=scratch.region(f"state-{index}", state.num_bytes),  # new memory and new files hold zeros
        gradients=scratch.region(f"gradients-{index}", gradients.num_bytes),
        pristine=pristine,
    )
    for name, tensor in tensors.items():
        place = bases[name]
        block.bases.store(tensor.contiguous().view(-1).view(torch.uint8), place.start)
    if stream.device.type == "cuda":
        torch.cuda.synchronize(stream.device)
    return block


def check_owners(archive: Archive, owners: Mapping[str, int]) -> None:
    """Checks that every matrix with free pairs is trained with some block.

    Raises:
        CapacityError: if there are none.
        SettingsError: if one is left out.
    """
    open_names = [name for name, record in archive.items() if record.staircase.num_free]
    if not open_names:
        raise CapacityError(f"{archive.path}: no capacity left: all {len(archive)} matrices are frozen")
    left = [name for name in open_names if name not in owners]
    if left:
        raise SettingsError(
            f"{archive.path}: {len(left)} matrices are not one block's own, first {left[0]}; use --offload none"
        )

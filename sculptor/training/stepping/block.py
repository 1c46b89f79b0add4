"""One block's matrices in streamed training: where their things wait, and how they are laid out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sculptor.archive.manifest import MatrixRecord
from sculptor.methods.rule import Tensors
from sculptor.streaming.files import TensorFiles
from sculptor.streaming.layout import Layout
from sculptor.streaming.regions import Region
from sculptor.streaming.transfers import DONE, Ticket
from sculptor.training.schedule import RateOf


class Stage(Enum):
    """Where a block stands between two updates: the first four in turn, but for steps of several micro-batches, and fused ones."""

    CURRENT = auto()  # what waits is up to date
    OPEN = auto()  # its gradients are appearing
    COLLECTED = auto()  # gradients of this step wait; OPEN again with the next micro-batch
    DUE = auto()  # the step was taken: it is updated when it is next fetched; CURRENT then
    REPLACED = auto()  # its coordinates were replaced: it is folded when it is next fetched


@dataclass(frozen=True, eq=False, slots=True)
class Divisors:
    """What gradients are divided by before they are used: each matrix's by its own, all by one number, or none.

    Attributes:
        whole: that number, where there is one.
        by_matrix: by name, where each has its own.
        ready: what to wait for before they are read.
    """

    whole: Tensor | None = None
    by_matrix: Mapping[str, Tensor] = field(default_factory=dict)
    ready: Ticket = DONE

    def of(self, name: str) -> Tensor | None:
        """What the gradients of a matrix are divided by, if they are."""
        return self.by_matrix[name] if self.by_matrix else self.whole

    def on_cpu(self) -> "Divisors":
        """The same in host memory; waits for the device."""
        whole = None if self.whole is None else self.whole.cpu()
        return Divisors(whole, {name: value.cpu() for name, value in self.by_matrix.items()})


class Due(NamedTuple):
    """An update: the rates of its step, the matrices that a gradient has reached, and what these gradients are divided by."""

    rate_of: RateOf
    touched: frozenset[str]
    divisors: Divisors


# No step: the weights are made of coordinates as they are.
FOLD_ONLY = Due(lambda peak: peak, frozenset(), Divisors())


@dataclass(eq=False, slots=True)
class StreamedMatrix:
    """One matrix with free pairs.

    Attributes:
        record: of the archive, `parameter_name` the parameter of the model.
        bases: which of the block's bases its rule's tensors are.
        keys: the names of its coordinates A, as they are saved.
        coordinates: A, holding nothing while they wait.
        optimizer: AdamW over them alone; `moments` what it keeps of each number.
        state: of A and its moments, as they lie together in the block's state, from byte `state_start` on.
        gradients: of the gradients of A, from byte `gradient_start` of the block's on.
        pristine: W0 as the checkpoint stores it, from byte `pristine_start` of the block's on.
        is_last: whether it is the last matrix of its parameter.
        touched: whether a gradient has reached it in this step: what none reaches is not stepped.
    """

    record: MatrixRecord
    parameter: nn.Parameter
    parameter_name: str
    bases: dict[str, str]
    fingerprint: list[float]
    keys: list[str]
    coordinates: list[nn.Parameter]
    optimizer: torch.optim.AdamW
    moments: Sequence[str]
    state: Layout
    gradients: Layout
    pristine: Layout
    state_start: int = 0
    gradient_start: int = 0
    pristine_start: int = 0
    is_last: bool = True
    touched: bool = False

    @property
    def name(self) -> str:
        """Of the matrix."""
        return self.record.name

    @property
    def num_coordinate_bytes(self) -> int:
        """Of A, which comes first in the state."""
        return self.state[self.keys[0] + "." + self.moments[0]].start

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
            files.read(self.record, self.pristine.view(pristine, "pristine"))

    def step(self, views: Mapping[str, Tensor], rate_of: RateOf, divisor: Tensor | None) -> None:
        """AdamW, in place, on views that are the optimizer's only for now; gradients are divided by `divisor` first."""
        if divisor is not None and divisor.device.type == "cpu" and float(divisor) == 1:
            divisor = None  # saves writing gradients again: memory is what AdamW on the host waits for
        for key, a in zip(self.keys, self.coordinates, strict=True):
            a.data = views[key]
            a.grad = views[key + ".grad"]
            kept = self.optimizer.state[a]
            if "step" not in kept:
                kept["step"] = torch.zeros((), dtype=torch.float32, device=a.device)
            kept |= {moment: views[f"{key}.{moment}"] for moment in self.moments}
        (group,) = self.optimizer.param_groups
        group["lr"] = rate_of(group["peak"])
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # as GradScaler has it: no passage of its own
        self.optimizer.step()
        for a in self.coordinates:
            a.data, a.grad = a.data.new_empty(0), None
            for moment in self.moments:
                del self.optimizer.state[a][moment]


@dataclass(eq=False, slots=True)
class StreamedBlock:
    """The matrices of one block, and the regions where their things wait, matrix after matrix.

    Attributes:
        pristine: None where W0 is read from the checkpoint.
        others: parameters that an update does not make, or makes only a part of: `shares` says whether there are such.
        norms: those of the step's gradients, by coordinate.
        stage: where the block stands.
        due: the update that it is to have, or had last: what that reads is kept until it is over.
    """

    matrices: list[StreamedMatrix]
    bases_layout: Layout
    state_layout: Layout
    gradient_layout: Layout
    bases: Region
    state: Region
    gradients: Region
    pristine: Region | None
    others: Sequence[str] = ()
    shares: bool = False
    norms: dict[str, Tensor] = field(default_factory=dict)
    stage: Stage = Stage.CURRENT
    due: Due = FOLD_ONLY

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of this step wait."""
        return any(matrix.touched for matrix in self.matrices)

    def touched(self) -> frozenset[str]:
        """The matrices that a gradient has reached in this step."""
        return frozenset(matrix.name for matrix in self.matrices if matrix.touched)

    def take_step(self, rate_of: RateOf, divisors: Divisors, updated: bool) -> bool:
        """The step is over: whether an update is due; none is if there are no gradients, or it was made already."""
        due = self.stage in (Stage.COLLECTED, Stage.OPEN) and self.has_gradients and not updated
        if due:
            self.stage, self.due = Stage.DUE, Due(rate_of, self.touched(), divisors)
        self.forget()
        return due

    def forget(self) -> None:
        """Gradients that wait are of no use any more."""
        if self.stage in (Stage.COLLECTED, Stage.OPEN):
            self.stage = Stage.CURRENT
        self.norms.clear()
        for matrix in self.matrices:
            matrix.touched = False

    def tensors(self, matrix: StreamedMatrix, memory: Tensor) -> Tensors:
        """A matrix's tensors in device memory that holds the block's bases."""
        return {key: self.bases_layout.view(memory, name) for key, name in matrix.bases.items()}

    def gradient_views(self, memory: Tensor) -> dict[str, Tensor]:
        """Gradients in device memory, by the name of their coordinates and `.grad`."""
        return {key + ".grad": view for key, view in self.gradient_layout.views(memory).items()}

    def load_state(self, saved: Mapping[str, Tensor], optimizer: bool) -> None:
        """Puts back A, and with `optimizer` its moments, as far as they were saved."""
        for matrix in self.matrices:
            for key, a in zip(matrix.keys, matrix.coordinates, strict=True):
                self._write(key, saved[key])
                if not optimizer or f"{key}.step" not in saved:  # no gradient ever reached it
                    continue
                matrix.optimizer.state[a]["step"] = saved[f"{key}.step"].to(a.device)
                for moment in matrix.moments:
                    self._write(f"{key}.{moment}", saved[f"{key}.{moment}"])

    def _write(self, name: str, value: Tensor) -> None:
        span = self.state_layout[name]
        self.state.store(value.to(span.dtype).contiguous().view(-1).view(torch.uint8), span.start)

    def close(self) -> None:
        """Gives back what it holds."""
        for region in (self.bases, self.state, self.gradients, self.pristine):
            if region is not None:
                region.close()

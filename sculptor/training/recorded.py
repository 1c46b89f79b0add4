"""Passes of micro-batches that are recorded once per shape, and played again.

Small models on a GPU wait for Python to launch their kernels, some thousands in a pass. A CUDA graph launches all of a pass at
once, with the fold of the weights. Which shapes are recorded follows from the rows of the run: one that is taken up does the same.
"""

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED, Example
from sculptor.model.load import LoadedModel
from sculptor.model.loss import AsBase, masked_inputs
from sculptor.model.samples import Sample
from sculptor.training.passes import LONG, Passed, Passes
from sculptor.training.precision import autocast
from sculptor.training.recorded_harm import RecordedLosses
from sculptor.training.settings import TrainSettings
from sculptor.world import here

_COLUMNS = 32  # places with loss are rounded up to a multiple
_OFTEN = 4  # a shape that comes less often is not worth recording: that takes as long as three passes
_MOST = 12  # shapes
_LOGITS = 2**27  # of a pass, in elements; longer ones are made in slices


class Shape(NamedTuple):
    """Of a micro-batch: rows, tokens of each, and of these how many may carry loss."""

    rows: int
    length: int
    columns: int


def shape_of(batch: Batch) -> tuple[Shape, int]:
    """The shape of a causal model's batch, and the first place that it has in its columns."""
    rows, length = batch.input_ids.shape
    wanted = (batch.labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
    first, last = (int(wanted[0]), int(wanted[-1])) if len(wanted) else (0, 0)
    columns = _columns(first, last, length)
    return Shape(rows, length, columns), min(first, length - columns)


def shape_of_rows(examples: Sequence[Example], length: int) -> Shape:
    """The shape that the batch of these rows will have, padded to `length`."""
    spans = [_span(example.labels) for example in examples]
    found = [span for span in spans if span is not None]
    first, last = min((a for a, _ in found), default=0), max((b for _, b in found), default=0)
    return Shape(len(examples), length, _columns(first, last, length))


def _span(labels: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last place that predicts a token with loss."""
    first = next((i for i in range(1, len(labels)) if labels[i] != IGNORED), None)
    if first is None:
        return None
    return first - 1, next(i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED) - 1


def _columns(first: int, last: int, length: int) -> int:
    return min(length, -(-(last - first + 1) // _COLUMNS) * _COLUMNS)


def often(shapes: Iterable[Shape]) -> frozenset[Shape]:
    """Those that are worth recording."""
    counted = Counter(shapes)
    found = sorted((-count, shape) for shape, count in counted.items() if count >= _OFTEN)
    return frozenset(shape for _, shape in found[:_MOST])


@contextmanager
def without_chance(device: torch.device) -> Iterator[None]:
    """For what gives the same whenever it is run: no dropout, no layers that are left out by chance.

    Raises:
        RuntimeError: if random numbers were drawn; no generator has moved then.
    """
    on_gpu = device.type == "cuda"
    host, drawn, own = torch.get_rng_state(), random.getstate(), torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        moved = not torch.equal(host, torch.get_rng_state()) or drawn != random.getstate()
        torch.set_rng_state(host)
        random.setstate(drawn)
        if own is not None:
            moved = moved or not torch.equal(own, torch.cuda.get_rng_state(device))
            torch.cuda.set_rng_state(own, device)
    if moved:
        raise RuntimeError("random numbers were drawn")


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs it once or more, and returns what plays it again.

        Raises:
            RuntimeError: if it does what cannot be recorded.
        """


class Graphs:
    """Records CUDA graphs, which share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        free, total = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if free < total / 2:
            raise RuntimeError("what a recording keeps may be wanted elsewhere")
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with without_chance(self._device), torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its stream the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            run()
        self._pool = self._pool or graph.pool()
        return graph.replay


@dataclass(eq=False, slots=True)
class _Recorded:
    """A pass of one shape: what it reads, what it leaves, and what plays it."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    columns: Tensor
    scale: Tensor
    loss: Tensor
    play: Callable[[], None] = field(default=lambda: None)


class RecordedPasses(Passes):
    """Passes of shapes that come often are recorded when they first come; the others are run.

    Args:
        loaded, settings: as of `Passes`.
        trained: parameters.
        expire: has every weight folded again when it is next read.
        shapes: to be recorded.
        recorder: records them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: TrainSettings,
        trained: Sequence[nn.Parameter],
        expire: Callable[[], None],
        shapes: frozenset[Shape],
        recorder: Recorder,
    ) -> None:
        super().__init__(loaded, settings, None)
        self.trained = list(trained)
        self.expire = expire
        self.shapes = shapes
        self._recorder = recorder
        self._losses = RecordedLosses(loaded, settings, expire, recorder.record)
        self._recorded: dict[Shape, _Recorded] = {}
        self._gradients: list[Tensor] = []

    def begin_step(self) -> None:
        if self._recorded:
            self._give_gradients()

    @property
    def sample_losses(self) -> Callable[[Sequence[Sample]], Tensor]:
        return self._losses

    def close(self) -> None:
        self._losses.close()
        for parameter in self.trained:
            parameter.grad = None
        self._recorded.clear()
        self._gradients = []
        self.shapes = frozenset()

    def run(self, batch: Batch, total_tokens: int) -> Passed:
        shape, first = shape_of(batch)
        if shape not in self.shapes or not (shape in self._recorded or self._record(shape)):
            return super().run(batch, total_tokens)
        found = self._recorded[shape]
        places = slice(first, first + shape.columns)
        found.input_ids.copy_(batch.input_ids)
        found.attention_mask.copy_(batch.attention_mask)
        found.labels.copy_(nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)[:, places])
        found.columns.copy_(torch.arange(first, first + shape.columns))
        found.scale.fill_(1 / total_tokens)
        found.play()
        return Passed(found.loss.clone(), None)

    def _give_gradients(self) -> None:
        """The parameters get those that are recorded, at zero; an optimizer takes them away after its step."""
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self.trained, self._gradients, strict=True):
            parameter.grad = gradient

    def _record(self, shape: Shape) -> bool:
        """Whether a pass could be recorded; if one cannot, none is any more."""
        device = self.loaded.device
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64, device=device)
        labels = torch.zeros(shape.rows, shape.columns, dtype=torch.int64, device=device)
        nothing = torch.zeros((), device=device)  # what is run for the recording adds nothing to the gradients
        columns = torch.arange(shape.columns, device=device)
        found = _Recorded(ids, torch.ones_like(ids), labels, columns, nothing, nothing.clone())
        before = [parameter.grad for parameter in self.trained]
        held = self._gradients or [torch.zeros_like(parameter) for parameter in self.trained]
        try:
            found.play = self._recorder.record(lambda: self._pass(found, held))
        except RuntimeError:  # a model that waits for the device, dropout, no memory: as without a recording
            self.shapes = frozenset()
            return False
        finally:
            self.expire()  # what was folded belongs to the recording
        if not self._gradients:
            self._gradients = held
            self._give_gradients()
            for gradient, earlier in zip(held, before, strict=True):  # of other micro-batches of this step
                if earlier is not None:
                    gradient.copy_(earlier)
        self._recorded[shape] = found
        return True

    def _pass(self, found: _Recorded, gradients: Sequence[Tensor]) -> None:
        model = self.loaded.model
        batch = Batch(found.input_ids, found.attention_mask, found.labels)
        self.expire()
        with autocast(self.settings.precision, self.loaded.device, cached=False):
            outputs = model(**masked_inputs(model, batch), logits_to_keep=found.columns)
        if getattr(outputs, "aux_loss", None) is not None:
            raise RuntimeError("a model that has a loss of its own")
        logits = outputs.logits.float().flatten(0, 1)
        total = nn.functional.cross_entropy(logits, found.labels.flatten(), ignore_index=IGNORED, reduction="sum")
        share = total * found.scale
        made = torch.autograd.grad(share, self.trained, allow_unused=True)
        if any(each is None for each in made):
            raise RuntimeError("a pass that reaches only some of what is trained")
        torch._foreach_add_(list(gradients), list(made))
        found.loss.copy_(share.detach())


def make_passes(
    loaded: LoadedModel,
    settings: TrainSettings,
    as_base: AsBase | None,
    trained: Sequence[nn.Parameter] | None,
    expire: Callable[[], None],
    batches: Callable[[], Iterable[Sequence[Example]]],
) -> Passes:
    """Recorded passes where launching kernels is what takes time, and a pass can be recorded.

    Args:
        loaded, settings, as_base: as of `Passes`.
        trained: parameters, if they and all of the model are on the device.
        expire: has every weight folded again when it is next read.
        batches: rows of the run's first micro-batches.
    """
    plain = Passes(loaded, settings, as_base)
    if loaded.device.type != "cuda" or trained is None or not _is_recordable(loaded, settings, as_base):
        return plain
    model = loaded.model
    vocabulary, numbers = loaded.architecture.vocab_size, sum(p.numel() for p in model.parameters())
    shapes = often(
        shape_of_rows(rows, loaded.widths.of(max(len(row.input_ids) for row in rows))) for rows in batches() if rows
    )
    short = frozenset(
        shape
        for shape in shapes
        if 8 * numbers * shape.rows * shape.length <= LONG and vocabulary * shape.rows * shape.columns <= _LOGITS
    )
    return RecordedPasses(loaded, settings, trained, expire, short, Graphs(loaded.device)) if short else plain


def _is_recordable(loaded: LoadedModel, settings: TrainSettings, as_base: AsBase | None) -> bool:
    model: Any = loaded.model
    takes = inspect.signature(model.forward).parameters
    return (
        loaded.kind == "causal"
        and "logits_to_keep" in takes
        and "token_type_ids" not in takes
        and as_base is None
        and settings.token_weights == "same"
        and here().size == 1  # other processes' collective calls would be in the way
        and not model.is_gradient_checkpointing
    )

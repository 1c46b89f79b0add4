"""Second moments of layer inputs and output gradients, measured by running the model on calibration rows.

A few blocks are measured at a time, as many as fit beside the model, so the memory is that of their moments and no
more; the rows are read again for the next blocks. Matrices that read the same input share its moment. In a pass with
gradients the graph begins at the first measured matrix, and blocks are computed again in the backward pass.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sculptor.analysis.beginnings import beginning_weights
from sculptor.analysis.expert_rows import watch_experts
from sculptor.analysis.padded import Mask, activation_bytes, find_masks, make_batches
from sculptor.checkpoint.architecture import Target, find_blocks
from sculptor.data.examples import Example
from sculptor.methods.settings import Labels, Weighting
from sculptor.model.head import find_head
from sculptor.model.load import LoadedModel
from sculptor.model.loss import batch_loss, sample_labels
from sculptor.numerics.moments import add_symmetric, mirror
from sculptor.numerics.precision import float32_products
from sculptor.progress import Bar
from sculptor.streaming.parts import without_cache

# Of the memory that model, activations and eigensolver leave, what the moments of one pass take.
_SHARE = 0.9
# GB to stay within on a CPU unless told otherwise, and what the process has before any tensor.
_CPU_MEMORY = 8.0
_CPU_RUNTIME = 0.6


@dataclass(frozen=True, eq=False, slots=True)
class MeasuredMoments:
    """Means over tokens, float32 on the model's device.

    Attributes:
        inputs: C (n, n) by input group.
        outputs: G (m, m) by target name; empty without gradients.
        num_tokens: that the inputs are means over, by input group; padding does not count.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: dict[str, float] = field(default_factory=dict)


def passes(
    targets: Sequence[Target],
    gradients: bool,
    device: torch.device,
    device_memory: float | None = None,
    model_bytes: int = 0,
    copies: int = 1,
) -> list[list[Target]]:
    """Targets by blocks, as many of these at a time as their moments fit into memory; one at least.

    Args:
        targets: in the order of the model.
        gradients: whether outputs are measured too.
        device: where the model is.
        device_memory: GB to stay within, the model included; None for what is free on a GPU, 8 on a CPU.
        model_bytes: size of the model.
        copies: of the moments that are held at a time.
    """
    # float64 matrix, eigenvectors and workspace of the eigensolver
    decomposition = 50 * max(max(target.shape) for target in targets) ** 2
    if device.type == "cuda" and device_memory is None:
        available = float(torch.cuda.mem_get_info(device)[0])
    elif device.type == "cuda":
        available = 1e9 * (device_memory or 0) - model_bytes
    else:
        available = 1e9 * ((device_memory or _CPU_MEMORY) - _CPU_RUNTIME) - model_bytes
    budget = _SHARE * (available - max(decomposition, activation_bytes(device, device_memory)))
    blocks: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        blocks[target.block].append(target)
    found: list[list[Target]] = []
    room = -1.0
    for block in blocks.values():
        needed = copies * moment_bytes(block, gradients)
        if room < needed:
            found.append([])
            room = budget
        found[-1] += block
        room -= needed
    return found


def moment_bytes(targets: Iterable[Target], gradients: bool) -> int:
    """Bytes of the float32 moments of some targets."""
    inputs = {target.input_group: target.shape[1] for target in targets}
    outputs = [target.shape[0] for target in targets] if gradients else []
    return sum(4 * d * d for d in [*inputs.values(), *outputs])


def measure_moments(
    loaded: LoadedModel,
    targets: Sequence[Target],
    examples: Sequence[Example],
    *,
    gradients: bool,
    labels: Labels = "true",
    seed: int = 0,
    weighting: Weighting = "tokens",
    device_memory: float | None = None,
    bar: Bar,
) -> MeasuredMoments:
    """Moments of some matrices over all tokens of some examples.

    Args:
        loaded: an unprotected model; run in evaluation mode, its parameters are not touched.
        targets: the matrices; only these take memory.
        examples: calibration rows.
        gradients: also measure the gradients of the summed loss with respect to each matrix's output.
        labels: the rows' own, or drawn from the model's predictions (the true Fisher).
        weighting: how much each token's input counts: the same, or as the squared gradient it receives.
        seed: of the drawn labels, and of what is masked in a masked language model.
        device_memory: GB to stay within; None for what a batch is best with.
        bar: advanced by one per example.
    """
    recorder = _Recorder(targets, gradients, weighting)

    def weigh(labels: Tensor) -> Tensor:
        """What a gradient counts is squared."""
        return beginning_weights(labels, loaded.kind).sqrt()

    generator = torch.Generator(loaded.device).manual_seed(seed)
    model = loaded.model
    model.eval()
    find_head(model, loaded.kind)  # tried on a token once, which is not to be measured
    handles: list[Any] = [
        handle
        for target in targets
        if target.window.is_whole
        for handle in recorder.watch(model.get_submodule(target.module), target)
    ]
    handles += watch_experts(model, targets, recorder)
    restore = _recompute_blocks(loaded) if gradients else lambda: None
    try:
        for batch in make_batches(loaded, examples, seed, device_memory):
            if gradients and labels == "sampled":
                with torch.no_grad():
                    batch = sample_labels(model, batch, loaded.kind, generator)
            with torch.set_grad_enabled(gradients), suppress(_EnoughError):
                with recorder.recording(find_masks(batch, loaded)):
                    found = batch_loss(model, batch, loaded.kind, weigh=weigh if gradients else None)
                if gradients:  # blocks run a second time in it, which is not recorded
                    found.total.backward()  # type: ignore[no-untyped-call]
            bar.update(batch.input_ids.shape[0])
    finally:
        restore()
        for handle in handles:
            handle.remove()
    return recorder.means()


def _recompute_blocks(loaded: LoadedModel) -> Callable[[], None]:
    """Keeps no activations inside blocks for the backward pass; returns what undoes it.

    On the instances' `forward`, since transformers' own switch asks for training mode; a streamed model does it anyway.
    """
    blocks = [] if loaded.stream is not None else list(find_blocks(loaded.model).values())
    for block in blocks:
        block.forward = functools.partial(_run_twice, block.forward)

    def restore() -> None:
        for block in blocks:
            del block.forward

    return restore


def _run_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = without_cache(args, kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x.detach()


class _EnoughError(Exception):
    """The last measured matrix has been read: the rest of a forward without gradients is of no use."""


class _Recorder:
    """Sums of outer products, filled by hooks on the watched modules."""

    def __init__(self, targets: Sequence[Target], gradients: bool, weighting: Weighting) -> None:
        self.gradients = gradients
        self.weighted = gradients and weighting == "gradients"
        self.is_recording = False  # else a forward is none of the measurement
        self.masks: list[Mask] = []  # of the batch, for each shape a layer may see
        self.sums = MeasuredMoments()
        self.leaders = {target.input_group: target.name for target in reversed(targets)}
        self.calls = 0  # inputs read in the forward under way
        self.calls_per_forward: int | None = None  # a shared module is called several times; the first forward tells
        self.weight_sums: dict[str, Tensor | float] = {}  # of gradients that weigh inputs, by group
        self.num_gradients: dict[str, int] = defaultdict(int)

    @contextmanager
    def recording(self, masks: list[Mask]) -> Iterator[None]:
        """The forward of a batch, which is what is read; its gradients follow outside."""
        self.masks, self.calls, self.is_recording = masks, 0, True
        try:
            yield
        finally:
            self.is_recording, self.calls_per_forward = False, self.calls

    def watch(self, module: nn.Module, target: Target) -> list[Any]:
        handles = []
        if self.leaders[target.input_group] == target.name:
            handles.append(module.register_forward_pre_hook(self._read_input(target), with_kwargs=True))
        if self.gradients:
            handles.append(module.register_forward_hook(self._watch_output(target), with_kwargs=True))
        return handles

    def _read_input(self, target: Target) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.is_recording:
                return
            if not self.weighted:
                self.add_input(target.input_group, self._counted(_first_input(args, kwargs)))
            self.call_counted()

        return hook

    def call_counted(self) -> None:
        """One of the calls of a forward is over."""
        self.calls += 1
        if not self.gradients and self.calls == self.calls_per_forward:
            raise _EnoughError

    def add_input(self, group: str, rows: Tensor) -> None:
        """Inputs that are no padding; if they are weighted, the gradients' hooks count them."""
        if rows.shape[0] and not self.weighted:
            _add_outer(self.sums.inputs, group, rows)
            self.sums.num_tokens[group] = self.sums.num_tokens.get(group, 0.0) + rows.shape[0]

    def _watch_output(self, target: Target) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            replaced = None
            if not y.requires_grad:  # the graph begins here; a copy, since models may go on in place
                y = replaced = y.detach().requires_grad_(True).clone()
            if self.is_recording:
                x = _first_input(args, kwargs) if self.weighted else None
                y.register_hook(self._read_gradient(target, x))  # type: ignore[no-untyped-call]
            return replaced

        return hook

    def _read_gradient(self, target: Target, x: Tensor | None) -> Any:
        def hook(gradient: Tensor) -> None:
            # Padding has no part in the loss, so its gradients are zero and need no mask.
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            self.add_gradient(target, rows, x)
            self.count_gradients(target, rows.shape[0])

        return hook

    def add_gradient(self, target: Target, rows: Tensor, x: Tensor | None) -> None:
        """Gradients of a matrix's outputs, and its inputs if these are weighted by them."""
        _add_outer(self.sums.outputs, target.name, rows)
        if x is not None and self.weighted:
            group = target.input_group
            weights = rows.to(torch.float32).square().sum(dim=1)
            _add_outer(self.sums.inputs, group, x.reshape(-1, x.shape[-1]), weights)
            # On the device: a number here would wait for the GPU once per matrix and batch.
            self.weight_sums[group] = self.weight_sums.get(group, 0.0) + weights.sum().to(torch.float64)

    def count_gradients(self, target: Target, num_tokens: int) -> None:
        """How many tokens its gradients are a mean over."""
        self.num_gradients[target.name] += self._num_counted(num_tokens)

    def real_tokens(self, num_tokens: int) -> Tensor | None:
        """Which of a batch's tokens are no padding (tokens,); None if all are."""
        mask = next((mask for mask in self.masks if mask.real.numel() == num_tokens), None)
        return None if mask is None or mask.count == num_tokens else mask.real.reshape(-1)

    def _counted(self, x: Tensor) -> Tensor:
        """The rows (tokens, d) of an input that are no padding."""
        flat = x.reshape(-1, x.shape[-1])
        for mask in self.masks:
            same_shape = x.ndim == 3 and mask.real.shape == x.shape[:2]
            if same_shape or (x.ndim == 2 and mask.real.numel() == x.shape[0]):
                return flat if mask.count == x.shape[:-1].numel() else flat[mask.real.reshape(-1)]
        return flat

    def _num_counted(self, rows: int) -> int:
        """Tokens among `rows` that are no padding."""
        return next((mask.count for mask in self.masks if mask.real.numel() == rows), rows)

    def means(self) -> MeasuredMoments:
        tokens = self.sums.num_tokens
        tokens |= {group: float(total) for group, total in self.weight_sums.items()}
        for group, total in self.sums.inputs.items():
            total /= tokens[group] or 1.0
            mirror(total)
        for name, total in self.sums.outputs.items():
            total /= self.num_gradients[name]
            mirror(total)
        return self.sums


def _add_outer(sums: dict[str, Tensor], key: str, rows: Tensor, weights: Tensor | None = None) -> None:
    """sums[key] += rows^T rows in float32, each row counted `weights` times; on and above the diagonal; `mirror` does the rest.

    Products of bf16 numbers are exact in TF32, whose sums are float32: the fast path loses nothing. Wider rows are
    multiplied in full float32.
    """
    d = rows.shape[-1]
    if key not in sums:
        sums[key] = torch.zeros(d, d, dtype=torch.float32, device=rows.device)
    rows32 = rows.to(torch.float32)
    left32 = rows32 if weights is None else rows32 * weights[:, None]
    with float32_products(rows.device, tf32=rows.dtype == torch.bfloat16 and weights is None):
        add_symmetric(sums[key], left32, rows32)

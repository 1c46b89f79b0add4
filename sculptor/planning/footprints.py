"""What training takes, by arithmetic: memory by component, bytes moved and operations per step.

Every figure follows from shapes and rules; activations are estimated from the widths of a block.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.methods.rule import cost_of
from sculptor.model.loss import SLICE
from sculptor.numerics.kernels import writes_scores
from sculptor.planning.matrices import PlannedMatrix, basis_numbers
from sculptor.planning.shares import Share, shares
from sculptor.planning.traffic import added_up, beside, shown
from sculptor.streaming.regions import STAGING_BYTES
from sculptor.training.precision import compute_dtype
from sculptor.training.settings import Offload
from sculptor.training.stepping.streamed import PART_TOKENS

# What torch and transformers take before any tensor: on a GPU its context and libraries' workspaces.
RUNTIME = {"cuda": 0.7e9, "cpu": 0.45e9}
# What a process with torch, its GPU libraries and its heap has in host memory beside the tensors; measured on an H200.
_HOST_RUNTIME = 2.1e9
# Activations inside a block over the widths of its matrices: norms in float32, attention, products of gates.
_ACTIVATIONS = 1.6
# Bytes of a written-out attention score: its softmax in float32 and once more in the model's dtype, and, in the one block that is
# worked on, gradients of both. On an H100, bf16, 128 to 2,048 tokens a row: 6.0 and up to 7.8.
_SCORE, _SCORE_NOW = 4, 8


@dataclass(frozen=True, slots=True)
class Footprint:
    """One way of training.

    Attributes:
        offload: none, bases, cpu or disk.
        device, host, disk: bytes by component.
        operations: floating-point operations of a step as plain training takes them.
        folding: of folds and projections beside that, less what gradients take that are never whole.
        loaded, stored: bytes that go to the device and come back in a step.
        read, written: bytes of files in a step.
        exchanged: bytes that come from other processes in a step.
        shares: what each process holds of matrices, by rank, where they are divided.
    """

    offload: Offload
    device: Mapping[str, float]
    host: Mapping[str, float]
    disk: Mapping[str, float]
    operations: float
    folding: float
    loaded: float = 0.0
    stored: float = 0.0
    read: float = 0.0
    written: float = 0.0
    exchanged: float = 0.0
    shares: Sequence[Share] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """A step: tokens, in how many micro-batches, and how blocks are updated.

    `on_host` is AdamW in host memory, `recompute` whether a resident run computes blocks again in the backward pass,
    `num_extra` how many numbers are trained openly, `written` bytes of what a run leaves on disk, `saves` how often it saves
    its state (more than twice is twice), `evaluates` whether it keeps the best parameters too, `row` the tokens of the longest
    row, which is never split, `micro_rows` the most rows of a micro-batch, `processes` how many divide the model, `kept`
    bytes of what the optimizer keeps of each number that is trained, `copied` of what it copies of each while it steps, and
    `compute` what weights are multiplied in.
    """

    tokens: int
    micro_batches: int
    fused: bool = False
    keep_inputs: bool = False
    on_host: bool = False
    recompute: bool = True
    num_extra: int = 0
    written: float = 0.0
    saves: int = 0
    evaluates: bool = False
    row: int = 0
    micro_rows: int = 0
    processes: int = 1
    kept: int = 8
    copied: int = 0
    compute: torch.dtype | None = None

    @property
    def state(self) -> float:
        """Bytes of a trained number and what the optimizer keeps of it."""
        return 4.0 + self.kept


def footprints(
    checkpoint: Checkpoint,
    architecture: Architecture,
    matrices: Sequence[PlannedMatrix],
    device: torch.device,
    work: Workload,
) -> dict[str, Footprint]:
    """By offload: none, cpu, bases, disk; where several processes divide the model: none, cpu, bases."""
    sizes = _Sizes(checkpoint, architecture, matrices, device, work)
    if work.processes > 1:
        return {"none": sizes.divided("none"), "cpu": sizes.divided("cpu"), "bases": sizes.divided("bases")}
    found = {"none": sizes.resident(), "cpu": sizes.streamed("cpu", work.on_host)}
    if matrices:  # where nothing is trained there is nothing to set apart
        found["bases"] = sizes.with_constants_apart()
    return found | {"disk": sizes.streamed("disk", on_host=False)}


class _Sizes:
    """Sums over a model, per block and in all."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        matrices: Sequence[PlannedMatrix],
        device: torch.device,
        work: Workload,
    ) -> None:
        self.kind = device.type
        self.work = work
        self.size = (work.compute or compute_dtype("auto", device)).itemsize  # of a trained weight, and of a basis
        widths: dict[str, float] = {}
        for target in architecture.targets:
            widths[target.block] = widths.get(target.block, 0.0) + target.width
        self.num_blocks = len(widths)
        self.matrices: dict[str, list[PlannedMatrix]] = defaultdict(list)
        for matrix in matrices:
            if matrix.num_free:
                self.matrices[matrix.target.parameter].append(matrix)
        self.inside_blocks: dict[str, dict[str, float]] = {block: defaultdict(float) for block in widths}
        for target in architecture.targets:
            trained = target.parameter in self.matrices
            width = self.size if trained else 4 if device.type == "cpu" else checkpoint.info_of(target).dtype.itemsize
            self.inside_blocks[target.block][target.parameter] += float(width * target.shape[0] * target.shape[1])
        by_block: dict[str, list[PlannedMatrix]] = {block: [] for block in widths}
        for matrix in matrices:
            by_block[matrix.target.block].append(matrix)
        names = {target.tensor for target in architecture.targets}
        inside = {block: [t for t in architecture.targets if t.block == block] for block in widths}
        self.target_weights = {b: sum(t.shape[0] * t.shape[1] for t in ts) for b, ts in inside.items()}
        numbers = {name: info.num_bytes // info.dtype.itemsize for name, info in checkpoint.infos.items()}
        in_targets = sum(self.target_weights.values())
        others = {tensor: parameter for parameter, tensor in architecture.tensors.items() if tensor not in names}
        in_blocks = sum(
            numbers[tensor]
            for tensor, parameter in others.items()
            if any(parameter.startswith(block + ".") for block in widths)
        )
        total = sum(numbers.values())
        unnamed = total - in_targets - sum(numbers[tensor] for tensor in others)  # stacked experts: parts of the blocks
        self.rest_in_blocks = in_blocks + unnamed
        self.outside = total - in_targets - self.rest_in_blocks
        self.block_weights = max(self.target_weights.values()) + self.rest_in_blocks // max(1, self.num_blocks)
        self.weights = in_targets + self.rest_in_blocks
        self.file_size = next(checkpoint.info_of(t).dtype.itemsize for t in architecture.targets)
        self.rest_size = 4 if device.type == "cpu" else self.file_size
        self.pristine = sum(m.num_entries for m in matrices) * self.file_size
        self.coordinates = {b: sum(m.num_free for m in ms) for b, ms in by_block.items()}
        self.bases = {b: self.size * sum(basis_numbers(ms).values()) for b, ms in by_block.items()}
        self.largest = max((m.num_entries for m in matrices), default=0)
        state = int(self.work.state + 4)
        self.ring = max((state * m.num_free + self.file_size * m.num_entries for m in matrices), default=0)
        self.host_ring = max((4 * m.num_free + self.file_size * m.num_entries for m in matrices), default=0)
        self.num_coordinates = sum(self.coordinates.values())
        micro = work.micro_rows * work.row or work.tokens / work.micro_batches
        widths_in = [t.shape[1] for t in architecture.targets]
        hidden = max(set(widths_in), key=widths_in.count)  # what most matrices read
        row = work.row or micro / max(1, work.micro_rows)
        written = architecture.writes_scores or writes_scores(device, work.compute or torch.float32, round(row))
        scores = architecture.heads * micro * row if written else 0.0
        self.inside = self.size * _ACTIVATIONS * max(widths.values()) * micro + (_SCORE + self.size % _SCORE) * scores
        # A router's loss is over the whole batch, which is not split then.
        configs = (checkpoint.config, checkpoint.config.get("text_config") or {})
        whole = any(each.get("output_router_logits") for each in configs) or self.kind not in PART_TOKENS
        part = micro if whole else max(PART_TOKENS[self.kind], work.row)
        self.inside_part = self.inside * min(1.0, part / micro)
        per_token = self.size * hidden * self.num_blocks
        self.inputs, self.inputs_of_step = per_token * micro, float(per_token * work.tokens)
        loss = 3 * 4 * min(SLICE[self.kind], int(micro) * architecture.vocab_size)
        self.working = max(_SCORE_NOW * scores, loss)  # one after the other
        self.working_part = max(_SCORE_NOW * scores * min(1.0, part / micro), loss)
        used = sum(t.shape[0] * t.shape[1] * t.share for t in architecture.targets)
        forward = 2 * (used + self.rest_in_blocks + architecture.vocab_size * hidden) * work.tokens
        self.operations = 4 * forward  # forward, again, and twice as much backward
        self.operations_at_once = (4 if work.recompute else 3) * forward
        self.folds = sum(cost_of(m.rule, m.names).operations for m in matrices)
        narrowed = {m.target.name: m.narrowing(micro, self.kind) for m in matrices}
        self.narrowing = work.micro_batches * sum(each for each in narrowed.values() if each is not None)
        after = (cost_of(m.rule, m.names).operations for m in matrices if narrowed[m.target.name] is None)
        self.projecting = work.micro_batches * sum(after)
        self.folding = self.folds + self.narrowing + self.projecting

    def extra(self) -> dict[str, float]:
        """Openly trained parameters, which are on the device in any way of training: float32, gradients, AdamW."""
        size = (self.work.state + 4 - self.rest_size) * self.work.num_extra
        return {"openly trained": size} if size else {}

    def files(self) -> dict[str, float]:
        """What any way of training needs of the disk."""
        numbers = float(self.num_coordinates + self.work.num_extra)
        best = 4 * numbers if self.work.evaluates else 0.0
        # A state goes when the next one is complete, so there are two for a while, before there is an output.
        second = self.work.state * numbers * (self.work.saves > 1) + best
        first = self.work.state * numbers * (self.work.saves > 0) + best
        found = {"saved state": first, "second state, then output and archive": max(self.work.written, second)}
        return {name: size for name, size in found.items() if size}

    def resident(self) -> Footprint:
        in_matrices = self.pristine / self.file_size
        device = {
            "weights, pristine and folded": self.size * in_matrices
            + self.rest_size * (in_matrices + self.rest_in_blocks + self.outside),
            "bases": sum(self.bases.values()),
            "coordinates, gradients, AdamW": (self.work.state + 4) * self.num_coordinates,
            "activations": self.inside * (1 if self.work.recompute else self.num_blocks) + self.inputs + self.working,
            "work space": RUNTIME[self.kind] + 12 * self.largest + self.work.copied * self.num_coordinates,
        } | self.extra()
        host = {"loading": self.file_size * (self.weights + self.outside) * 1.0} if self.kind == "cuda" else {}
        return Footprint("none", device, host, self.files(), self.operations_at_once, self.folding)

    def with_constants_apart(self) -> Footprint:
        """Streamed, from the device itself but for bases and W0."""
        alone = self.streamed("cpu", on_host=False)
        held = ("weights", "coordinates, gradients, AdamW")
        keep = self.work.keep_inputs or self.kind == "cpu"
        waiting = {f"{name}, waiting": alone.host[name] for name in held}
        activations = (
            self.inside_part + self.working_part + (self.inputs if keep else 3 * self.inputs / self.num_blocks)
        )
        names = ("bases", "pristine weights", "copies", "runtime", *(() if keep else ("activation checkpoints",)))
        host = {**alone.host, "activation checkpoints": self.inputs}
        micro = self.work.micro_batches
        loaded = sum(self.bases.values()) * (micro + (not self.work.fused)) + self.pristine
        moved = 0.0 if keep else self.inputs_of_step
        return Footprint(
            "bases",
            {**alone.device, **waiting, "activations": activations},
            {name: host[name] for name in names if name in host},
            self.files(),
            alone.operations,
            alone.folding,
            loaded=float(loaded) + moved,
            stored=moved,
        )

    def divided(self, offload: Literal["none", "bases", "cpu"]) -> Footprint:
        """Of the process that holds most; what it holds of matrices is on the device, or in host memory."""
        slots, count = 2 if self.kind == "cuda" else 1, self.work.processes
        rest = {"others": self.rest_size * self.rest_in_blocks / max(1, self.num_blocks)}
        blocks = {path: found | rest for path, found in self.inside_blocks.items()}
        parts = shares(blocks, self.matrices, self.file_size, self.kind, count, self.work.kept)
        most = max(parts, key=lambda share: share.num_bytes)
        exchanges = [beside(block, self.matrices, self.size) for block in blocks.values()]
        gradients, bases = (max(sizes) for sizes in zip(*exchanges, strict=True))
        held = {
            "weights": most.weights,
            "pristine weights": most.pristine,
            "bases": most.bases,
            "coordinates, gradients, AdamW": most.state,
        }
        alone = self.streamed("cpu", on_host=self.work.on_host and offload == "cpu")
        own = ("blocks", "embedding, head, norms", "activations", "work space", "openly trained")
        updates = alone.device["coordinates, gradients, AdamW"]
        device = {name: alone.device[name] for name in own if name in alone.device} | {
            "gradients of blocks": slots * gradients,
            "bases and updates on their way": slots * (most.block_bases + bases) + updates,
        }
        host = {"copies": 2.0 * STAGING_BYTES[self.kind]}
        if offload == "none":
            device = held | device | {"activations": self.inside_part + self.inputs + self.working_part}
        elif offload == "bases":
            apart, keep = ("pristine weights", "bases"), self.work.keep_inputs or self.kind == "cpu"
            inputs = self.inputs if keep else 3 * self.inputs / self.num_blocks
            host |= {name: held.pop(name) for name in apart} | ({} if keep else {"activation checkpoints": self.inputs})
            host |= {"runtime": alone.host["runtime"]} if "runtime" in alone.host else {}
            device = held | device | {"activations": self.inside_part + inputs + self.working_part}
        else:
            host = {name: size for name, size in alone.host.items() if name not in held} | held
        sizes = [sum(block.values()) for block in blocks.values()]
        aside = added_up(self.work.num_extra, count)
        return Footprint(
            offload,
            device,
            host,
            self.files(),
            alone.operations,
            (self.folds + self.projecting) / count + self.narrowing,
            loaded={"none": 0.0, "bases": self.with_constants_apart().loaded, "cpu": alone.loaded}[offload] / count,
            stored=alone.stored / count if offload == "cpu" else 0.0,
            exchanged=shown(sizes, sum(map(sum, exchanges)), self.work.micro_batches, count, slots) + aside,
            shares=parts,
        )

    def streamed(self, tier: Literal["cpu", "disk"], on_host: bool) -> Footprint:
        """`on_host` is AdamW in host memory."""
        slots = 2 if self.kind == "cuda" else 1
        keep = self.work.keep_inputs or self.kind == "cpu"
        largest = {name: max(found.values(), default=0) for name, found in (("c", self.coordinates), ("b", self.bases))}
        device = {
            "blocks": slots * self.size * self.block_weights,
            "embedding, head, norms": self.rest_size * self.outside,
            "bases": slots * largest["b"],
            "coordinates, gradients, AdamW": slots * (4 * largest["c"] + (self.host_ring if on_host else self.ring)),
            "activations": self.inside_part
            + self.working_part
            + (self.inputs if keep else 3 * self.inputs / self.num_blocks),
            "work space": RUNTIME[self.kind] + 12 * self.largest,
        } | self.extra()
        waiting = {
            "weights": self.size * self.weights,
            "bases": float(sum(self.bases.values())),
            "coordinates, gradients, AdamW": (self.work.state + 4) * self.num_coordinates,
        }
        kept = {} if keep else {"activation checkpoints": self.inputs}
        staging = {"copies": (2.0 if tier == "cpu" else 4.0) * STAGING_BYTES[self.kind]}
        runtime = {"runtime": _HOST_RUNTIME} if self.kind == "cuda" else {}
        micro, n = self.work.micro_batches, self.num_coordinates
        weights, bases, inputs = waiting["weights"], waiting["bases"], 0.0 if keep else self.inputs_of_step
        # Forward and backward of every micro-batch; the update brings state, pristine weights and bases, and makes the
        # weights of the first forward on the device. Gradients leave and come back once per micro-batch.
        exact = not self.work.fused
        gradients = 4.0 * n * micro if exact else 0.0
        state = self.work.state * n
        loaded = (2 * micro - exact) * weights + (micro + exact) * bases + self.pristine + inputs
        loaded += 4 * n * micro if on_host else state + gradients  # A, and what is added to; the moments stay
        stored = (0 if on_host else state) + weights + gradients + inputs
        in_host = tier == "cpu"
        in_files = {} if in_host or not self.pristine else waiting  # what does not change is read where it is
        return Footprint(
            tier,
            device,
            (waiting | {"pristine weights": float(self.pristine)} if in_host else {}) | kept | staging | runtime,
            in_files | self.files(),
            self.operations,
            self.folding,
            loaded=loaded,
            stored=stored,
            read=0.0 if in_host else loaded - inputs,
            written=0.0 if in_host else stored - inputs,
        )

"""What a training run can be told. Every field's help is the text the command line shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sculptor.errors import SettingsError

Schedule = Literal["cosine", "linear", "constant"]
SaveDtype = Literal["keep", "float32", "bfloat16"]
Carry = Literal["merge", "accumulate", "retake"]
ClipBy = Literal["model", "matrix"]
OptimizerMode = Literal["exact", "fused"]
OptimizerOn = Literal["auto", "host", "device"]
Offload = Literal["none", "cpu", "disk", "auto"]
DEFAULT_RATE = 5e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Settings of `sculptor train`; everything that decides its result."""

    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps, at least 1; overrides epochs and repeats the data."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW on the coordinates; default 1e-3 with curvature, which slows down what matters, else
    5e-4."""
    weight_decay: float = 0.0
    """Pulls the coordinates towards 0, that is the weights towards the base."""
    soften: float | None = None
    """With moments: slow free pairs down by 1 / sqrt(1 + soften * their importance over the mean); default 3 with
    curvature, else 0."""
    warmup: float = 0.03
    """Share of the steps (below 1) or number of steps (1 and more) with rising learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls to 0 after the warm-up."""
    clip: float = 1.0
    """Largest norm of the gradient of all trained parameters; 0 for none."""
    clip_by: ClipBy = "model"
    """What is clipped together: all trained parameters, or each matrix by itself."""
    optimizer_mode: OptimizerMode = "exact"
    """When blocks are offloaded: exact, or fused to update each block within the backward pass, for less copying; fused
    needs one micro-batch per step, and no clipping or one by matrix."""
    batch_size: int = 32
    """Rows per optimizer step."""
    micro_batch_size: int = 8
    """Rows per forward; splits a batch."""
    max_rows: int | None = None
    """Use at most this many rows of each file, the first ones."""
    max_length: int | None = None
    """Longest sequence in tokens; default 1024 or the model's limit."""
    also_train: tuple[str, ...] = ()
    """Patterns of further parameters (norms, embeddings, head, biases) to train without protection."""
    seed: int = 0
    """Decides order, masking and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offload: Offload = "auto"
    """Where blocks wait that are not computed: nowhere (all on the device), host memory, disk, or by what fits."""
    optimizer_on: OptimizerOn = "auto"
    """Where AdamW runs with --offload cpu: in host memory, so that its moments stay there, or on the device; default host if
    the device is a GPU."""
    offload_inputs: bool | None = None
    """With offloading: send activation checkpoints to host memory too; default on a GPU."""
    save_dtype: SaveDtype = "keep"
    """Dtype of the merged checkpoint."""
    carry: Carry | None = None
    """How the archive goes on: merge the task's moments in (default where it has any), add what the task learned
    (default elsewhere), or decompose again."""
    memory_rows: int | None = None
    """Rows of the task whose moments are merged into the archive; default 384."""
    memory_weight: float | None = None
    """Weight of the task's moments against those of one earlier source; default 1."""
    checkpoint_activations: bool | None = None
    """Recompute activations in the backward pass; default only on a GPU."""
    save_every: int | None = None
    """Steps between saved states; default about every tenth of the run."""
    eval_every: int | None = None
    """Steps between evaluations; default five times in the run."""

    def __post_init__(self) -> None:
        checks: Sequence[tuple[bool, str]] = (
            (0 < self.epochs < float("inf"), f"--epochs {self.epochs}: expected more than 0"),
            (self.max_steps is None or self.max_steps >= 1, f"--max-steps {self.max_steps}: expected at least 1"),
            (_positive(self.learning_rate), f"--learning-rate {self.learning_rate}: expected more than 0"),
            (0 <= self.weight_decay < float("inf"), f"--weight-decay {self.weight_decay}: expected 0 or more"),
            (self.soften is None or 0 <= self.soften < float("inf"), f"--soften {self.soften}: expected 0 or more"),
            (0 <= self.warmup < float("inf"), f"--warmup {self.warmup}: expected 0 or more"),
            (0 <= self.clip < float("inf"), f"--clip {self.clip}: expected 0 (none) or more"),
            (self.batch_size >= 1, f"--batch-size {self.batch_size}: expected at least 1"),
            (self.micro_batch_size >= 1, f"--micro-batch-size {self.micro_batch_size}: expected at least 1"),
            (self.max_rows is None or self.max_rows >= 1, f"--max-rows {self.max_rows}: expected at least 1"),
            (self.max_length is None or self.max_length >= 8, f"--max-length {self.max_length}: expected at least 8"),
            (0 <= self.seed < 2**31, f"--seed {self.seed}: expected 0 to {2**31 - 1}"),
            (self.save_every is None or self.save_every >= 1, f"--save-every {self.save_every}: expected at least 1"),
            (self.eval_every is None or self.eval_every >= 1, f"--eval-every {self.eval_every}: expected at least 1"),
            (self.schedule in ("cosine", "linear", "constant"), f"--schedule {self.schedule}: unknown"),
            (self.save_dtype in ("keep", "float32", "bfloat16"), f"--save-dtype {self.save_dtype}: unknown"),
            (self.clip_by in ("model", "matrix"), f"--clip-by {self.clip_by}: unknown"),
            (self.optimizer_mode in ("exact", "fused"), f"--optimizer-mode {self.optimizer_mode}: unknown"),
            (
                self.optimizer_mode == "exact" or self.batch_size <= self.micro_batch_size,
                f"--optimizer-mode fused: a step of {self.batch_size} rows in micro-batches of {self.micro_batch_size} "
                "needs the gradients of all of them first; set --micro-batch-size to --batch-size, or use exact",
            ),
            (
                self.optimizer_mode == "exact" or self.clip == 0 or self.clip_by == "matrix",
                "--optimizer-mode fused: the norm over the model is known only after the backward pass; use --clip-by "
                "matrix or --clip 0, or exact",
            ),
            (self.optimizer_on in ("auto", "host", "device"), f"--optimizer-on {self.optimizer_on}: unknown"),
            (
                self.optimizer_on != "host" or self.offload in ("cpu", "auto"),
                f"--optimizer-on host without effect with --offload {self.offload}; use --offload cpu",
            ),
            (
                self.optimizer_on != "host" or self.optimizer_mode == "exact",
                "--optimizer-on host without effect with --optimizer-mode fused; use exact",
            ),
            (
                self.offload != "none" or self.offload_inputs is None,
                "--offload-inputs and --keep-inputs without effect with --offload none; use cpu or disk",
            ),
            (
                self.offload != "none" or self.optimizer_mode == "exact",
                "--optimizer-mode fused without effect with --offload none; use cpu or disk",
            ),
            (
                self.offload not in ("cpu", "disk") or self.checkpoint_activations is not False,
                f"--keep-activations without effect with --offload {self.offload}: blocks are always computed again",
            ),
            (self.offload in ("none", "cpu", "disk", "auto"), f"--offload {self.offload}: unknown"),
            (self.carry in (None, "merge", "accumulate", "retake"), f"--carry {self.carry}: unknown"),
            (
                self.memory_rows is None or self.memory_rows >= 1,
                f"--memory-rows {self.memory_rows}: expected at least 1",
            ),
            (_positive(self.memory_weight), f"--memory-weight {self.memory_weight}: expected more than 0"),
        )
        wrong = [message for holds, message in checks if not holds]
        if wrong:
            raise SettingsError("; ".join(wrong))

    def steps_between_saves(self, total: int) -> int:
        """Of a run of so many steps."""
        return self.save_every or max(1, min(500, total // 10))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))


def _positive(value: float | None) -> bool:
    return value is None or 0 < value < float("inf")

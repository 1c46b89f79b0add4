"""What a training run can be told. Every field's help is the text the command line shows."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from sculptor.errors import SettingsError
from sculptor.methods.settings import Carry
from sculptor.validation import AtLeastOne, ColumnNames, Name, NotNegative, Off, Positive, Seed, Texts, settings

Schedule = Literal["cosine", "linear", "constant"]
SaveDtype = Literal["keep", "float32", "bfloat16"]
TokenWeights = Literal["same", "entropy"]
Task = Literal["language-modeling", "sequence-classification"]
CLASSIFICATION: Task = "sequence-classification"
ClipBy = Literal["model", "matrix"]
Optimizer = Literal["adamw", "bayes-adam"]
OptimizerMode = Literal["exact", "fused"]
OptimizerOn = Literal["auto", "host", "device"]
Offload = Literal["none", "bases", "cpu", "disk", "auto"]
ReadOffload = Literal["none", "cpu", "disk", "auto"]  # where nothing is trained there are no bases
STREAMED = ("bases", "cpu", "disk")  # ways of offloading by which one block at a time is computed
Parallel = Literal["auto", "replicate", "shard"]
Precision = Literal["auto", "float32", "bfloat16"]
OptimizerDtype = Literal["float32", "bfloat16"]
# Of bayes-adam: after a hundred steps with a gradient of norm 1, the average number has as much precision again.
EVIDENCE = 0.01
# Rows per forward where nothing else decides.
MICRO_ROWS = 8
# Where nothing else decides: few rows are passed over up to five times, as long as that makes fewer steps than it may, and a step
# takes as few as four of them, until a run has enough steps. Of 200 rows SmolLM2 answers 90 % exactly after 100 steps of five
# passes, 97 % after 145, for the same harm.
MOST_ROWS, LEAST_ROWS = 32, 4
MOST_EPOCHS, PASSED_STEPS = 5, 60
ENOUGH_STEPS = 140
FEW_STEPS = 25  # teach next to nothing at any rate that is safe


@settings
class TrainSettings:
    """Settings of `sculptor train`; everything that decides its result."""

    task: Task | None = None
    """What rows teach: to say their text, or the class of theirs, by a head that is trained freely and made new where the model
    has none [default: what the model has a head for]."""
    epochs: Positive | None = None
    """Passes over the data [default: 1, and up to 5 where a run would have fewer than 60 steps of 32 rows]."""
    max_steps: AtLeastOne | None = None
    """Optimizer steps; overrides --epochs and repeats the data."""
    relative_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate over the root mean square of a matrix's entries [default: what suits the archive's rules; train
    prints it]."""
    learning_rate: Positive | None = None
    """Peak learning rate in absolute terms, the same for everything, in the place of --relative-rate."""
    soften: NotNegative | None = None
    """With moments: slow free pairs down by 1/sqrt(1 + SOFTEN * importance/mean) [default: 3 with curvature, else 0]."""
    optimizer: Optimizer = "adamw"
    """adamw, or bayes-adam (BAdam), whose step each number takes the less of, the more data have decided it; how much is kept in
    the archive from task to task, so it goes on by --carry keep."""
    optimizer_dtype: OptimizerDtype = "float32"
    """What the optimizer keeps the averages of gradients in: bfloat16 takes 4 bytes less of every trained number."""
    evidence: Positive | None = None
    """With bayes-adam: precision that a step with a gradient of norm 1 adds to the average number, over that of the start
    [default: 0.01]."""
    weight_decay: NotNegative = 0.0
    """Pulls the update of protected matrices towards 0, the weights towards the base; what is trained openly has none."""
    warmup: NotNegative = 0.03
    """Share (below 1) or number of steps with rising learning rate."""
    schedule: Schedule = "cosine"
    """Fall of the learning rate after the warm-up."""
    token_weights: TokenWeights = "same"
    """Weight of each token's loss: the same, or the normalised entropy of the model's prediction over its 20 likeliest tokens
    (EAFT), by which what it contradicts with confidence is learned least."""
    clip: NotNegative = 1.0
    """Largest norm of the trainable gradient; 0 for none."""
    clip_by: ClipBy = "model"
    """Clip all trained parameters together, or each matrix by itself."""
    precision: Precision = "auto"
    """What weights are multiplied in; updates are added up in float32 always [auto: bfloat16 on a GPU, and on a CPU that has
    instructions for it, where a model of 50 million parameters or more is stored so; else float32]."""
    offload: Offload = "auto"
    """Where blocks wait that are not being computed: all stay on the device, or only bases and original weights, which do not
    change, wait in host memory; host memory; disk; or what fits."""
    parallel: Parallel = "auto"
    """In several processes: each holds everything, or its share of weights, bases and state [auto: everything where it fits]."""
    optimizer_mode: OptimizerMode = "exact"
    """With offloading: fused updates blocks within the backward pass; needs one micro-batch per step, and --clip-by matrix
    or --clip 0."""
    optimizer_on: OptimizerOn = "auto"
    """With --offload cpu: run AdamW in host memory, where its moments wait, or on the device [auto: host for a GPU]."""
    offload_inputs: Annotated[bool | None, Off("keep-inputs")] = None
    """With offloading: activation checkpoints wait in host memory too [default: on a GPU]."""
    batch_size: AtLeastOne | None = None
    """Rows per optimizer step [default: 32; without --max-steps as few as 4 where a run would have fewer than 140
    steps]."""
    micro_batch_size: AtLeastOne | None = None
    """Rows per forward; splits a batch [default: on a GPU as many as fit, else 8, and more of rows so short that they hold 1,024
    tokens]."""
    max_rows: AtLeastOne | None = None
    """Rows to use of each of the data, the first ones [default: all]."""
    select_rows: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the task's rows to train on: those that the model predicts worst, by one pass before the first step (EL2N, in
    the manner of EsaCL) [default: all]."""
    max_length: Annotated[int, Field(ge=8, le=2**31)] | None = None
    """Longest sequence in tokens [default: 1024 or the model's limit]."""
    chat_template: Name | None = None
    """For conversations: name of one of the tokenizer's templates, or a file [default: the tokenizer's own]."""
    columns: ColumnNames | None = None
    """Which columns of the data are which keys of ours: prompt=question,completion=answer."""
    also_train: Texts = ()
    """Further parameters to train unprotected, e.g. 'norm' or 'lm_head'; repeatable."""
    add_tokens: Texts = ()
    """A new token, or a file with one a line: tokenizer, embedding and head get rows for them, which are trained freely;
    repeatable."""
    common_tokens: bool = False
    """Take --add-tokens that stand in old text, too: it is read in another way then."""
    seed: Seed = 0
    """Decides order, masking and dropout."""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N."""
    attn_implementation: Name | None = None
    """Attention of the model: eager, sdpa, flash_attention_2, ... [default: transformers' choice]."""
    save_dtype: SaveDtype = "keep"
    """Dtype of the merged checkpoint."""
    carry: Carry | None = None
    """Updated archive: merge the task's moments in, add what it learned, decompose again, or keep it as it is [default:
    merge if the archive has moments, else accumulate]."""
    memory_rows: AtLeastOne | None = None
    """Rows of the task whose moments are merged in [default: 384; on a CPU as many as hold the tokens that `analyze` takes
    there, at least 48]."""
    memory_weight: Positive | None = None
    """Weight of the task's moments against those of one earlier source [default: 1]."""
    checkpoint_activations: Annotated[bool | None, Off("keep-activations")] = None
    """Recompute activations in the backward pass [default: on a GPU where they do not fit]."""
    save_every: AtLeastOne | None = None
    """Steps between saved states [default: a tenth of the run, at most 500, and a twentieth of the time at most]."""
    eval_every: AtLeastOne | None = None
    """Steps between evaluations [default: a fifth of the run]."""
    kl_weight: Positive | None = None
    """Adds KL_WEIGHT * KL(base || new) on the rows' own tokens to the loss, for one more forward a step; not with offloading."""
    max_harm: NotNegative | None = None
    """Largest harm, as KL(base || new) in nats a token on what the model says by itself; updates that do more are scaled back;
    0 for no limit [default: of an archive of conversations that the model says, 0.02 more than where the task began; else 0]."""
    harm_every: AtLeastOne | None = None
    """Steps between measurements of harm [default: a twentieth of the time; with a limit a twentieth of the run, too]."""

    def __post_init__(self) -> None:
        resident, fused = self.offload == "none", self.optimizer_mode == "fused"
        faults = (
            (self.common_tokens and not self.add_tokens, "--common-tokens without effect: there are no --add-tokens"),
            (
                self.learning_rate is not None and self.relative_rate is not None,
                "--relative-rate without effect: --learning-rate is absolute; give one of the two",
            ),
            (
                fused and self.batch_size is not None and self.batch_size > (self.micro_batch_size or self.batch_size),
                f"--optimizer-mode fused: a step of {self.batch_size} rows in micro-batches of {self.micro_batch_size} "
                "needs the gradients of all of them first; set --micro-batch-size to --batch-size, or use exact",
            ),
            (
                fused and self.clip > 0 and self.clip_by == "model",
                "--optimizer-mode fused: the norm over the model is known only after the backward pass; use --clip-by "
                "matrix or --clip 0, or exact",
            ),
            (
                self.evidence is not None and self.optimizer != "bayes-adam",
                "--evidence without effect with --optimizer adamw; use bayes-adam",
            ),
            (
                self.optimizer == "bayes-adam" and self.carry not in (None, "keep"),
                f"--optimizer bayes-adam: what it knows is of coordinates that --carry {self.carry} makes anew; use --carry keep",
            ),
            (
                self.optimizer_on == "host" and self.offload not in ("cpu", "auto"),
                f"--optimizer-on host without effect with --offload {self.offload}; use --offload cpu",
            ),
            (
                self.optimizer_on == "host" and fused,
                "--optimizer-on host without effect with --optimizer-mode fused; use exact",
            ),
            (
                resident and self.offload_inputs is not None,
                "--offload-inputs and --keep-inputs without effect with --offload none; use bases, cpu or disk",
            ),
            (resident and fused, "--optimizer-mode fused without effect with --offload none; use bases, cpu or disk"),
            (
                self.offload in STREAMED and self.checkpoint_activations is False,
                f"--keep-activations without effect with --offload {self.offload}: blocks are always computed again",
            ),
        )
        wrong = [message for is_fault, message in faults if is_fault]
        if wrong:
            raise SettingsError("; ".join(wrong))

    def for_rows(self, num_epoch: int) -> "TrainSettings":
        """With passes and rows of a step that suit an epoch of so many rows, where nothing was said."""
        epochs, rows = self.epochs, self.batch_size or MOST_ROWS
        if epochs is None:
            wanted = 1 if self.max_steps is not None else -(-PASSED_STEPS * rows // max(1, num_epoch))
            epochs = float(min(MOST_EPOCHS, max(1, wanted)))
        if self.batch_size is None and self.max_steps is None:
            rows = max(LEAST_ROWS, min(MOST_ROWS, int(epochs * num_epoch) // ENOUGH_STEPS))
        filled: TrainSettings = replace(self, epochs=epochs, batch_size=rows)
        return filled

    def rows_of_step(self, num_epoch: int) -> int:
        """Rows per optimizer step where an epoch has so many."""
        return min(self.for_rows(num_epoch).batch_size or MOST_ROWS, max(1, num_epoch))

    def num_selected(self, num_rows: int) -> int:
        """How many of a task's rows are trained on."""
        return num_rows if self.select_rows is None else max(1, round(self.select_rows * num_rows))

    @property
    def micro_rows(self) -> int:
        """Rows per forward, as far as they are decided."""
        return self.micro_batch_size or MICRO_ROWS

    def steps_between_saves(self, total: int) -> int:
        """Of a run of so many steps."""
        return self.save_every or max(1, min(500, total // 10))

    def total_steps(self, num_epoch: int) -> int:
        """Optimizer steps of a run where an epoch has so many rows."""
        epochs = self.for_rows(num_epoch).epochs or 1.0
        return self.max_steps or max(1, round(epochs * -(-num_epoch // self.rows_of_step(num_epoch))))


@settings
class ReadSettings:
    """How a model is read of which nothing is trained."""

    offload: ReadOffload = "auto"
    """Where blocks wait that are not being computed: all stay on the device, host memory, disk, or what fits."""

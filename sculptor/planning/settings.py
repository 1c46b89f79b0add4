"""What an estimate can be told. Every field's help is the text the command line shows."""

from typing import Annotated

from pydantic import Field

from sculptor.errors import SettingsError
from sculptor.methods.settings import AnalyzeSettings
from sculptor.numerics.staircase import Constraint
from sculptor.training.settings import MOST_ROWS, OptimizerDtype, Parallel
from sculptor.validation import AtLeastOne, ColumnNames, Name, Positive, option, settings

_PRESERVE = 0.5
_OF_ARCHIVES = ("preserve", "constraint", "free", "rank", "block_size")


@settings
class EstimateSettings:
    """What is to be trained, and on what."""

    rule: Name = "staircase"
    """Without an archive: kind of rule."""
    preserve: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Without an archive: share of directions protected, by weights [default: curvature instead, which train measures by itself;
    0.5 with --constraint, 0 with --rule rotation]."""
    constraint: Constraint | None = None
    """Without an archive: what an update may not touch [default: double]."""
    free: Annotated[float, Field(gt=0, le=1)] | None = None
    """Without an archive: as that of analyze --rule mask."""
    rank: AtLeastOne | None = None
    """Without an archive: as that of analyze --rule lowrank."""
    block_size: Annotated[int, Field(ge=2, le=2**31)] | None = None
    """Without an archive: as that of analyze --rule rotation."""
    batch_size: AtLeastOne | None = None
    """Rows per optimizer step [default: 32, with --data as that of train]."""
    micro_batch_size: AtLeastOne | None = None
    """Rows per forward [default: as that of train]."""
    max_length: AtLeastOne | None = None
    """Tokens per row [default: 1024 or the model's limit]."""
    chat_template: Name | None = None
    """With --data, for conversations: name of one of the tokenizer's templates, or a file [default: the tokenizer's own]."""
    columns: ColumnNames | None = None
    """With --data: which columns are which keys of ours: prompt=question,completion=answer."""
    max_rows: AtLeastOne | None = None
    """With --data: rows to use of each, the first ones [default: all]."""
    gpus: AtLeastOne = 1
    """Processes that share the rows of a step, each with a GPU of its own."""
    parallel: Parallel = "auto"
    """With --gpus: as that of train [auto: shows both, and picks as train does]."""
    optimizer_dtype: OptimizerDtype = "float32"
    """As that of train: bfloat16 takes 4 bytes less of every trained number."""
    fused: bool = False
    """For --optimizer-mode fused."""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N."""
    gpu_memory: Positive | None = None
    """Plan for a GPU with this many GB, which need not be here."""
    host_memory: Positive | None = None
    """Plan for this many GB of host memory [default: what is free]."""
    tflops: Positive | None = None
    """TFLOP/s of matrix products [default: measured]."""
    link: Positive | None = None
    """GB/s between host and GPU, each way [default: measured]."""
    disk: Positive | None = None
    """GB/s of the disk [default: measured]."""

    @property
    def analysis(self) -> AnalyzeSettings:
        """What an archive would be made with."""
        by_weights = self.constraint is not None and self.rule == "staircase"
        preserve = _PRESERVE if self.preserve is None and by_weights else self.preserve
        told = {name: getattr(self, name) for name in ("rule", "constraint", "free", "rank", "block_size")}
        return AnalyzeSettings(**told, preserve=preserve)

    @property
    def given(self) -> list[str]:
        """Options about an archive that there is not."""
        names = [name for name in _OF_ARCHIVES if getattr(self, name) is not None]
        return [option(name) for name in (["rule"] if self.rule != "staircase" else []) + names]

    def __post_init__(self) -> None:
        if self.fused and self.gpus > 1:
            raise SettingsError("--fused without effect with --gpus: several processes update exactly")
        if self.parallel != "auto" and self.gpus == 1:
            raise SettingsError(f"--parallel {self.parallel} without effect with one process; give --gpus")
        rows = self.batch_size or MOST_ROWS
        if self.fused and rows > (self.micro_batch_size or rows):
            raise SettingsError(
                f"--fused: a step of {rows} rows in micro-batches of {self.micro_batch_size} needs the gradients of "
                "all of them first; set --micro-batch-size to --batch-size"
            )

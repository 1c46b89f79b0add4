"""What an estimate can be told. Every field's help is the text the command line shows."""

from typing import Annotated

from pydantic import Field

from sculptor.errors import SettingsError
from sculptor.numerics.staircase import Constraint
from sculptor.validation import AtLeastOne, ColumnNames, Name, Positive, settings


@settings
class EstimateSettings:
    """What is to be trained, and on what."""

    preserve: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Without an archive: share of directions protected."""
    constraint: Constraint = "double"
    """Without an archive: what an update may not touch."""
    batch_size: AtLeastOne = 32
    """Rows per optimizer step."""
    micro_batch_size: AtLeastOne | None = None
    """Rows per forward [default: on a GPU as many as fit, else 8]."""
    max_length: AtLeastOne | None = None
    """Tokens per row [default: 1024 or the model's limit]."""
    chat_template: Name | None = None
    """With --data, for conversations: name of one of the tokenizer's templates, or a file [default: the tokenizer's own]."""
    columns: ColumnNames | None = None
    """With --data: which columns are which keys of ours: prompt=question,completion=answer."""
    max_rows: AtLeastOne | None = None
    """With --data: rows to use of each, the first ones [default: all]."""
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

    def __post_init__(self) -> None:
        if self.fused and self.batch_size > (self.micro_batch_size or self.batch_size):
            raise SettingsError(
                f"--fused: a step of {self.batch_size} rows in micro-batches of {self.micro_batch_size} needs the gradients of "
                "all of them first; set --micro-batch-size to --batch-size"
            )

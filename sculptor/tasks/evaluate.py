"""`sculptor.evaluate`: loss, perplexity, exact match and label ranking of a checkpoint on rows."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.chat import check_use, use_template
from sculptor.data.examples import resolve_max_length
from sculptor.errors import SettingsError
from sculptor.evaluation.rows import Evaluation, evaluate_rows, read_evaluation_rows
from sculptor.model.load import resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.job import open_model
from sculptor.training.settings import Offload


def evaluate(
    model: str | Path,
    data: Sequence[str | Path],
    *,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
    offload: Offload = "auto",
    progress: Progress = silent,
) -> Evaluation:
    """Measures what a checkpoint can do.

    Args:
        model: a checkpoint directory or hub name.
        data: JSONL or text files, all of one kind of row.
        labels: completions to rank; default the distinct completions of the rows, when there are at most 32.
        max_length: longest sequence in tokens; default 1024 or the model's limit.
        chat_template: for conversations: name of one of the tokenizer's templates, or a file; default its own.
        batch_size: rows per forward.
        device: auto, cpu, cuda or cuda:N.
        offload: where the model's blocks wait that are not being computed: none, cpu, disk, or auto.
        progress: makes progress bars.

    Raises:
        SculptorError: if the checkpoint or the data cannot be used.
    """
    if batch_size < 1:
        raise SettingsError(f"--batch-size {batch_size}: expected at least 1")
    checkpoint = open_checkpoint(model)
    rows = read_evaluation_rows(data, labels)
    check_use(rows, chat_template)
    architecture = inspect_architecture(checkpoint)
    tokens = batch_size * resolve_max_length(max_length, architecture.max_positions)
    loaded = open_model(checkpoint, resolve_device(device), architecture, offload, tokens=tokens, progress=progress)
    with closing(loaded):
        use_template(loaded.tokenizer, chat_template)
        return evaluate_rows(loaded, rows, labels, max_length, batch_size, generate=True, progress=progress)

"""`sculptor train`."""

from pathlib import Path
from typing import Any

import click

from .options import (
    Choice,
    SuggestingCommand,
    bars,
    catch_signals,
    device_option,
    json_option,
    offload_option,
    overwrite_option,
    quiet_libraries,
    resume_option,
)


@click.command("train", cls=SuggestingCommand)
@click.argument("model")
@click.option("--subspaces", required=True, type=click.Path(), help="Subspace archive of MODEL.")
@click.option(
    "--data", multiple=True, required=True, type=click.Path(), help="JSONL or .txt rows of the task; repeatable."
)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the merged checkpoint."
)
@click.option(
    "--eval-data", multiple=True, type=click.Path(), help="Rows whose loss chooses the best parameters; repeatable."
)
@click.option("--epochs", type=float, default=1.0, show_default=True, help="Passes over the data.")
@click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs and repeats the data.")
@click.option("--learning-rate", type=float, help="Peak learning rate [default: 1e-3 with curvature, else 5e-4].")
@click.option(
    "--soften",
    type=float,
    help="With moments: slow free pairs down by 1/sqrt(1 + SOFTEN * importance/mean) [default: 3 with curvature, else 0].",
)
@click.option(
    "--weight-decay",
    type=float,
    default=0.0,
    show_default=True,
    help="Pulls the update towards 0, the weights towards the base.",
)
@click.option(
    "--warmup",
    type=float,
    default=0.03,
    show_default=True,
    help="Share (below 1) or number of steps with rising learning rate.",
)
@click.option(
    "--schedule",
    type=Choice(["cosine", "linear", "constant"]),
    default="cosine",
    show_default=True,
    help="Fall of the learning rate after the warm-up.",
)
@click.option(
    "--clip", type=float, default=1.0, show_default=True, help="Largest norm of the trainable gradient; 0 for none."
)
@click.option(
    "--clip-by",
    type=Choice(["model", "matrix"]),
    default="model",
    show_default=True,
    help="Clip all trained parameters together, or each matrix by itself.",
)
@offload_option
@click.option(
    "--optimizer-mode",
    type=Choice(["exact", "fused"]),
    default="exact",
    show_default=True,
    help="With offloading: fused updates blocks within the backward pass; needs one micro-batch per step, and --clip-by "
    "matrix or --clip 0.",
)
@click.option(
    "--optimizer-on",
    type=Choice(["auto", "host", "device"]),
    default="auto",
    show_default=True,
    help="With --offload cpu: run AdamW in host memory, where its moments wait, or on the device [auto: host for a GPU].",
)
@click.option(
    "--offload-inputs/--keep-inputs",
    default=None,
    help="With offloading: activation checkpoints wait in host memory too [default: on a GPU].",
)
@click.option("--batch-size", type=int, default=32, show_default=True, help="Rows per optimizer step.")
@click.option("--micro-batch-size", type=int, default=8, show_default=True, help="Rows per forward; splits a batch.")
@click.option("--max-rows", type=int, help="Rows to use of each file, the first ones [default: all].")
@click.option("--max-length", type=int, help="Longest sequence in tokens [default: 1024 or the model's limit].")
@click.option(
    "--also-train", multiple=True, help="Further parameters to train unprotected, e.g. 'norm' or 'lm_head'; repeatable."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides order, masking and dropout.")
@device_option
@click.option(
    "--save-dtype",
    type=Choice(["keep", "float32", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Dtype of the merged checkpoint.",
)
@click.option(
    "--carry",
    type=Choice(["merge", "accumulate", "retake"]),
    help="Updated archive: merge the task's moments in, add what it learned, or decompose again [default: merge if the "
    "archive has moments, else accumulate].",
)
@click.option("--memory-rows", type=int, help="Rows of the task whose moments are merged in [default: 384].")
@click.option(
    "--memory-weight",
    type=float,
    help="Weight of the task's moments against those of one earlier source [default: 1].",
)
@click.option(
    "--checkpoint-activations/--keep-activations",
    default=None,
    help="Recompute activations in the backward pass [default: on a GPU].",
)
@click.option("--save-every", type=int, help="Steps between saved states [default: a tenth of the run, at most 500].")
@click.option("--eval-every", type=int, help="Steps between evaluations [default: a fifth of the run].")
@resume_option
@overwrite_option
@json_option
def command(
    model: str,
    subspaces: str,
    data: tuple[str, ...],
    output: Path,
    eval_data: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Teach MODEL a task inside what the archive leaves free.

    Writes a plain Hugging Face checkpoint, with the archive for the next task in its folder subspaces/.
    SIGTERM and Ctrl-C save the state and exit; --resume goes on bit for bit.

    \b
    Examples:
      sculptor train ./model --subspaces ./subspaces --data task.jsonl --output ./tuned
      sculptor train ./model --subspaces ./subspaces --data task.jsonl --output ./tuned --resume
    """
    from sculptor.report.json_text import to_json
    from sculptor.report.text import train_text
    from sculptor.tasks.train import train
    from sculptor.training.settings import TrainSettings

    quiet_libraries()
    report = train(
        model,
        subspaces,
        data,
        output,
        TrainSettings(**settings),
        eval_data=eval_data,
        overwrite=overwrite,
        resume=resume,
        progress=bars,
        notice=lambda text: click.echo(text, err=True),
        stop=catch_signals(),
    )
    click.echo(to_json(report, max_leak=report.max_leak) if as_json else train_text(report))

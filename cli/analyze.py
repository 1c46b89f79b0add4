"""`sculptor analyze`."""

from pathlib import Path
from typing import Any

import click

from .options import (
    Choice,
    SuggestingCommand,
    bars,
    device_option,
    json_option,
    offload_option,
    overwrite_option,
    quiet_libraries,
    resume_option,
)


@click.command("analyze", cls=SuggestingCommand)
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the archive.")
@click.option(
    "--basis",
    type=Choice(["weights", "inputs", "curvature", "random"]),
    default="weights",
    show_default=True,
    help="Where protected directions come from: the weights' singular vectors, what layers read, what they read and "
    "its effect on the loss, or chance (a control).",
)
@click.option(
    "--budget", type=float, help="inputs, curvature: share of (output, input) pairs left free [default: 0.6]."
)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(),
    help="Rows to calibrate on, or `self` for text the model says; with weights, rows that measure importance for the "
    "adaptive rank; repeatable.",
)
@click.option("--chat", is_flag=True, help="With `--data self`: sample through the chat template.")
@click.option(
    "--calibration-tokens", type=int, default=100_000, show_default=True, help="Tokens to calibrate on, over all files."
)
@click.option("--max-length", type=int, help="Longest sequence in tokens [default: 1024 or the model's limit].")
@click.option(
    "--keep", type=float, default=0.5, show_default=True, help="Share of each moment's directions that is stored."
)
@click.option("--steps", type=int, default=7, show_default=True, help="curvature: row groups of the staircase.")
@click.option(
    "--threshold",
    type=Choice(["matrix", "model"]),
    help="Give every matrix the budget, or all together [default: model with curvature, matrix with inputs].",
)
@click.option(
    "--fisher",
    type=Choice(["true", "sampled"]),
    default="true",
    show_default=True,
    help="curvature: gradients of the rows' own labels, or of labels drawn from the model.",
)
@click.option(
    "--weighting",
    type=Choice(["tokens", "gradients"]),
    help="Count each token's input once, or by the squared gradient it receives [default: gradients with curvature].",
)
@click.option(
    "--constraint",
    type=Choice(["double", "input", "core"]),
    help="weights, random: what an update may not touch: outputs and inputs, inputs, or their core [default: double].",
)
@click.option(
    "--preserve",
    type=float,
    help="weights, random: protect this share of directions in every matrix, 0 to below 1 [default: adaptive rank].",
)
@click.option("--min-retention", type=float, help="Adaptive rank: share of the least important matrix [default: 0.1].")
@click.option("--target-retention", type=float, help="Adaptive rank: share at mean importance [default: 0.8].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, masking and random directions.")
@click.option(
    "--targets", multiple=True, help="Protect only matrices that match, e.g. 'q_proj' or 'mlp.*'; repeatable."
)
@click.option("--exclude", multiple=True, help="Leave out matrices that match; repeatable.")
@click.option(
    "--dtype",
    type=Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="Dtype of the stored bases.",
)
@device_option
@offload_option
@click.option(
    "--device-memory",
    type=float,
    help="inputs, curvature: GB to stay within, by reading the rows more often [default: what is free on a GPU, 8 on a CPU].",
)
@resume_option
@overwrite_option
@json_option
def command(
    model: str, output: Path, offload: Any, resume: bool, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Save the subspaces that carry what MODEL knows, as an archive.

    MODEL is a checkpoint directory or a hub name. `--basis curvature` protects what earlier data use, and is the one
    to choose if there are such data, or text of any kind. `weights` is the paper's: it needs no data; without --preserve
    its share is the adaptive rank, 0.8 everywhere, or by importance if --data is given.

    \b
    Examples:
      sculptor analyze ./model --basis curvature --data general.txt --output ./subspaces
      sculptor analyze ./model --basis curvature --data self --output ./subspaces
      sculptor analyze ./model --preserve 0.5 --output ./subspaces
      sculptor analyze ./model --data old-task.jsonl --constraint input --output ./subspaces
    """
    from sculptor.analysis.settings import AnalyzeSettings
    from sculptor.report.json_text import to_json
    from sculptor.report.text import analyze_text
    from sculptor.tasks.analyze import analyze

    quiet_libraries()
    report = analyze(
        model,
        output,
        AnalyzeSettings(**settings),
        offload=offload,
        overwrite=overwrite,
        resume=resume,
        progress=bars,
    )
    click.echo(to_json(report) if as_json else analyze_text(report))

"""`sculptor analyze`."""

from pathlib import Path

import click

from .options import (
    Choice,
    SuggestingCommand,
    bars,
    device_option,
    json_option,
    overwrite_option,
    quiet_libraries,
    resume_option,
)


@click.command("analyze", cls=SuggestingCommand)
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the archive.")
@click.option(
    "--basis",
    type=Choice(["weights"]),
    default="weights",
    show_default=True,
    help="Where protected directions come from: the weights' singular vectors.",
)
@click.option(
    "--constraint",
    type=Choice(["double", "input", "core"]),
    default="double",
    show_default=True,
    help="What an update may not touch: outputs and inputs, inputs, or their core.",
)
@click.option(
    "--preserve",
    type=float,
    help="Protect this share of directions in every matrix, 0 to below 1 (default: adaptive rank).",
)
@click.option("--min-retention", type=float, help="Adaptive rank: share of the least important matrix [default: 0.1].")
@click.option("--target-retention", type=float, help="Adaptive rank: share at mean importance [default: 0.8].")
@click.option(
    "--data", multiple=True, type=click.Path(), help="Rows that measure importance for the adaptive rank; repeatable."
)
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
@resume_option
@overwrite_option
@json_option
def command(
    model: str,
    output: Path,
    basis: str,
    constraint: str,
    preserve: float | None,
    min_retention: float | None,
    target_retention: float | None,
    data: tuple[str, ...],
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    dtype: str,
    device: str,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Save the subspaces that carry what MODEL knows, as an archive.

    MODEL is a checkpoint directory or a hub name. Without --preserve, the share is the paper's adaptive rank:
    0.8 everywhere, or by importance if --data is given.

    \b
    Examples:
      sculptor analyze ./model --preserve 0.5 --output ./subspaces
      sculptor analyze ./model --data old-task.jsonl --constraint input --output ./subspaces
    """
    from sculptor.report.json_text import to_json
    from sculptor.report.text import analyze_text
    from sculptor.tasks.analyze import AnalyzeSettings, analyze

    quiet_libraries()
    settings = AnalyzeSettings(
        basis=basis,  # type: ignore[arg-type]
        constraint=constraint,  # type: ignore[arg-type]
        preserve=preserve,
        min_retention=min_retention,
        target_retention=target_retention,
        data=data,
        targets=targets,
        exclude=exclude,
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
    )
    report = analyze(model, output, settings, overwrite=overwrite, resume=resume, progress=bars)
    click.echo(to_json(report) if as_json else analyze_text(report))

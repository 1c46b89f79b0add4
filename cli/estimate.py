"""`sculptor estimate`."""

from pathlib import Path
from typing import Any

import click

from .options import Choice, SuggestingCommand, device_option, json_option, quiet_libraries


@click.command("estimate", cls=SuggestingCommand)
@click.argument("model")
@click.option("--subspaces", type=click.Path(), help="Subspace archive of MODEL, if there is one.")
@click.option("--data", multiple=True, type=click.Path(), help="JSONL or .txt rows of the task; repeatable.")
@click.option("--preserve", type=float, default=0.5, show_default=True, help="Without an archive: share protected.")
@click.option(
    "--constraint",
    type=Choice(["double", "input", "core"]),
    default="double",
    show_default=True,
    help="Without an archive: what an update may not touch.",
)
@click.option("--batch-size", type=int, default=32, show_default=True, help="Rows per optimizer step.")
@click.option("--micro-batch-size", type=int, default=8, show_default=True, help="Rows per forward.")
@click.option("--max-length", type=int, help="Tokens per row [default: 1024 or the model's limit].")
@click.option("--fused", is_flag=True, help="For --optimizer-mode fused.")
@device_option
@click.option("--gpu-memory", type=float, help="Plan for a GPU with this many GB, which need not be here.")
@click.option("--host-memory", type=float, help="Plan for this many GB of host memory [default: what is free].")
@click.option("--tflops", type=float, help="TFLOP/s of matrix products [default: measured].")
@click.option("--link", type=float, help="GB/s between host and GPU, each way [default: measured].")
@click.option("--disk", type=float, help="GB/s of the disk [default: measured].")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    help="Where files would go; its disk is measured [default: here].",
)
@json_option
def command(
    model: str, subspaces: str | None, data: tuple[str, ...], directory: Path, as_json: bool, **settings: Any
) -> int:
    """Say what training MODEL takes: memory, time per step, sizes, for each way of offloading.

    Reads headers only, of the archive too; with --data the rows, for the length of the longest and the time of an epoch. Times are bounds at the speeds shown last, which a busy machine measures too low.
    Exits with 1 if nothing fits.

    \b
    Examples:
      sculptor estimate ./model
      sculptor estimate ./model --subspaces ./subspaces --data task.jsonl
      sculptor estimate ./model --gpu-memory 24 --host-memory 64 --tflops 150
    """
    from sculptor.report.estimate import estimate_text
    from sculptor.report.json_text import to_json
    from sculptor.tasks.estimate import EstimateSettings, estimate

    quiet_libraries()
    found = estimate(model, EstimateSettings(**settings), subspaces=subspaces, data=data, directory=directory)
    click.echo(to_json(found) if as_json else estimate_text(found))
    return 0 if found.chosen is not None else 1

"""`sculptor estimate`."""

from pathlib import Path
from typing import Any

import click

from sculptor.planning.settings import EstimateSettings

from .options import SuggestingCommand, bars, json_option, quiet_libraries, rule_option, settings_options


@click.command("estimate", cls=SuggestingCommand)
@click.argument("model")
@click.option("--subspaces", type=click.Path(), help="Subspace archive of MODEL, if there is one.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(),
    help="Rows of the task: a file, a folder or a hub name, PLACE[:CONFIG][@SPLIT][:WEIGHT]; repeatable.",
)
@rule_option
@settings_options(EstimateSettings, skip=("rule",))
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    help="Where files would go; its disk is measured [default: here].",
)
@click.option("--all", "components", is_flag=True, help="Show memory by component.")
@json_option
def command(
    model: str,
    subspaces: str | None,
    data: tuple[str, ...],
    directory: Path,
    components: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Say what training MODEL takes: memory, time per step, sizes, for each way of offloading.

    Reads headers only, of the archive too; with --data the rows: the longest, an epoch's time, what the first becomes (`sculptor data` shows more). Times are what these operations take
    at the speeds shown last, which a busy machine measures too low, and small models on a GPU do not reach.
    Exits with 1 if nothing fits.

    \b
    Examples:
      sculptor estimate ./model
      sculptor estimate ./model --subspaces ./subspaces --data task.jsonl
      sculptor estimate ./model --gpu-memory 24 --host-memory 64 --tflops 150
    """
    from sculptor.report.estimate import estimate_text
    from sculptor.report.json_text import to_json
    from sculptor.tasks.estimate import estimate

    quiet_libraries()
    found = estimate(
        model, EstimateSettings(**settings), subspaces=subspaces, data=data, directory=directory, progress=bars
    )
    click.echo(to_json(found) if as_json else estimate_text(found, components))
    return 0 if found.chosen is not None else 1

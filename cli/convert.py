"""`sculptor convert`."""

from pathlib import Path

import click

from .options import SuggestingCommand, bars, overwrite_option, quiet_libraries


@click.command("convert", cls=SuggestingCommand)
@click.argument("archive")
@click.option("--model", required=True, help="Checkpoint that the archive belongs to.")
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the converted archive."
)
@overwrite_option
def command(archive: str, model: str, output: Path, overwrite: bool) -> None:
    """Write ARCHIVE, of an earlier version of the format, in today's.

    `train` reads both, and writes today's.

    \b
    Examples:
      sculptor convert ./old-subspaces --model ./model --output ./subspaces
    """
    from sculptor.tasks.convert import convert

    quiet_libraries()
    made = convert(archive, output, model=model, overwrite=overwrite, progress=bars)
    click.echo(f"{len(made)} matrices.\nWrote {made.path}.")

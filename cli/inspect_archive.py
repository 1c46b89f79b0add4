"""`sculptor inspect`."""

from pathlib import Path

import click

from .options import SuggestingCommand, bars, html_option, json_option, overwrite_option, quiet_libraries, tell


@click.command("inspect", cls=SuggestingCommand)
@click.argument("archive")
@click.option("--model", help="Checkpoint the archive should belong to: checks every matrix.")
@click.option("--compare", type=click.Path(), help="Another archive, compared by principal angles.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw spectra and preserved share into this picture file."
)
@click.option("--all", "every", is_flag=True, help="Show every matrix, too.")
@html_option
@overwrite_option
@json_option
def command(
    archive: str,
    model: str | None,
    compare: str | None,
    plot: Path | None,
    every: bool,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show what ARCHIVE protects, by role and block, and what each task added.

    \b
    Examples:
      sculptor inspect ./subspaces
      sculptor inspect ./subspaces --all
      sculptor inspect ./tuned/subspaces --compare ./subspaces
      sculptor inspect ./subspaces --plot subspaces.png
      sculptor inspect ./subspaces --html subspaces.html
    """
    from sculptor.archive.store import Archive
    from sculptor.report.html.inspect import inspect_page
    from sculptor.report.html.page import check_page, write_page
    from sculptor.report.json_text import to_json
    from sculptor.report.plot import check_picture, plot_archive, require_matplotlib
    from sculptor.report.text import inspect_text
    from sculptor.tasks.inspect_archive import inspect

    quiet_libraries()
    if every and as_json:
        raise click.UsageError("--all without effect: --json has every matrix")
    if plot is not None:
        require_matplotlib()
        check_picture(plot, overwrite, [archive, model, compare])
    if html is not None:
        check_page(html, overwrite, inputs=[archive, model, compare])
    found = inspect(archive, model=model, compare=compare, progress=bars)
    if plot is not None:
        plot_archive(Archive(archive), plot)
    click.echo(
        to_json(found, basis=found.basis, constraint=found.constraint) if as_json else inspect_text(found, every)
    )
    if plot is not None:
        tell(f"Drew {plot}.")
    if html is not None:
        write_page(html, inspect_page(found, Archive(archive)), overwrite)
        tell(f"Wrote {html}.")

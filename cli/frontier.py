"""`sculptor frontier`."""

from pathlib import Path

import click

from .options import SuggestingCommand, html_option, json_option, overwrite_option, quiet_libraries, tell


@click.command("frontier", cls=SuggestingCommand)
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option(
    "--against",
    metavar="harm|harm.first|TEXT",
    help="What a run costs: harm, that at first tokens of answers, or the rise on a watched text, by its file name.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw AA against what it costs into this picture file.")
@html_option
@overwrite_option
@json_option
def command(
    runs: tuple[str, ...], against: str | None, plot: Path | None, html: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Compare RUNS of `sculptor continual`: what each learned, against the harm that it did.

    Runs of the same tasks; those that differ in their seed alone are one point, with its standard deviation.

    \b
    Examples:
      sculptor frontier ./run ./plain ./replay
      sculptor frontier ./runs/* --plot frontier.png --html frontier.html
      sculptor frontier ./runs/* --against wikitext2-test.txt --plot frontier.png
    """
    from sculptor.benchmark.frontier import frontier
    from sculptor.report.frontier import frontier_text
    from sculptor.report.html.frontier import frontier_page
    from sculptor.report.html.page import check_page, write_page
    from sculptor.report.json_text import to_json
    from sculptor.report.plot import check_picture, plot_frontier, require_matplotlib

    quiet_libraries()
    if overwrite and plot is None and html is None:
        raise click.UsageError("--overwrite without effect: there is no --plot and no --html")
    if plot is not None:
        require_matplotlib()
        check_picture(plot, overwrite, runs)
    if html is not None:
        check_page(html, overwrite, inputs=runs)
    found = frontier(runs, against)
    if plot is not None:
        plot_frontier(found, plot)
        tell(f"Drew {plot}.")
    if html is not None:
        write_page(html, frontier_page(found), overwrite)
        tell(f"Wrote {html}.")
    click.echo(to_json(found) if as_json else frontier_text(found))

"""`sculptor card`."""

import sys
from pathlib import Path
from typing import Any

import click

from sculptor.training.settings import ReadSettings, TrainSettings

from .options import SuggestingCommand, bars, html_option, overwrite_option, quiet_libraries, settings_options, tell


@click.command("card", cls=SuggestingCommand)
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True)
@click.option("--data", multiple=True, type=click.Path(), help="Test rows of a task that was taught; repeatable.")
@click.option(
    "--abilities",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Rows of what the base can do: a file, or a folder of files; repeatable. With choices they are ranked, with a "
    "completion compared; prompts alone count refusals; IFEval is checked where the extra `harness` is installed.",
)
@click.option("--watch", multiple=True, type=click.Path(), help="Text whose loss is watched; repeatable.")
@click.option(
    "--subspaces",
    type=click.Path(),
    help="Subspace archive of BASE: its samples measure harm [default: samples drawn from BASE], and TUNED is verified.",
)
@click.option(
    "--fail-if",
    multiple=True,
    metavar="NAME<VALUE",
    help="Exit code 1 if a measure changed beyond this: piqa<-1 (points), wikitext>0.02 (nats), NAME.FIGURE for another than "
    "the first of its figures; harm>0.02, harm.first>0.2, leak>0.1 and `unverified` are no changes; repeatable.",
)
@click.option("--strict", is_flag=True, help="Hold the worse end of the 95 % interval against --fail-if.")
@click.option(
    "--exact-match/--no-exact-match",
    default=None,
    help="Generate greedily and compare [default: for prompts without choices].",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Of what is generated [default: of the longest expected answer; 64 for refusals, 1280 for IFEval].",
)
@click.option("--max-length", type=int, help="Longest sequence in tokens [default: 1024 or the model's limit].")
@click.option("--batch-size", type=int, help="Rows per forward [default: 16, and on a GPU as many as go well].")
@settings_options(TrainSettings, "max_rows", "columns", "chat_template", "device")
@settings_options(ReadSettings)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write everything as JSON to this file."
)
@html_option
@overwrite_option
def command(
    base: str,
    tuned: tuple[str, ...],
    html: Path | None,
    json_file: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Measure TUNED beside BASE, row by row, and say whether it may be released.

    Each change comes with its 95 % confidence interval, of differences in pairs.

    Exit code 0: no threshold of --fail-if is passed. 1: one is. 2: it could not be measured.

    \b
    Examples:
      sculptor card ./model ./tuned --data test.jsonl --abilities ./abilities --watch general.txt
      sculptor card ./model ./tuned --abilities piqa.jsonl --fail-if 'piqa<-1' --fail-if 'harm>0.02'
    """
    from sculptor.data.rows import local_files
    from sculptor.errors import SculptorError
    from sculptor.report.card import card_text, check_card_file
    from sculptor.report.html.card import card_page
    from sculptor.report.html.page import check_page, write_file, write_page
    from sculptor.report.json_text import to_json
    from sculptor.tasks.card import card

    quiet_libraries()
    if overwrite and html is None and json_file is None:
        raise click.UsageError("--overwrite without effect: there is no --html and no --json")
    try:
        read = [base, *tuned, options["subspaces"], *options["abilities"]]
        read += local_files([*options["data"], *options["watch"]])
        if html is not None:
            check_page(html, overwrite, inputs=read)
        if json_file is not None:
            check_card_file(json_file, overwrite, read)
        report = card(base, tuned, progress=bars, notice=tell, **options)
        click.echo(card_text(report))
        if json_file is not None:
            check_card_file(json_file, overwrite)  # something may have come there since
            write_file(json_file, to_json(report) + "\n")
            tell(f"Wrote {json_file}.")
        if html is not None:
            write_page(html, card_page(report), overwrite)
            tell(f"Wrote {html}.")
    except SculptorError as error:
        error.exit_code = 2  # whatever the reason: 1 says that it was measured, and fails
        raise
    sys.exit(0 if report.passed else 1)

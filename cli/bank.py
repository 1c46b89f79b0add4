"""`sculptor bank`: add, route and export."""

from pathlib import Path
from typing import Any

import click

from sculptor.edits.settings import BankSettings
from sculptor.training.settings import SaveDtype, TrainSettings

from .options import SuggestingGroup, bars, json_option, overwrite_option, quiet_libraries, settings_options, tell


@click.group("bank", cls=SuggestingGroup)
def command() -> None:
    """Keep what tasks changed in MODEL beside each other, and route rows to them.

    Every task is trained from MODEL itself. A bank keeps the differences, in as few numbers as give them back, and keys: means of
    MODEL's own hidden states, by which each row finds its task.

    \b
    Examples:
      sculptor bank add ./bank ./model ./tuned --name news --data news.jsonl
      sculptor bank route ./bank ./model --data test.jsonl
      sculptor evaluate ./model --bank ./bank --data test.jsonl
    """


@command.command("add")
@click.argument("bank", type=click.Path(path_type=Path))
@click.argument("model")
@click.argument("tuned")
@click.option("--name", required=True, help="Of the task: letters, digits, - and _.")
@click.option(
    "--data", multiple=True, required=True, type=click.Path(), help="Rows of the task, for its key; repeatable."
)
@click.option(
    "--rank", type=click.IntRange(1), help="Keep so many directions of a difference [default: what gives it back]."
)
@settings_options(BankSettings)
@json_option
def add(
    bank: Path,
    model: str,
    tuned: str,
    name: str,
    data: tuple[str, ...],
    rank: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Add what TUNED changed in MODEL to BANK, which is made where there is none.

    TUNED may be a LoRA adapter. BANK is as it was until the task is complete.

    \b
    Examples:
      sculptor bank add ./bank ./model ./tuned --name news --data news.jsonl
      sculptor bank add ./bank ./model ./adapter --name law --data law.jsonl --rank 8
    """
    from sculptor.report.bank import add_text
    from sculptor.report.json_text import to_json
    from sculptor.tasks.bank import add_to_bank

    quiet_libraries()
    told = BankSettings(**settings)
    report = add_to_bank(bank, model, tuned, data, name=name, rank=rank, settings=told, progress=bars, notice=tell)
    click.echo(to_json(report) if as_json else add_text(report))


@command.command("route")
@click.argument("bank", type=click.Path(path_type=Path))
@click.argument("model")
@click.option(
    "--data", multiple=True, required=True, type=click.Path(), help="Rows; a line of the table for each; repeatable."
)
@settings_options(BankSettings)
@json_option
def route(bank: Path, model: str, data: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Say how many rows of each of the data go to which task of BANK.

    \b
    Examples:
      sculptor bank route ./bank ./model --data news-test.jsonl --data law-test.jsonl
    """
    from sculptor.report.bank import route_text
    from sculptor.report.json_text import list_to_json
    from sculptor.tasks.bank import route

    quiet_libraries()
    report = route(bank, model, data, BankSettings(**settings), progress=bars, notice=tell)
    click.echo(list_to_json(report) if as_json else route_text(report))


@command.command("export")
@click.argument("bank", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--task", required=True, help="Which one.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the checkpoint.")
@settings_options(TrainSettings, "save_dtype")
@overwrite_option
def export(bank: Path, model: str, task: str, output: Path, save_dtype: SaveDtype, overwrite: bool) -> None:
    """Write the plain checkpoint of one task of BANK.

    \b
    Examples:
      sculptor bank export ./bank ./model --task news --output ./news
    """
    from sculptor.tasks.bank import export_task

    quiet_libraries()
    written = export_task(
        bank, model, task, output, save_dtype=save_dtype, overwrite=overwrite, progress=bars, notice=tell
    )
    click.echo(f"Wrote {written}.")

"""`sculptor data`."""

import click

from sculptor.training.settings import TrainSettings

from .options import SuggestingCommand, bars, json_option, quiet_libraries, settings_options


@click.command("data", cls=SuggestingCommand)
@click.argument("files", nargs=-1, required=True)
@click.option("--model", required=True, help="Checkpoint directory or hub name that the rows are for.")
@click.option(
    "--rows", type=click.IntRange(0), default=3, show_default=True, help="Rows to show in full, the first ones."
)
@settings_options(TrainSettings, "max_length", "chat_template", "columns", "max_rows")
@json_option
def command(
    files: tuple[str, ...],
    model: str,
    rows: int,
    max_length: int | None,
    chat_template: str | None,
    columns: str | None,
    max_rows: int | None,
    as_json: bool,
) -> None:
    """Show what the rows of FILES become for a model: tokens, which carry loss, what is dropped, and why.

    \b
    Examples:
      sculptor data task.jsonl --model ./model
      sculptor data questions.csv --model ./model --columns prompt=question,completion=answer
      sculptor data task.jsonl:0.7 openai/gsm8k:main@train:0.3 --model ./model --max-rows 1000
      sculptor data chats.jsonl --model ./model --chat-template ./template.jinja --rows 1
    """
    from sculptor.report.data import data_text
    from sculptor.report.json_text import to_json
    from sculptor.tasks.data import preview

    quiet_libraries()
    found = preview(
        model, files, max_length=max_length, chat_template=chat_template, columns=columns, max_rows=max_rows, rows=rows,
        progress=bars,
    )  # fmt: skip
    click.echo(to_json(found) if as_json else data_text(found))

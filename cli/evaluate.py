"""`sculptor evaluate`."""

from typing import Any

import click

from sculptor.training.settings import TrainSettings

from .options import SuggestingCommand, bars, json_option, quiet_libraries, settings_options


@click.command("evaluate", cls=SuggestingCommand)
@click.argument("model")
@click.option(
    "--data", multiple=True, required=True, type=click.Path(), help="JSONL or .txt rows, all of one kind; repeatable."
)
@click.option(
    "--labels", multiple=True, help="A label to rank; repeat for each [default: the rows' completions, if at most 32]."
)
@click.option("--max-length", type=int, help="Longest sequence in tokens [default: 1024 or the model's limit].")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Rows per forward.")
@settings_options(TrainSettings, "chat_template", "device", "offload")
@json_option
def command(
    model: str,
    data: tuple[str, ...],
    labels: tuple[str, ...],
    max_length: int | None,
    batch_size: int,
    chat_template: str | None,
    device: str,
    offload: Any,
    as_json: bool,
) -> None:
    """Measure loss, exact match and label ranking of MODEL.

    Text gives loss and perplexity. Prompts also give exact match of greedy generation, and accuracy by ranking
    the labels: summed log-probability of label and end of sequence.

    \b
    Examples:
      sculptor evaluate ./tuned --data test.jsonl
      sculptor evaluate ./tuned --data general.txt --json
    """
    from sculptor.report.json_text import to_json
    from sculptor.report.text import evaluate_text
    from sculptor.tasks.evaluate import evaluate

    quiet_libraries()
    result = evaluate(
        model,
        data,
        labels=labels or None,
        max_length=max_length,
        batch_size=batch_size,
        chat_template=chat_template,
        device=device,
        offload=offload,
        progress=bars,
    )
    click.echo(to_json(result) if as_json else evaluate_text(result))

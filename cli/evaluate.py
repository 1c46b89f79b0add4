"""`sculptor evaluate`."""

from pathlib import Path
from typing import Any

import click

from sculptor.training.settings import ReadSettings, TrainSettings

from .options import (
    SuggestingCommand,
    adapter_option,
    bars,
    check_overwrite,
    html_option,
    json_option,
    merged,
    overwrite_option,
    quiet_libraries,
    settings_options,
    speaks,
    tell,
)


@click.command("evaluate", cls=SuggestingCommand)
@click.argument("model")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(),
    help="Rows, all of one kind: a file, a folder or a hub name, PLACE[:CONFIG][@SPLIT]; repeatable.",
)
@click.option(
    "--base",
    help="Another checkpoint, such as the one MODEL was tuned from: its figures and answers stand beside MODEL's.",
)
@click.option("--watch", multiple=True, type=click.Path(), help="Rows whose loss is shown by itself; repeatable.")
@click.option(
    "--tasks", multiple=True, help="Tasks of lm-eval (extra `harness`), separated by commas; groups and patterns too."
)
@click.option(
    "--include-path", type=click.Path(path_type=Path), help="With --tasks: a folder of task files (YAML) of your own."
)
@click.option(
    "--num-fewshot", type=click.IntRange(0), help="With --tasks: examples before each [default: the task's own number]."
)
@click.option("--chat", is_flag=True, help="With --tasks: ask through the chat template.")
@click.option(
    "--labels", multiple=True, help="A label to rank; repeat for each [default: the rows' completions, if at most 32]."
)
@click.option(
    "--exact-match/--no-exact-match",
    default=None,
    help="Generate greedily and compare [default: for prompts without choices].",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Of what is generated [default: of the longest expected answer]."
)
@click.option("--show", type=click.IntRange(0), default=0, help="Show what is answered to the first rows, so many.")
@click.option("--max-length", type=int, help="Longest sequence in tokens [default: 1024 or the model's limit].")
@click.option(
    "--batch-size",
    type=int,
    help="Rows per forward [default: 16, and on a GPU as many as go well, but with --tasks 16].",
)
@click.option(
    "--bank", type=click.Path(), help="Bank of MODEL: each row is answered by the task that it is nearest to."
)
@click.option("--bank-top", type=click.IntRange(1), help="With --bank: tasks that answer a row, mixed [default: 1].")
@settings_options(TrainSettings, "max_rows", "columns", "chat_template", "attn_implementation", "device")
@settings_options(ReadSettings)
@adapter_option
@html_option
@overwrite_option
@json_option
def command(
    model: str,
    merge_adapter: str | None,
    data: tuple[str, ...],
    base: str | None,
    watch: tuple[str, ...],
    tasks: tuple[str, ...],
    labels: tuple[str, ...],
    html: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure loss, exact match and ranking of MODEL on rows, and tasks of lm-eval.

    Text gives loss and perplexity. Prompts also give exact match of greedy generation, and accuracy by ranking
    the labels: summed log-probability of label and end of sequence. Rows with choices are ranked by those, as lm-eval does.

    \b
    Examples:
      sculptor evaluate ./tuned --data test.jsonl --watch general.txt --watch code.txt
      sculptor evaluate ./tuned --base ./model --data test.jsonl --show 5
      sculptor evaluate ./model --bank ./bank --data test.jsonl
      sculptor evaluate ./tuned --data chats.jsonl --exact-match --show 5
      sculptor evaluate ./tuned --tasks my_task,arc_easy --include-path ./tasks
    """
    from sculptor.data.rows import local_files
    from sculptor.report.evaluate import evaluate_text
    from sculptor.report.html.evaluate import evaluate_page
    from sculptor.report.html.page import check_page, write_page
    from sculptor.report.json_text import to_json
    from sculptor.tasks.evaluate import evaluate

    quiet_libraries()
    check_overwrite(html, overwrite)
    if html is not None:
        check_page(html, overwrite, inputs=[model, base, merge_adapter, *local_files([*data, *watch])])
    result = evaluate(
        merged(model, merge_adapter, options["device"]),
        data,
        base=base,
        watch=watch,
        tasks=[name.strip() for listed in tasks for name in listed.split(",") if name.strip()],
        labels=labels or None,
        progress=bars,
        notice=tell,
        **options,
    )
    click.echo(to_json(result) if as_json else evaluate_text(result))
    if html is not None and speaks():
        write_page(html, evaluate_page(result, model, base), overwrite)
        tell(f"Wrote {html}.")

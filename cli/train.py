"""`sculptor train`."""

import shlex
from pathlib import Path
from typing import Any

import click

from sculptor.training.settings import TrainSettings

from .options import (
    Choice,
    SuggestingCommand,
    adapter_option,
    bars,
    html_option,
    json_option,
    merged,
    overwrite_option,
    push_options,
    quiet_libraries,
    resume_option,
    settings_options,
    speaks,
    tell,
)


@click.command("train", cls=SuggestingCommand)
@click.argument("model")
@click.option(
    "--subspaces",
    type=click.Path(),
    help="Subspace archive of MODEL [default: MODEL is analyzed first, as by `sculptor analyze`].",
)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(),
    help="Rows of the task: a file, a folder or a hub name, PLACE[:CONFIG][@SPLIT][:WEIGHT]; repeatable.",
)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the merged checkpoint."
)
@click.option(
    "--eval-data", multiple=True, type=click.Path(), help="Rows whose loss chooses the best parameters; repeatable."
)
@click.option(
    "--protect-data",
    multiple=True,
    type=click.Path(),
    help="Without --subspaces: rows or text that MODEL should stay good at, or `self`; repeatable [default: self, text that "
    "MODEL says].",
)
@click.option(
    "--replay",
    multiple=True,
    type=click.Path(),
    help="Mixed into the task's rows: PLACE[:CONFIG][@SPLIT][:SHARE of an epoch], 0.1 by default; or self[:SHARE], what "
    "MODEL says, drawn before the first step; repeatable.",
)
@settings_options(TrainSettings)
@click.option(
    "--report-to",
    multiple=True,
    type=Choice(["tensorboard", "wandb", "mlflow", "trackio"]),
    help="Show loss, harm, rate, gradient norm and speed there, too; files go to the folder runs/ beside OUTPUT; repeatable.",
)
@adapter_option
@push_options
@html_option
@resume_option
@overwrite_option
@json_option
def command(
    model: str,
    merge_adapter: str | None,
    subspaces: str | None,
    data: tuple[str, ...],
    output: Path,
    eval_data: tuple[str, ...],
    push_to_hub: str | None,
    public: bool,
    protect_data: tuple[str, ...],
    replay: tuple[str, ...],
    report_to: tuple[str, ...],
    html: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Teach MODEL a task inside what the archive leaves free.

    Writes a plain Hugging Face checkpoint, with the archive for the next task in its folder subspaces/. Without --subspaces
    MODEL is analyzed first; that archive stays in the folder analyzed/, and is the one for `sculptor verify`.
    SIGTERM and Ctrl-C save the state and exit; --resume goes on bit for bit, in an
    analysis before that behind the last complete block.

    \b
    Examples:
      sculptor train ./model --data task.jsonl --output ./tuned
      sculptor train ./model --subspaces ./subspaces --data task.jsonl --output ./tuned
      sculptor train ./model --subspaces ./subspaces --data task.jsonl --output ./tuned --resume
      sculptor train ./model --data task.jsonl --max-harm 0.02 --output ./tuned
      sculptor train ./model --data task.jsonl --replay general.txt:0.1 --output ./tuned
    """
    from sculptor.data.rows import local_files
    from sculptor.interruption import asked_to_stop
    from sculptor.methods.settings import is_self
    from sculptor.report.html.page import check_page, write_page
    from sculptor.report.html.train import train_page
    from sculptor.report.json_text import to_json
    from sculptor.report.train import train_text
    from sculptor.tasks.push import pushing
    from sculptor.tasks.train import train

    quiet_libraries()
    if resume and merge_adapter is not None:
        raise click.UsageError(
            f"--resume goes on with what was merged: give {merge_adapter} as MODEL, without --merge-adapter"
        )
    if html is not None:
        rows = [item for item in (*data, *eval_data, *protect_data, *replay) if not is_self(item)]
        template = settings["chat_template"]
        check_page(html, overwrite, output, [model, merge_adapter, subspaces, template, *local_files(rows)])
    with pushing(output, push_to_hub, public, overwrite, tell, speaks()):
        report = train(
            merged(model, merge_adapter, settings["device"], output, overwrite=overwrite),
            subspaces,
            data,
            output,
            TrainSettings(**settings),
            eval_data=eval_data,
            protect_data=protect_data,
            replay=replay,
            report_to=report_to,  # type: ignore[arg-type]
            overwrite=overwrite,
            resume=resume,
            progress=bars,
            notice=tell,
            stop=asked_to_stop,
        )
        archive = output / "analyzed" if subspaces is None else subspaces
        places = [f"./{place}" if str(place).startswith("-") else str(place) for place in (model, output, archive)]
        check = shlex.join(["sculptor", "verify", *places[:2], "--subspaces", places[2]])
        # Of a model that an adapter was merged into there is no directory left to name.
        text = train_text(report, check if merge_adapter is None else None)
        click.echo(to_json(report, max_leak=report.max_leak) if as_json else text)
        if html is not None and speaks():
            write_page(html, train_page(report), overwrite)
            tell(f"Wrote {html}.")

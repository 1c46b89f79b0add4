"""`sculptor continual`."""

from pathlib import Path

import click

from .options import (
    Choice,
    SuggestingCommand,
    bars,
    html_option,
    json_option,
    overwrite_option,
    quiet_libraries,
    resume_option,
    speaks,
    tell,
)

_METHODS = [
    "sculptor", "random", "full", "joint", "replay", "l2", "kl", "interpolate", "eaft", "rescaled", "lines", "crispedit",
    "inflora", "sara", "orthsr", "bayes-adam", "esacl", "mamf", "slm", "lora", "olora", "osf",
]  # fmt: skip


@click.command("continual", cls=SuggestingCommand)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of report and model.")
@click.option(
    "--method",
    type=Choice(_METHODS),
    default="sculptor",
    show_default=True,
    help="sculptor as the plan says; to compare: random directions, plain fine-tuning, all tasks at once, plain with "
    "replay, l2, kl (KL to the base in the loss), interpolate (WiSE-FT), lines (LiNeS), eaft (entropy-weighted) or rescaled to "
    "the norm of another run, CrispEdit's mask, InfLoRA, SaRA, OrthSR, bayes-adam (BAdam), EsaCL-style, MAMF, SLM, or (extra "
    "`baselines`) LoRA, O-LoRA and OSF through PEFT.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Override the plan's value; repeatable."
)
@click.option("--seed", type=int, help="Of training, sampling and random directions [default: the plan's].")
@click.option(
    "--split",
    type=Choice(["test", "validation"]),
    default="test",
    show_default=True,
    help="Which files of the tasks to evaluate on; choose settings on validation.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the matrix as a heat map into this picture file.")
@html_option
@resume_option
@overwrite_option
@json_option
def command(
    plan: Path,
    output: Path,
    method: str,
    overrides: tuple[str, ...],
    seed: int | None,
    split: str,
    plot: Path | None,
    html: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train the tasks of PLAN in order and evaluate all of them after each.

    PLAN is a TOML file: a model, [analyze], [train] and [evaluate] settings, a list of [[tasks]] and texts to watch. Reports the accuracy matrix, average accuracy (AA), backward transfer (BWT, forgetting if negative),
    learning accuracy (LA) and forward transfer (FWT).

    \b
    Examples:
      sculptor continual plan.toml --output ./run
      sculptor continual plan.toml --output ./plain --method full --set train.learning_rate=3e-4
    """
    from sculptor.benchmark.inputs import files_of
    from sculptor.benchmark.plan import read_plan
    from sculptor.benchmark.runner import continual
    from sculptor.checkpoint.staging import check_apart
    from sculptor.interruption import asked_to_stop
    from sculptor.report.continual import continual_text
    from sculptor.report.html.continual import continual_page
    from sculptor.report.html.page import check_page, write_page
    from sculptor.report.json_text import to_json
    from sculptor.report.plot import check_picture, plot_matrix, require_matplotlib

    quiet_libraries()
    if plot is not None:
        require_matplotlib()
        check_picture(plot, overwrite, [plan], output)
    if html is not None:
        check_page(html, overwrite, output, [plan])
    if places := [place for place in (plot, html) if place is not None]:
        inputs = files_of(read_plan(plan, overrides))
        for place in places:
            check_apart(place.resolve(), inputs)
    report = continual(
        plan,
        output,
        method=method,  # type: ignore[arg-type]
        overrides=overrides,
        seed=seed,
        split=split,  # type: ignore[arg-type]
        overwrite=overwrite,
        resume=resume,
        progress=bars,
        notice=tell,
        stop=asked_to_stop,
    )
    if plot is not None and speaks():
        plot_matrix(report, plot)
    click.echo(to_json(report) if as_json else continual_text(report))
    if plot is not None:
        tell(f"Drew {plot}.")
    if html is not None and speaks():
        write_page(html, continual_page(report), overwrite)
        tell(f"Wrote {html}.")

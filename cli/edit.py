"""`sculptor edit`: lines, interpolate, project, threshold and prune."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sculptor.edits.settings import Choose, Interpolate, Lines, Project, Prune, Threshold
from sculptor.training.settings import TrainSettings

from .options import (
    SuggestingGroup,
    bars,
    json_option,
    overwrite_option,
    push_options,
    quiet_libraries,
    settings_options,
    tell,
)

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group("edit", cls=SuggestingGroup)
def command() -> None:
    """Make a checkpoint from one or two others, without training.

    lines, interpolate, project and threshold take BASE and TUNED, what somebody's training made of it or a LoRA adapter, and keep
    a part of the difference. prune makes the weights of MODEL 0 that matter least. One tensor is in memory at a time.

    \b
    Examples:
      sculptor edit interpolate ./model ./tuned --alpha 0.5 --output ./edited
      sculptor edit project ./model ./tuned --subspaces ./subspaces --output ./edited
      sculptor edit lines --help
    """


def _output_options(made: Command) -> Command:
    for add in (
        click.option("--output", "-o", type=click.Path(path_type=Path), help="Directory of the edited checkpoint."),
        click.option("--dry-run", is_flag=True, help="Measure by role what would stay, and write nothing."),
        push_options,
        overwrite_option,
        json_option,
    )[::-1]:
        made = add(made)
    return made


def _pair_options(settings: Any) -> Callable[[Command], Command]:
    """BASE, TUNED, and the options of one edit of their difference."""

    def add(made: Command) -> Command:
        made = settings_options(TrainSettings, "save_dtype", "device")(_output_options(made))
        made = settings_options(settings)(settings_options(Choose)(made))
        return click.argument("base")(click.argument("tuned")(made))

    return add


def _edit(settings: Any, base: str, tuned: str, options: dict[str, Any], subspaces: str | None = None) -> None:
    """Runs one edit of a difference, and prints its report."""
    from sculptor.report.edit import edit_text
    from sculptor.report.json_text import to_json
    from sculptor.tasks.edit import edit
    from sculptor.tasks.push import pushing

    quiet_libraries()
    as_json, output = options.pop("as_json"), options.pop("output")
    hub = options.pop("push_to_hub"), options.pop("public")
    job = {name: options.pop(name) for name in ("save_dtype", "device", "dry_run", "overwrite")}
    choose = Choose(**{name: options.pop(name) for name in ("choose", "watch", "grid", "max_length", "batch_size")})
    with pushing(output, *hub, job["overwrite"], tell):
        report = edit(
            base,
            tuned,
            output,
            settings(**options),
            subspaces=subspaces,
            choose=choose,
            progress=bars,
            notice=tell,
            **job,
        )
        click.echo(to_json(report) if as_json else edit_text(report))


@command.command("lines")
@_pair_options(Lines)
def lines(base: str, tuned: str, **options: Any) -> None:
    """Give shallow blocks back more of BASE than deep ones (LiNeS).

    W = BASE + lambda (TUNED - BASE), lambda = ALPHA + BETA l / (L - 1) in block l of L of its stack; ALPHA outside of the blocks.

    \b
    Examples:
      sculptor edit lines ./model ./tuned --alpha 0.3 --output ./edited
      sculptor edit lines ./model ./tuned --choose task.jsonl --watch general.txt --output ./edited
    """
    _edit(Lines, base, tuned, options)


@command.command("interpolate")
@_pair_options(Interpolate)
def interpolate(base: str, tuned: str, **options: Any) -> None:
    """Go back from TUNED to BASE by the same share everywhere (WiSE-FT).

    W = BASE + ALPHA (TUNED - BASE).

    \b
    Examples:
      sculptor edit interpolate ./model ./tuned --alpha 0.5 --output ./edited
      sculptor edit interpolate ./model ./tuned --alpha 0.5 --dry-run
    """
    _edit(Interpolate, base, tuned, options)


@command.command("project")
@_pair_options(Project)
@click.option("--subspaces", required=True, type=click.Path(), help="Subspace archive of BASE.")
def project(base: str, tuned: str, subspaces: str, **options: Any) -> None:
    """Keep of the difference what the archive of BASE leaves free, so that `verify` passes.

    Everything outside of the archive's matrices is as in BASE, tokenizer and configuration too, as it is after `train`.

    \b
    Examples:
      sculptor edit project ./model ./tuned --subspaces ./subspaces --output ./edited
      sculptor verify ./model ./edited --subspaces ./subspaces
    """
    _edit(Project, base, tuned, options, subspaces)


@command.command("threshold")
@_pair_options(Threshold)
def threshold(base: str, tuned: str, **options: Any) -> None:
    """Drop the small singular values of the difference of every matrix (DG-Hard).

    Below tau = omega(b) times their median (Donoho and Gavish). What is no matrix stays as in TUNED.

    \b
    Examples:
      sculptor edit threshold ./model ./tuned --output ./edited
    """
    _edit(Threshold, base, tuned, options)


@command.command("prune")
@click.argument("model")
@settings_options(Prune)
@click.option("--subspaces", type=click.Path(), help="Subspace archive of MODEL, with curvature.")
@_output_options
def prune(
    model: str,
    subspaces: str | None,
    output: Path | None,
    dry_run: bool,
    push_to_hub: str | None,
    public: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make the weights of MODEL 0 that matter least, by the archive's curvature (EsaCL-style).

    The lowest h w^2 / 2 of every matrix of the archive go. The archive is then of another checkpoint: analyze the output anew.

    \b
    Examples:
      sculptor edit prune ./model --subspaces ./subspaces --sparsity 0.3 --output ./sparse
      sculptor edit prune ./model --sparsity 0.3 --by magnitude --output ./sparse
    """
    from sculptor.report.edit import prune_text
    from sculptor.report.json_text import to_json
    from sculptor.tasks.prune import prune
    from sculptor.tasks.push import pushing

    quiet_libraries()
    with pushing(output, push_to_hub, public, overwrite, tell):
        report = prune(
            model,
            output,
            Prune(**settings),
            subspaces=subspaces,
            dry_run=dry_run,
            overwrite=overwrite,
            progress=bars,
            notice=tell,
        )
        click.echo(to_json(report) if as_json else prune_text(report))

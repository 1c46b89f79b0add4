"""`sculptor analyze`."""

from pathlib import Path
from typing import Any

import click

from sculptor.methods.settings import AnalyzeSettings
from sculptor.training.settings import ReadSettings

from .options import (
    SuggestingCommand,
    adapter_option,
    bars,
    json_option,
    merged,
    overwrite_option,
    quiet_libraries,
    resume_option,
    rule_option,
    settings_options,
    tell,
)


@click.command("analyze", cls=SuggestingCommand)
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the archive.")
@rule_option
@settings_options(AnalyzeSettings, skip=("rule",))
@settings_options(ReadSettings)
@adapter_option
@resume_option
@overwrite_option
@json_option
def command(
    model: str,
    output: Path,
    merge_adapter: str | None,
    offload: Any,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Save the subspaces that carry what MODEL knows, as an archive.

    MODEL is a checkpoint directory or a hub name. By default, what the loss depends on is protected (`--basis curvature`):
    on --data, which is what the model should stay good at, or else on text that the model says by itself. `weights` is the
    paper's: it needs no data; without --preserve its share is the adaptive rank, 0.8 everywhere, or by importance if --data
    is given. All this is of the default --rule; the others are InfLoRA's, SaRA's and OrthSR's.

    \b
    Examples:
      sculptor analyze ./model --output ./subspaces
      sculptor analyze ./model --data general.txt --data self --output ./subspaces
      sculptor analyze ./model --preserve 0.5 --output ./subspaces
      sculptor analyze ./model --data old-task.jsonl --constraint input --output ./subspaces
      sculptor analyze ./model --rule lowrank --rank 8 --output ./subspaces
      sculptor analyze ./model --rule mask --free 0.1 --output ./subspaces
      sculptor analyze ./model --rule rotation --output ./subspaces
    """
    from sculptor.report.json_text import to_json
    from sculptor.report.text import analyze_text
    from sculptor.tasks.analyze import analyze

    quiet_libraries()
    report = analyze(
        merged(model, merge_adapter, settings["device"], output, overwrite=overwrite),
        output,
        AnalyzeSettings(**settings),
        offload=offload,
        overwrite=overwrite,
        resume=resume,
        progress=bars,
        notice=tell,
    )
    click.echo(to_json(report, basis=report.basis, constraint=report.constraint) if as_json else analyze_text(report))

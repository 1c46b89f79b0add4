"""`sculptor demo`."""

import shutil
import tempfile
from pathlib import Path

import click

from .options import SuggestingCommand, bars, json_option, quiet_libraries


@click.command("demo", cls=SuggestingCommand)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Keep models, archives and data in this new directory."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides the facts and the model."
)
@json_option
def command(output: Path | None, seed: int, as_json: bool) -> None:
    """Show the whole tool on a tiny model made on the spot.

    Trains a small Llama on invented facts, protects it, teaches it more with and without protection, verifies,
    and prints what was learned and what was kept. Nothing is downloaded.

    \b
    Examples:
      sculptor demo
      sculptor demo --output ./demo
    """
    import torch

    from sculptor.report.json_text import to_json
    from sculptor.report.text import demo_text
    from sculptor.tasks.demo import demo

    quiet_libraries()
    torch.set_num_threads(1)  # the model is too small for more, and waiting threads starve each other on a busy machine
    scratch = None if output is not None else Path(tempfile.mkdtemp(prefix="sculptor-demo-"))
    try:
        report = demo(output or (scratch or Path()) / "demo", seed=seed, progress=bars)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)
    click.echo(to_json(report) if as_json else demo_text(report, kept=output is not None))

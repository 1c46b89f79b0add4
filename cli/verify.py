"""`sculptor verify`."""

import sys
from pathlib import Path

import click

from sculptor.training.settings import TrainSettings

from .options import (
    SuggestingCommand,
    bars,
    check_overwrite,
    html_option,
    json_option,
    overwrite_option,
    quiet_libraries,
    settings_options,
    speaks,
    tell,
)


@click.command("verify", cls=SuggestingCommand)
@click.argument("base")
@click.argument("tuned")
@click.option("--subspaces", required=True, type=click.Path(), help="Subspace archive of BASE.")
@settings_options(TrainSettings, "device")
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse a leak above 1e-3 that only rounding explains: it could hide one as large; and new tokens in old text.",
)
@click.option(
    "--harm",
    is_flag=True,
    help="Run TUNED, too, and measure harm on the archive's samples: KL(first base || TUNED). Decides nothing.",
)
@html_option
@overwrite_option
@json_option
def command(
    base: str,
    tuned: str,
    subspaces: str,
    device: str,
    strict: bool,
    harm: bool,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Prove that TUNED left the protected pairs of BASE untouched, and everything else that a user loads.

    Judged from tensors, configuration and tokenizer. What TUNED's own record says may explain a leak, never excuse it: further
    merges and openly trained tensors count as far as TUNED/subspaces tells of them, too.

    Exit code 0: it did. 1: it did not. 2: it could not be checked.

    \b
    Examples:
      sculptor verify ./model ./tuned --subspaces ./subspaces
      sculptor verify ./model ./tuned --subspaces ./subspaces --strict
    """
    from sculptor.errors import SculptorError
    from sculptor.report.html.page import check_page, write_page
    from sculptor.report.html.verify import verify_page
    from sculptor.report.json_text import to_json
    from sculptor.report.verify import verify_text
    from sculptor.tasks.verify import verify

    quiet_libraries()
    check_overwrite(html, overwrite)
    try:
        if html is not None:
            check_page(html, overwrite, inputs=[base, tuned, subspaces])
        result = verify(base, tuned, subspaces, device=device, strict=strict, harm=harm, progress=bars)
        click.echo(to_json(result) if as_json else verify_text(result))
        if html is not None and speaks():
            write_page(html, verify_page(result, base, tuned, subspaces), overwrite)
            tell(f"Wrote {html}.")
    except SculptorError as error:
        error.exit_code = 2  # whatever the reason: 1 says that the check was made and failed
        raise
    sys.exit(0 if result.passed else 1)

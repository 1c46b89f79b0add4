"""`sculptor chat`."""

import sys
from typing import Any

import click

from sculptor.training.settings import ReadSettings, TrainSettings

from .options import SuggestingCommand, bars, quiet_libraries, settings_options

_HELP = "/new starts a new conversation, /quit or the end of the input ends it."


@click.command("chat", cls=SuggestingCommand)
@click.argument("model")
@click.option("--base", help="Another checkpoint that hears the same, answering beside it.")
@click.option("--system", help="A system message before everything.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Of an answer, at most [default: 256, and at most half of --max-length].",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of sampling; 0 for the most likely token each time.",
)
@settings_options(TrainSettings, "max_length", "chat_template", "device")
@settings_options(ReadSettings)
def command(model: str, base: str | None, **options: Any) -> None:
    """Talk to MODEL, and to the one it was tuned from beside it.

    Every line of the input is said through the chat template; each model remembers its own answers. A model without a template
    goes on with each line as it is. Where a conversation outgrows --max-length, its oldest turns are forgotten. /new starts a new conversation, /quit or the end of the input ends it.

    \b
    Examples:
      sculptor chat ./tuned --base ./model
      sculptor chat ./tuned < questions.txt
    """
    from sculptor.errors import DataError
    from sculptor.report.chat import replies_text
    from sculptor.tasks.chat import chat

    quiet_libraries()
    with chat(model, base=base, progress=bars, notice=lambda text: click.echo(text, err=True), **options) as session:
        typed = sys.stdin.isatty()
        if typed:
            click.echo(_HELP, err=True)
        while (line := _next_line(typed)) is not None:
            if line == "/quit":
                break
            if line == "/new":
                session.forget()
                continue
            if not typed:
                click.echo(f"> {line}")
            try:
                click.echo(replies_text(session.ask(line)) + "\n")
            except DataError as error:
                if not typed:
                    raise
                click.echo(f"error: {error}\n", err=True)  # there is somebody to say it otherwise


def _next_line(typed: bool) -> str | None:
    """What is said next, None at the end."""
    if typed:
        import readline  # noqa: F401  for editing lines

    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return None
        if not line and not typed:
            return None
        if line.strip():
            return line.strip()

"""The `sculptor` command."""

import importlib
import os
import sys
from typing import NoReturn

import click

from .options import SuggestingGroup

_COMMANDS = {
    "estimate": "estimate",
    "data": "data",
    "analyze": "analyze",
    "train": "train",
    "inspect": "inspect_archive",
    "verify": "verify",
    "evaluate": "evaluate",
    "edit": "edit",
    "continual": "continual",
    "convert": "convert",
    "demo": "demo",
}
_LONGEST = 1200  # characters of an error


class _LazyGroup(SuggestingGroup):
    """Imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{_COMMANDS[cmd_name]}", package=__package__)
        command: click.Command = module.command
        return command


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from sculptor import __version__

        click.echo(f"sculptor {__version__}")
        ctx.exit()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Teach a saved language model new tasks without making it forget.

    \b
    Examples:
      sculptor demo
      sculptor analyze MODEL --basis curvature --data TEXT --output ARCHIVE
      sculptor train MODEL --subspaces ARCHIVE --data task.jsonl --output TUNED
      sculptor verify MODEL TUNED --subspaces ARCHIVE
    """


def run() -> None:
    """Entry point, and the one place where an error that a user can act on becomes one line."""
    try:
        code = main(standalone_mode=False)
        if sys.stdout is not None:  # closed by whoever asked
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`" if context is not None else ""
        _fail(error.format_message().rstrip(".") + hint, error.exit_code)
    except click.Abort:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `| head` is not an error of ours
        sys.stderr.close()
        sys.exit(1)
    except (MemoryError, RuntimeError, ValueError, OSError) as error:
        message = _message(error)
        if message is None:
            raise
        _fail(message, getattr(error, "exit_code", 1))
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _message(error: Exception) -> str | None:
    """The one line for an error that is the user's to mend; None for one that is ours."""
    from sculptor.errors import SculptorError

    if isinstance(error, SculptorError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}; free some space or choose another place"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out of memory; use a smaller --micro-batch-size or --max-length, --offload cpu or disk, or another --device"
    return None


def _fail(message: str, code: int) -> NoReturn:
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > _LONGEST:  # of a name that somebody made long
        line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
    click.echo(f"error: {line}", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and exit with 120
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)

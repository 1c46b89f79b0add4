"""The `sculptor` command."""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from .options import SuggestingGroup, speaks

# Name -> module, and what its help begins with, so that listing them imports none.
_COMMANDS = {
    "estimate": (
        "estimate",
        "Say what training MODEL takes: memory, time per step, sizes, for each way of offloading.",
    ),
    "data": (
        "data",
        "Show what the rows of FILES become for a model: tokens, which carry loss, what is dropped, and why.",
    ),
    "analyze": ("analyze", "Save the subspaces that carry what MODEL knows, as an archive."),
    "train": ("train", "Teach MODEL a task inside what the archive leaves free."),
    "inspect": ("inspect_archive", "Show what ARCHIVE protects, by role and block, and what each task added."),
    "verify": (
        "verify",
        "Prove that TUNED left the protected pairs of BASE untouched, and everything else that a user loads.",
    ),
    "evaluate": ("evaluate", "Measure loss, exact match and ranking of MODEL on rows, and tasks of lm-eval."),
    "card": ("card", "Measure TUNED beside BASE, row by row, and say whether it may be released."),
    "chat": ("chat", "Talk to MODEL, and to the one it was tuned from beside it."),
    "edit": ("edit", "Make a checkpoint from one or two others, without training."),
    "bank": ("bank", "Keep what tasks changed in MODEL beside each other, and route rows to them."),
    "continual": ("continual", "Train the tasks of PLAN in order and evaluate all of them after each."),
    "frontier": ("frontier", "Compare RUNS of `sculptor continual`: what each learned, against the harm that it did."),
    "convert": ("convert", "Write ARCHIVE, of an earlier version of the format, in today's."),
    "demo": ("demo", "Show the whole tool on a tiny model made on the spot."),
}
_DISTRIBUTION = "sculptor-subspaces"  # told here too: the package that is found may be any
_LONGEST = 1200  # characters of an error
_SHARED = ("analyze", "train", "verify", "evaluate", "continual")  # commands that several processes can do together
_QUOTED = 200  # of them, those of one name, path or argument


class _LazyGroup(SuggestingGroup):
    """Imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{_COMMANDS[cmd_name][0]}", package=__package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


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
    if not speaks():  # the first process tells what all have done
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        _check_package()
        _check_processes(sys.argv[1:])
        code = _interruptible()
        _leave()
        if sys.stdout is not None:  # closed by whoever asked
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.ClickException as error:
        if not speaks():
            sys.exit(error.exit_code)
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
        if _is_told(error):
            _exit(getattr(error, "exit_code", 1))
        _fail(message, getattr(error, "exit_code", 1))
    else:
        number = code if isinstance(code, int) else 0
        if os.environ.get("WORLD_SIZE", "1") != "1":  # torch's threads abort some processes that take leave of Python
            _exit(number)
        sys.exit(number)


def _interruptible() -> object:
    """The command; a signal that ends it leaves nothing behind but what can be taken up. `chat` has its own keys."""
    from sculptor.interruption import Interrupted, catch_signals, release_signals

    if next((argument for argument in sys.argv[1:] if argument in _COMMANDS), None) != "chat":
        catch_signals()
    try:
        return main(standalone_mode=False)
    except Interrupted as error:
        if not speaks():
            _exit(128 + error.number)
        _fail(str(error), 128 + error.number)
    finally:
        release_signals()


def _check_package() -> None:
    """Refuses to work on another project's package of the same name, or on a mixture of both."""
    try:
        import sculptor

        found = getattr(sculptor, "__distribution__", None)
        place = sculptor.__file__ or "a folder without __init__.py"
    except Exception as error:  # whatever it needs may not be here
        found, place = None, f"another package ({_cut(str(error), _QUOTED)})"
    if found != _DISTRIBUTION:
        raise click.ClickException(
            f"`import sculptor` finds {place}, which does not belong to {_DISTRIBUTION}: another project has the same import name; "
            f"pip uninstall sculptor {_DISTRIBUTION}, then install {_DISTRIBUTION} again, or use a virtual environment for each"
        )


def _check_processes(arguments: list[str]) -> None:
    """Refuses a launcher where there is nothing to share: every process would do the whole."""
    chosen = next((argument for argument in arguments if argument in _COMMANDS), None)
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and chosen is not None and chosen not in _SHARED and not {"-h", "--help"} & set(arguments):
        raise click.UsageError(
            f"sculptor {chosen}: {count[:20]} processes (WORLD_SIZE) have nothing to share here; start it without a launcher"
        )


def _leave() -> None:
    """Ends what several processes have in common, if there are several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from sculptor.world import leave

        leave()


def _is_told(error: Exception) -> bool:
    """Whether another of several processes says what went wrong."""
    from sculptor.errors import PeerError, SettingsError

    if isinstance(error, PeerError):  # it may be the first that has gone, so the second speaks of that, too
        return error.told or os.environ.get("RANK", "0") not in ("0", "1")
    return isinstance(error, SettingsError) and not speaks()  # those are the same in all


def _message(error: Exception) -> str | None:
    """The one line for an error that is the user's to mend; None for one that is ours."""
    from sculptor.errors import SculptorError

    if isinstance(error, SculptorError):
        return _in_a_plan(str(error)) if "continual" in sys.argv[1:2] else str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}; free some space or choose another place"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"out of memory; {_remedy_for_memory(options_of(sys.argv[1:]))}"
    return None


def options_of(arguments: Sequence[str]) -> frozenset[str]:
    """The options of the command that is asked for."""
    command: click.Command | None = main
    for argument in arguments:
        if isinstance(command, click.Group) and not argument.startswith("-"):
            command = command.get_command(click.Context(command), argument)
    found = command.params if command is not None else []
    return frozenset(name for option in found for name in (*option.opts, *option.secondary_opts))


def _remedy_for_memory(options: frozenset[str]) -> str:
    """What of a command's options takes less memory."""
    smaller = [name for name in ("--micro-batch-size", "--batch-size", "--max-length") if name in options]
    ways = [f"a smaller {' or '.join(smaller)}"] if smaller else []
    ways += ["--offload cpu or disk"] if "--offload" in options else []
    ways += ["another --device"] if "--device" in options else []
    ways += ["a smaller batch_size or micro_batch_size in the plan"] if "--method" in options else []
    return f"use {', or '.join(ways)}" if ways else "use a machine with more, or end what else runs there"


def _in_a_plan(line: str) -> str:
    """A message with the options of other commands as a plan calls them."""
    from sculptor.methods.settings import AnalyzeSettings
    from sculptor.training.settings import TrainSettings

    known = options_of(sys.argv[1:])

    def renamed(found: re.Match[str]) -> str:
        name = found[0][2:].replace("-", "_")
        for section, settings in (("train", TrainSettings), ("analyze", AnalyzeSettings)):
            if found[0] not in known and name in settings.__dataclass_fields__:
                return f"[{section}] {name}"
        return found[0]

    parts = line.split("`")  # every second one is a command in full
    parts[::2] = [re.sub(r"(?<![\w-])--[a-z][a-z-]*[a-z]", renamed, part) for part in parts[::2]]
    return "`".join(parts)


def _exit(code: int) -> NoReturn:
    """Ends one of several processes at once: it may not wait for others that wait for it."""
    sys.stderr.flush()
    os._exit(code)


def _cut_names(line: str, arguments: Sequence[str]) -> str:
    """A message in which no argument, and no name without a space, is longer than anybody reads."""
    given = {" ".join(part.split()) for argument in arguments for part in (argument, argument.partition("=")[2])}
    for text in sorted(given, key=len, reverse=True):
        if len(text) > _QUOTED:
            line = line.replace(text, _cut(text, _QUOTED))
    return re.sub(rf"\S{{{_QUOTED + 1},}}", lambda found: _cut(found[0], _QUOTED), line)


def _cut(text: str, limit: int) -> str:
    """Text without its middle, if it is longer."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"


def _fail(message: str, code: int) -> NoReturn:
    line = _cut_names(" ".join(message.split()), sys.argv[1:])
    line = _cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), _LONGEST)
    click.echo(f"error: {line}", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and exit with 120
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _exit(code)
    sys.exit(code)

"""What commands share: near-miss suggestions, progress bars and common options."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from .configuration import check_complete, config_option
from .nearest import nearest

Command = TypeVar("Command", bound=Callable[..., Any])


# What the same thing is called elsewhere.
_OTHER_NAMES = {"--lr": "--learning-rate", "--out": "--output", "--archive": "--subspaces", "--dataset": "--data"}


class Choice(click.Choice[str]):
    """A choice that suggests the nearest value."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            listed = ", ".join(map(repr, self.choices))
            self.fail(f"{value!r} is not one of {listed}.{nearest(str(value), map(str, self.choices))}", param, ctx)
        return super().convert(value, param, ctx)


class SuggestingCommand(click.Command):
    """A command that suggests the nearest option, and reads options from a file."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(config_option())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for parameter in self.params for name in parameter.opts]
            if error.option_name in _OTHER_NAMES and _OTHER_NAMES[error.option_name] in known:
                message = f"No such option: {error.option_name}. Did you mean {_OTHER_NAMES[error.option_name]!r}?"
                raise click.UsageError(message, ctx) from None
            raise click.UsageError(
                f"No such option: {error.option_name}.{nearest(error.option_name, known)}", ctx
            ) from None
        check_complete(ctx)
        return rest


class SuggestingGroup(click.Group):
    """A group that suggests the nearest command."""

    command_class = SuggestingCommand

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"No such command {name!r}.{nearest(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


def speaks() -> bool:
    """Whether this process is alone, or the first of several: the others are silent."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    """A line about what was decided."""
    if speaks():
        click.echo(text, err=True)


def bars(*, total: int, desc: str, unit: str, initial: int = 0) -> Any:
    """Progress on stderr with time left, in the first process."""
    from sculptor import progress

    return (progress.bars if speaks() else progress.silent)(total=total, desc=desc, unit=unit, initial=initial)


def quiet_libraries() -> None:
    """Keeps transformers' own bars and advice off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def json_option(command: Command) -> Command:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def settings_options(cls: Any, *names: str, skip: Iterable[str] = ()) -> Callable[[Command], Command]:
    """One option for each field of a class of settings, or for some: its name, type, default, range and help.

    Args:
        cls: settings whose fields have docstrings.
        names: of fields; default all, in their order.
        skip: fields that have no option.
    """
    hints = get_type_hints(cls, include_extras=True)
    described = cls.__pydantic_fields__
    chosen = [
        field for field in dataclasses.fields(cls) if (not names or field.name in names) and field.name not in skip
    ]

    def add(command: Command) -> Command:
        for field in reversed(chosen):  # click lists options in the reverse order of decoration
            command = _option(field, hints[field.name], described[field.name].description)(command)
        return command

    return add


def _option(field: Any, hint: Any, text: str) -> Callable[[Command], Command]:
    from sculptor.validation import Off

    kind, metadata = _innermost(hint)
    name = "--" + field.name.replace("_", "-")
    needed = field.default is dataclasses.MISSING
    settings: dict[str, Any] = {"required": True} if needed else {"default": field.default}
    settings["show_default"] = not needed and field.default is not None
    if kind is bool:
        off = next((item.name for item in metadata if isinstance(item, Off)), None)
        if off is not None:
            name += f"/--{off}"
        settings |= {"is_flag": True, "show_default": False}
    elif get_origin(kind) is tuple:
        settings = {"multiple": True, "type": str}
    elif get_origin(kind) is Literal:
        settings["type"] = Choice([str(choice) for choice in get_args(kind)])
    else:
        settings["type"] = _range(kind, metadata)
    return click.option(name, field.name, help=" ".join(text.split()), **settings)


def _innermost(hint: Any) -> tuple[Any, list[Any]]:
    """A field's type without None, and everything that is annotated of it."""
    metadata: list[Any] = []
    while True:
        if get_origin(hint) is Annotated:
            hint, *found = get_args(hint)
            metadata += found
        elif get_origin(hint) in (Union, UnionType):
            (hint,) = (choice for choice in get_args(hint) if choice is not type(None))
        else:
            return hint, metadata


def _range(kind: Any, metadata: Iterable[Any]) -> Any:
    """A number's type with its range, where it has one that people would meet."""
    bounds: dict[str, Any] = {}
    for item in metadata:
        for part in getattr(item, "metadata", [item]):  # of pydantic's Field
            for key, edge, is_open in (
                ("ge", "min", False),
                ("gt", "min", True),
                ("le", "max", False),
                ("lt", "max", True),
            ):
                bound = getattr(part, key, None)
                if bound is not None and abs(bound) < 2**31:
                    bounds |= {edge: bound} | ({f"{edge}_open": True} if is_open else {})
    if not bounds or kind not in (int, float):
        return kind
    return click.IntRange(**bounds) if kind is int else click.FloatRange(**bounds)


def rule_option(command: Command) -> Command:
    """`--rule`, of sculptor's own kinds."""
    from sculptor.methods.settings import RULES

    return click.option(
        "--rule",
        type=Choice(RULES),
        default=RULES[0],
        show_default=True,
        help="What may change: everything outside of protected directions, a few directions of each input, the smallest "
        "entries, or rotations of the outputs.",
    )(command)


def adapter_option(command: Command) -> Command:
    """`--merge-adapter`."""
    return click.option(
        "--merge-adapter",
        type=click.Path(),
        metavar="DIR",
        help="MODEL is a LoRA adapter: merge it into the base that it names, write that checkpoint to DIR, and go on with it.",
    )(command)


def _check_places(directory: str, output: Path | None, overwrite: bool) -> None:
    from sculptor.checkpoint.staging import check_free
    from sculptor.errors import OutputError

    if os.path.lexists(directory):
        raise OutputError(
            f"{directory}: exists already; choose another --merge-adapter, or give it as MODEL if it was merged before"
        )
    if output is not None:
        check_free(output, command=str(click.get_current_context().info_name), overwrite=overwrite)


def merged(
    model: str, directory: str | None, device: str, output: Path | None = None, *, overwrite: bool = False
) -> str:
    """MODEL, or what merging it gives; `output`, which may be there with `overwrite`, is what is made of that."""
    if directory is None:
        return model
    from sculptor.jobs.processes import join
    from sculptor.tasks.adapter import merge_adapter

    join(device).once(lambda: _check_places(directory, output, overwrite))  # others may come when it is merged already
    made = merge_adapter(model, directory, device=device, progress=bars, goes_to=output, notice=tell)
    tell(f"merged {model} into its base: {made}; that is MODEL from now on")
    return str(made)


def overwrite_option(command: Command) -> Command:
    """`--overwrite`."""
    return click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is complete.")(
        command
    )


def html_option(command: Command) -> Command:
    """`--html`."""
    return click.option(
        "--html", type=click.Path(path_type=Path), help="Write a report to look at: one file for any browser."
    )(command)


def check_overwrite(html: Path | None, overwrite: bool) -> None:
    """Refuses `--overwrite` of a command that writes nothing but a report, where it writes none."""
    if overwrite and html is None:
        raise click.UsageError("--overwrite without effect: there is no --html")


def push_options(command: Command) -> Command:
    """`--push-to-hub` and `--public`."""
    for add in (
        click.option("--public", is_flag=True, help="With --push-to-hub: for everybody to see."),
        click.option(
            "--push-to-hub",
            metavar="OWNER/NAME",
            help="Upload the finished output to this repository of the Hugging Face hub, private unless --public; nothing if "
            "the run fails.",
        ),
    ):
        command = add(command)
    return command


def resume_option(command: Command) -> Command:
    """`--resume`."""
    return click.option(
        "--resume", is_flag=True, help="Go on with what a killed run left; starts anew if there is nothing."
    )(command)

"""`--config`: options from a TOML file, or from the record of an earlier run, behind those of the command line."""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from .nearest import nearest

_LEFT_OUT = f"{__name__}.left_out"


def config_option() -> click.Option:
    """`--config`, for every command."""
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="Options from this TOML file, or settings from the sculptor.json or archive.json of an earlier run; the command "
        "line goes before them.",
    )


def _read(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    words = _words(ctx)
    content = _of_record(ctx, path, words) if path.suffix == ".json" else _of_command(ctx, _toml(path), path, words)
    known = _known(ctx.command)
    found: dict[str, Any] = {}
    for key, value in content.items():
        parameter = known.get(key.replace("-", "_"))
        if parameter is None:
            raise _error(
                path, f"{key!r} is no option of `{' '.join(words)}`.{nearest(key.replace('_', '-'), _names(known))}"
            )
        assert parameter.name
        if parameter.name in found:
            raise _error(path, f"{key!r} is given twice")
        found[parameter.name] = _value(ctx, path, key, value, parameter)
    ctx.default_map = {**(ctx.default_map or {}), **found}


def _words(ctx: click.Context) -> list[str]:
    """The names of a command and its groups; the program's own may be several words."""
    return [] if ctx.parent is None else [*_words(ctx.parent), ctx.info_name or ""]


def _error(path: Path, text: str) -> click.UsageError:
    return click.UsageError(f"--config {path}: {text}")


def _known(command: click.Command) -> dict[str, click.Parameter]:
    """Options and arguments, by their names as Python writes them."""
    return {
        name.lstrip("-").replace("-", "_"): parameter
        for parameter in command.params
        if parameter.expose_value
        for name in parameter.opts
        if not (name.startswith("-") and not name.startswith("--"))
    }


def _names(known: Iterable[str]) -> list[str]:
    return [name.replace("_", "-") for name in known]


def _content(path: Path) -> bytes:
    from sculptor.errors import SettingsError
    from sculptor.validation import read_file

    try:
        return read_file(path, SettingsError, "give a TOML file, or a record of sculptor")
    except SettingsError as cause:
        raise click.UsageError(f"--config {cause}") from cause


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_content(path).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise _error(path, f"is no TOML ({cause})") from cause


def _of_command(ctx: click.Context, content: dict[str, Any], path: Path, words: Sequence[str]) -> Mapping[str, Any]:
    """All of a file, or the table of the command where it has tables: one file may serve several commands."""
    tables = [key for key, value in content.items() if isinstance(value, dict)]
    if not tables:
        return content
    if len(tables) < len(content):
        plain = next(key for key in content if key not in tables)
        raise _error(path, f"{plain!r} stands outside of a table, and there are tables ([{tables[0]}])")
    root = ctx.find_root()
    commands = root.command.list_commands(root) if isinstance(root.command, click.Group) else list(words)
    for name in tables:
        if name not in commands:
            raise _error(path, f"[{name}] is no command.{nearest(name, commands)}")
    for word in words:
        found = content.get(word)
        if not isinstance(found, dict):
            raise _error(path, f"has no table [{'.'.join(words)}].{nearest(word, content)}")
        content = found
    return content


def _of_record(ctx: click.Context, path: Path, words: Sequence[str]) -> Mapping[str, Any]:
    """The settings that a run was done with, resolved; records have names of data without folder and weight."""
    try:
        content = json.loads(_content(path))
        command = content.get("command", "analyze" if content.get("format") == "sculptor-subspaces" else None)
        settings = {key: value for key, value in content["settings"].items() if value is not None}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise _error(path, "is no record of a run of sculptor with settings") from cause
    if command != " ".join(words):
        raise _error(path, f"holds settings of `{command}`, not of `{' '.join(words)}`")
    ctx.meta[_LEFT_OUT] = path, _left_out(content, settings)
    return settings


class _Left(NamedTuple):
    """What an option of the run was for, and whether its data had shares."""

    what: str
    shares: bool = False


def _left_out(content: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, _Left]:
    """Options that a record names the values of, and that have to be given again; takes them out of the settings."""
    from sculptor.data.replay import DEFAULT_SHARE

    left = {}
    if settings.get("data", []) not in ([], ["self"]):
        first = next(iter(found), None) if isinstance(found := content.get("tasks"), list) else None
        shares = any(weight != 1 for weight in _part({"": first}, "").get("weights") or ())
        left["data"] = _Left(f"measured on {', '.join(map(str, settings.pop('data')))}", shares)
    weights = _part(content, "data").get("weights")
    if isinstance(weights, list) and weights:
        left["data"] = _Left(f"mixed its data in shares of {' to '.join(map(str, weights))}", shares=True)
    mixed = _part(content, "data").get("replay")
    if isinstance(mixed, list) and mixed:
        parts = [_part({"": each}, "") for each in mixed]
        shares = any(part.get("share") != DEFAULT_SHARE for part in parts)
        named = [f"{part.get('name')}:{part.get('share')}" if shares else str(part.get("name")) for part in parts]
        left["replay"] = _Left(f"mixed in {', '.join(named)}", shares)
    template = settings.get("chat_template")
    if isinstance(template, str) and (
        Path(template).suffix or Path(template).exists()
    ):  # else one of the tokenizer's own
        left["chat_template"] = _Left(f"wrote conversations by {settings.pop('chat_template')}")
    chosen = _part(content, "eval_data").get("files")
    if chosen or _part(content, "result").get("best_step") is not None:
        named = [f" ({', '.join(map(str, chosen))})"] if isinstance(chosen, list) else []
        left["eval_data"] = _Left(f"chose its best parameters by rows of --eval-data{''.join(named)}")
    if content.get("analyzed") is False:
        left["subspaces"] = _Left("was protected by an archive")
    if content.get("protect_data", []) not in ([], ["self"]):
        left["protect_data"] = _Left("analyzed its model on data of its own")
    return left


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}


# Of two that exclude each other the command line's is taken; neither is set by default.
_RIVALS = (("epochs", "max_steps"), ("learning_rate", "relative_rate"))


def check_complete(ctx: click.Context) -> None:
    """Refuses a record whose data were not given again; what an option of the command line excludes is not taken from a file.

    Raises:
        UsageError: naming them.
    """
    for one, other in (*_RIVALS, *((b, a) for a, b in _RIVALS)):
        sources = [ctx.get_parameter_source(name) for name in (one, other)]
        if sources == [ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP]:
            ctx.params[other] = None
    path, left = ctx.meta.get(_LEFT_OUT, (None, {}))
    for name, (what, shares) in left.items():
        if name in ctx.params and not (_are_weighted(ctx.params[name]) if shares else ctx.params[name]):
            option = f"--{name.replace('_', '-')}{' PLACE:WEIGHT' if shares else ''}"
            raise click.UsageError(
                f"--config {path}: {what}, where records keep no folders and weights; give it as {option}"
            )


def _are_weighted(data: Iterable[str]) -> bool:
    """Whether any of some data is given with its share."""
    from sculptor.data.rows import weight_of

    return any(weight_of(name) is not None for name in data)


def _value(ctx: click.Context, path: Path, key: str, value: Any, parameter: click.Parameter) -> Any:
    """A value of TOML or JSON, as click takes it; of which kind it has to be, the option says."""
    several = parameter.multiple or parameter.nargs != 1
    values = value if isinstance(value, list) and several else [value]
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    for item in values:
        if not isinstance(item, str | int | float) or isinstance(item, bool) != is_flag:
            wanted = "true or false" if is_flag else "text or a number" + (", or a list of these" if several else "")
            raise _error(path, f"{key} = {json.dumps(item, default=str)}: expected {wanted}")
    made = values if several else value
    try:
        parameter.type_cast_value(ctx, made)
    except click.BadParameter as cause:
        raise _error(path, f"{key}: {cause.message}") from cause
    except (TypeError, ValueError, OverflowError) as cause:  # a NUL in a path, or a number; a number that is none
        raise _error(path, f"{key}: {cause}") from cause
    return made

"""What messages tell people to pass is there to be passed."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from conftest import COMMANDS, Result
from sculptor_cli.main import _message, main

from sculptor.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


# Of other programs, and of no command.
OTHERS = {"--private", "--version", "--dataset", "--out", "--lr", "--archive"}
OF_HOSTS = {"swift.py": {"--model", "--tuner", "--callbacks"}}  # what is told to users of ms-swift


def options_of(command: click.Command | None) -> set[str]:
    """Of a command, and of those in it."""
    assert command is not None
    names = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return names.union(*map(options_of, inner))


def named(file: Path) -> set[str]:
    """Options in the texts of a module, docstrings and what is told of another program or command in backquotes aside."""
    tree = ast.parse(file.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]
    return {name for text in texts for name in OPTION.findall(re.sub(r"`[^`]*`", "", text))}


def test_every_option_that_a_message_names_is_there() -> None:
    """Which command has it is looked at wherever a test runs one: `unknown_options` of conftest."""
    context = click.Context(main)
    known = {"--help"}.union(*(options_of(main.get_command(context, name)) for name in COMMANDS))
    for file in [*(ROOT / "sculptor").rglob("*.py"), *(ROOT / "cli").glob("*.py")]:
        if file.name == "style.py":  # whose names with dashes are those of a style sheet
            continue
        assert not named(file) - known - OTHERS - OF_HOSTS.get(file.name, set()), file


@pytest.mark.parametrize("name", [*COMMANDS, "edit lines"])
def test_what_takes_less_memory_is_there_to_be_passed(
    cli: Callable[..., Result], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(click.Command, "invoke", full)  # the fixture looks at what is said
    found = cli(*name.split(), *["x"] * 3)
    assert found.code in (1, 2)
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("--micro-batch-size 8: too much", "[train] micro_batch_size 8: too much"),
        ("use --set or --calibration-tokens", "use --set or [analyze] calibration_tokens"),
        ("run `sculptor analyze --keep 0.5`, --save-dtype", "run `sculptor analyze --keep 0.5`, [train] save_dtype"),
    ],
)
def test_a_plan_has_other_names(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sculptor", "continual", "plan.toml"])
    assert _message(SettingsError(said)) == f"{told}"

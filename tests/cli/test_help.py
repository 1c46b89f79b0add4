"""Help alone tells a newcomer enough, and costs nothing."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import Result

COMMANDS = [
    "estimate",
    "data",
    "analyze",
    "train",
    "inspect",
    "verify",
    "evaluate",
    "chat",
    "edit",
    "continual",
    "convert",
    "demo",
]


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "lines", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    body = "assert 'torch' not in sys.modules"
    code = f"import sys, sculptor_cli.main as m\ntry: m.main({arguments})\nexcept SystemExit: pass\n{body}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_command_is_listed(cli: Callable[..., Result]) -> None:
    found = cli("--help")
    assert found.code == 0
    assert all(f"\n  {name} " in found.out for name in COMMANDS)
    assert cli("--version").out.startswith("sculptor ")
    assert cli().code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_every_command_examples(cli: Callable[..., Result], name: str) -> None:
    found = cli(name, "--help")
    assert found.code == 0
    assert "Examples:" in found.out
    import importlib

    modules = {"inspect": "inspect_archive"}
    command = importlib.import_module(f"sculptor_cli.{modules.get(name, name)}").command
    for parameter in command.params:
        assert parameter.param_type_name == "argument" or parameter.help, parameter.name


@pytest.mark.parametrize("name", ["interpolate", "lines", "project", "prune", "threshold"])
def test_every_edit_has_help_and_examples(cli: Callable[..., Result], name: str) -> None:
    from sculptor_cli.edit import command

    assert f"\n  {name} " in cli("edit", "--help").out
    found = cli("edit", name, "--help")
    assert found.code == 0
    assert "Examples:" in found.out
    for parameter in command.commands[name].params:
        assert parameter.param_type_name == "argument" or parameter.help, parameter.name


@pytest.mark.parametrize("name", ["train", "analyze", "estimate"])
def test_defaults_of_the_command_are_those_of_the_library(name: str) -> None:
    import importlib
    from dataclasses import fields

    from sculptor import AnalyzeSettings, EstimateSettings, TrainSettings

    command = importlib.import_module(f"sculptor_cli.{name}").command
    defaults = {"train": TrainSettings, "analyze": AnalyzeSettings, "estimate": EstimateSettings}[name]()
    shown = {parameter.name: parameter.default for parameter in command.params}
    described = type(defaults).__pydantic_fields__
    for field in fields(defaults):
        if field.name == "rule":  # one kind only: nothing to choose yet
            continue
        assert field.name in shown, field.name
        (option,) = (parameter for parameter in command.params if parameter.name == field.name)
        assert option.help == " ".join(described[field.name].description.split()), field.name
        if isinstance(shown[field.name], int | float | str) and not isinstance(shown[field.name], bool):
            assert shown[field.name] == getattr(defaults, field.name), field.name

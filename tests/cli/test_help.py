"""Help alone tells a newcomer enough, and costs nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COMMANDS, Result


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "lines", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    body = "assert 'torch' not in sys.modules"
    code = f"import sys, sculptor_cli.main as m\ntry: m.main({arguments})\nexcept SystemExit: pass\n{body}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_listing_commands_imports_none() -> None:
    heavy = {"torch", "numpy", "pydantic", "transformers", "huggingface_hub", "importlib.metadata"}
    code = (
        "import sys\nbefore = set(sys.modules)\nimport sculptor_cli.main as m\n"
        "sys.argv = ['sculptor', '--help']\ntry: m.run()\nexcept SystemExit: pass\n"
        f"found = {heavy} & set(sys.modules) - before\nassert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str) -> None:
    import importlib

    from sculptor_cli.main import _COMMANDS

    module, text = _COMMANDS[name]
    command = importlib.import_module(f"sculptor_cli.{module}").command
    assert command.help.partition("\n\n")[0].replace("\n", " ") == text


def _run_beside(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from sculptor_cli.main import run; sys.argv = ['sculptor', '--version']; run()"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("content", ["", "raise ImportError('no pandas')", "__distribution__ = 'sculptor'"])
def test_another_package_of_the_same_name_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    assert _run_beside(tmp_path).returncode == 0
    other = tmp_path / "sculptor" / "__init__.py"
    other.parent.mkdir()
    other.write_text(content)
    found = _run_beside(tmp_path)
    assert found.returncode == 1
    assert found.stderr.startswith("error: `import sculptor` finds ")
    assert ("no pandas" if "pandas" in content else str(other)) in found.stderr
    assert "does not belong to sculptor-subspaces" in found.stderr
    assert found.stderr.count("\n") == 1


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

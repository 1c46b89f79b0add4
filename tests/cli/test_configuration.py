"""`--config`: a file instead of options, of every command, and the record of a run fed back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows

# Of every command: an option with a value, and one of its switches.
OPTIONS = {
    "estimate": ("gpu-memory = 24.0", "json"),
    "data": ("rows = 1", "json"),
    "analyze": ("preserve = 0.5", "overwrite"),
    "train": ("max-steps = 3", "resume"),
    "inspect": ('model = "m"', "all"),
    "verify": ('device = "cpu"', "strict"),
    "evaluate": ("show = 1", "chat"),
    "chat": ("temperature = 0.5", None),
    "edit lines": ("alpha = 0.5", "dry-run"),
    "edit interpolate": ("alpha = 0.5", "dry-run"),
    "edit project": ('device = "cpu"', "dry-run"),
    "edit threshold": ('device = "cpu"', "dry-run"),
    "edit prune": ("sparsity = 0.5", "dry-run"),
    "bank add": ("rank = 3", "json"),
    "bank export": ('task = "news"', "overwrite"),
    "bank route": ("max-length = 99", "json"),
    "continual": ('set = ["train.seed=1"]', "overwrite"),
    "card": ('device = "cpu"', "strict"),
    "frontier": ('plot = "p.png"', "overwrite"),
    "convert": ('model = "m"', "overwrite"),
    "demo": ("seed = 3", "json"),
}


def one_line(found: Result, *needles: str) -> None:
    assert found.code == 2, found
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1, found.err
    for needle in needles:
        assert needle in found.err, found.err


def the_command(name: str) -> Any:
    import click
    from sculptor_cli.main import main

    command: Any = main
    for word in name.split():
        command = command.get_command(click.Context(command), word)
    return command


def parsed(name: str, *arguments: object) -> dict[str, Any]:
    """What a command's function would be called with."""
    import click

    command, parent = (
        the_command(name),
        click.Context(the_command(""), info_name="sculptor", help_option_names=["-h", "--help"]),
    )
    for word in name.split():
        parent = click.Context(command, info_name=word, parent=parent)
    found: dict[str, Any] = parent.params
    needed = [argument for argument in command.params if isinstance(argument, click.Argument)]
    given = [str(argument) for argument in arguments] or ["--", *("x" for _ in needed)]
    with parent:
        command.parse_args(parent, given)
    return found


def test_every_command_is_tried() -> None:
    import click
    from sculptor_cli.main import _COMMANDS

    names = []
    for name in _COMMANDS:
        command = the_command(name)
        inner = command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []
        names += [f"{name} {each}" for each in inner] or [name]
    assert sorted(names) == sorted(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_command_takes_a_file(tmp_path: Path, cli: Callable[..., Result], name: str) -> None:
    import click

    setting, switch = OPTIONS[name]
    command, file = the_command(name), tmp_path / "a.toml"
    needed = [
        f"{parameter.name} = {['x'] if parameter.multiple or parameter.nargs == -1 else 'x'!r}".replace("'", '"')
        for parameter in command.params
        if parameter.required and f"--{setting.partition(' ')[0]}" not in parameter.opts
    ]
    key = setting.partition(" ")[0]
    lines = "\n".join([*needed, setting, *([] if switch is None else [f"{switch} = true"])])
    (option,) = [each for each in command.params if f"--{key}" in each.opts]
    for text in (
        lines,
        f"[{'.'.join(name.split())}]\n{lines}\n[verify]\nstrict = true\n" if name != "verify" else lines,
    ):
        file.write_text(text)
        found = parsed(name, "--config", file)
        value = found[option.name]
        assert value != option.get_default(click.Context(command))
        assert str(value).strip("(),'") in setting
        if switch is not None:
            (flag,) = [each for each in command.params if f"--{switch}" in each.opts]
            assert found[flag.name] is True
        other = {"gpu-memory": 12.0, "seed": 4, "rows": 2, "max-steps": 5, "show": 2, "set": "train.seed=2"}.get(key)
        if other is not None:
            ahead = parsed(name, "--config", file, f"--{key}", other)[option.name]
            assert ahead in (other, (other,))  # the command line goes before the file
    words = name.split()
    for text, *needles in (
        ("nonsense-key = 1", "'nonsense-key' is no option of", name),
        (f"{key[:-1]} = 1", f"Did you mean {key!r}?"),
        (f"{key} = {{ a = 1 }}", "is no command"),
        (f"{key} = [[1]]", f"{key} = "),
        (f"{key} = 1\n[{words[0]}]\nx = 1", "stands outside of a table"),
        ("[tran]\nx = 1", "[tran] is no command. Did you mean 'train'?"),
        ("= 1", "is no TOML"),
    ):
        file.write_text(text)
        one_line(cli(*words, "--config", file), str(file), *needles)
    one_line(cli(*words, "--config", tmp_path / "none.toml"), "none.toml", "cannot be read")


def test_bad_files(tmp_path: Path, cli: Callable[..., Result]) -> None:
    file = tmp_path / "a.toml"
    for text, needle in (
        ("[verify]\nstrict = true", "has no table [train]"),
        ("epochs = true", "epochs = true: expected text or a number"),
        ("resume = 1", "resume = 1: expected true or false"),
        ('epochs = "many"', "epochs: 'many' is not a valid float"),
        ('output = "a\\u0000"', "output: embedded null byte"),
        (f"epochs = {10**400}", "epochs: "),
        ("output = 1.5", "output: "),
        ('schedule = "cosin"', "Did you mean 'cosine'?"),
        ("max-steps = 0", "max-steps: 0 is not in the range x>=1"),
        ("max-steps = 3\nmax_steps = 3", "'max_steps' is given twice"),
        ("data = [1979-05-27]", "1979-05-27"),
        ("config = 'b.toml'", "'config' is no option"),
    ):
        file.write_text(text)
        one_line(cli("train", "--config", file), str(file), needle)
    file.write_bytes(b"\xff\xfe")
    one_line(cli("train", "--config", file), "is no TOML")
    one_line(cli("train", "--config", tmp_path), "cannot be read")
    record = tmp_path / "a.json"
    for text, needle in (
        ("[]", "is no record"),
        ("{", "is no record"),
        ("[" * 100_000, "is no record"),
        ('{"command": "train"}', "is no record"),
        ('{"command": "edit lines", "settings": {}}', "holds settings of `edit lines`, not of `train`"),
        ('{"command": "train", "settings": {"epocs": 1}}', "Did you mean 'epochs'?"),
    ):
        record.write_text(text)
        one_line(cli("train", "--config", record), str(record), needle)


def test_data_that_a_record_only_names_are_asked_for(tmp_path: Path, cli: Callable[..., Result]) -> None:
    record = tmp_path / "archive.json"
    record.write_text('{"format": "sculptor-subspaces", "settings": {"data": ["a.jsonl", "self"]}}')
    one_line(cli("analyze", "m", "-o", tmp_path / "a", "--config", record), "a.jsonl, self", "give it as --data")
    assert parsed("analyze", "m", "-o", "a", "--config", record, "--data", "b.jsonl")["data"] == ("b.jsonl",)
    record = tmp_path / "sculptor.json"
    given = ("train", "m", "-o", tmp_path / "a", "--data", "b.jsonl", "--config", record)
    record.write_text(
        '{"command": "train", "settings": {}, "data": {"replay": [{"name": "old.txt", "share": 0.1}]}, "result": {"best_step": 3}}'
    )
    one_line(cli(*given), "mixed in old.txt", "give it as --replay")
    one_line(cli(*given, "--replay", "old.txt"), "chose its best parameters", "give it as --eval-data")
    assert parsed(*given, "--replay", "old.txt", "--eval-data", "e.jsonl")["replay"] == ("old.txt",)
    content = {
        "command": "train", "settings": {}, "analyzed": False, "eval_data": {"files": ["e.jsonl"]},
        "data": {"weights": [0.7, 0.3], "replay": [{"name": "self", "share": 0.3}]},
    }  # fmt: skip
    record.write_text(json.dumps(content))
    for option, value, *needles in (
        ("--data", "c.jsonl:0.3", "shares of 0.7 to 0.3", "--data PLACE:WEIGHT"),
        ("--replay", "self:0.3", "mixed in self:0.3", "--replay PLACE:WEIGHT"),
        ("--eval-data", "e.jsonl", "(e.jsonl)", "give it as --eval-data"),
        ("--subspaces", "s", "was protected by an archive", "give it as --subspaces"),
    ):
        one_line(cli(*given), *needles)
        given = (*given, option, value)
    assert parsed(*given)["data"] == ("b.jsonl", "c.jsonl:0.3")
    record.write_text(json.dumps({"command": "train", "settings": {}, "analyzed": True, "protect_data": ["old.txt"]}))
    one_line(cli(*given), "analyzed its model on data of its own", "give it as --protect-data")


def test_the_command_line_takes_the_place_of_what_it_excludes(tmp_path: Path) -> None:
    """`--epochs` beside a file's max_steps would have no effect, and a rate beside one of the other kind is refused."""
    record, table = tmp_path / "sculptor.json", tmp_path / "plan.toml"
    for mine, theirs, value in (("epochs", "max_steps", 3), ("learning_rate", "relative_rate", 0.01)):
        record.write_text(json.dumps({"command": "train", "settings": {theirs: value}}))
        table.write_text(f"[train]\n{theirs} = {value}\n")
        for file in (record, table):
            given = ("train", "m", "-o", tmp_path / "a", "--data", "b.jsonl", "--config", file)
            assert parsed(*given)[theirs] == value
            found = parsed(*given, f"--{mine.replace('_', '-')}", "0.5")
            assert (found[mine], found[theirs]) == (0.5, None)
    both = parsed("train", "m", "-o", tmp_path / "a", "--data", "b.jsonl", "--epochs", "0.5", "--max-steps", "3")
    assert (both["epochs"], both["max_steps"]) == (0.5, 3), "as --max-steps says of itself"


def test_a_template_file_that_a_record_only_names_is_asked_for(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another of that name may lie here; a name of the tokenizer's own is taken as it is."""
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "sculptor.json"
    given = ("train", "m", "-o", tmp_path / "a", "--data", "b.jsonl", "--config", record)
    for name, is_file in (("alt.jinja", True), ("plain", True), ("tool_use", False)):
        if name == "plain":
            (tmp_path / name).write_text("another")
        record.write_text(json.dumps({"command": "train", "settings": {"chat_template": name}}))
        if is_file:
            one_line(cli(*given), f"wrote conversations by {name}", "give it as --chat-template")
            assert parsed(*given, "--chat-template", "own.jinja")["chat_template"] == "own.jinja"
        else:
            assert parsed(*given)["chat_template"] == name


def test_a_run_is_repeated_from_its_record(tmp_path: Path, cli: Callable[..., Result]) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows())
    file = tmp_path / "plan.toml"
    file.write_text(
        f'[analyze]\nmodel = "{model}"\npreserve = 0.4\ndevice = "cpu"\n[train]\nmodel = "{model}"\n'
        f'subspaces = "{tmp_path}/a"\ndata = ["{rows}"]\nmax-steps = 3\nseed = 7\nkeep-inputs = true\n'
    )
    one_line(cli("train", "--config", file, "-o", tmp_path / "b"), "'keep-inputs' is no option")
    file.write_text(file.read_text().replace("keep-inputs = true", "checkpoint-activations = false\noffload = 'none'"))
    assert cli("analyze", "--config", file, "-o", tmp_path / "a").code == 0
    again = cli("analyze", model, "--config", tmp_path / "a" / "archive.json", "-o", tmp_path / "a2")
    assert again.code == 0, again.err
    assert (tmp_path / "a" / "archive.json").read_bytes() == (tmp_path / "a2" / "archive.json").read_bytes()
    assert cli("train", "--config", file, "-o", tmp_path / "b").code == 0
    given = ("--subspaces", tmp_path / "a", "--data", rows, "-o", tmp_path / "c")
    again = cli("train", model, "--config", tmp_path / "b" / "sculptor.json", *given)
    assert again.code == 0, again.err
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()
    b, c = (json.loads((tmp_path / name / "sculptor.json").read_text()) for name in "bc")
    assert b["settings"] == c["settings"]
    edited = ("edit", "interpolate", model, tmp_path / "b")
    assert cli(*edited, "--alpha", 0.25, "-o", tmp_path / "d").code == 0
    assert cli(*edited, "--config", tmp_path / "d" / "sculptor.json", "-o", tmp_path / "e").code == 0
    assert (tmp_path / "d" / "sculptor.json").read_bytes() == (tmp_path / "e" / "sculptor.json").read_bytes()

"""Every example in the documentation runs, and the page of options is what the commands print."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import COMMANDS, Result, save_checkpoint, task_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
def test_quickstart_runs_as_printed(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("docs/quickstart.md", "sh") for line in block.splitlines()]
    assert len(commands) >= 9
    for command in commands:
        found = cli(*shlex.split(command)[1:])
        assert found.code == 0, command + found.err
    (plan,) = blocks("docs/continual.md", "toml")  # it goes on with what the quickstart's demo left
    (tmp_path / "plan.toml").write_text(plan, encoding="utf-8")
    for command in blocks("docs/continual.md", "sh")[0].splitlines():
        found = cli(*shlex.split(command)[1:])
        assert found.code == 0, command + found.err


def test_library_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "task.jsonl", task_rows())
    namespace: dict[str, object] = {}
    code = blocks("docs/library.md", "python")
    assert len(code) == 3
    for block in code:
        exec(compile(block, "docs/library.md", "exec"), namespace)
    for name in ("by-hand", "streamed-by-hand"):
        assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_loop_of_several_processes_runs(tmp_path: Path) -> None:
    from guests import run_script
    from together import together

    from sculptor import AnalyzeSettings, analyze, verify

    save_checkpoint(tmp_path / "model")
    analyze(tmp_path / "model", tmp_path / "subspaces", AnalyzeSettings(preserve=0.5, device="cpu"))
    (code,) = blocks("docs/several-gpus.md", "python")
    together(2, run_script, code, tmp_path)
    assert verify(tmp_path / "model", tmp_path / "by-hand", tmp_path / "subspaces", device="cpu").passed


def test_the_rule_of_the_page_is_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, use = blocks("docs/add-a-method.md", "python")[:2]
    assert rule == (ROOT / "tests" / "methods" / "toys" / "frozen_rows.py").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "methods" / "toys"))
    save_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "task.jsonl", task_rows())
    exec(compile(use, "docs/add-a-method.md", "exec"), {})
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_readme_commands_are_real(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sculptor.jobs.defaults._CPU_TOKENS", (400, 400))
    save_checkpoint(tmp_path / "model")
    for name in ("task", "next", "test"):
        write_rows(tmp_path / f"{name}.jsonl", task_rows())
    (tmp_path / "general.txt").write_text(" ".join(row["text"] for row in task_rows("text")), encoding="utf-8")
    found = [line for block in blocks("README.md", "sh") for line in block.splitlines() if line.startswith("sculptor ")]
    assert len(found) == 8
    for command in found:
        result = cli(*shlex.split(command)[1:])
        assert result.code == 0, command + result.err


def test_streaming_commands_are_real(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "task.jsonl", task_rows())
    assert cli("analyze", "model", "--preserve", 0.5, "--output", "subspaces").code == 0
    (block,) = blocks("docs/streaming.md", "sh")
    for command in block.splitlines():
        result = cli(*shlex.split(command)[1:])
        assert result.code == 0, command + result.err


def test_edit_commands_are_real(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edited import save_tuned

    monkeypatch.chdir(tmp_path)
    save_tuned(save_checkpoint(tmp_path / "model"), tmp_path / "tuned")
    write_rows(tmp_path / "task.jsonl", task_rows())
    assert cli("analyze", "model", "--basis", "curvature", "--data", "task.jsonl", "--output", "subspaces").code == 0
    commands, choice = blocks("docs/edit.md", "sh")
    for command in commands.splitlines():
        result = cli(*shlex.split(command)[1:])
        assert result.code == 0, command + result.err
    # needs a model that learned something: test_edit_choice.py
    assert "--choose task.jsonl --watch general.txt" in choice


@pytest.mark.slow
def test_recipes_are_real(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a folder of its own, with what it begins from; the others are a plan of its own, or need many gigabytes."""
    from edited import save_adapter, save_tuned

    from sculptor import AnalyzeSettings, analyze

    monkeypatch.setattr("sculptor.jobs.defaults._CPU_TOKENS", (400, 400))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    save_tuned(save_checkpoint(inputs / "model"), inputs / "tuned")
    save_adapter(inputs / "model", inputs / "adapter", target_modules=["q_proj", "down_proj"])
    analyze(inputs / "model", inputs / "subspaces", AnalyzeSettings(preserve=0.5, samples=True, device="cpu"))
    for name in ("task", "domain", "test", "chats"):
        write_rows(inputs / f"{name}.jsonl", task_rows())
    (inputs / "general.txt").write_text(" ".join(row["text"] for row in task_rows("text")), encoding="utf-8")
    sections = re.split(r"^## ", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    found = {part.partition("\n")[0]: re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S) for part in sections}
    recipes = {name: "".join(code) for name, code in found.items() if code}
    # the choice needs a model that learned something: test_edit_choice.py
    choice = " --choose task.jsonl --watch general.txt"
    assert choice in recipes["Repair a fine-tune that forgot"]
    recipes = {name: code.replace(choice, "") for name, code in recipes.items()}
    for name in recipes.keys() - {"Ten tasks in a row", "A 70B on one GPU"}:
        place = tmp_path / name.replace(" ", "-")
        place.mkdir()
        for source in inputs.iterdir():
            if f"--output ./{source.name}" not in recipes[name].replace("\n", " ") + " ":
                (place / source.name).symlink_to(source)
        monkeypatch.chdir(place)
        for command in recipes[name].splitlines():
            result = cli(*shlex.split(command)[1:])
            judged = "--fail-if" in command or (command.startswith("sculptor verify") and "/tuned" in command)
            assert result.code in ((0, 1) if judged else (0,)), command + result.err
            assert not (result.code and result.err.startswith("error")), command + result.err


def test_messages_are_as_the_page_has_them(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model")
    save_checkpoint(tmp_path / "other", seed=1)
    write_rows(tmp_path / "task.jsonl", task_rows())
    write_rows(tmp_path / "questions.jsonl", [{"question": "w1", "answer": "w2"}])
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    write_rows(tmp_path / "chats.jsonl", [{"messages": talk}])
    assert cli("analyze", "model", "--preserve", 0.5, "--output", "subspaces").code == 0
    train = ("train", "model", "--subspaces", "subspaces", "--data", "task.jsonl")
    assert cli(*train, "--max-steps", 1, "--output", "tuned").code == 0
    for name in ("quantised", "pickled"):
        shutil.copytree("model", name)
    config = json.loads(Path("quantised/config.json").read_text())
    Path("quantised/config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```sh\n(.*)\n```\n\n(?:```text\n(.*)\n```)?(.*`(error: [^(]*)\()?", page, re.M)
    assert len(shown) == 10
    for command, message, _, begin in shown:
        found = cli(*shlex.split(command)[1:])
        assert found.code in (1, 2)
        said = found.err.strip().replace(f"{tmp_path}/", "")
        assert said == message or (begin and said.startswith(begin)), command
    assert not Path("out").exists()


def test_rules_commands_are_real(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "task.jsonl", task_rows())
    (block,) = blocks("docs/rules.md", "sh")
    for command in block.splitlines():
        result = cli(*shlex.split(command)[1:])
        assert result.code == 0, command + result.err


def test_new_token_commands_are_real(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "task.jsonl", [row | {"completion": "<topic>" + row["completion"]} for row in task_rows()])
    assert cli("analyze", "model", "--preserve", 0.5, "--output", "subspaces").code == 0
    for command in blocks("docs/new-tokens.md", "sh")[0].splitlines():
        result = cli(*shlex.split(command)[1:])
        assert result.code == 0, command + result.err


def test_data_examples_are_read(tmp_path: Path) -> None:
    from sculptor.data.rows import read_rows

    (block,) = blocks("docs/data.md", "json")
    (tmp_path / "rows.jsonl").write_text(block)
    assert len(read_rows([tmp_path / "rows.jsonl"])) == 3


def test_commands_on_data_and_evaluation_are_real(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("model", "tuned")):
        save_checkpoint(tmp_path / name, seed=seed)
    write_rows(tmp_path / "task.jsonl", task_rows(count=6))
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    write_rows(tmp_path / "chats.jsonl", [{"messages": talk}] * 2)
    write_rows(tmp_path / "choices.jsonl", [{"prompt": "w1", "choices": ["w2", "w3"], "gold": 1}] * 2)
    (tmp_path / "general.txt").write_text(" ".join(row["text"] for row in task_rows("text")), encoding="utf-8")
    (tmp_path / "questions.csv").write_text("question,answer\nw1,w2\n", encoding="utf-8")
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }} <end> {% endfor %}")
    commands = [
        line
        for page in ("data", "evaluate")
        for block in blocks(f"docs/{page}.md", "sh")
        for line in block.splitlines()
    ]
    assert len(commands) == 6
    for command in commands:
        result = cli(*shlex.split(command)[1:])
        assert result.code == 0, command + result.err
    (code,) = blocks("docs/evaluate.md", "python")
    exec(compile(code, "docs/evaluate.md", "exec"), {})


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_options_is_what_help_prints(name: str) -> None:
    from click import Context, Group
    from sculptor_cli.main import main

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    command = main.get_command(Context(main), name)
    parts = [name, *(f"{name} {part}" for part in (command.commands if isinstance(command, Group) else ()))]
    for part in parts:
        help_ = CliRunner().invoke(main, [*part.split(), "--help"], prog_name="sculptor", terminal_width=100)
        assert f"## sculptor {part}\n\n```text\n{help_.output.rstrip()}\n```" in page


def anchors(page: Path) -> set[str]:
    """What may stand behind a # : headings as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = [re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", head) for head in re.findall(r"^#+ +(.+?) *$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    dead = []
    for page in pages:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            place = page.parent / target if target else page
            if not target.startswith("http") and not (
                place.exists() and (not anchor or place.suffix != ".md" or anchor in anchors(place))
            ):
                dead.append(f"{page.name}: {target}#{anchor}")
    assert dead == []
    linked = {
        target for page in pages for target in re.findall(r"docs/([\w-]+\.\w+)", page.read_text(encoding="utf-8"))
    }
    assert {page.name for page in (ROOT / "docs").iterdir() if page.is_file()} <= linked, "no page names it"


def test_the_archive_format_page_names_every_key() -> None:
    from dataclasses import fields

    from sculptor.archive.manifest import Manifest, MatrixRecord
    from sculptor.methods.staircase import StaircaseRule

    page = (ROOT / "docs" / "archive-format.md").read_text(encoding="utf-8")
    for cls in (Manifest, MatrixRecord, StaircaseRule):
        for field in fields(cls):
            assert f"`{field.name}`" in page, field.name


def test_the_page_of_records_names_every_key(tmp_path: Path) -> None:
    from edited import save_tuned

    from sculptor import AnalyzeSettings, TrainSettings, analyze, edit, train
    from sculptor.edits.settings import Interpolate

    base, rows = save_checkpoint(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", task_rows(count=6))
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu", samples=True))
    settings = TrainSettings(max_steps=2, device="cpu", also_train=("*norm*",))
    data = [f"{rows}:1", f"{rows}:2"]
    train(base, tmp_path / "archive", data, tmp_path / "tuned", settings, eval_data=rows, replay="self:0.1")
    edit(base, save_tuned(base, tmp_path / "other"), tmp_path / "edited", Interpolate(alpha=0.5), device="cpu")
    page = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
    found = set()
    for place in ("tuned", "edited"):
        record = json.loads((tmp_path / place / "sculptor.json").read_text())
        parts = [record, *(record.get(key, {}) for key in ("base", "data", "eval_data", "examples", "result", "tuned"))]
        parts += [record["lineage"][0], *list(record.get("matrices", {}).values())[:1], *record.get("roles", [])[:1]]
        found |= {key for part in parts for key in part}
    for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line).keys() - {"relative_rate"}
    named = set(re.findall(r"`([\w.]+)`", page))
    assert not found - named
    assert len(found) > 40


def test_an_independent_reader_follows_the_format_page(tmp_path: Path) -> None:
    """A reader written from docs/archive-format.md alone, without sculptor's own."""
    import hashlib
    import json

    import numpy as np
    from safetensors.numpy import load_file

    from sculptor import AnalyzeSettings, analyze

    for constraint in ("double", "input", "core"):
        model = save_checkpoint(tmp_path / constraint / "model")
        settings = AnalyzeSettings(preserve=0.75, constraint=constraint, device="cpu")  # type: ignore[arg-type]
        analyze(model, tmp_path / constraint / "a", settings)
        directory = tmp_path / constraint / "a"
        manifest = json.loads((directory / "archive.json").read_text())
        assert (manifest["format"], manifest["version"]) == ("sculptor-subspaces", 3)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == manifest["sha256"]
        weights = load_file(model / "model.safetensors")
        for name, record in manifest["matrices"].items():
            rule, tensors = record["rule"], record["tensors"]
            m, n = rule["shape"]
            assert hashlib.sha256(weights[name].tobytes()).hexdigest() == record["base_digest"]
            complete = []
            for key, d in (("output", m), ("input", n)):
                side = rule[key]
                if side is None:
                    complete.append(np.eye(d))
                    continue
                stored = manifest["tensors"][tensors[key]]
                q = load_file(directory / stored["file"])[tensors[key]]
                assert hashlib.sha256(q.tobytes()).hexdigest() == stored["sha256"]
                rest = np.linalg.qr(q.astype(np.float64), mode="complete")[0][:, q.shape[1] :]
                complete.append(np.hstack([q, rest] if side["form"] == "leading" else [rest, q]))
            qu, qv = complete
            u, s, vt = np.linalg.svd(weights[name].astype(np.float64))
            k = int(0.75 * min(m, n))
            leading, start = (u[:, :k] * s[:k]) @ vt[:k], 0
            frozen = 0.0
            for stop, reach in rule["steps"]:
                frozen += np.linalg.norm(qu[:, start:stop].T @ leading @ qv[:, :reach]) ** 2
                start = stop
            assert abs(frozen**0.5 - np.linalg.norm(leading)) < 1e-5 * np.linalg.norm(leading)


def cells(notebook: str) -> list[dict[str, Any]]:
    """Those with code."""
    read = json.loads((ROOT / "docs" / notebook).read_text(encoding="utf-8"))
    return [cell for cell in read["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures follow rounding; what it says of them does not."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace: dict[str, Any] = {}
    for cell in cells("quickstart.ipynb"):
        exec(compile("".join(cell["source"]), "docs/quickstart.ipynb", "exec"), namespace)
    said = capsys.readouterr().out
    assert "protected: PASSED" in said
    assert "plain: FAILED" in said
    (old, new), (plain_old, plain_new) = namespace["scores"]["protected"], namespace["scores"]["plain"]
    assert old > 0.8 > 0.6 > plain_old
    assert min(new, plain_new) > 0.9


def test_the_notebook_shows_what_a_run_gave() -> None:
    outputs = [output for cell in cells("quickstart.ipynb") for output in cell["outputs"]]
    assert all(cell["execution_count"] == i for i, cell in enumerate(cells("quickstart.ipynb"), 1))
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not re.search(r"/home|/tmp|/work", str([output.get("text") for output in outputs]))


def test_no_placeholder_is_left() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert "@@" not in page.read_text(encoding="utf-8"), page.name

"""`sculptor edit lines|interpolate|project|threshold` by its commands, on checkpoints of every kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, make_tokenizer, save_checkpoint, slowly, task_rows, write_rows
from edited import change_tensors, save_adapter, save_tuned, tensors_of

import sculptor
from sculptor import AnalyzeSettings, analyze, verify
from sculptor.edits.interpolate import interpolate
from sculptor.edits.lines import lines
from sculptor.edits.threshold import threshold

COVERS = ["sculptor.edits.settings", "sculptor.report.edit", "sculptor.jobs.edit_record", "sculptor.jobs.edit_report"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an archive of its curvature and one of its weights, a fine-tune of everything, rows and text."""
    path = tmp_path_factory.mktemp("edit")
    save_checkpoint(path / "base")
    save_tuned(path / "base", path / "tuned")
    write_rows(path / "text.jsonl", task_rows("text"))
    write_rows(path / "task.jsonl", task_rows())
    curvature = AnalyzeSettings(basis="curvature", data=(str(path / "text.jsonl"),), device="cpu")
    analyze(path / "base", path / "archive", curvature)
    analyze(path / "base", path / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    return path


def run(cli: Callable[..., Result], command: str, *arguments: object) -> Result:
    return cli("edit", command, *arguments, "--device", "cpu")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("family", ["llama-tied", "t5", *slowly("llama")])
def test_lines_on_sharded_bf16_files(family: str, cli: Callable[..., Result], tmp_path: Path) -> None:
    """In the layout of TUNED, with depth counted in each stack."""
    base = save_checkpoint(tmp_path / "base", family, dtype=torch.bfloat16, max_shard_size="15KB")
    tuned = save_tuned(base, tmp_path / "tuned", dtype=torch.bfloat16, max_shard_size="9KB")
    out = tmp_path / "out"
    found = run(cli, "lines", base, tuned, "--alpha", 0.25, "--beta", 0.5, "-o", out)
    assert (found.code, found.err) == (0, "")
    before, after, edited = (tensors_of(path) for path in (base, tuned, out))
    assert {f.name for f in out.glob("*.safetensors*")} == {f.name for f in tuned.glob("*.safetensors*")}
    for name, value in edited.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        factor = 0.25 + 0.5 * (block or 0)
        exact = before[name].double() + factor * (after[name].double() - before[name].double())
        assert same(value, exact.to(torch.bfloat16)), name
        assert torch.equal(value, lines(before[name], after[name], block, 0.25, 0.5).to(torch.bfloat16))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("command", "numbers", "expected"),
    [
        ("lines", ("--alpha", 1), "tuned"),
        ("lines", ("--alpha", 0, "--beta", 0), "base"),
        *slowly(
            ("interpolate", ("--alpha", 1), "tuned"),
            ("interpolate", ("--alpha", 0), "base"),
            ("threshold", ("--alpha", 0), "base"),
        ),
    ],
)
def test_the_ends_are_the_inputs(
    command: str, numbers: tuple[object, ...], expected: str, cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    assert run(cli, command, made / "base", made / "tuned", *numbers, "-o", tmp_path / "out").code == 0
    wanted, found = tensors_of(made / expected), tensors_of(tmp_path / "out")
    assert set(wanted) == set(found)
    assert all(same(found[name], value) for name, value in wanted.items())


def test_interpolate_and_threshold_are_their_formulas(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    assert run(cli, "interpolate", made / "base", made / "tuned", "--alpha", 0.4, "-o", tmp_path / "even").code == 0
    report = run(cli, "threshold", made / "base", made / "tuned", "--json", "-o", tmp_path / "cut")
    assert report.code == 0
    before, after = tensors_of(made / "base"), tensors_of(made / "tuned")
    even, cut = tensors_of(tmp_path / "even"), tensors_of(tmp_path / "cut")
    for name, base in before.items():
        assert same(even[name], interpolate(base, after[name], 0.4).float())
        if base.ndim == 1:
            assert same(cut[name], after[name])
        else:
            kept = threshold(after[name].double() - base.double())
            torch.testing.assert_close(cut[name], (base.double() + kept).float(), atol=1e-6, rtol=0)
    stays = sum(float((cut[name].double() - base.double()).square().sum()) for name, base in before.items())
    whole = sum(float((after[name].double() - base.double()).square().sum()) for name, base in before.items())
    assert report.json["all"]["stays"] == pytest.approx((stays / whole) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("archive", ["archive", "weights"])
@pytest.mark.parametrize("numbers", [(), ("--alpha", 0.5), ("--soft", 2)])
def test_what_was_projected_verifies(
    archive: str, numbers: tuple[object, ...], cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (made / "base", made / "tuned", "--subspaces", made / archive, *numbers, "-o", out)
    found = run(cli, "project", *arguments)
    if archive == "weights" and "--soft" in numbers:
        assert found.code == 2
        assert "--soft without effect" in found.err
        assert "has basis weights" in found.err
        return
    assert (found.code, found.err) == (0, "")
    proof = verify(made / "base", out, made / archive, device="cpu")
    assert proof.passed
    assert proof.num_changed == proof.num_targets == 14
    assert proof.leak < 1e-5
    assert not verify(made / "base", made / "tuned", made / archive, device="cpu").passed
    protected = {name for name in tensors_of(out) if "_proj" in name}
    before, edited = tensors_of(made / "base"), tensors_of(out)
    assert all(same(edited[name], value) for name, value in before.items() if name not in protected)


def test_projecting_twice_is_once(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    for tuned, out in ((made / "tuned", "once"), (tmp_path / "once", "twice")):
        found = run(cli, "project", made / "base", tuned, "--subspaces", made / "archive", "-o", tmp_path / out)
        assert found.code == 0
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("save", "limit"), [("keep", 0.2), ("float32", 1e-5)])
def test_a_bf16_base_verifies_too(
    save: str, limit: float, cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    """To what rounding explains, or to float32 if it is saved so."""
    base = save_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    tuned = save_tuned(base, tmp_path / "tuned")
    settings = AnalyzeSettings(basis="curvature", data=(str(made / "text.jsonl"),), device="cpu")
    analyze(base, tmp_path / "archive", settings)
    arguments = (base, tuned, "--subspaces", tmp_path / "archive", "--save-dtype", save, "-o", tmp_path / "out")
    assert run(cli, "project", *arguments).code == 0
    proof = verify(base, tmp_path / "out", tmp_path / "archive", device="cpu")
    assert proof.passed
    assert proof.leak < limit
    dtypes = {value.dtype for value in tensors_of(tmp_path / "out").values()}
    assert dtypes == {torch.bfloat16 if save == "keep" else torch.float32}


def test_everything_else_is_of_tuned_or_of_base(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(made / "tuned", tuned)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (tuned / "training_args.bin").write_bytes(b"pickle")
    assert run(cli, "interpolate", made / "base", tuned, "--alpha", 0.5, "-o", tmp_path / "even").code == 0
    found = run(cli, "project", made / "base", tuned, "--subspaces", made / "archive", "-o", tmp_path / "projected")
    assert found.code == 0
    assert "Not taken of TUNED: chat_template.jinja was added" in found.out
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "even" / name).read_bytes() == (tuned / name).read_bytes()
        assert (tmp_path / "projected" / name).read_bytes() == (made / "base" / name).read_bytes()
    assert (tmp_path / "even" / "chat_template.jinja").is_file()
    assert not (tmp_path / "projected" / "chat_template.jinja").exists()
    assert not list(tmp_path.glob("*/training_args.bin"))[1:]
    assert verify(made / "base", tmp_path / "projected", made / "archive", device="cpu").passed


def test_the_record_says_what_was_done(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(cli, "project", made / "base", made / "tuned", "--subspaces", made / "archive", "-o", out).code == 0
    text = (out / "sculptor.json").read_text()
    record = json.loads(text)
    assert record["command"] == "edit project"
    assert record["settings"] == {"soft": 0.0, "alpha": 1.0, "save_dtype": "keep"}
    names = [record[key]["name"] for key in ("base", "tuned", "archive")]
    assert names == ["base", "tuned", "archive"]
    assert str(made) not in text
    assert all(len(record[key]["identity"]) == 64 for key in ("base", "tuned", "archive"))
    (merge,) = record["lineage"]
    assert len(merge["base_digests"]) == 14
    again = tmp_path / "again"
    assert run(cli, "interpolate", made / "base", out, "--alpha", 0.5, "-o", again).code == 0
    assert len(json.loads((again / "sculptor.json").read_text())["lineage"]) == 2
    assert json.loads((again / "sculptor.json").read_text())["base"] == record["base"]


def test_a_dry_run_measures_and_writes_nothing(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    before = sorted(made.rglob("*"))
    arguments = (made / "base", made / "tuned", "--alpha", 0.3)
    dry = run(cli, "lines", *arguments, "--dry-run", "--json")
    wet = run(cli, "lines", *arguments, "-o", tmp_path / "out", "--json")
    assert dry.code == wet.code == 0
    assert dry.json["output"] is None
    assert dry.json["roles"] == wet.json["roles"]
    assert {role["role"] for role in dry.json["roles"]} >= {"self_attn.q_proj", "lm_head", "input_layernorm"}
    text = run(cli, "lines", *arguments, "--dry-run")
    assert "Nothing was written." in text.out
    assert max(map(len, text.out.splitlines())) <= 100
    assert sorted(made.rglob("*")) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["interpolate", "project"])
def test_tuned_may_be_an_adapter(command: str, cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = save_adapter(made / "base", tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    more: tuple[object, ...] = ("--alpha", 1)
    if command == "project":
        more = ("--subspaces", made / "archive")
    found = run(cli, command, made / "base", tmp_path / "adapter", *more, "-o", tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    merged, before, edited = (
        model.merge_and_unload().state_dict(),
        tensors_of(made / "base"),
        tensors_of(tmp_path / "out"),
    )
    for name, value in edited.items():
        if not any(part in name for part in ("q_proj", "up_proj")):
            assert same(value, before[name])
        elif command == "interpolate":
            torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-6)
    assert json.loads((tmp_path / "out" / "sculptor.json").read_text())["tuned"]["kind"] == "adapter"
    if command == "project":
        assert verify(made / "base", tmp_path / "out", made / "archive", device="cpu").passed


def test_experts_are_edited_too(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Tensors that loading joins, one by one."""
    base = save_checkpoint(tmp_path / "base", "mixtral")
    tuned = save_tuned(base, tmp_path / "tuned")
    assert run(cli, "interpolate", base, tuned, "--alpha", 0.5, "-o", tmp_path / "out").code == 0
    before, after, edited = (tensors_of(tmp_path / name) for name in ("base", "tuned", "out"))
    for name, value in edited.items():
        assert same(value, interpolate(before[name], after[name], 0.5).float())


def test_stacks_of_experts_are_cut_one_by_one(cli: Callable[..., Result], tmp_path: Path) -> None:
    """A tensor of three dimensions goes through memory by its slices."""
    from families import tiny

    tiny("gpt_oss", "GptOssForCausalLM").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    tuned = save_tuned(tmp_path / "base", tmp_path / "tuned")
    found = run(cli, "threshold", tmp_path / "base", tuned, "-o", tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    before, after, edited = (tensors_of(tmp_path / name) for name in ("base", "tuned", "out"))
    (name, *_) = [name for name, value in before.items() if value.ndim == 3]
    for old, new, value in zip(before[name], after[name], edited[name], strict=True):
        kept = threshold(new.double() - old.double())
        torch.testing.assert_close(value, (old.double() + kept).float(), atol=1e-6, rtol=0)


def one_line(found: Result, *needles: str, code: int) -> None:
    assert found.code == code, (found.code, found.err)
    lines_ = found.err.strip().splitlines()
    assert len(lines_) == 1, found.err
    assert lines_[0].startswith("error: ")
    for needle in needles:
        assert needle in lines_[0]


def test_bad_options_are_one_line(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    base, tuned, out, archive = (
        made / "base",
        made / "tuned",
        ("-o", tmp_path / "out"),
        ("--subspaces", made / "archive"),
    )
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("lines", base, tuned, *out), ("--alpha is needed",)),
        (("interpolate", base, tuned, *out), ("--alpha is needed",)),
        (("interpolate", base, tuned, "--alpha", 2, *out), ("alpha",)),
        (("lines", base, tuned, "--alpha", "nan", *out), ("alpha",)),
        (("lines", base, tuned, "--alpha", 0.5), ("--output is needed",)),
        (("lines", base, tuned, "--alpha", 0.5, "--dry-run", *out), ("--output without effect",)),
        (
            ("lines", base, tuned, "--alpha", 0.5, "--watch", "x.txt", *out),
            ("--watch without effect without --choose",),
        ),
        (("lines", base, tuned, "--choose", "x.jsonl", *out), ("--choose needs --watch",)),
        (
            ("lines", base, tuned, "--alpha", 0.5, "--choose", "x", "--watch", "y", *out),
            ("--choose without effect: all numbers are given",),
        ),
        (
            ("project", base, tuned, *archive, "--alpha", 1, "--soft", 1, "--choose", "x", "--watch", "y", *out),
            ("all numbers are given",),
        ),
        (("project", base, tuned, *out), ("--subspaces",)),
        (("project", base, tuned, *archive, "--soft", -1, *out), ("soft",)),
        (("threshold", base, tuned, "--lr", 1, *out), ("--lr",)),
        (("sharpen", base, tuned), ("No such command 'sharpen'",)),
    ]
    for arguments, needles in cases:
        one_line(cli("edit", *arguments), *needles, code=2)
    assert not list(tmp_path.iterdir())


def test_bad_inputs_are_one_line_and_leave_nothing(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    base, tuned, out = made / "base", made / "tuned", ("--alpha", 0.5, "-o", tmp_path / "out")
    other = save_checkpoint(tmp_path / "other", "gpt2")
    broken = tmp_path / "broken"
    shutil.copytree(tuned, broken)
    change_tensors(broken, lambda found: found["model.norm.weight"].fill_(float("inf")))
    recorded = tmp_path / "recorded"
    shutil.copytree(tuned, recorded)
    (recorded / "sculptor.json").write_text("{")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"}))
    seed = save_checkpoint(tmp_path / "seed", seed=5)
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("lines", tmp_path / "nowhere", tuned, *out), ("no such directory",)),
        (("lines", base, tmp_path / "nowhere", *out), ("no such directory",)),
        (("lines", base, other, *out), ("an edit needs two checkpoints of one model",)),
        (("lines", base, broken, *out), ("model.norm.weight", "NaN or infinite")),
        (("lines", base, recorded, *out), ("sculptor.json", "damaged")),
        (("lines", base, tmp_path / "adapter", *out), ("peft_type 'VERA' is not supported",)),
        (("lines", base, made / "text.jsonl", *out), ("is a file",)),
        (("project", base, tuned, "--subspaces", tmp_path / "nowhere", *out), ("no archive.json",)),
        (("project", seed, tuned, "--subspaces", made / "archive", *out), ("archive of another checkpoint",)),
        (("lines", base, tuned, "--alpha", 0.5, "-o", "/proc/nowhere/out"), ("cannot write",)),
        (("lines", base, tuned, "--alpha", 0.5, "-o", tuned, "--overwrite"), ("is or holds the input",)),
    ]
    for arguments, needles in cases:
        one_line(cli("edit", *arguments), *needles, code=1)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("*.partial"))


def test_existing_outputs_are_kept(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    arguments = ("interpolate", made / "base", made / "tuned", "--alpha", 0.5, "-o", tmp_path / "out")
    assert cli("edit", *arguments).code == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    one_line(cli("edit", *arguments[:4], 0.9, *arguments[5:]), "exists already", "--overwrite", code=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert cli("edit", *arguments[:4], 0.9, *arguments[5:], "--overwrite").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first


def test_a_full_disk_leaves_nothing(cli: Callable[..., Result], made: Path, tmp_path: Path, small_disk: None) -> None:
    found = run(cli, "interpolate", made / "base", made / "tuned", "--alpha", 0.5, "-o", tmp_path / "out")
    one_line(found, "cannot write", code=1)
    assert not list(tmp_path.iterdir())


def test_rules_that_somebody_else_made(made: Path, tmp_path: Path) -> None:
    """A rule that says what of an update it allows is projected onto like sculptor's own."""
    from dataclasses import dataclass

    from methods.toys.frozen_rows import FirstRows, FrozenRows

    from sculptor.methods.method import Derived

    @dataclass(frozen=True)
    class Allowing(FrozenRows):
        def projection(self, weight: Any, tensors: Any, soften: float = 0.0) -> Any:
            def kept(update: torch.Tensor) -> torch.Tensor:
                return torch.cat([torch.zeros_like(update[: self.count]), update[self.count :]])

            return kept

    class Method(FirstRows):
        def derive(self, evidence: Any) -> Derived:
            return Derived(Allowing(evidence.shape, evidence.shape[0] // 4), {})

    rules = {"frozen-rows": sculptor.Kind(Allowing, Method)}
    analyze(made / "base", tmp_path / "archive", AnalyzeSettings(rule="frozen-rows", device="cpu"), rules=rules)
    project, out = sculptor.Project(), tmp_path / "out"
    subspaces = tmp_path / "archive"
    sculptor.edit(made / "base", made / "tuned", out, project, subspaces=subspaces, device="cpu", rules=rules)
    assert verify(made / "base", out, subspaces, device="cpu", rules=rules).passed
    assert not verify(made / "base", made / "tuned", subspaces, device="cpu", rules=rules).passed

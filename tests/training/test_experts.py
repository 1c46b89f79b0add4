"""Experts of a stack: each is folded, projected, merged and proved by itself, resident or streamed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, slowly, task_rows, write_rows
from families import mappings, tiny
from safetensors.torch import load_file
from torch import Tensor

import sculptor
from sculptor import AnalyzeSettings, Archive, TrainSettings
from sculptor.checkpoint.orientation import as_out_in
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import ArchiveError
from sculptor.methods.staircase import StaircaseRule
from sculptor.model.experts import multiply, run_experts
from sculptor.training.experts import leaf_of, run_in_pieces, tap
from sculptor.training.protect import protected_matrices
from sculptor.validation import sign

COVERS = ["sculptor.checkpoint.experts"]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def save(path: Path, family: str) -> Path:
    tiny(family, mappings()["causal"][family]).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def experts_of(model: Any) -> Any:
    return next(module for path, module in model.named_modules() if path.endswith(".experts"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3", "deepseek_v4"])
def test_experts_run_here_as_they_do_in_transformers(family: str, generator: torch.Generator) -> None:
    model = tiny(family, mappings()["causal"][family]).double()
    model.config._experts_implementation = "eager"
    module = experts_of(model)
    hidden = torch.randn(7, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator).double()
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0], [3, 1], [0, 1]])  # nothing for the third
    weights = torch.rand(7, 2, generator=generator).double()
    expected = module(hidden, chosen, weights)
    found = run_experts(module, multiply, hidden, chosen, weights)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_matrix_has_the_gradient_of_its_window(family: str, tmp_path: Path, generator: torch.Generator) -> None:
    """Against autograd through the whole stack; the matrices of the second expert are asked for in part."""
    save(tmp_path / "model", family)
    sculptor.analyze(tmp_path / "model", tmp_path / "a", AnalyzeSettings(preserve=0.5, device="cpu"))
    model = tiny(family, mappings()["causal"][family]).double()
    model.config._experts_implementation = "eager"
    path, module = next(item for item in model.named_modules() if item[0].endswith(".experts"))
    hidden = torch.randn(6, 32, generator=generator).double()
    chosen, weights = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 1], [1, 3], [0, 1]]), torch.rand(6, 2).double()
    module(hidden, chosen, weights).square().sum().backward()
    wanted = {leaf: getattr(module, leaf).grad for leaf in ("gate_up_proj", "down_proj")}
    model.requires_grad_(False)
    records = [r for r in Archive(tmp_path / "a").values() if r.parameter.startswith(path + ".")]
    left_out = next(record for record in records if record.window.part == 1)
    got: dict[str, Tensor] = {}
    asked = [r for r in records if r is not left_out]
    handle = run_in_pieces(
        module,
        [(leaf_of(r), r.window, tap(lambda g, r=r: got.update({r.name: g}), torch.device("cpu"))) for r in asked],
    )
    module(hidden, chosen, weights).square().sum().backward()
    handle.remove()
    assert got.keys() == {record.name for record in asked if record.window.part != 2}, "none for what no token reaches"
    for record in asked:
        if record.name in got:
            expected = record.window.of(wanted[record.parameter.rpartition(".")[2]])
            torch.testing.assert_close(got[record.name], expected, atol=1e-10, rtol=1e-10)
    assert "forward" not in module.__dict__


def leaks(archive: Archive, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Of every matrix that changed: frozen part over update, in float64, by the definition."""
    found = {}
    for name, record in archive.items():
        assert isinstance(record.rule, StaircaseRule)
        old, new = (t[record.tensor] if record.part is None else t[record.tensor][record.part] for t in (before, after))
        update = as_out_in(new.double() - old.double(), record.transposed)
        if not bool(update.any()):
            continue
        tensors = archive.read(name).tensors
        frozen = record.rule.violation(
            tensors, as_out_in(old.double(), record.transposed), update, torch.zeros_like(update)
        )
        found[name] = frozen.norm / float(update.norm())
    return found


@pytest.mark.parametrize(
    ("family", "basis"), [("gpt_oss", "curvature"), *slowly(("mixtral", "weights"), ("qwen3_moe", "curvature"))]
)
def test_experts_of_a_loop_of_ones_own_are_trained_and_merged(family: str, basis: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    data = (str(rows),) if basis == "curvature" else ()
    settings = AnalyzeSettings(basis=basis, data=data, preserve=None if data else 0.5, device="cpu")
    sculptor.analyze(path, tmp_path / "a", settings)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(40).view(4, 10) + 4
    plain = copy.deepcopy(model)(input_ids=ids).logits
    sculptor.protect(model, tmp_path / "a")
    torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=1e-5, rtol=1e-4)
    with pytest.raises(ArchiveError, match="protected already"):
        sculptor.protect(model, tmp_path / "a")
    optimizer = torch.optim.AdamW(sculptor.parameter_groups(model))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(model)  # goes on with coordinates of its own
    for matrix in protected_matrices(twin):
        with torch.no_grad():
            matrix.coordinates.values[0].zero_()
    trained = model(input_ids=ids).logits
    assert not torch.allclose(twin(input_ids=ids).logits, trained, atol=1e-3)
    sculptor.merge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, trained, atol=1e-4, rtol=1e-3)
    assert not any("coordinates" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "by-hand")
    found = leaks(Archive(tmp_path / "a"), tensors_of(path), tensors_of(tmp_path / "by-hand"))
    assert len([name for name in found if "experts" in name]) >= 6
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"exclude": ("*experts.0.*", "*experts.1.up_proj*")}),
        *slowly(("gpt_oss", {"exclude": ("*down_proj[[]2]",), "basis": "curvature"})),
        *slowly(("mixtral", {"targets": ("*.experts.1.*",)}), ("deepseek_v3", {"basis": "inputs"})),
    ],
)
def test_streamed_is_resident_and_what_is_left_out_keeps_its_bytes(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    data = {"data": (str(rows),)} if "basis" in options else {"preserve": 0.5}
    report = sculptor.analyze(path, tmp_path / "a", AnalyzeSettings(**options, **data, device="cpu"))
    archive = Archive(tmp_path / "a")
    for offload in ("none", "bases", "cpu", "disk"):
        settings = TrainSettings(
            max_steps=3, batch_size=6, micro_batch_size=2, learning_rate=1e-2, clip=0.1, device="cpu", offload=offload
        )  # type: ignore[arg-type]
        sculptor.train(path, tmp_path / "a", [rows], tmp_path / offload, settings)
    before, after = tensors_of(path), tensors_of(tmp_path / "none")
    for offload in ("cpu", "disk"):
        for folder in (".", "subspaces"):
            one, other = tensors_of(tmp_path / "none" / folder), tensors_of(tmp_path / offload / folder)
            assert one.keys() == other.keys()
            if family == "deepseek_v3":  # its attention rounds by where its weights lie
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            else:
                assert all(torch.equal(value, other[name]) for name, value in one.items())
    parts = {(record.tensor, record.part) for record in archive.values()}
    for name, old in before.items():
        for part in [None] if old.ndim < 3 else range(len(old)):
            if (name, part) not in parts:
                pair = (old, after[name]) if part is None else (old[part], after[name][part])
                assert torch.equal(*pair), (name, part)
    found = leaks(archive, before, after)
    assert [name for name in found if "experts" in name]
    assert max(found.values()) < 2e-6, "of float32: rounding"
    assert sculptor.verify(path, tmp_path / "disk", tmp_path / "a", device="cpu").passed
    assert report.num_matrices == len(archive)


def test_an_expert_that_no_row_reaches_is_left_out_by_name(tmp_path: Path) -> None:
    """Two tokens, of which each goes to one of four experts."""
    path = save(tmp_path / "model", "mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "w1 w2"}])
    settings = AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu")
    report = sculptor.analyze(path, tmp_path / "a", settings)
    reached = {name for name in Archive(tmp_path / "a") if "experts" in name}
    left_out = {item.role for item in report.not_targeted if item.reason == "no calibration row reaches it"}
    assert 6 <= len(reached) <= 18
    assert left_out == {"mlp.experts.w1", "mlp.experts.w3", "mlp.experts.down_proj"}


def test_a_window_outside_of_its_parameter_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save(tmp_path / "model", "gpt_oss")
    sculptor.analyze(path, tmp_path / "a", AnalyzeSettings(preserve=0.5, device="cpu", targets=("down_proj",)))
    manifest = tmp_path / "a" / "archive.json"
    content = json.loads(manifest.read_text())
    next(iter(content["matrices"].values()))["window"]["part"] = 9
    content.pop("sha256")
    manifest.write_text(json.dumps(content | {"sha256": sign(content)}))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with pytest.raises(ArchiveError, match=r"is \[32, 48\]|is \[48, 32\]"):
        sculptor.protect(model, tmp_path / "a")
    assert open_checkpoint(path).config["model_type"] == "gpt_oss"

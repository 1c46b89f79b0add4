"""The proof holds when it should and fails when it should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, train, verify
from sculptor.errors import VerificationError

COVERS = ["sculptor.analysis.rest"]
NAME = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bf16 base, its archive, and what one task made of it."""
    root = tmp_path_factory.mktemp("chain")
    made: dict[str, Any] = {
        "root": root,
        "base": save_checkpoint(root / "base", dtype=torch.bfloat16),
        "archive": root / "archive",
    }
    analyze(made["base"], made["archive"], AnalyzeSettings(preserve=0.5, device="cpu"))
    made["data"] = write_rows(root / "task.jsonl", task_rows())
    for dtype in ("keep", "float32"):
        settings = TrainSettings(max_steps=20, batch_size=8, learning_rate=1e-2, save_dtype=dtype, device="cpu")  # type: ignore[arg-type]
        made[dtype] = root / dtype
        made[f"{dtype} report"] = train(made["base"], made["archive"], [made["data"]], made[dtype], settings)
    return made


def edited(chain: dict[str, Path], tmp_path: Path, source: str, change: Any) -> Path:
    import shutil

    shutil.copytree(chain[source], tmp_path / "edited")
    tensors = load_file(tmp_path / "edited" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "edited" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "edited"


def test_bf16_leaks_what_rounding_explains(chain: dict[str, Path]) -> None:
    found = verify(chain["base"], chain["keep"], chain["archive"], device="cpu")
    assert found.passed
    assert found.untouched_identical
    assert (found.num_targets, found.num_changed, found.num_untouched) == (14, 14, 7)
    assert found.leak == pytest.approx(found.rounding, rel=0.15)
    assert found.leak > 1e-4
    assert found.cast is None


def test_train_and_verify_say_the_same_of_rounding(chain: dict[str, Any]) -> None:
    for dtype in ("keep", "float32"):
        found = verify(chain["base"], chain[dtype], chain["archive"], device="cpu")
        assert chain[f"{dtype} report"].rounding_loss == pytest.approx(found.eaten, rel=0.05)


def test_float32_leaks_a_few_1e6_at_most(chain: dict[str, Path]) -> None:
    found = verify(chain["base"], chain["float32"], chain["archive"], device="cpu")
    assert found.passed
    assert found.max_leak < 3e-6
    assert found.untouched_identical
    assert found.cast == "float32"


def test_an_update_of_a_protected_pair_fails(chain: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        u, _, vh = torch.linalg.svd(load_file(chain["base"] / "model.safetensors")[NAME].float())
        norm = tensors[NAME].norm()
        tensors[NAME] = tensors[NAME] + 1e-4 * norm * torch.outer(u[:, 0], vh[20])

    path = edited(chain, tmp_path, "float32", change)
    found = verify(chain["base"], path, chain["archive"], device="cpu")
    assert not found.passed
    assert [matrix.name for matrix in found.matrices if not matrix.holds] == [NAME]
    assert found.untouched_identical


def test_a_changed_bystander_fails(chain: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 0.01

    found = verify(chain["base"], edited(chain, tmp_path, "keep", change), chain["archive"], device="cpu")
    assert not found.passed
    assert not found.untouched_identical
    assert found.changed_elsewhere == ("model.norm.weight",)
    assert all(matrix.holds for matrix in found.matrices)


def test_an_unchanged_checkpoint_holds(chain: dict[str, Path]) -> None:
    found = verify(chain["base"], chain["base"], chain["archive"], device="cpu")
    assert found.passed
    assert (found.leak, found.num_changed) == (0.0, 0)


def test_plain_training_fails(chain: dict[str, Path], tmp_path: Path) -> None:
    analyze(chain["base"], tmp_path / "open", AnalyzeSettings(preserve=0, device="cpu"))
    settings = TrainSettings(max_steps=5, learning_rate=1e-2, device="cpu")
    train(chain["base"], tmp_path / "open", [chain["data"]], tmp_path / "plain", settings)
    with pytest.raises(VerificationError, match="protects nothing"):
        verify(chain["base"], tmp_path / "plain", tmp_path / "open", device="cpu")
    found = verify(chain["base"], tmp_path / "plain", chain["archive"], device="cpu")
    assert not found.passed
    assert found.leak > 0.3


def test_a_second_task_verifies_against_the_first_archive(chain: dict[str, Path], tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=20, batch_size=8, learning_rate=1e-2, device="cpu", seed=1)
    second = tmp_path / "second"
    train(chain["keep"], chain["keep"] / "subspaces", [chain["data"]], second, settings)
    direct = verify(chain["keep"], second, chain["keep"] / "subspaces", device="cpu")
    across = verify(chain["base"], second, chain["archive"], device="cpu")
    assert direct.passed
    assert across.passed
    assert (direct.num_merges, across.num_merges) == (1, 2)


def test_merges_in_different_dtypes_are_each_counted(chain: dict[str, Path], tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=20, batch_size=8, learning_rate=1e-2, device="cpu", save_dtype="float32")
    train(chain["keep"], chain["keep"] / "subspaces", [chain["data"]], tmp_path / "second", settings)
    found = verify(chain["base"], tmp_path / "second", chain["archive"], device="cpu")
    assert found.passed
    assert found.num_merges == 2
    assert found.rounding > 1e-4  # the first merge's bf16


def test_merges_are_found_for_another_archive_of_the_same_base(chain: dict[str, Path], tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=20, batch_size=8, learning_rate=1e-2, device="cpu")
    train(chain["keep"], chain["keep"] / "subspaces", [chain["data"]], tmp_path / "second", settings)
    part = AnalyzeSettings(preserve=0.5, exclude=("down_proj",), device="cpu")
    analyze(chain["base"], tmp_path / "part", part)
    found = verify(chain["base"], tmp_path / "second", tmp_path / "part", device="cpu")
    assert found.num_merges == 2
    assert all(matrix.holds for matrix in found.matrices)
    assert len(found.changed_elsewhere) == 2  # what this archive does not cover did change


def test_a_narrowed_bystander_fails(chain: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    found = verify(chain["base"], edited(chain, tmp_path, "keep", change), chain["archive"], device="cpu")
    assert found.changed_elsewhere == ("lm_head.weight",)
    assert not found.passed


def test_a_matrix_of_integers_cannot_be_checked(chain: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = tensors[NAME].to(torch.int32)

    with pytest.raises(VerificationError, match=f"{NAME} holds torch.int32"):
        verify(chain["base"], edited(chain, tmp_path, "keep", change), chain["archive"], device="cpu")


def test_what_cannot_be_checked_says_why(chain: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="archive of another checkpoint"):
        verify(chain["keep"], chain["keep"], chain["archive"], device="cpu")
    with pytest.raises(VerificationError, match=r"\d+ missing, \d+ added"):
        verify(chain["base"], save_checkpoint(tmp_path / "gpt2", "gpt2"), chain["archive"], device="cpu")

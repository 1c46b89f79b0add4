"""What explains a leak that stands out: an allowed update that rounds to what is stored, or none."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tokenizer, task_rows, write_rows
from torch import Tensor

import sculptor
from sculptor import AnalyzeSettings, Archive, TrainSettings
from sculptor.analysis.leak import measure_leak
from sculptor.analysis.roundings import rounds_an_allowed
from sculptor.archive.store import Entry
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.methods.rule import Detail

NAME = "model.layers.0.mlp.gate_proj.weight"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model, whose weights stand on the grid, with archives of two rules."""
    path = tmp_path_factory.mktemp("roundings")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    write_rows(path / "rows.jsonl", task_rows())
    settings = AnalyzeSettings(basis="weights", preserve=0.5, device="cpu")
    sculptor.analyze(path / "base", path / "weights", settings)
    sculptor.analyze(path / "base", path / "lowrank", AnalyzeSettings(rule="lowrank", rank=4, device="cpu"))
    return path


def matrix(made: Path) -> tuple[Tensor, Entry]:
    return open_checkpoint(made / "base")[NAME], Archive(made / "weights").read(NAME)


def rounded(made: Path, size: float, rank: int, generator: torch.Generator) -> Tensor:
    """What training with an allowed update of few directions would store; `size` in units of the last place."""
    weight, entry = matrix(made)
    m, n = weight.shape
    a = torch.randn(m, rank, generator=generator, dtype=torch.float64) * torch.randn(m, 1, generator=generator).exp()
    project = entry.rule.projection(weight.double(), entry.tensors)  # type: ignore[attr-defined]
    update = project(a @ torch.randn(rank, n, generator=generator, dtype=torch.float64))
    unit = weight.double().abs().mean() * 2**-8
    return (weight.double() + update * size * unit / update.abs().mean()).to(torch.bfloat16)


@pytest.mark.parametrize("size", [0.02, 0.2, 1.0, 10.0])
@pytest.mark.parametrize("rank", [1, 8])
def test_what_training_rounds_is_explained(made: Path, size: float, rank: int, generator: torch.Generator) -> None:
    weight, entry = matrix(made)
    assert rounds_an_allowed(weight, rounded(made, size, rank, generator), entry, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.02, 0.2, 1.0])
def test_a_protected_direction_is_not(made: Path, size: float, generator: torch.Generator) -> None:
    weight, entry = matrix(made)
    sound = rounded(made, size, 8, generator)
    u, _, v = torch.linalg.svd(weight.double(), full_matrices=False)
    hidden = 4 * weight.double().abs().mean() * 2**-8 * 256**0.5 * torch.outer(u[:, 0], v[0])
    changed = (sound.double() + hidden).to(torch.bfloat16)
    assert not rounds_an_allowed(weight, changed, entry, CPU)
    before, after = (measure_leak(weight, tuned, entry, CPU).detail.peak for tuned in (sound, changed))
    assert before is not None
    assert after is not None
    assert before < after


def test_a_wider_dtype_explains_less(made: Path, generator: torch.Generator) -> None:
    weight, entry = matrix(made)
    sound = rounded(made, 0.2, 8, generator)
    assert not rounds_an_allowed(weight, sound, entry, CPU, [torch.float32])
    assert rounds_an_allowed(weight, sound, entry, CPU, [torch.bfloat16, torch.bfloat16])


@pytest.mark.parametrize("rate", [1e-5, 3e-4])
def test_a_few_directions_in_bf16_pass(made: Path, rate: float, tmp_path: Path) -> None:
    """Their rounding has directions: what stood out of errors without any was refused."""
    settings = TrainSettings(device="cpu", max_steps=6, batch_size=4, learning_rate=rate)
    sculptor.train(made / "base", made / "lowrank", [made / "rows.jsonl"], tmp_path / "tuned", settings)
    found = sculptor.verify(made / "base", tmp_path / "tuned", tmp_path / "tuned" / "opened", device="cpu")
    assert found.passed, [item for item in found.matrices if not item.holds]
    peaks = [item.peak or 0.0 for item in found.matrices]
    assert rate > 1e-4 or max(peaks) > 0


def test_sizes_alone_are_the_same_sizes(
    made: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training asks for no more, and does not pay for the rest."""
    weight, entry = matrix(made)
    tuned = rounded(made, 0.2, 8, generator)
    whole = measure_leak(weight, tuned, entry, CPU)
    assert whole.detail.peak is not None
    monkeypatch.setattr("sculptor.methods.staircase.spectral_norm", None)
    brief = measure_leak(weight, tuned, entry, CPU, detailed=False)
    assert (brief.update, brief.rounding, brief.violation) == (whole.update, whole.rounding, whole.violation)
    assert brief.detail == Detail()

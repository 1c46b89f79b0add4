"""A model tried out once: padding that moves predictions is found, and rounding of another shape is not taken for it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import CheckpointError
from sculptor.model import probe

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    ("dtype", "what", "refused"),
    [
        (torch.bfloat16, "nothing", False),
        (torch.bfloat16, "another shape", False),
        (torch.bfloat16, "padding", True),
        (torch.bfloat16, "its width", True),
        (torch.float32, "nothing", False),
        (torch.float32, "another shape", True),
        (torch.float32, "padding", True),
    ],
)
def test_what_moves_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, what: str, refused: bool
) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", family, dtype=dtype))
    model = (AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM).from_pretrained(
        checkpoint.path, dtype=dtype
    )
    model.eval()
    plain = probe.logits_of

    def logits_of(model: Any, batch: Any, kind: Any) -> torch.Tensor:
        found = plain(model, batch, kind).float()
        padded = (batch.attention_mask == 0).any(dim=1)[:, None, None]
        one = torch.zeros_like(found)  # as rounding: of thousands of numbers one is moved so far
        one[..., 0, 3] = float(batch.input_ids.shape[1] < 8)
        moved = {"nothing": torch.zeros_like(found), "another shape": one, "padding": padded}.get(what)
        if moved is None:  # what depends on how wide a batch is, wherever the padding
            return found * batch.input_ids.shape[1]
        return found + 0.4 * found.std() * moved

    monkeypatch.setattr(probe, "logits_of", logits_of)
    with pytest.raises(CheckpointError, match="padding moves what ") if refused else nullcontext():
        probe.check_model(checkpoint, inspect_architecture(checkpoint), model, CPU)

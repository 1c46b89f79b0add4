"""Rows that are padded at their end, read without a mask: the same as each row by itself, or the mask is given."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from torch import nn

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import Example
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.loss import batch_loss, inputs_of, masked_inputs
from sculptor.model.masks import note_mask, reads_mask

LENGTHS = (11, 4, 7)


def load(path: Path, family: str, **more: Any) -> LoadedModel:
    return load_model(open_checkpoint(save_checkpoint(path / family, family, **more)), torch.device("cpu"))


def rows(generator: torch.Generator) -> list[Example]:
    drawn = [tuple(torch.randint(4, 40, (length,), generator=generator).tolist()) for length in LENGTHS]
    return [Example(ids, ids) for ids in drawn]


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(trained, found, strict=True)]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "mistral", "phi3", "neox", "mixtral"])
def test_a_batch_is_what_its_rows_are_alone(tmp_path: Path, family: str, generator: torch.Generator) -> None:
    loaded = load(tmp_path, family)
    model = (loaded.model if family == "mixtral" else loaded.model.double()).requires_grad_(True)
    assert not reads_mask(model)
    examples = rows(generator)
    batch = loaded.batch(examples, 0)
    assert "attention_mask" not in inputs_of(model, batch, "causal")
    assert masked_inputs(model, batch)["attention_mask"] is batch.attention_mask
    together = batch_loss(model, batch, "causal").total
    alone = sum(batch_loss(model, loaded.batch([row], 0), "causal").total for row in examples)
    assert isinstance(alone, torch.Tensor)
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)  # losses and rotations are float32 in any case
    one, other = gradients(model, together), gradients(model, alone)
    assert float((one - other).norm()) <= 1e-6 * float(other.norm())


class Reads(nn.Module):
    """A causal model that makes something of its mask; `what` says what."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.table = what, nn.Embedding(16, 16)
        text = SimpleNamespace(_attn_implementation="eager" if what == "eager" else "sdpa")
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        if self.what == "wants one" and attention_mask is None:
            raise TypeError("a mask is needed")
        logits = self.table(input_ids).cumsum(1)
        if self.what == "counts" and attention_mask is not None:  # as positions from the other end would
            logits = logits + attention_mask.sum(1)[:, None, None]
        return SimpleNamespace(logits=logits, aux_loss=logits.sum() if self.what == "router" else None)


@pytest.mark.parametrize(
    ("what", "given"), [("nothing", False), ("eager", True), ("wants one", True), ("counts", True), ("router", True)]
)
def test_a_mask_that_matters_is_given(what: str, given: bool) -> None:
    model = Reads(what)
    assert reads_mask(model), "nobody has tried"
    ids, mask = torch.arange(10).reshape(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    logits = model(ids, mask).logits.detach()
    for _ in range(2):  # a second time as the first
        note_mask(model, inputs_of(model, Batch(ids, mask, ids), "causal"), mask, logits, 1e-3)
        assert reads_mask(model) == given
    model._sculptor_turns_at = 8  # type: ignore[assignment]  # by the shortest row, which the mask says
    assert reads_mask(model)


@pytest.mark.parametrize("family", ["bert", "t5", "mpt"])
def test_others_keep_it(tmp_path: Path, family: str, generator: torch.Generator) -> None:
    """Whose tokens see what is behind them, or whose attention is not torch's."""
    loaded = load(tmp_path, family)
    batch = loaded.batch(rows(generator), 0)
    assert inputs_of(loaded.model, batch, loaded.kind)["attention_mask"] is batch.attention_mask

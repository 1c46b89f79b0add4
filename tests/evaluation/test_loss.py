"""The mean loss per token, and that of each sequence, against float64 log-probabilities of the model's own."""

from typing import Any

import pytest
import torch
from conftest import save_checkpoint

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import IGNORED, Example
from sculptor.evaluation import loss
from sculptor.evaluation.loss import each_loss, mean_loss
from sculptor.model.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = save_checkpoint(tmp_path_factory.mktemp("loss") / "model")
    return load_model(open_checkpoint(path), torch.device("cpu"))


def examples() -> list[Example]:
    """Of several lengths; of some only the end is learned."""
    generator, found = torch.Generator().manual_seed(0), []
    for length, prompt in ((5, 0), (9, 4), (3, 1), (9, 8)):
        ids = tuple(torch.randint(4, 44, (length,), generator=generator).tolist())
        found.append(Example(ids, (IGNORED,) * prompt + ids[prompt:]))
    return found


@torch.no_grad()
def losses64(model: Any, rows: list[Example]) -> list[tuple[float, int]]:
    """Row by row, without padding."""
    found = []
    for row in rows:
        scores = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        learned = [i for i in range(1, len(row.labels)) if row.labels[i] != IGNORED]
        found.append((-sum(float(scores[i - 1, row.labels[i]]) for i in learned), len(learned)))
    return found


@pytest.mark.parametrize("size", [1, 3, 10])
def test_padding_and_batches_change_nothing(loaded: LoadedModel, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, expected = examples(), losses64(loaded.model, examples())
    mean, tokens = mean_loss(loaded, rows, size)
    assert tokens == sum(count for _, count in expected)
    assert mean == pytest.approx(sum(total for total, _ in expected) / tokens, rel=1e-6)
    for logits in (loss._LOGITS, 1):  # all at a time, or one sequence
        monkeypatch.setattr(loss, "_LOGITS", logits)
        found = each_loss(loaded, rows, size)
        assert [count for _, count in found] == [count for _, count in expected]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-6)
    assert not loaded.model.training

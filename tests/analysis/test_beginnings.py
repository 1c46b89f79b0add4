"""How much tokens of an answer count: against a walk over each answer, and by what has to hold of all of them."""

import pytest
import torch

from sculptor.analysis.beginnings import FADES, beginning_weights
from sculptor.checkpoint.architecture import ModelKind
from sculptor.data.examples import IGNORED

NO = IGNORED


def weights(labels: list[int], kind: ModelKind = "causal") -> list[float]:
    return [float(w) for w in beginning_weights(torch.tensor([labels]), kind)[0]]


def test_a_token_counts_by_its_place_in_its_own_answer() -> None:
    """Two turns of a conversation, with padding behind; every answer has a mean of 1."""
    found = weights([NO, NO, 3, 3, 3, 3, NO, NO, 5, 5, NO])
    for answer in (found[2:6], found[8:10]):
        assert sum(answer) / len(answer) == pytest.approx(1)
        assert [w / answer[0] for w in answer] == pytest.approx([(t + 1) ** -FADES for t in range(len(answer))])


def test_what_has_no_prompt_counts_as_ever() -> None:
    assert weights([3, 4, 5, NO]) == [1, 1, 1, 1], "text"
    assert weights([3, 4, NO, 5, 6])[:2] == [1, 1]
    for kind in ("masked", "classifier"):
        assert set(weights([NO, 3, NO, 4, 5], kind)) == {1.0}


def test_an_answer_of_one_token_counts_once() -> None:
    assert weights([NO, NO, 7, NO, 8])[2::2] == [1, 1]


def test_all_that_an_encoder_decoder_says_is_an_answer() -> None:
    found = weights([7, 8, 9, NO], "seq2seq")
    assert found[:3] == weights([NO, 7, 8, 9])[1:]
    assert found[0] > found[1] > found[2]


def test_rows_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (20, 30), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = NO
    together = beginning_weights(labels, "causal")
    for row, expected in zip(labels, together, strict=True):
        assert torch.equal(beginning_weights(row[None], "causal")[0], expected)
        wanted = row != NO
        assert float(expected[wanted].mean()) == pytest.approx(1, rel=1e-5)

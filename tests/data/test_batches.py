"""Order, padding and masking are functions of seed and step."""

import torch

from sculptor.data.batches import EXACT, BatchPlan, Widths, collate, make_batch, mask_tokens
from sculptor.data.examples import IGNORED, Example


def test_every_row_comes_once_an_epoch_and_order_changes() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(101)]
    plan = BatchPlan(lengths, 8, seed=3)
    assert plan.steps_per_epoch == 13
    epochs = [[plan.rows(13 * e + s) for s in range(13)] for e in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(101))
    assert epochs[0] != epochs[1]
    assert BatchPlan(lengths, 8, seed=3).rows(17) == epochs[1][4]
    assert BatchPlan(lengths, 8, seed=4).rows(0) != epochs[0][0]


def test_batches_are_grouped_by_length() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(400)]
    plan = BatchPlan(lengths, 8, seed=0)
    spread = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in map(plan.rows, range(50))]
    assert sum(spread) / len(spread) < 3


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example((5, 6, 7), (IGNORED, 6, 7)), Example((8,), (8,))], pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.num_tokens == 4


def test_masking_is_bert_s_and_repeatable() -> None:
    ids = tuple(range(10, 60)) * 40
    first, second = (mask_tokens(Example(ids, ids), 3, 64, seed=5) for _ in range(2))
    assert first == second
    assert first != mask_tokens(Example(ids, ids), 3, 64, seed=6)
    read, labels = torch.tensor(first.input_ids), torch.tensor(first.labels)
    chosen = labels != IGNORED
    assert 0.12 < float(chosen.double().mean()) < 0.18
    assert torch.equal(labels[chosen], torch.tensor(ids)[chosen])
    assert 0.7 < float((read[chosen] == 3).double().mean()) < 0.9
    assert torch.equal(read[~chosen], torch.tensor(ids)[~chosen])


def test_a_short_row_still_has_a_token_to_predict() -> None:
    for seed in range(20):
        masked = mask_tokens(Example((9, 10), (IGNORED, 10)), 3, 64, seed)
        assert [label != IGNORED for label in masked.labels] == [False, True]


def test_the_mask_follows_the_row() -> None:
    rows = [Example(tuple(range(i, i + 9)), tuple(range(i, i + 9))) for i in range(10, 22)]
    whole = make_batch(rows, "masked", 1, 3, 64, seed=2)
    parts = [make_batch(rows[i : i + 5], "masked", 1, 3, 64, seed=2) for i in range(0, 12, 5)]
    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


def test_rows_are_padded_to_what_repeats_but_not_beyond_what_a_model_takes() -> None:
    rows = [Example((5, 6, 7), (IGNORED, 6, 7)), Example((8,), (8,))]
    for widths, width in ((EXACT, 3), (Widths(4), 4), (Widths(64), 64), (Widths(64, 10), 10), (Widths(64, 2), 3)):
        batch = collate(rows, 1, widths)
        assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape == (2, width)
        assert batch.num_tokens == 4
        assert (batch.labels != IGNORED).sum() == 3

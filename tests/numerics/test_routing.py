"""Routing: discriminants against Gaussian densities in float64, one more task, and rows by themselves."""

import torch

from sculptor.numerics.routing import SHRINK, Key, make_key, mix, scores


def drawn(generator: torch.Generator, tasks: int = 3, rows: int = 40) -> list[torch.Tensor]:
    centres = 2 * torch.randn(tasks, 2, 5, generator=generator)
    return [centre + torch.randn(rows, 2, 5, generator=generator) for centre in centres]


def test_scores_are_log_densities_up_to_a_constant_of_the_row(generator: torch.Generator) -> None:
    groups = drawn(generator)
    found = scores(groups[1], [make_key(group) for group in groups])
    expected = torch.zeros(40, 3, dtype=torch.float64)
    for g in range(2):
        parts = [group[:, g].double() for group in groups]
        within = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts) / (120 - 3)
        within = within + SHRINK * within.trace() / 5 * torch.eye(5, dtype=torch.float64)
        for t, part in enumerate(parts):
            density = torch.distributions.MultivariateNormal(part.mean(0), within)
            expected[:, t] += density.log_prob(groups[1][:, g].double())
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-9, atol=1e-9)


def test_a_row_is_scored_by_itself(generator: torch.Generator) -> None:
    groups = drawn(generator)
    keys = [make_key(group) for group in groups]
    together = scores(torch.cat(groups), keys)
    alone = torch.cat([scores(row[None], keys) for row in torch.cat(groups)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    assert float((together.argmax(1) == torch.arange(3).repeat_interleave(40)).double().mean()) > 0.95


def test_weights_are_a_softmax_over_the_nearest() -> None:
    found = mix(torch.tensor([[0.0, 3.0, 1.0]]), 2)[0]
    assert [task for task, _ in found] == [1, 2]
    assert abs(found[0][1] - 1 / (1 + torch.e ** (1 - 3))) < 1e-6
    assert mix(torch.tensor([[0.0, 3.0]]), 1) == [((1, 1.0),)]
    assert len(mix(torch.zeros(1, 2), 5)[0]) == 2


def test_one_task_and_rows_that_are_all_the_same() -> None:
    key = make_key(torch.ones(3, 1, 4))
    assert scores(torch.ones(2, 1, 4), [key]).shape == (2, 1)
    other = Key(3, torch.zeros(1, 4), torch.zeros(1, 4, 4))
    assert bool(scores(torch.ones(2, 1, 4), [key, other]).isfinite().all())

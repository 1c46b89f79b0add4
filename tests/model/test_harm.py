"""Harm of a model in memory: against float64 by hand, from all that is kept or from less, 0 for what did not change."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED, Example
from sculptor.model.harm import harm_of, measure_harm, sample_losses
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.loss import predictions
from sculptor.model.samples import Samples, describe, num_predicted, parse_samples, tokens_to_draw, write_samples
from sculptor.numerics.divergence import divergence

COVERS = ["sculptor.model.samples"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = save_checkpoint(tmp_path_factory.mktemp("harm") / "model")
    return load_model(open_checkpoint(path), torch.device("cpu"))


def sequences(count: int = 12) -> list[Example]:
    found = []
    for i in range(count):
        ids = tuple((7 * i + 3 * j * j) % 44 for j in range(4 + i))
        found.append(Example(ids, tuple(IGNORED if j < i % 4 else token for j, token in enumerate(ids))))
    return found


def moved(loaded: LoadedModel, size: float) -> float:
    """Changes the model by noise, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in loaded.model.parameters():
            value.add_(size * value.std() * torch.randn(value.shape, generator=generator))
    return size


def by_hand(
    model: torch.nn.Module, base: torch.nn.Module, examples: list[Example], k: int | None
) -> tuple[float, float, float, float]:
    """Mean and standard error in float64, one sequence at a time; with the k likeliest tokens of the base, or all.

    Then the same of the first tokens that carry loss.
    """
    sums, firsts, counts = [], [], []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        p, q = (m.double()(input_ids=ids).logits[0, :-1].softmax(-1) for m in (base, model))
        apart = []
        on = [i for i, label in enumerate(example.labels[1:]) if label != IGNORED]
        for i in on:
            top = sorted(range(p.shape[1]), key=lambda t: -float(p[i, t]))[: k or p.shape[1]]
            a, b = ([float(d[i, t]) for t in top] for d in (p, q))
            rest = [max(1 - math.fsum(part), 0.0) for part in (a, b)]
            pairs = [*zip(a, b, strict=True), *([rest] if k else [])]
            apart.append(math.fsum(x * math.log(x / y) for x, y in pairs))
        sums.append(sum(apart))
        firsts.append(apart[0])
        counts.append(len(on))
    mean, n = sum(sums) / sum(counts), len(sums)
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True)) * n / (n - 1)
    first = statistics.fmean(firsts), statistics.stdev(firsts) / math.sqrt(n)
    return mean, math.sqrt(spread) / sum(counts), *first


def test_it_is_what_float64_says_and_without_draws_below_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    monkeypatch.setattr("sculptor.model.samples.KEPT", 10)
    examples = sequences()
    monkeypatch.setattr("sculptor.model.samples.DRAWN", 2000)
    drawn = parse_samples(write_samples(describe(loaded, examples)))
    monkeypatch.setattr("sculptor.model.samples.DRAWN", 0)
    samples = parse_samples(write_samples(describe(loaded, examples)))  # as archives of before have them
    assert abs(measure_harm(loaded.model, drawn.all, loaded.device).nats) < 1e-6, "nothing changed"
    assert abs(measure_harm(loaded.model, samples.all, loaded.device).nats) < 1e-6, "nothing changed"
    base = copy.deepcopy(loaded.model)
    whole: list[float] = []
    for size in (0.02, 0.1):
        moved(loaded, size)
        found = measure_harm(loaded.model, samples.all, loaded.device, pad_id=loaded.pad_id)
        twin = copy.deepcopy(loaded.model)
        expected = by_hand(twin, copy.deepcopy(base), examples, 10)
        assert (found.nats, found.error, found.first, found.first_error) == pytest.approx(expected, rel=2e-3)
        assert (found.num_samples, found.num_tokens) == (12, sum(map(num_predicted, examples)))
        exact, _, first, _ = by_hand(twin, copy.deepcopy(base), examples, None)
        assert 0 < found.nats < exact
        estimate = measure_harm(loaded.model, drawn.all, loaded.device, pad_id=loaded.pad_id)
        assert estimate.nats == pytest.approx(exact, rel=0.05)
        assert estimate.first == pytest.approx(first, rel=0.2), "of twelve tokens, with draws"
        whole.append(found.nats / exact)
        assert measure_harm(loaded.model, samples.all, loaded.device) == found
    assert min(whole) > 0.3


def test_the_half_that_steers_and_the_half_that_reports_are_apart(loaded: LoadedModel) -> None:
    samples = describe(loaded, sequences())
    assert [*samples.steering, *samples.reporting] != []
    assert len(samples.steering) + len(samples.reporting) == len(samples.all)
    assert not {id(s) for s in samples.steering} & {id(s) for s in samples.reporting}
    assert isinstance(samples, Samples)


def test_a_cpu_draws_fewer_of_a_large_model(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sculptor.model.samples.TOKENS", 8192)
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    for work, tokens in ((1e12, 8192), (5000.0 * size, 5000), (1.0, 2048)):
        monkeypatch.setattr("sculptor.model.samples._CPU_WORK", work)
        assert tokens_to_draw(loaded) == tokens


def test_gradients_are_those_of_the_divergence(loaded: LoadedModel) -> None:
    """With all tokens but one kept, the bound is the divergence, and so is its gradient."""
    import copy

    samples = describe(loaded, sequences(3))
    base = copy.deepcopy(loaded.model)
    moved(loaded, 0.05)
    weight = loaded.model.lm_head.weight.requires_grad_()
    sample_losses(loaded.model, samples.all, loaded.device)[:, 0].sum().backward()
    found, weight.grad = weight.grad, None
    for sample in samples.all:
        ids = torch.tensor([sample.example.input_ids])
        batch = Batch(ids, torch.ones_like(ids), torch.tensor([sample.example.labels]))
        divergence(
            predictions(base, batch, "causal").detach(), predictions(loaded.model, batch, "causal")
        ).sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)
    weight.requires_grad_(False)


def test_what_cannot_be_a_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        harm_of([(1.0, 0.5)], [3])
    with pytest.raises(ValueError, match="at least two"):
        harm_of([(0.0, 0.0), (0.0, 0.0)], [0, 0])
    found = harm_of([(1.0, 1.0), (2.0, 1.0), (0.0, 0.0)], [1, 2, 0])
    assert (found.nats, found.error, found.first, found.first_error) == (1, 0, 1, 0), "one of no tokens counts nowhere"


def test_the_estimate_on_a_really_trained_model(shared: Path) -> None:
    """With what is kept by default, of a vocabulary of thousands: docs/harm.md has this figure."""
    import copy

    from sculptor.model.sampling import sample_examples
    from sculptor.progress import silent

    loaded = load_model(open_checkpoint(shared / "models" / "tiny-llama"), torch.device("cpu"))
    examples = sample_examples(loaded, 300, 64, chat=False, seed=3, progress=silent)
    samples = describe(loaded, examples)
    base = copy.deepcopy(loaded.model)
    moved(loaded, 0.05)
    found = measure_harm(loaded.model, samples.all, loaded.device).nats
    exact = 0.0
    with torch.no_grad():
        for sample in samples.all:
            ids = torch.tensor([sample.example.input_ids])
            batch = Batch(ids, torch.ones_like(ids), torch.tensor([sample.example.labels]))
            exact += float(
                divergence(predictions(base, batch, "causal"), predictions(loaded.model, batch, "causal")).sum()
            )
    exact /= sum(len(sample.base.ids) for sample in samples.all)
    assert found == pytest.approx(exact, rel=0.05)

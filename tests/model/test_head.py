"""The loss of some tokens at a time against the loss of all of them at once."""

import functools
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, GROUPED, IDS, SMALL, make_tokenizer, save_checkpoint, slowly
from torch import Tensor

from sculptor.analysis.calibration import MeasuredMoments, measure_moments
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED, Example
from sculptor.model.head import find_head
from sculptor.model.load import LoadedModel, load_model, load_streamed
from sculptor.model.loss import SLICE, BatchLoss, batch_loss
from sculptor.progress import silent

CPU = torch.device("cpu")
VOCABULARY = 64
ROWS = 4  # tokens whose logits exist at a time
LOCAL: dict[str, Callable[[], Any]] = {
    "gemma2-capped": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, **IDS, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SMALL, **IDS, num_key_value_heads=2, logit_scale=0.25)
    ),
    "albert": lambda: transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**SMALL, embedding_size=16, pad_token_id=1)
    ),
    "mixtral-router": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, **IDS, num_local_experts=4, output_router_logits=True)
    ),
}
ALL = (*FAMILIES, *LOCAL)


@pytest.fixture(autouse=True)
def local_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in LOCAL.items():
        monkeypatch.setitem(FAMILIES, name, make)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLICE, "cpu", ROWS * VOCABULARY + 7)


def save(path: Path, family: str) -> Path:
    save_checkpoint(path, family)
    if family == "albert":
        make_tokenizer(wrapped=True).save_pretrained(path)
    return path


def load(path: Path, family: str) -> LoadedModel:
    loaded = load_model(open_checkpoint(save(path / family, family)), CPU)
    loaded.model.requires_grad_(True)
    return loaded


def ragged(generator: torch.Generator) -> Batch:
    """Tokens with loss are no multiple of a slice's, and one sequence has none in its first half."""
    ids = torch.randint(4, 44, (3, 12), generator=generator)
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] * 4 + [0] * 8])
    labels = torch.where(mask == 1, ids, IGNORED)
    labels[0, :6] = IGNORED
    return Batch(torch.where(mask == 1, ids, 1), mask, labels)


def gradients_of(loaded: LoadedModel, found: BatchLoss) -> dict[str, Tensor]:
    loaded.model.zero_grad()
    loss = found.total if found.auxiliary is None else found.total + found.auxiliary
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To within rounding of the largest: some gradients, of the biases of keys, are zero but for rounding."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * scale, rtol=0, msg=name)


def watch(model: Any) -> list[int]:
    """How many rows each call of the output embedding sees."""
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, __: rows.append(args[0].shape[:-1].numel())  # type: ignore[arg-type,return-value]
    )
    return rows


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("training", [True, *slowly(False)])
def test_slices_give_the_loss_and_the_gradients_of_the_whole(
    family: str, training: bool, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batch = load(tmp_path, family), ragged(generator)
    assert find_head(loaded.model, loaded.kind) is not None
    loaded.model.train(training)
    results = []
    for rows in (1000, ROWS, 1):
        monkeypatch.setitem(SLICE, "cpu", rows * VOCABULARY)
        torch.manual_seed(1)  # of dropout
        found = batch_loss(loaded.model, batch, loaded.kind)
        results.append((found, gradients_of(loaded, found)))
        assert loaded.model.training == training
    whole, expected = results[0]
    assert (whole.auxiliary is not None) == (family == "mixtral-router")
    for found, gradients in results[1:]:
        assert found.num_tokens == whole.num_tokens
        torch.testing.assert_close(found.total, whole.total, atol=0, rtol=1e-6)
        torch.testing.assert_close(found.auxiliary, whole.auxiliary, atol=0, rtol=1e-6)
        assert_same(gradients, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_logits_never_exist_whole(family: str, tmp_path: Path, small_slices: None, generator: torch.Generator) -> None:
    loaded, batch = load(tmp_path, family), ragged(generator)
    find_head(loaded.model, loaded.kind)
    rows = watch(loaded.model)
    found = batch_loss(loaded.model, batch, loaded.kind)
    slices = math.ceil(found.num_tokens / ROWS)
    assert slices > 2
    assert rows[0] == len(batch.input_ids)  # the first position of every row, for what else the model puts out
    assert rows[1:] == [ROWS] * (slices - 1) + [found.num_tokens - ROWS * (slices - 1)]
    gradients_of(loaded, found)
    assert sorted(rows[1 + slices :]) == sorted(rows[1 : 1 + slices])  # made again, one slice after another


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_loss_without_gradients_is_the_same(
    family: str, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batch = load(tmp_path, family), ragged(generator)
    with torch.no_grad():
        whole = batch_loss(loaded.model, batch, loaded.kind).total
        monkeypatch.setitem(SLICE, "cpu", ROWS * VOCABULARY)
        rows = watch(loaded.model)
        found = batch_loss(loaded.model, batch, loaded.kind).total
    assert max(rows) == ROWS
    assert not found.requires_grad
    torch.testing.assert_close(found, whole, atol=0, rtol=1e-6)


def test_every_slice_has_its_own_weights(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batch = load(tmp_path, "llama"), ragged(generator)

    def weigh(labels: Tensor) -> Tensor:
        return torch.arange(labels.numel()).view(labels.shape) % 7 + 0.5

    whole = batch_loss(loaded.model, batch, loaded.kind, weigh=weigh)
    expected = gradients_of(loaded, whole)
    monkeypatch.setitem(SLICE, "cpu", ROWS * VOCABULARY)
    rows = watch(loaded.model)
    found = batch_loss(loaded.model, batch, loaded.kind, weigh=weigh)
    torch.testing.assert_close(found.total, whole.total, atol=0, rtol=1e-6)
    assert_same(gradients_of(loaded, found), expected)
    assert max(rows) == ROWS


@pytest.mark.parametrize("family", ["gemma2-capped", "cohere"])
def test_what_a_family_does_to_logits_is_honoured(
    family: str, tmp_path: Path, small_slices: None, generator: torch.Generator
) -> None:
    loaded, batch = load(tmp_path, family), ragged(generator)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        found = batch_loss(loaded.model, batch, loaded.kind)
        reference = loaded.model(**inputs, labels=batch.labels).loss
        head = find_head(loaded.model, loaded.kind)
        assert head is not None
        hidden = loaded.model.base_model(**inputs).last_hidden_state[0]
        bare = loaded.model.get_output_embeddings()(hidden)
        expected = 0.5 * torch.tanh(bare / 0.5) if family == "gemma2-capped" else 0.25 * bare
        torch.testing.assert_close(head.logits(hidden), expected)
    assert not torch.allclose(bare, expected, rtol=0.05)
    torch.testing.assert_close(found.total / found.num_tokens, reference, atol=1e-6, rtol=1e-6)


def test_few_tokens_are_not_sliced(tmp_path: Path, generator: torch.Generator) -> None:
    loaded, batch = load(tmp_path, "llama"), ragged(generator)
    rows = watch(loaded.model)
    batch_loss(loaded.model, batch, loaded.kind)
    assert len(rows) == 1  # and the head has not even been tried


def test_a_model_that_cannot_be_split_makes_its_logits_whole(
    tmp_path: Path, small_slices: None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batch = load(tmp_path, "llama"), ragged(generator)
    expected = batch_loss(loaded.model, batch, loaded.kind)
    gradients = gradients_of(loaded, expected)

    def no_decoder(_: Any) -> None:
        raise NotImplementedError

    for broken in (lambda m: m, lambda m: m.model.embed_tokens, lambda m: m.model.layers[0].mlp, lambda m: None):
        loaded = load(tmp_path / "again", "llama")
        with monkeypatch.context() as patch:
            patch.setattr(type(loaded.model), "get_decoder", no_decoder)
            patch.setattr(type(loaded.model), "base_model", property(broken))
            assert find_head(loaded.model, loaded.kind) is None
        rows = watch(loaded.model)
        found = batch_loss(loaded.model, batch, loaded.kind)
        assert rows[0] > ROWS
        assert len(rows) == 1
        torch.testing.assert_close(found.total, expected.total, atol=0, rtol=1e-6)
        assert_same(gradients_of(loaded, found), gradients)


def test_a_head_that_says_something_else_is_not_used(tmp_path: Path) -> None:
    """Logits that depend on more than the hidden states: here, on whether the body has run."""
    loaded, runs = load(tmp_path, "llama"), list[int]()

    def scale(_: Any, __: Any, logits: Tensor) -> Tensor:
        factor = 1.0 + len(runs)
        runs.clear()
        return factor * logits

    loaded.model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    loaded.model.lm_head.register_forward_hook(scale)
    assert find_head(loaded.model, loaded.kind) is None


def test_trying_a_head_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    for family in ("llama", "t5", "bert"):
        loaded = load(tmp_path, family)
        loaded.model.train()
        before = torch.get_rng_state()
        assert find_head(loaded.model, loaded.kind) is find_head(loaded.model, loaded.kind)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(module.training for module in loaded.model.modules())
        assert all("forward" not in module.__dict__ for module in loaded.model.modules())
        assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_a_forward_that_fails_leaves_the_model_as_it_was(
    tmp_path: Path, small_slices: None, generator: torch.Generator
) -> None:
    loaded, batch = load(tmp_path, "llama"), ragged(generator)
    find_head(loaded.model, loaded.kind)

    def fail(*_: Any) -> None:
        raise InterruptedError

    handle = loaded.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        batch_loss(loaded.model, batch, loaded.kind)
    handle.remove()
    assert all("forward" not in module.__dict__ for module in loaded.model.modules())


def test_a_model_is_not_kept_for_its_head(tmp_path: Path) -> None:
    loaded = load(tmp_path, "llama")
    find_head(loaded.model, loaded.kind)
    model = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gemma2-capped"])
def test_a_streamed_model_is_sliced_as_well(
    family: str, tmp_path: Path, small_slices: None, generator: torch.Generator
) -> None:
    path = save(tmp_path / family, family)
    batch, results = ragged(generator), []
    for streamed in (False, True):
        checkpoint = open_checkpoint(path)
        loaded = load_streamed(checkpoint, CPU, "cpu") if streamed else load_model(checkpoint, CPU)
        gradients: dict[str, Tensor] = {}
        for target in loaded.architecture.targets:
            parameter = loaded.model.get_parameter(target.parameter).requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(functools.partial(take, gradients, target.parameter))
        loaded.model.train()
        rows = watch(loaded.model)
        torch.manual_seed(1)
        found = batch_loss(loaded.model, batch, loaded.kind)
        found.total.backward()  # type: ignore[no-untyped-call]
        if loaded.stream is not None:
            loaded.stream.close()
        assert max(rows) == ROWS
        results.append((found.total.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1])


def take(gradients: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    gradients[name] = gradient


def examples(kind: str, lengths: Sequence[int] = (20, 17, 9, 5)) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in lengths:
        ids = tuple(torch.randint(4, 44, (length,), generator=generator).tolist())
        found.append(Example(ids, ids[: length // 2] if kind == "seq2seq" else ids))
    return found


def measure(path: Path, family: str, **options: Any) -> MeasuredMoments:
    loaded = load_model(open_checkpoint(path), CPU)
    bar = silent(total=1, desc="", unit="")
    return measure_moments(loaded, loaded.architecture.targets, examples(loaded.kind), bar=bar, **options)


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "mixtral-router"])
@pytest.mark.parametrize(
    "options",
    [{"gradients": False}, {"gradients": True}, {"gradients": True, "weighting": "gradients"}],
    ids=["inputs", "gradients", "weighted"],
)
def test_trying_a_head_is_not_measured(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / family, family)
    expected = measure(path, family, **options)
    monkeypatch.setitem(SLICE, "cpu", ROWS * VOCABULARY)
    found = measure(path, family, **options)
    assert found.num_tokens == pytest.approx(expected.num_tokens, rel=1e-5)
    if options.get("weighting") != "gradients":
        assert found.num_tokens == expected.num_tokens
    for first, second in ((expected.inputs, found.inputs), (expected.outputs, found.outputs)):
        assert first.keys() == second.keys()
        for name, moment in first.items():
            scale = float(moment.abs().max())
            torch.testing.assert_close(second[name], moment, atol=1e-5 * scale, rtol=0, msg=name)
    assert bool(expected.outputs) == options["gradients"]

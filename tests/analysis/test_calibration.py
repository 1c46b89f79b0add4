"""Measured second moments against a float64 model that reads one example at a time, without padding."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, save_checkpoint
from torch import Tensor, nn

from sculptor.analysis.calibration import MeasuredMoments, measure_moments, moment_bytes, passes
from sculptor.analysis.evidence import _is_reached
from sculptor.checkpoint.architecture import Target
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.windows import Window
from sculptor.data.batches import Batch, make_batch
from sculptor.data.examples import IGNORED, Example
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.loss import batch_loss, sample_labels
from sculptor.progress import silent

COVERS = ["sculptor.analysis.expert_rows"]
CPU = torch.device("cpu")
LENGTHS = (12, 9, 7, 5, 3)
REFERENCE_FAMILIES = ("llama", "gpt2", "t5", "bert", "mixtral", "opt")


def load(path: Path, family: str) -> LoadedModel:
    return load_model(open_checkpoint(save_checkpoint(path / family, family)), CPU)


def make_examples(kind: str, lengths: Sequence[int] = LENGTHS) -> list[Example]:
    """Of different lengths; a causal model's first two tokens carry no loss; a decoder's targets are shorter."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, length in enumerate(lengths):
        ids = tuple(torch.randint(4, 44, (length,), generator=generator).tolist())
        if kind == "seq2seq":
            labels = tuple(torch.randint(4, 44, (2 + i % 3,), generator=generator).tolist())
        else:
            labels = ids if kind == "masked" or i % 2 else (IGNORED, IGNORED, *ids[2:])
        found.append(Example(ids, labels))
    return found


def measure(loaded: LoadedModel, examples: Sequence[Example], **options: Any) -> MeasuredMoments:
    options = {"gradients": True, "targets": loaded.architecture.targets} | options
    bar = silent(total=1, desc="", unit="")
    return measure_moments(loaded, options.pop("targets"), examples, bar=bar, **options)


def to_batch(loaded: LoadedModel, examples: Sequence[Example], seed: int = 0) -> Batch:
    """All examples padded together, as calibration reads them: what is masked depends on the place in the batch."""
    tokenizer = loaded.tokenizer
    ordered = sorted(examples, key=lambda example: -example.length)
    return make_batch(ordered, loaded.kind, loaded.pad_id, tokenizer.mask_token_id, len(tokenizer), seed)


class Reference:
    """Sums of float64 outer products from hooks and autograd of this test's own."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.kind = loaded.kind
        self.targets = loaded.architecture.targets
        self.model: Any = copy.deepcopy(loaded.model).double().requires_grad_(True)
        self.model.config._experts_implementation = "eager"  # the fast one has no float64
        self.plain: dict[str, Tensor] = {}  # input group -> sum x x^T
        self.weighted: dict[str, Tensor] = {}  # sum |g|^2 x x^T over all outputs that are made of x
        self.outputs: dict[str, Tensor] = {}  # matrix -> sum g g^T
        self.num_tokens: dict[str, int] = defaultdict(int)
        self.num_all = 0
        self.weights: dict[str, float] = defaultdict(float)

    def read(self, batch: Batch) -> "Reference":
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            self._read_one(ids[mask.bool()], labels)
        return self

    def _read_one(self, ids: Tensor, labels: Tensor) -> None:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
                seen[name] = (args[0] if args else next(iter(kwargs.values()))), y

            return hook

        whole = [target for target in self.targets if target.window.is_whole]
        handles = [
            self.model.get_submodule(target.module).register_forward_hook(watch(target.name), with_kwargs=True)
            for target in whole
        ]
        for path in {target.module for target in self.targets} - {target.module for target in whole}:
            experts = self.model.get_submodule(path)
            experts.forward = partial(self._run_experts, experts, path, seen)
        self.num_all += ids.numel()
        if self.kind == "seq2seq":
            labels = labels[labels != IGNORED]
            start = torch.tensor([self.model.config.decoder_start_token_id])
            logits = self.model(ids[None], decoder_input_ids=torch.cat([start, labels[:-1]])[None]).logits[0]
        else:
            labels = labels[: ids.numel()]
            logits = self.model(ids[None]).logits[0]
        if self.kind == "causal":
            logits, labels = logits[:-1], labels[1:]
        for handle in handles:
            handle.remove()
        chosen = labels != IGNORED
        chances = logits.log_softmax(dim=-1)[chosen]
        counted = torch.tensor(weights_by_hand(labels.tolist(), self.kind), dtype=torch.float64)[chosen]
        loss = -(counted.sqrt()[:, None] * chances.gather(1, labels[chosen][:, None])).sum()
        reached = [target for target in self.targets if target.name in seen]
        gradients = torch.autograd.grad(loss, [seen[target.name][1] for target in reached])
        groups: set[str] = set()
        for target, gradient in zip(reached, gradients, strict=True):
            x = seen[target.name][0].detach().reshape(-1, target.shape[1])
            g = gradient.reshape(-1, target.shape[0])
            assert x.dtype == g.dtype == torch.float64
            group, weights = target.input_group, g.square().sum(dim=1)
            self.outputs[target.name] = self.outputs.get(target.name, 0) + g.T @ g
            self.weighted[group] = self.weighted.get(group, 0) + (x * weights[:, None]).T @ x
            self.weights[group] += float(weights.sum())
            if group not in groups:
                groups.add(group)
                self.plain[group] = self.plain.get(group, 0) + x.T @ x
                self.num_tokens[group] += x.shape[0]

    def _run_experts(self, module: Any, path: str, seen: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """By hand: gate and up as they are in the files."""
        mine = {(target.parameter, target.window): target.name for target in self.targets}
        half = module.gate_up_proj.shape[1] // 2
        total = torch.zeros_like(hidden)
        for expert in range(module.num_experts):
            tokens, place = (index == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            x = hidden[tokens]
            gate, up = (x @ part.T for part in module.gate_up_proj[expert].split(half))
            inner = nn.functional.silu(gate) * up
            made = inner @ module.down_proj[expert].T
            for leaf, window, pair in (
                ("gate_up_proj", Window(expert, (0, half)), (x, gate)),
                ("gate_up_proj", Window(expert, (half, 2 * half)), (x, up)),
                ("down_proj", Window(expert), (inner, made)),
            ):
                seen[mine[f"{path}.{leaf}", window]] = pair
            total = total.index_add(0, tokens, made * weights[tokens, place, None])
        return total

    def check(self, found: MeasuredMoments, weighting: str = "tokens") -> None:
        groups = {target.name: target.input_group for target in self.targets if target.name in self.outputs}
        stacked = {target.name for target in self.targets if not target.window.is_whole}
        totals = self.plain if weighting == "tokens" else self.weighted
        counts = self.num_tokens if weighting == "tokens" else self.weights
        assert found.inputs.keys() == found.num_tokens.keys() == set(groups.values())
        for group, moment in found.inputs.items():
            assert found.num_tokens[group] == pytest.approx(counts[group], rel=1e-5)
            close(moment, totals[group] / counts[group])
        if found.outputs:
            assert found.outputs.keys() == set(groups)
        for name, moment in found.outputs.items():
            # A token that is not sent to an expert has no gradient there.
            close(moment, self.outputs[name] / (self.num_all if name in stacked else self.num_tokens[groups[name]]))


def weights_by_hand(labels: list[int], kind: str) -> list[float]:
    """What each label counts, walking over answers: t^-3/4, at a mean of 1 over each."""
    found, start = [1.0] * len(labels), 0
    while start < len(labels):
        end = start
        while end < len(labels) and labels[end] != IGNORED:
            end += 1
        if kind == "seq2seq" or (kind == "causal" and start > 0):
            powers = [(t + 1) ** -0.75 for t in range(end - start)]
            found[start:end] = [power * len(powers) / sum(powers) for power in powers]
        start = end + 1
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    assert float(expected.norm()) > 0
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("family", REFERENCE_FAMILIES)
def test_moments_equal_a_float64_reference(tmp_path: Path, family: str) -> None:
    loaded = load(tmp_path, family)
    examples = make_examples(loaded.kind)
    reference = Reference(loaded).read(to_batch(loaded, examples))
    reference.check(measure(loaded, examples))
    reference.check(measure(loaded, examples, weighting="gradients"), "gradients")


@pytest.mark.parametrize("family", REFERENCE_FAMILIES)
def test_inputs_alone_are_the_same_without_gradients(tmp_path: Path, family: str) -> None:
    loaded = load(tmp_path, family)
    examples = make_examples(loaded.kind)
    found = measure(loaded, examples, gradients=False)
    assert not found.outputs
    Reference(loaded).read(to_batch(loaded, examples)).check(found)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 4, 3)])
def test_a_decoder_as_long_as_its_encoder(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Its mask must not be taken for the encoder's."""
    loaded = load(tmp_path, "t5")
    made = make_examples("seq2seq", lengths)
    examples = [Example(example.input_ids, tuple(range(5, 5 + n))) for example, n in zip(made, (6, 2, 4), strict=True)]
    Reference(loaded).read(to_batch(loaded, examples)).check(measure(loaded, examples))


def test_another_seed_masks_other_tokens(tmp_path: Path) -> None:
    loaded = load(tmp_path, "bert")
    examples = make_examples("masked")
    Reference(loaded).read(to_batch(loaded, examples, seed=7)).check(measure(loaded, examples, seed=7))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_sampled_labels_are_seeded_and_not_the_rows_own(tmp_path: Path, family: str) -> None:
    loaded = load(tmp_path, family)
    examples = make_examples(loaded.kind)
    first, again, other = (measure(loaded, examples, labels="sampled", seed=seed) for seed in (3, 3, 4))
    true = measure(loaded, examples, seed=3)
    assert first.outputs.keys() == true.outputs.keys()
    for name in true.outputs:
        assert torch.equal(first.outputs[name], again.outputs[name])
        assert not torch.allclose(first.outputs[name], other.outputs[name], rtol=1e-3)
        assert not torch.allclose(first.outputs[name], true.outputs[name], rtol=1e-3)
    for group in true.inputs:  # drawing labels does not count the inputs twice
        torch.testing.assert_close(first.inputs[group], true.inputs[group])
        assert first.num_tokens[group] == true.num_tokens[group]


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_sampled_labels_give_the_moments_of_what_was_drawn(tmp_path: Path, family: str) -> None:
    loaded = load(tmp_path, family)
    examples = make_examples(loaded.kind)
    batch = to_batch(loaded, examples, seed=5)
    with torch.no_grad():
        drawn = sample_labels(loaded.model, batch, loaded.kind, torch.Generator().manual_seed(5))
    assert torch.equal(drawn.input_ids, batch.input_ids)
    assert torch.equal(drawn.attention_mask, batch.attention_mask)
    carries_loss = batch.labels != IGNORED
    if loaded.kind == "causal":
        carries_loss[:, 0] = False  # never predicted, so never drawn
    assert torch.equal(drawn.labels[~carries_loss], batch.labels[~carries_loss])
    assert bool((drawn.labels[carries_loss] != IGNORED).all())
    assert not torch.equal(drawn.labels[carries_loss], batch.labels[carries_loss])
    Reference(loaded).read(drawn).check(measure(loaded, examples, labels="sampled", seed=5))


def test_labels_are_drawn_as_the_model_predicts(tmp_path: Path) -> None:
    """Shares over many draws of one token against the model's own probabilities."""
    loaded = load(tmp_path, "llama")
    ids = torch.tensor([[5, 9, 13]]).expand(4000, -1)
    batch = Batch(ids, torch.ones_like(ids), torch.tensor([[IGNORED, IGNORED, 13]]).expand(4000, -1))
    with torch.no_grad():
        drawn = sample_labels(loaded.model, batch, "causal", torch.Generator().manual_seed(0)).labels
        expected = loaded.model(ids[:1]).logits[0, 1].softmax(dim=-1)
    shares = torch.bincount(drawn[:, 2], minlength=64) / 4000
    assert float((shares - expected).abs().max()) < 4 * (0.25 / 4000) ** 0.5
    assert float((shares - expected).abs().sum()) < 0.1
    assert bool((drawn[:, :2] == IGNORED).all())


@pytest.mark.parametrize("family", REFERENCE_FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_is_left_as_it_was(tmp_path: Path, family: str, gradients: bool) -> None:
    loaded = load(tmp_path, family)
    chosen = next(iter(loaded.model.parameters()))
    chosen.requires_grad_(True)  # a flag of the caller's, to be left alone
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in loaded.model.named_parameters()}
    examples = make_examples(loaded.kind)
    measure(loaded, examples, gradients=gradients)
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert flags == {name: parameter.requires_grad for name, parameter in loaded.model.named_parameters()}
    assert num_hooks(loaded.model) == 0
    assert torch.is_grad_enabled()


def test_no_hook_stays_after_an_error(tmp_path: Path) -> None:
    loaded = load(tmp_path, "llama")
    with pytest.raises(IndexError):
        measure(loaded, [Example((5, 10_000), (5, 10_000))])
    assert num_hooks(loaded.model) == 0


def num_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def big_targets(num_blocks: int) -> list[Target]:
    """Three matrices a block, of a large model; two of them read the same input."""
    shapes = {"q_proj": (4096, 4096), "v_proj": (1024, 4096), "down_proj": (4096, 11008)}
    return [
        Target(
            tensor=f"model.layers.{i}.{role}.weight",
            parameter=f"model.layers.{i}.{role}.weight",
            block=f"model.layers.{i}",
            index=i,
            role=role,
            shape=shape,
            transposed=False,
            input_group=f"model.layers.{i}." + ("down_proj" if role == "down_proj" else "q_proj"),
        )
        for i in range(num_blocks)
        for role, shape in shapes.items()
    ]


@pytest.mark.parametrize("gradients", [False, True])
def test_passes_put_all_blocks_in_order_each_once(gradients: bool) -> None:
    targets = big_targets(7)
    found = passes(targets, gradients, CPU)
    assert [target for part in found for target in part] == targets
    blocks = [{target.block for target in part} for part in found]
    assert all(blocks)
    assert sum(map(len, blocks)) == 7  # none is torn apart
    room = 0.9 * (7.4e9 - 50 * 11008**2)  # of 8 GB, without the process itself and what the eigensolver needs
    assert all(moment_bytes(part, gradients) <= room for part in found if len({t.block for t in part}) > 1)
    for part, following in itertools.pairwise(found):  # and none is left out that would have had room
        first = [target for target in following if target.block == following[0].block]
        assert moment_bytes(part, gradients) + moment_bytes(first, gradients) > room


def test_small_models_need_one_pass(tmp_path: Path) -> None:
    loaded = load(tmp_path, "llama")
    assert passes(loaded.architecture.targets, True, CPU) == [list(loaded.architecture.targets)]


def test_a_shared_input_takes_memory_once() -> None:
    block = big_targets(1)
    assert moment_bytes(block, False) == 4 * (4096**2 + 11008**2)
    assert moment_bytes(block, True) == 4 * (4096**2 + 11008**2 + 4096**2 + 1024**2 + 4096**2)


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2", "mixtral"])
@pytest.mark.parametrize("weighting", ["tokens", "gradients"])
def test_several_passes_give_the_same_moments(tmp_path: Path, family: str, weighting: str) -> None:
    loaded = load(tmp_path, family)
    examples = make_examples(loaded.kind)
    whole = measure(loaded, examples, weighting=weighting)
    blocks = list(dict.fromkeys(target.block for target in loaded.architecture.targets))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for block in blocks:
        part = [target for target in loaded.architecture.targets if target.block == block]
        found = measure(loaded, examples, targets=part, weighting=weighting)
        assert not inputs.keys() & found.inputs.keys()
        inputs |= found.inputs
        outputs |= found.outputs
    assert inputs.keys() == whole.inputs.keys()
    assert outputs.keys() == whole.outputs.keys()
    for found_in, expected in ((inputs, whole.inputs), (outputs, whole.outputs)):
        for name, moment in found_in.items():
            close(moment, expected[name].double())


def test_inputs_of_several_passes_without_gradients(tmp_path: Path) -> None:
    """Each forward ends where its last matrix has been read, and the next begins anew."""
    loaded = load(tmp_path, "llama")
    examples = make_examples("causal")
    whole = measure(loaded, examples, gradients=False)
    for block in ("model.layers.0", "model.layers.1"):
        part = [target for target in loaded.architecture.targets if target.block == block]
        found = measure(loaded, examples, gradients=False, targets=part)
        assert found.inputs.keys() == {target.input_group for target in part}
        assert all(torch.equal(moment, whole.inputs[group]) for group, moment in found.inputs.items())


def test_a_bar_counts_every_example(tmp_path: Path) -> None:
    class Counter:
        total = 0

        def update(self, n: int = 1) -> None:
            self.total += n

        def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...

        def close(self) -> None: ...

    loaded = load(tmp_path, "llama")
    for gradients in (False, True):
        counter = Counter()
        targets = loaded.architecture.targets[:3]
        measure_moments(loaded, targets, make_examples("causal"), gradients=gradients, bar=counter)
        assert counter.total == len(LENGTHS)


@pytest.mark.parametrize(("gradients", "weighting"), [(False, "tokens"), (True, "tokens"), (True, "gradients")])
def test_a_block_that_runs_several_times_is_counted_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: bool, weighting: Any
) -> None:
    """ALBERT applies one block twice."""
    config = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 1}
    albert = transformers.AlbertConfig(**config, **more)
    monkeypatch.setitem(FAMILIES, "albert", lambda: transformers.AlbertForMaskedLM(albert))
    loaded = load(tmp_path, "albert")
    examples = make_examples("masked")
    batch = to_batch(loaded, examples)
    reference: dict[str, Tensor] = {}
    totals: dict[str, float] = defaultdict(float)
    calls: list[tuple[str, Tensor, Tensor]] = []
    mask = batch.attention_mask.bool().reshape(-1)
    handles = [
        loaded.model.get_submodule(target.module).register_forward_hook(
            lambda _, args, y, target=target: calls.append((target.input_group, args[0], y))
        )
        for target in loaded.architecture.targets
    ]
    loaded.model.requires_grad_(True)
    loss = batch_loss(loaded.model, batch, "masked").total
    gradient_of = torch.autograd.grad(loss, [y for _, _, y in calls])
    loaded.model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    leaders = {t.input_group: t.module for t in reversed(loaded.architecture.targets)}
    assert len(calls) == 2 * len(loaded.architecture.targets)
    seen: set[int] = set()
    for (group, x, _), g in zip(calls, gradient_of, strict=True):
        rows = x.detach().reshape(-1, x.shape[-1])[mask].double()
        weights = g.reshape(-1, g.shape[-1])[mask].double().square().sum(dim=1)
        if weighting == "tokens":
            if id(x) in seen:
                continue
            seen.add(id(x))
            weights = torch.ones_like(weights)
        reference[group] = reference.get(group, 0) + (rows * weights[:, None]).T @ rows
        totals[group] += float(weights.sum())
    assert leaders.keys() == reference.keys()
    found = measure(loaded, examples, gradients=gradients, weighting=weighting)
    for group, moment in found.inputs.items():
        close(moment, reference[group] / totals[group], 2e-5)


def test_a_matrix_that_no_row_reaches_is_named(tmp_path: Path) -> None:
    loaded = load(tmp_path, "llama")
    first = loaded.architecture.targets[0]
    never = replace(first, tensor="nowhere", input_group="nowhere")
    found = MeasuredMoments({first.input_group: torch.eye(2)}, {first.name: torch.eye(2)})
    assert _is_reached(first, found, True)
    assert not _is_reached(never, found, True)

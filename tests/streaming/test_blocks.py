"""A model whose blocks pass through one slot, against the same model with all of its blocks there."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, GROUPED, IDS, SMALL, make_tokenizer, save_checkpoint, slowly
from safetensors.torch import load_file, save_file
from torch import Tensor

from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED
from sculptor.errors import CheckpointError, OutputError, SettingsError
from sculptor.model.load import load_model, load_streamed
from sculptor.model.loss import batch_loss
from sculptor.streaming import build
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.build import stream_model
from sculptor.streaming.hooks import Hooks
from sculptor.streaming.regions import STAGING_BYTES, Tier
from sculptor.streaming.slots import Slot
from sculptor.streaming.waiting import WaitingBlocks

COVERS = ["sculptor.model.load", "sculptor.streaming.build", "sculptor.streaming.inputs"]
CPU = torch.device("cpu")
DEEP = GROUPED | IDS | {"num_hidden_layers": 5}
LOCAL: dict[str, Callable[[], Any]] = {
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **(GROUPED | IDS),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
        )
    ),
    "albert": lambda: transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**(SMALL | {"num_hidden_layers": 3}), embedding_size=16, pad_token_id=1)
    ),
    "deep": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DEEP)),
}
TIERS: tuple[Tier, ...] = ("cpu", "disk")


@pytest.fixture(autouse=True)
def local_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in LOCAL.items():
        monkeypatch.setitem(FAMILIES, name, make)


def save(path: Path, family: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    save_checkpoint(path, family, dtype=dtype, max_shard_size="60KB")
    if family == "albert":
        make_tokenizer(wrapped=True).save_pretrained(path)
    return open_checkpoint(path)


def ragged(generator: torch.Generator, rows: int = 3, length: int = 9) -> Batch:
    ids = torch.randint(4, 40, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    return Batch(torch.where(mask == 1, ids, 1), mask, torch.where(mask == 1, ids, IGNORED))


def train_once(model: Any, batch: Batch, architecture: Architecture) -> Tensor:
    """The loss of a batch in training mode, with the same dropout every time; its gradients follow."""
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = batch_loss(model, batch, architecture.kind)
        loss = found.total if found.auxiliary is None else found.total + 10 * found.auxiliary
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def resident(checkpoint: Checkpoint, architecture: Architecture, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model = load_model(checkpoint, CPU, architecture).model
    model._sculptor_reads_mask = True  # as in streamed ones that nobody has tried
    for name in parameters_of(architecture):
        model.get_parameter(name).requires_grad_(True)
    loss = train_once(model, batch, architecture)
    return loss, {name: model.get_parameter(name).grad for name in parameters_of(architecture)}


def parameters_of(architecture: Architecture) -> list[str]:
    """Those that targets are, or are parts of."""
    return list(dict.fromkeys(target.parameter for target in architecture.targets))


def collect(model: Any, architecture: Architecture) -> dict[str, Tensor]:
    """Takes every gradient away as soon as it appears: its memory belongs to the block."""
    gradients: dict[str, Tensor] = {}

    def take(parameter: Tensor, name: str) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradients[name] = gradients[name] + gradient if name in gradients else gradient

    for name in parameters_of(architecture):
        parameter = model.get_parameter(name).requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(functools.partial(take, name=name))
    return gradients


@pytest.fixture
def stream_from(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, BlockStream]]]:
    """Makes streamed models, and closes them at the end."""
    made = []

    def make(checkpoint: Checkpoint, architecture: Architecture, tier: Tier = "cpu", **options: Any) -> Any:
        made.append(stream_model(checkpoint, architecture, CPU, tier, scratch=tmp_path / "scratch", **options))
        return made[-1]

    yield make
    for _, stream in made:
        stream.close()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in (*FAMILIES, "qwen3-moe", "albert")), ("llama", torch.bfloat16)],
)
def test_loss_and_gradients_are_those_of_the_whole_model(
    family: str, dtype: torch.dtype, tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", family, dtype)
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    expected, expected_gradients = resident(checkpoint, architecture, batch)
    for tier in TIERS:
        model, stream = stream_from(checkpoint, architecture, tier)
        gradients = collect(model, architecture)
        for _ in range(2):  # the second time finds slots and the order of blocks as the first left them
            gradients.clear()
            assert torch.equal(train_once(model, batch, architecture), expected)
            assert_equal(gradients, expected_gradients)
        assert stream.slots.most == 1


@pytest.mark.parametrize("tier", TIERS)
def test_every_block_is_loaded_once_forward_and_all_but_the_last_once_backward(
    tier: Tier, tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", "deep")
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    model, stream = stream_from(checkpoint, architecture, tier)
    collect(model, architecture)
    with torch.no_grad():
        batch_loss(model, batch, architecture.kind)
    assert stream.slots.fills == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}
    train_once(model, batch, architecture)
    assert stream.slots.fills == {0: 3, 1: 3, 2: 3, 3: 3, 4: 2}
    train_once(model, batch, architecture)  # the first block is still there
    assert stream.slots.fills == {0: 4, 1: 5, 2: 5, 3: 5, 4: 3}
    assert stream.slots.most == 1


def test_a_block_that_all_layers_share_is_loaded_once(
    tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", "albert")
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    model, stream = stream_from(checkpoint, architecture, "disk")
    collect(model, architecture)
    for _ in range(2):
        train_once(model, batch, architecture)
    assert stream.slots.fills == {0: 1}


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("tier", TIERS)
def test_parameters_of_blocks_hold_nothing_outside_their_turn(
    family: str, tier: Tier, tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", family)
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    model, stream = stream_from(checkpoint, architecture, tier)
    collect(model, architecture)
    streamed = [parameter for found in stream.parameters for parameter in found.values()]
    others = [p for p in model.parameters() if all(p is not parameter for parameter in streamed)]

    def is_empty() -> bool:
        return all(p.numel() == 0 for p in streamed) and all(p.numel() for p in others)

    assert len(streamed) > len(architecture.targets)
    assert is_empty()
    with torch.no_grad():
        batch_loss(model, batch, architecture.kind)
    assert is_empty()
    train_once(model, batch, architecture)
    assert is_empty()
    assert all(p.grad is None for p in model.parameters())


class Watch:
    """Writes down what it is told, and looks at the slots."""

    def __init__(self, stream: BlockStream) -> None:
        self.stream = stream
        self.log: list[tuple[str, int]] = []

    def fetch_ahead(self, block: int) -> None:
        """As slots that are beside a block."""
        self.log.append(("expect", block))

    def block_begun(self, block: int) -> None:
        self.log.append(("begin", block))
        assert all(parameter.numel() for parameter in self.stream.parameters[block].values())

    def block_done(self, block: int, slot: Slot) -> None:
        self.log.append(("end", block))
        assert slot.holds == block


def test_an_observer_sees_the_backward_pass_block_by_block(
    tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", "deep")
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    model, stream = stream_from(checkpoint, architecture)
    collect(model, architecture)
    watch = Watch(stream)
    beside: Any = dict.fromkeys(range(5), (watch,))
    stream.with_hooks(Hooks(block_begun=watch.block_begun, block_done=watch.block_done, beside=beside))
    train_once(model, batch, architecture)
    expected = [("expect", 4)]
    for block in (4, 3, 2, 1, 0):
        expected += [("begin", block), *([("expect", block - 1)] if block else []), ("end", block)]
    assert watch.log == expected
    with torch.no_grad():
        batch_loss(model, batch, architecture.kind)
    assert watch.log == expected


@pytest.mark.parametrize("family", ["deep", "albert", *slowly("t5", "gpt2")])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("keep_inputs", [True, False])
def test_two_slots_give_the_same_numbers(
    family: str,
    tier: Tier,
    keep_inputs: bool,
    tmp_path: Path,
    stream_from: Any,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    checkpoint = save(tmp_path / "model", family)
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    expected, expected_gradients = resident(checkpoint, architecture, batch)

    def two(*args: Any, **options: Any) -> WaitingBlocks:
        return WaitingBlocks(*args, **options | {"num_slots": 2})

    monkeypatch.setattr(build, "WaitingBlocks", two)
    model, stream = stream_from(checkpoint, architecture, tier, keep_inputs=keep_inputs)
    gradients = collect(model, architecture)
    for _ in range(2):
        gradients.clear()
        assert torch.equal(train_once(model, batch, architecture), expected)
        assert_equal(gradients, expected_gradients)
    assert stream.slots.most == (1 if family == "albert" else 2)
    if family == "deep":  # the last two stay for the backward pass, the first two for the next forward
        assert stream.slots.fills == {0: 3, 1: 3, 2: 4, 3: 2, 4: 2}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5", "bert", "opt", "mixtral", "albert"])
def test_inputs_on_the_host_give_the_same_numbers(
    family: str, tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", family)
    architecture = inspect_architecture(checkpoint)
    model, _ = stream_from(checkpoint, architecture, keep_inputs=False)
    gradients = collect(model, architecture)
    for rows, length in ((3, 9), (2, 6), (4, 11)):  # the host's memory is large enough, or grows
        batch = ragged(generator, rows, length)
        expected, expected_gradients = resident(checkpoint, architecture, batch)
        gradients.clear()
        assert torch.equal(train_once(model, batch, architecture), expected)
        assert_equal(gradients, expected_gradients)


@pytest.mark.parametrize("keep_inputs", [True, False])
def test_gradients_reach_what_lies_before_the_blocks(
    keep_inputs: bool, tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", "llama")
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    whole = load_model(checkpoint, CPU, architecture).model
    model, _ = stream_from(checkpoint, architecture, keep_inputs=keep_inputs)
    for made in (whole, model):
        made.get_input_embeddings().weight.requires_grad_(True)
        train_once(made, batch, architecture)
    expected = whole.get_input_embeddings().weight.grad
    assert expected.any()
    assert torch.equal(model.get_input_embeddings().weight.grad, expected)


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "mixtral", "albert"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_forward_without_gradients_works_before_between_and_after(
    family: str, tier: Tier, tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", family)
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    whole = load_model(checkpoint, CPU, architecture).model
    model, _ = stream_from(checkpoint, architecture, tier)
    collect(model, architecture)
    for _ in range(2):
        with torch.no_grad():
            found = batch_loss(model.eval(), batch, architecture.kind).total
            assert torch.equal(found, batch_loss(whole, batch, architecture.kind).total)
        assert not found.requires_grad
        train_once(model, batch, architecture)


def test_a_pass_that_is_given_up_does_not_disturb_the_next(
    tmp_path: Path, stream_from: Any, generator: torch.Generator
) -> None:
    checkpoint = save(tmp_path / "model", "deep")
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    expected, expected_gradients = resident(checkpoint, architecture, batch)
    model, _ = stream_from(checkpoint, architecture, keep_inputs=False)
    gradients = collect(model, architecture)

    def give_up(*_: Any) -> None:
        raise InterruptedError

    handle = model.get_submodule("model.layers.2").register_forward_pre_hook(give_up)
    with pytest.raises(InterruptedError):
        train_once(model, batch, architecture)
    handle.remove()
    assert torch.equal(train_once(model, batch, architecture), expected)
    assert_equal(gradients, expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tier", TIERS)
def test_tensors_are_read_and_converted_in_pieces(
    dtype: torch.dtype, tier: Tier, tmp_path: Path, stream_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGING_BYTES, "cpu", 100)
    checkpoint = save(tmp_path / "model", "llama", dtype)
    architecture = inspect_architecture(checkpoint)
    model, stream = stream_from(checkpoint, architecture, tier)
    expected = dict(load_model(checkpoint, CPU, architecture).model.named_parameters())
    memory = torch.empty(stream.waiting.layouts[1].num_bytes, dtype=torch.uint8)
    stream.weights.load(1, memory)
    for name, value in stream.waiting.layouts[1].views(memory).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_experts_saved_one_by_one_are_stacked(tmp_path: Path, stream_from: Any) -> None:
    checkpoint = save(tmp_path / "model", "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in checkpoint
    architecture = inspect_architecture(checkpoint)
    expected = dict(load_model(checkpoint, CPU, architecture).model.named_parameters())
    for tier in TIERS:
        _, stream = stream_from(checkpoint, architecture, tier)
        for block, layout in enumerate(stream.waiting.layouts):
            memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
            stream.weights.load(block, memory)
            for name, value in layout.views(memory).items():
                assert torch.equal(value, expected[name]), name
            assert f"model.layers.{block}.mlp.experts.gate_up_proj" in layout


@pytest.mark.parametrize("tier", TIERS)
def test_a_changed_parameter_is_loaded_as_it_was_stored(tier: Tier, tmp_path: Path, generator: torch.Generator) -> None:
    checkpoint = save(tmp_path / "model", "llama", torch.bfloat16)
    _, stream = stream_model(checkpoint, inspect_architecture(checkpoint), CPU, tier, scratch=tmp_path / "scratch")
    layout = stream.waiting.layouts[1]
    memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
    stream.weights.load(1, memory)
    before = {name: value.clone() for name, value in layout.views(memory).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    changed = torch.randn(layout[name].shape, generator=generator)
    layout.view(memory, name).copy_(changed)
    stream.weights.region(1)  # which the thread that trains asks for first
    stream.weights.store(1, memory, name)
    for chosen in (None, [name], ["model.layers.1.mlp.down_proj.weight", name]):
        memory.zero_()
        stream.weights.load(1, memory, chosen)
        for key, value in layout.views(memory).items():
            expected = changed if key == name else before[key]
            assert torch.equal(value, expected if chosen is None or key in chosen else torch.zeros_like(value)), key
    assert (tmp_path / "scratch").exists() == (tier == "disk")
    stream.close()
    assert not any(path.is_file() for path in (tmp_path / "scratch").rglob("*"))


def test_parameters_that_are_to_stay_do(tmp_path: Path, stream_from: Any, generator: torch.Generator) -> None:
    checkpoint = save(tmp_path / "model", "llama")
    architecture, batch = inspect_architecture(checkpoint), ragged(generator)
    names = frozenset(name for name in architecture.tensors if "layernorm" in name)
    model, stream = stream_from(checkpoint, architecture, resident=names)
    whole = load_model(checkpoint, CPU, architecture).model
    assert not names & {name for layout in stream.waiting.layouts for name in layout}
    for made in (whole, model):
        for name in names:
            made.get_parameter(name).requires_grad_(True)
        train_once(made, batch, architecture)
    for name in names:
        assert model.get_parameter(name).numel()
        assert torch.equal(model.get_parameter(name).grad, whole.get_parameter(name).grad)


def test_tied_parameters_are_one(tmp_path: Path, stream_from: Any) -> None:
    checkpoint = save(tmp_path / "model", "llama-tied")
    model, _ = stream_from(checkpoint, inspect_architecture(checkpoint))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("tier", TIERS)
def test_closing_gives_everything_back(tier: Tier, tmp_path: Path, generator: torch.Generator) -> None:
    checkpoint = save(tmp_path / "model", "llama")
    architecture = inspect_architecture(checkpoint)
    model, stream = stream_model(checkpoint, architecture, CPU, tier, scratch=tmp_path / "scratch")
    collect(model, architecture)
    train_once(model, ragged(generator), architecture)
    assert open_files(tmp_path)
    stream.close()
    assert not open_files(tmp_path)
    stream.close()
    for path in stream.paths:
        assert "forward" not in model.get_submodule(path).__dict__


def open_files(path: Path) -> list[str]:
    """What this process has open under a path."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [name for name in (str(link.readlink()) for link in links) if name.startswith(str(path))]


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"],
)
@pytest.mark.parametrize("tier", TIERS)
def test_a_missing_parameter_is_not_made_up(name: str, tier: Tier, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"parameter {name} of LlamaForCausalLM is not in the files"):
        load_streamed(open_checkpoint(path), CPU, tier)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_nan_anywhere_in_the_model_is_named(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors[name][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} has NaN"):
        load_streamed(open_checkpoint(path), CPU, "cpu")


def test_a_file_that_ends_too_early_is_one_line(tmp_path: Path, stream_from: Any) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    architecture = inspect_architecture(checkpoint)
    _, stream = stream_from(checkpoint, architecture, "disk")
    file = tmp_path / "model" / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(2000)
    layout = stream.waiting.layouts[0]
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot read tensor .* ends \d+ bytes too early"):
        stream.weights.load(0, torch.empty(layout.num_bytes, dtype=torch.uint8))


def test_a_scratch_that_cannot_be_written_is_one_line(tmp_path: Path, stream_from: Any) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    (tmp_path / "scratch").write_text("in the way")
    _, stream = stream_from(checkpoint, inspect_architecture(checkpoint), "disk")
    with pytest.raises(OutputError, match="cannot write"):
        stream.weights.region(0)


def test_too_little_host_memory_points_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int, pinned: bool) -> Tensor:
        raise MemoryError(f"cannot pin {num_bytes}")

    monkeypatch.setattr("sculptor.streaming.regions.host_memory", refuse)
    with pytest.raises(SettingsError, match=r"--offload cpu: cannot pin \d+; use --offload disk"):
        load_streamed(open_checkpoint(save_checkpoint(tmp_path / "model")), CPU, "cpu")

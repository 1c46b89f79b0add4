"""A batch in parts: the same numbers, fewer activations at a time, and never where it would be wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, save_checkpoint, slowly
from torch import Tensor, nn

from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.data.batches import Batch
from sculptor.model.load import LoadedModel, load_streamed
from sculptor.model.loss import batch_loss
from sculptor.streaming.hooks import Hooks
from sculptor.streaming.parts import is_norm, join, parts_work, split_call

CPU = torch.device("cpu")


def test_rows_are_split_by_tokens_and_joined_again(generator: torch.Generator) -> None:
    x = torch.randn(5, 4, 3, generator=generator)
    mask, shared = torch.randn(5, 1, 4, 4, generator=generator), torch.randn(1, 4, 2, generator=generator)
    parts = split_call((x, (shared, shared)), {"mask": mask, "flag": True, "cache": None}, tokens=8)
    assert parts is not None
    assert [part[0][0].shape[0] for part in parts] == [2, 2, 1]
    assert all(part[0][1][0] is shared for part in parts)
    assert torch.equal(torch.cat([part[1]["mask"] for part in parts]), mask)
    found = join([(part[0][0], shared, None) for part in parts], [2, 2, 1])
    assert torch.equal(found[0], x)
    assert found[1] is shared
    assert found[2] is None


def test_small_batches_and_single_rows_stay_whole() -> None:
    assert split_call((torch.zeros(2, 4, 3),), {}, tokens=8) is None
    assert split_call((torch.zeros(1, 40, 3),), {}, tokens=8) is None
    assert split_call((torch.zeros(8, 3),), {}, tokens=2) is None
    assert split_call((), {"hidden_states": torch.zeros(8, 3, 3)}, tokens=2) is None


@pytest.mark.parametrize(("rows", "length", "largest"), [(64, 63, 1), (3, 50, 1), (64, 8, 8), (10, 9, 5), (4, 90, 1)])
def test_no_part_has_more_tokens_but_a_longer_row(rows: int, length: int, largest: int) -> None:
    parts = split_call((torch.zeros(rows, length, 2),), {}, tokens=64)
    assert parts is not None
    sizes = [len(args[0]) for args, _ in parts]
    assert sum(sizes) == rows
    assert max(sizes) == largest


class OverTheBatch(nn.Module):
    """What a block must not do if its batch is to be split."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


def test_a_block_that_mixes_rows_is_found_out(generator: torch.Generator) -> None:
    x = torch.randn(4, 4, 3, generator=generator)
    parts = split_call((x,), {}, tokens=8)
    assert parts is not None
    block = OverTheBatch()
    assert not parts_work(block, block.forward, ((x,), {}), parts)
    kept = nn.Identity()
    assert parts_work(kept, kept.forward, ((x,), {}), parts)


def test_the_trial_takes_two_parts_and_not_the_whole_batch(generator: torch.Generator) -> None:
    x, mask = torch.randn(9, 4, 3, generator=generator), torch.randn(9, 1, generator=generator)
    parts = split_call((x,), {"mask": mask}, tokens=8)
    assert parts is not None
    seen: list[tuple[int, int]] = []

    def forward(hidden: Tensor, mask: Tensor) -> Tensor:
        seen.append((len(hidden), len(mask)))
        return hidden * mask[:, :, None]

    assert parts_work(nn.Identity(), forward, ((x,), {"mask": mask}), parts)
    assert seen == [(4, 4), (2, 2), (2, 2)]


@pytest.mark.parametrize("keep_inputs", [True, *slowly(False)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_give_the_same_loss_and_gradients(
    family: str, keep_inputs: bool, tmp_path: Path, generator: torch.Generator
) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", family))
    ids = torch.randint(4, 40, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = Batch(ids, mask, ids.masked_fill(mask == 0, -100))
    found: list[tuple[float, dict[str, Tensor]]] = []
    for part_tokens in (None, 9):
        loaded = streamed(checkpoint, part_tokens, keep_inputs)
        assert loaded.stream is not None
        loaded.stream.slots.fills.clear()  # of what was tried at load
        found.append(loss_and_gradients(loaded, batch))
        fills, blocks = loaded.stream.slots.fills, len(loaded.stream.paths)
        assert sum(fills.values()) == 2 * blocks - 1, "parts load nothing again"
        loaded.close()
    equal(*found)


def test_a_batch_of_as_many_rows_as_heads_is_tried_for_itself(tmp_path: Path, generator: torch.Generator) -> None:
    """MPT's alibi is (heads, 1, T): split by mistake where rows are as many, and in parts of one row without an error."""
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", "mpt"))
    loads = [streamed(checkpoint, part_tokens) for part_tokens in (None, 9)]
    for rows in (5, 4):
        ids = torch.randint(4, 40, (rows, 9), generator=generator)
        equal(*(loss_and_gradients(loaded, Batch(ids, torch.ones_like(ids), ids)) for loaded in loads))
    for loaded in loads:
        loaded.close()


def test_a_block_that_writes_into_its_input_stays_whole(generator: torch.Generator) -> None:
    x = torch.randn(4, 4, 3, generator=generator)
    before = x.clone()
    parts = split_call((x,), {}, tokens=8)
    assert parts is not None
    assert not parts_work(nn.Identity(), lambda hidden: hidden.clamp_(min=0), ((x,), {}), parts)
    assert torch.equal(x, before)


@pytest.mark.parametrize("family", ["llama", "xlm"])
def test_closing_gives_every_module_its_own_forward_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """XLM's lists of norms are found as blocks, and so are norms that are blocks."""
    config = transformers.XLMConfig(
        vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, n_langs=1, max_position_embeddings=64, use_lang_emb=False,
        pad_index=1, pad_token_id=1,
    )  # fmt: skip
    monkeypatch.setitem(FAMILIES, "xlm", lambda: transformers.XLMWithLMHeadModel(config))
    loaded = streamed(open_checkpoint(save_checkpoint(tmp_path / "model", family)), 9)
    ids = torch.randint(4, 40, (3, 9), generator=generator)
    with torch.no_grad():
        loaded.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert any("forward" in vars(module) for module in loaded.model.modules())
    loaded.close()
    assert not any("forward" in vars(module) for module in loaded.model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "t5", "bert"])
def test_no_norm_sees_a_whole_batch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    kinds: set[Any] = {type(module) for module in FAMILIES[family]().modules() if is_norm(module)}
    seen: list[int] = []
    for kind in kinds:

        def forward(self: Any, x: Tensor, forward: Any = kind.forward) -> Any:
            seen.append(x.numel() // x.shape[-1])
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", forward)
    loaded = streamed(open_checkpoint(save_checkpoint(tmp_path / "model", family)), 9)
    ids = torch.randint(4, 40, (4, 9), generator=generator)
    batch = Batch(ids, torch.ones_like(ids), ids)
    loss_and_gradients(loaded, batch)
    seen.clear()  # trials take two parts
    loss_and_gradients(loaded, batch)
    loaded.close()
    assert max(seen) == 9


def test_a_norm_in_parts_keeps_nothing_but_its_input(tmp_path: Path, generator: torch.Generator) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    ids = torch.randint(4, 40, (8, 9), generator=generator)
    hidden = ids.numel() * 32 * 4  # bytes
    kept = []
    for part_tokens in (None, 9):
        loaded = streamed(checkpoint, part_tokens)
        norm = loaded.model.model.norm
        forward, sizes = norm.forward, []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        def probed(x: Tensor, forward: Any = forward, note: Any = note) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return forward(x)

        norm.forward = probed
        loss_and_gradients(loaded, Batch(ids, torch.ones_like(ids), ids))
        loaded.close()
        kept.append(sum(sizes))
    assert kept[0] > 2 * hidden
    assert kept[1] <= hidden


def test_a_smaller_batch_brings_back_no_parts_of_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    loaded = streamed(open_checkpoint(save_checkpoint(tmp_path / "model")), 9, keep_inputs=False)
    assert loaded.stream is not None
    copies: list[int] = []
    load = loaded.stream.transfers.load
    monkeypatch.setattr(loaded.stream.transfers, "load", lambda *of: copies.append(1) or load(*of))
    counts = []
    for rows in (1, 3, 1):
        ids = torch.randint(4, 40, (rows, 9), generator=generator)
        copies.clear()
        batch_loss(loaded.model, Batch(ids, torch.ones_like(ids), ids), loaded.kind).total.backward()  # type: ignore[no-untyped-call]
        counts.append(len(copies))
    loaded.stream.close()
    # The first block stays from the pass before.
    assert counts[1] > counts[0]
    assert counts[2] == counts[0] - 1


def streamed(checkpoint: Checkpoint, part_tokens: int | None, keep_inputs: bool | None = None) -> LoadedModel:
    """A model whose matrices are trained, in parts of so many tokens."""
    loaded = load_streamed(checkpoint, CPU, "cpu", keep_inputs=keep_inputs)
    assert loaded.stream is not None
    loaded = replace(loaded, stream=loaded.stream.with_hooks(Hooks(part_tokens=part_tokens)))
    for target in loaded.architecture.targets:
        loaded.model.get_parameter(target.parameter).requires_grad_(True)
    return loaded


def loss_and_gradients(loaded: LoadedModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Of one forward and backward pass."""
    gradients: dict[str, Tensor] = {}
    names = dict.fromkeys(target.parameter for target in loaded.architecture.targets)
    parameters = {name: loaded.model.get_parameter(name) for name in names}
    hooks = [p.register_post_accumulate_grad_hook(collector(gradients, name)) for name, p in parameters.items()]
    loss = batch_loss(loaded.model, batch, loaded.kind).total
    loss.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return float(loss.detach()), gradients


def equal(whole: tuple[float, dict[str, Tensor]], parts: tuple[float, dict[str, Tensor]]) -> None:
    """The same loss and gradients to rounding."""
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in whole[1].values())
    assert whole[1].keys() == parts[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-6 * scale, rtol=0)


def collector(gradients: dict[str, Tensor], name: str) -> Any:
    """A hook that adds up what a parameter gets and frees it."""

    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradients[name] = gradients[name] + gradient if name in gradients else gradient

    return hook

"""A batch in parts: the same numbers, fewer activations at a time, and never where it would be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, save_checkpoint
from torch import Tensor, nn

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.model.load import load_streamed
from sculptor.model.loss import batch_loss
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


@pytest.mark.parametrize("keep_inputs", [True, False])
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
        loaded = load_streamed(checkpoint, CPU, "cpu", keep_inputs=keep_inputs)
        stream = loaded.stream
        assert stream is not None
        stream.part_tokens = part_tokens
        gradients: dict[str, Tensor] = {}
        for target in loaded.architecture.targets:
            parameter = loaded.model.get_parameter(target.parameter).requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(collector(gradients, target.name))
        loss = batch_loss(loaded.model, batch, loaded.kind).total
        loss.backward()  # type: ignore[no-untyped-call]
        stream.end_backward()
        assert sum(stream.slots.fills.values()) == 2 * len(stream.paths) - 1, "parts load nothing again"
        stream.close()
        found.append((float(loss.detach()), gradients))
    (whole, expected), (parts, gradients) = found
    assert parts == pytest.approx(whole, rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6 * scale, rtol=0)


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
    loaded = load_streamed(open_checkpoint(save_checkpoint(tmp_path / "model", family)), CPU, "cpu")
    assert loaded.stream is not None
    loaded.stream.part_tokens = 9
    for target in loaded.architecture.targets:
        loaded.model.get_parameter(target.parameter).requires_grad_(True)
    ids = torch.randint(4, 40, (4, 9), generator=generator)
    loss = batch_loss(loaded.model, Batch(ids, torch.ones_like(ids), ids), loaded.kind).total
    seen.clear()  # a trial takes two parts
    loss.backward()  # type: ignore[no-untyped-call]
    loaded.stream.end_backward()
    batch_loss(loaded.model, Batch(ids, torch.ones_like(ids), ids), loaded.kind)
    loaded.stream.close()
    assert max(seen) == 9


def test_a_smaller_batch_brings_back_no_parts_of_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    loaded = load_streamed(open_checkpoint(save_checkpoint(tmp_path / "model")), CPU, "cpu", keep_inputs=False)
    assert loaded.stream is not None
    loaded.stream.part_tokens = 9
    for target in loaded.architecture.targets:
        loaded.model.get_parameter(target.parameter).requires_grad_(True)
    copies: list[int] = []
    load = loaded.stream.transfers.load
    monkeypatch.setattr(loaded.stream.transfers, "load", lambda *of: copies.append(1) or load(*of))
    counts = []
    for rows in (1, 3, 1):
        ids = torch.randint(4, 40, (rows, 9), generator=generator)
        copies.clear()
        batch_loss(loaded.model, Batch(ids, torch.ones_like(ids), ids), loaded.kind).total.backward()  # type: ignore[no-untyped-call]
        loaded.stream.end_backward()
        counts.append(len(copies))
    loaded.stream.close()
    # The first block stays from the pass before.
    assert counts[1] > counts[0]
    assert counts[2] == counts[0] - 1


def collector(gradients: dict[str, Tensor], name: str) -> Any:
    """A hook that adds up what a parameter gets and frees it."""

    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradients[name] = gradients[name] + gradient if name in gradients else gradient

    return hook

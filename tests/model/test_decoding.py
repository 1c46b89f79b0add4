"""Steps of decoding that are recorded: the same tokens as `generate` says, and never others in silence."""

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, save_checkpoint
from torch import Tensor

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.jobs.opening import open_model
from sculptor.model import decoding, sampling
from sculptor.model.decoding import decode, recorded
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.sampling import continue_prompts

ENDS = list(range(8, 20))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
MADE: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"],
            eos_token_id=0, pad_token_id=1, bos_token_id=0,
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=5, eos_token_id=0, pad_token_id=1, bos_token_id=0,
        )
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=0, pad_token_id=1)
    ),
    "gpt-neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16,
            max_position_embeddings=64, eos_token_id=0, pad_token_id=1, bos_token_id=0,
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0, pad_token_id=1)
    ),
}  # fmt: skip


def load(path: Path, family: str, device: str = "cpu") -> LoadedModel:
    return load_model(open_checkpoint(save_checkpoint(path / family, family)), torch.device(device))


def prompts_of(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Padded on the left, with what is seen."""
    width = max(map(len, prompts))
    ids = [[loaded.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=loaded.device), torch.tensor(mask, device=loaded.device)


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """Stands for a recording where there is no GPU: the step itself. Recording runs nothing: what it predicts is not there yet."""
    run()
    steps: Any = run.__self__  # type: ignore[attr-defined]
    steps.logits = torch.full_like(steps.logits, torch.nan)
    return run


def record_on(device: str) -> decoding.Record:
    return recorded if device == "cuda" else run_again


def up_to_the_end(said: Tensor) -> list[list[int]]:
    return [sampling._up_to(row, ENDS)[0] for row in said.tolist()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3", "gemma2", "phi3", "opt", "gemma3", "mistral"])
def test_the_likeliest_tokens_are_those_of_generate(
    tmp_path: Path, family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths, rows that end at different places, windows that are shorter than what is said."""
    if family in MADE:
        monkeypatch.setitem(FAMILIES, family, MADE[family])
    loaded = load(tmp_path, family, device)
    prompts = [[5 + i, *range(7, 7 + i % 4)] for i in range(9)]
    ids, mask = prompts_of(loaded, prompts)
    with monkeypatch.context() as plainly:
        plainly.setattr(sampling, "decode", lambda *_, **__: None)
        wanted = continue_prompts(loaded, prompts, 40, ENDS, temperature=0.0)
    found = decode(loaded, ids, mask, 40, ENDS, 0.0, record=record_on(device))
    if family == "mixtral" and device == "cuda":  # how many tokens an expert has is read from the device
        assert found is None
        assert continue_prompts(loaded, prompts, 40, ENDS, temperature=0.0) == wanted
        return
    assert found is not None
    assert up_to_the_end(found) == wanted
    assert len({len(row) for row in wanted}) > 2
    assert found.shape[1] <= max(map(len, wanted)) + decoding._LOOK


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_drawn_as_often_as_they_are_likely(tmp_path: Path, device: str) -> None:
    """At two temperatures, the first token and the one behind it; Pearson's statistic within five standard deviations."""
    loaded = load(tmp_path, "llama", device)
    rows = 20_000
    ids, mask = prompts_of(loaded, [[5, 6]] * rows)
    for temperature in (1.0, 0.05):
        torch.manual_seed(1)
        said = decode(loaded, ids, mask, 9, [63], temperature, record=record_on(device))
        assert said is not None
        for before, drawn in (([5, 6], said[:, 0]), ([5, 6, int(said[:, 0].mode().values)], said[:, 1])):
            here = drawn if len(before) == 2 else drawn[said[:, 0] == before[-1]]
            logits = loaded.model(input_ids=torch.tensor([before], device=device)).logits[0, -1].double()
            wanted = (logits / temperature).softmax(0).cpu() * len(here)
            counts = torch.bincount(here.cpu(), minlength=len(wanted)).double()
            often = wanted > 5
            statistic = float((((counts - wanted) ** 2) / wanted)[often].sum())
            freedom = int(often.sum()) - 1
            assert abs(statistic - freedom) < 5 * (2 * max(freedom, 1)) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_the_seed_decides_what_is_drawn(tmp_path: Path, device: str) -> None:
    loaded = load(tmp_path, "llama", device)
    ids, mask = prompts_of(loaded, [[5, 6], [7]])
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        said = decode(loaded, ids, mask, 20, [63], 1.0, record=record_on(device))
        assert said is not None
        found.append(said.tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("frozen", ["position", "seen", "token"])
def test_a_recording_that_sees_something_else_is_thrown_away(tmp_path: Path, frozen: str) -> None:
    """What a model's Python decides stays as it was when a step was recorded: the last step is predicted anew, and differs."""
    loaded = load(tmp_path, "llama")
    with torch.no_grad():  # positions and tokens that matter
        for name, parameter in loaded.model.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    ids, mask = prompts_of(loaded, [[5, 6, 7]] * 4)
    assert decode(loaded, ids, mask, 20, [63], 1.0, record=run_again) is not None
    forward = loaded.model.forward
    name = {"position": "position_ids", "seen": "attention_mask", "token": "input_ids"}[frozen]
    kept: list[Tensor] = []

    def stuck(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        own = {"cache": cache} if cache is not None else {"past_key_values": past_key_values}
        if use_cache and input_ids.shape[1] == 1:
            kept.append(given[name].clone())  # type: ignore[union-attr]
            given[name] = kept[0]
        return forward(**given, **{key: value for key, value in own.items() if value is not None}, use_cache=use_cache)

    loaded.model.forward = stuck
    torch.manual_seed(0)
    assert decode(loaded, ids, mask, 20, [63], 1.0, record=run_again) is None
    assert len(kept) > 8


def test_a_model_that_goes_by_the_length_of_its_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-Neo cuts its window by how long keys are, and those of a recorded step are as long as they will be."""
    monkeypatch.setitem(FAMILIES, "gpt-neo", MADE["gpt-neo"])
    loaded = load(tmp_path, "gpt-neo")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    for length, within in ((4, True), (14, False), (30, False)):
        ids, mask = prompts_of(loaded, [[4 + (7 * i * i + i * length) % 40 for i in range(length)]])
        assert (decode(loaded, ids, mask, 8, [63], 1.0, record=run_again) is not None) == within
        said = decode(loaded, ids, mask, 8, [63], 0.0, record=run_again)
        assert (said is not None) == within
        if said is not None:
            assert said.tolist() == continue_prompts(loaded, ids.tolist(), 8, [63], 0.0)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_first_prediction_is_looked_at(tmp_path: Path, wrong: bool) -> None:
    loaded = load(tmp_path, "llama")
    ids, mask = prompts_of(loaded, [[5, 6, 7]] * 3)
    forward = loaded.model.forward

    @functools.wraps(forward)
    def begun(*given: Any, **more: Any) -> Any:
        made = forward(*given, **more)
        if more.get("use_cache") and more["input_ids"].shape[1] > 1 and wrong:
            made.logits = made.logits.roll(5, dims=-1)
        return made

    loaded.model.forward = begun
    assert (decode(loaded, ids, mask, 20, [63], 1.0, record=run_again) is None) == wrong


@pytest.mark.parametrize("wrong", [False, True])
def test_every_likeliest_token_is_looked_at(tmp_path: Path, wrong: bool) -> None:
    """One step in the middle says another token; what follows goes on from there, and is right."""
    loaded = load(tmp_path, "llama")
    ids, mask = prompts_of(loaded, [[5, 6, 7]] * 3)
    forward, steps = loaded.model.forward, iter(range(99))

    @functools.wraps(forward)
    def once(*given: Any, **more: Any) -> Any:
        made = forward(*given, **more)
        if more.get("use_cache") and more["input_ids"].shape[1] == 1 and next(steps) == 7 and wrong:
            made.logits = made.logits.roll(5, dims=-1)
        return made

    loaded.model.forward = once
    assert (decode(loaded, ids, mask, 20, [63], 0.0, record=run_again) is None) == wrong


def test_what_cannot_be_recorded_is_said_the_usual_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of other kinds than keys and values, positions that a model counts itself, a kernel that cannot be recorded."""
    for family in ("mamba", "bloom"):
        monkeypatch.setitem(FAMILIES, family, MADE[family])
        loaded = load(tmp_path, family)
        ids, mask = prompts_of(loaded, [[5, 6], [7]])
        assert decode(loaded, ids, mask, 20, [63], 1.0, record=run_again) is None
    loaded = load(tmp_path, "llama")
    ids, mask = prompts_of(loaded, [[5, 6], [7]])

    def fails(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert decode(loaded, ids, mask, 20, [63], 1.0, record=fails) is None
    assert decode(loaded, ids, mask, decoding._WORTH - 1, [63], 1.0, record=run_again) is None


def test_blocks_that_come_and_go_are_not_recorded(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", "llama"))
    loaded = open_model(checkpoint, torch.device("cpu"), inspect_architecture(checkpoint), "disk")
    with closing(loaded):
        ids, mask = prompts_of(loaded, [[5, 6], [7]])
        assert loaded.stream is not None
        assert decode(loaded, ids, mask, 20, [63], 1.0, record=run_again) is None


def test_tokens_are_told_while_they_are_said(tmp_path: Path) -> None:
    loaded = load(tmp_path, "llama")
    ids, mask = prompts_of(loaded, [[5, 6], [7]])
    told: list[int] = []
    heard = SimpleNamespace(put=lambda tokens: told.append(int((tokens != loaded.pad_id).sum())))
    said = decode(loaded, ids, mask, 50, [], 1.0, heard=heard, record=run_again)
    assert said is not None
    assert sum(told) == int((said != loaded.pad_id).sum())
    assert len(told) > 2

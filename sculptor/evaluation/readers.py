"""Continuations of prompts, read behind a cache where the model's own keeps its promise, else from the beginning.

A cache saves computing the prompt once per label, but not every model's can be copied for several labels, and a model with a
state reads padding on the left as if it were text. So caches are tried on two short prompts, against reading each by itself.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sculptor.data.edges import target_ids
from sculptor.model.decoding import padded_left
from sculptor.model.load import LoadedModel
from sculptor.model.loss import decoder_inputs

# How far the logits of a cache may be from those of the whole sequence, beside what batching alone makes of them.
_NEAR = {torch.float32: 5e-6, torch.float64: 1e-12}
_NEAR_OTHERS = 2e-2


class Reader(Protocol):
    """Some prompts, ready to be continued; `first_logits` (B, vocabulary) predict the first token behind each."""

    device: torch.device
    first_logits: Tensor

    def fork(self, owners: Sequence[int]) -> Any:
        """The states of some prompts, in this order, with repetitions."""
        ...

    def read(self, state: Any, ids: Tensor) -> tuple[Tensor, Any]:
        """Logits (B, t, vocabulary) behind each of `ids` (B, t), and the state after them."""
        ...


def open_reader(loaded: LoadedModel, prompts: Sequence[list[int]]) -> Reader:
    """The fastest way of reading that gives the right scores."""
    if loaded.kind != "causal":
        return _EncoderDecoder(loaded, prompts)
    if not hasattr(loaded.model, "_sculptor_cache_works"):
        loaded.model._sculptor_cache_works = _cache_works(loaded)
    return _Cached(loaded, prompts) if loaded.model._sculptor_cache_works else _Whole(loaded, prompts)


@torch.no_grad()
def _cache_works(loaded: LoadedModel) -> bool:
    """Whether prompts padded on the left, and copies of their cache, give what each sequence gives by itself."""
    size = max(2, min(97, loaded.architecture.vocab_size - 1))
    prompts = [[1 + (7 * i) % size for i in range(9)], [1 + (5 * i + 3) % size for i in range(4)]]
    owners, ids = [1, 0, 1], torch.tensor([[2, 3], [1, 2], [3, 1]], device=loaded.device) % (size + 1)
    try:
        cached = _Cached(loaded, prompts)
        found = torch.cat([cached.first_logits[owners][:, None], cached.read(cached.fork(owners), ids)[0]], dim=1)
    except Exception:  # caches fail in as many ways as there are models
        return False
    together = _Whole(loaded, prompts)
    right = torch.cat([together.first_logits[owners][:, None], together.read(together.fork(owners), ids)[0]], dim=1)
    alone = []
    for owner, continuation in zip(owners, ids, strict=True):
        one = _Whole(loaded, [prompts[owner]])
        alone.append(torch.cat([one.first_logits[:, None], one.read(one.fork([0]), continuation[None])[0]], dim=1))
    expected = torch.cat(alone)
    noise = float((right - expected).abs().max())
    dtype = next(loaded.model.parameters()).dtype
    near = _NEAR.get(dtype, _NEAR_OTHERS) * max(1.0, float(expected.abs().max()))
    return bool((found - expected).abs().max() <= 10 * noise + near)


class _Cached:
    """Prompts, padded on the left and computed once; continuations are read behind copies of their cache."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[list[int]]) -> None:
        self.model, self.device = loaded.model, loaded.device
        accepted = inspect.signature(self.model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        # Renamed in transformers 5.24.
        self.cache_name = "past_key_values" if "past_key_values" in accepted else "cache"
        ids, self.mask = padded_left(loaded, prompts)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        output = self._run(ids, self.mask, None, keep)
        self.cache = output[self.cache_name]
        self.first_logits = output.logits[:, -1].float()

    def _run(self, ids: Tensor, mask: Tensor, cache: Any, extra: dict[str, Any]) -> Any:
        if self.takes_positions:
            extra = extra | {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]}
        extra = extra | {self.cache_name: cache, "use_cache": True} | _plain(self.model)
        return self.model(input_ids=ids, attention_mask=mask, **extra)

    def fork(self, owners: Sequence[int]) -> tuple[Any, Tensor]:
        index = torch.tensor(owners, device=self.device)
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(index)
        return cache, self.mask[index]

    def read(self, state: tuple[Any, Tensor], ids: Tensor) -> tuple[Tensor, tuple[Any, Tensor]]:
        cache, mask = state
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        output = self._run(ids, mask, cache, {})
        return output.logits.float(), (output[self.cache_name], mask)


class _Whole:
    """Prompts with their continuations, read from the beginning each time; padding is on the right, where nothing sees it."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[list[int]]) -> None:
        self.model, self.device, self.pad_id = loaded.model, loaded.device, loaded.pad_id
        self.prompts = [list(prompt) for prompt in prompts]
        self.first_logits = self._behind(self.prompts, 1)[:, 0]

    def fork(self, owners: Sequence[int]) -> list[list[int]]:
        return [self.prompts[i] for i in owners]

    def read(self, state: list[list[int]], ids: Tensor) -> tuple[Tensor, list[list[int]]]:
        longer = [[*prompt, *more] for prompt, more in zip(state, ids.tolist(), strict=True)]
        return self._behind(longer, ids.shape[1]), longer

    def _behind(self, sequences: list[list[int]], count: int) -> Tensor:
        """Logits (B, count, vocabulary) of the last `count` tokens of each."""
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        width = int(lengths.max())
        padded = [ids + [self.pad_id] * (width - len(ids)) for ids in sequences]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]
        wanted = lengths[:, None] - count + torch.arange(count, device=self.device)  # (B, count)
        accepted = inspect.signature(self.model.forward).parameters
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        columns = torch.arange(width, device=self.device)
        if "logits_to_keep" in accepted:
            columns = extra["logits_to_keep"] = torch.unique(wanted)
        logits = self.model(
            input_ids=torch.tensor(padded, device=self.device), attention_mask=torch.tensor(mask, device=self.device),
            **extra, **_plain(self.model),
        ).logits  # fmt: skip
        places = torch.searchsorted(columns, wanted)
        rows = torch.arange(len(sequences), device=self.device)[:, None]
        return torch.as_tensor(logits[rows, places].float())


class _EncoderDecoder:
    """Prompts, encoded once; continuations go to the decoder behind its start token."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[list[int]]) -> None:
        self.model, self.device = loaded.model, loaded.device
        width = max(map(len, prompts))
        ids = [prompt + [loaded.pad_id] * (width - len(prompt)) for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        self.mask = torch.tensor(mask, device=self.device)
        encoder = self.model.get_encoder()
        output = encoder(input_ids=torch.tensor(ids, device=self.device), attention_mask=self.mask)
        self.output_class, self.hidden = type(output), output[0]
        # As training makes it of a target: some models begin with the language, which targets end with.
        target = torch.tensor([target_ids(loaded.tokenizer, "a")], device=self.device)
        self.start = decoder_inputs(self.model, target)[:, :1].repeat(len(prompts), 1)
        self.first_logits = self._run(self.start, self.hidden, self.mask)[:, -1]

    def _run(self, ids: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=self.output_class(last_hidden_state=hidden), attention_mask=mask, decoder_input_ids=ids,
            use_cache=False,
        )  # fmt: skip
        return torch.as_tensor(output.logits.float())

    def fork(self, owners: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor(owners, device=self.device)
        return self.start[index], self.hidden[index], self.mask[index]

    def read(self, state: tuple[Tensor, Tensor, Tensor], ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        before, hidden, mask = state
        decoder_ids = torch.cat([before, ids], dim=1)
        return self._run(decoder_ids, hidden, mask)[:, -ids.shape[1] :], (decoder_ids, hidden, mask)


def _plain(model: Any) -> dict[str, bool]:
    """Arguments that leave out what scoring has no use for: a router's loss needs a mask as long as the ids."""
    accepted = inspect.signature(model.forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in accepted else {}

"""Continuations of many prompts on a GPU, whose steps are recorded once and played again.

A step of a small model is some hundreds of kernels that take less than Python needs to launch them. A CUDA graph launches them at
once. What is kept of each row lies at fixed places of its full length, so that every step is the same kernels.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from sculptor.data.examples import no_embedding
from sculptor.errors import CheckpointError
from sculptor.model.load import LoadedModel

# What a cache is called by newer and older versions of transformers.
CACHES = ("cache", "past_key_values")
_WORTH = 8  # steps: recording takes as long as a few
_LOOK = 16  # steps between looking whether all rows have ended, for which the device is waited for
_PLAYED = 3  # the first step that is played: what recording itself leaves behind was not run
_CHECKED = 4  # rows that are predicted anew
# Of the norm of what is predicted: bf16 differs by one or two hundredths, a step that saw something else by half or more.
_SAME, _SAME_OTHERS = {torch.float32: 1e-3, torch.float64: 1e-6}, 0.1
_BEHIND = 5  # times as much of the spread a likeliest token may be behind another one, by rounding

Record = Callable[[Callable[[], None]], Callable[[], None]]


def padded_left(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as (rows, width), padded on the left, and the mask of what is no padding; where the model computes.

    Raises:
        CheckpointError: if the model has no embedding for one of their tokens.
    """
    largest = max((max(prompt, default=0) for prompt in prompts), default=0)
    if largest >= loaded.architecture.vocab_size:
        raise CheckpointError(f"{loaded.checkpoint.path}: {no_embedding(largest, loaded.architecture.vocab_size)}")
    width = max(map(len, prompts))
    ids = [[loaded.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=loaded.device), torch.tensor(mask, device=loaded.device)


class Heard(Protocol):
    """Is told of tokens while they are said, as a streamer of `generate` is."""

    def put(self, tokens: Tensor) -> None:
        """One token of every row (rows,); those of rows that have ended are padding."""


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What launches the kernels of a step, which is run once before, again.

    Raises:
        RuntimeError: if it does what cannot be recorded, such as reading a number of the device.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A recording that fails leaves its stream the current one.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        run()
    return graph.replay


@torch.no_grad()
def decode(
    loaded: LoadedModel,
    ids: Tensor,
    mask: Tensor,
    num_new: int,
    ends: Sequence[int],
    temperature: float,
    *,
    heard: Heard | None = None,
    record: Record | None = None,
) -> Tensor | None:
    """New tokens (rows, at most num_new), padded behind the first of `ends`; None where a model's steps cannot be recorded.

    So it is without a GPU, whose launches are what a recording spares.

    Args:
        loaded: a causal model.
        ids, mask: prompts (rows, width), padded on the left.
        num_new: tokens at most.
        ends: tokens that end a row.
        temperature: 0 for the most likely tokens.
        heard: is told of the tokens.
        record: makes a step one that can be played again; it runs it once. Default a CUDA graph.
    """
    record = recorded if record is None and loaded.device.type == "cuda" else record
    if record is None:
        return None
    if num_new < _WORTH or loaded.stream is not None:  # blocks come and go, which no recording would do again
        return None
    steps = _Steps.of(loaded, ids, mask, num_new, ends, temperature)
    if steps is None:
        return None
    # Whatever keeps a step from being recorded: a model's own code, its kernels, memory. There is another way.
    with suppress(RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError):
        steps.begin()
        steps.note(1)
        play = record(steps.step)
        done, told = 2, 0
        while done < num_new:
            if done - told >= _LOOK:
                steps.tell(heard, told, done)
                told = done
                if bool(steps.ended.all()):
                    break
            play()
            done += 1
            if done == _PLAYED:
                steps.note(done)
        steps.note(done)
        if steps.is_as_predicted(ids, mask, done):
            steps.tell(heard, told, done)
            return steps.said[:, :done]
    return None


class _Steps:
    """Rows that are continued side by side, a token a step; everything at places that do not change.

    Attributes:
        said: (rows, num_new) tokens, padding where nothing was said yet.
        ended: (rows,) which rows have.
        logits: (rows, vocabulary) of the last step.
    """

    def __init__(
        self, loaded: LoadedModel, ids: Tensor, mask: Tensor, num_new: int, ends: Sequence[int], temperature: float
    ) -> None:
        rows, width = ids.shape
        self._loaded, self._temperature = loaded, temperature
        self._ids, self._first = ids, (mask.cumsum(1) - 1).clamp(min=0)
        self._seen = torch.cat([mask, mask.new_zeros(rows, num_new)], dim=1)
        self._ends = torch.tensor(list(ends), device=ids.device)
        self._token = ids[:, -1:].clone()
        self._position = self._first[:, -1:].clone()
        self._count = torch.zeros(1, dtype=torch.long, device=ids.device)
        self._width = width
        self.said = torch.full((rows, num_new), loaded.pad_id, device=ids.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        self.logits = torch.empty(0, device=ids.device)
        self._checked = range(0, rows, max(1, rows // _CHECKED))
        self._noted: list[tuple[int, Tensor]] = []
        self._cache: dict[str, Any] = {}

    @classmethod
    def of(
        cls, loaded: LoadedModel, ids: Tensor, mask: Tensor, num_new: int, ends: Sequence[int], temperature: float
    ) -> "_Steps | None":
        """None for models that count positions by themselves, or keep other things than keys and values."""
        from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

        known = inspect.signature(loaded.model.forward).parameters
        name = next((name for name in CACHES if name in known), None)
        if name is None or "position_ids" not in known:
            return None
        if any(getattr(module, "rope_deltas", None) is not None for module in loaded.model.modules()):
            return None
        steps = cls(loaded, ids, mask, num_new, ends, temperature)
        total = ids.shape[1] + num_new
        try:
            layers = StaticCache(config=loaded.model.config, max_cache_len=total).layers
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        if not {*map(type, layers)} <= {StaticLayer, StaticSlidingWindowLayer}:
            return None
        # Layers with a window keep everything as well: their masks leave out what is too far, and their own count is Python's.
        steps._cache = {name: Cache(layers=[StaticLayer(max_cache_len=total) for _ in layers])}
        return steps

    def begin(self) -> None:
        """Reads the prompts, and says the first token."""
        self._choose(self._predict(self._ids, self._first))

    def step(self) -> None:
        """Says one more token of every row."""
        self._seen.index_fill_(1, self._width + self._count - 1, 1)
        self._position += 1
        self._choose(self._predict(self._token, self._position))

    def _predict(self, ids: Tensor, positions: Tensor) -> Tensor:
        made = self._loaded.model(
            input_ids=ids, attention_mask=self._seen, position_ids=positions, use_cache=True, **self._cache
        )
        return made.logits[:, -1]  # type: ignore[no-any-return]

    def _choose(self, logits: Tensor) -> None:
        self.logits = logits
        scores = logits.float()
        if self._temperature > 0:
            # The largest with Gumbel noise is drawn from the softmax: https://arxiv.org/abs/1411.0030, section 2.
            scores = scores / self._temperature - torch.empty_like(scores).exponential_().log()
        chosen = scores.argmax(dim=-1)
        chosen = torch.where(self.ended, self._loaded.pad_id, chosen)
        self.said.index_copy_(1, self._count, chosen[:, None])
        self.ended |= (chosen[:, None] == self._ends).any(dim=1)
        self._token.copy_(chosen[:, None])
        self._count += 1

    def tell(self, heard: Heard | None, start: int, stop: int) -> None:
        """Tells of the tokens of some steps."""
        if heard is not None:
            heard.put(self.said[:, start:stop].flatten())

    def note(self, count: int) -> None:
        """Keeps what step `count` predicted of the rows that are checked."""
        self._noted.append((count, self.logits[self._checked.start :: self._checked.step].clone()))

    def is_as_predicted(self, ids: Tensor, mask: Tensor, count: int) -> bool:
        """Whether the steps that were noted predicted what the model does of the same tokens, read at once.

        What Python decides is decided once, when a step is recorded, and a model may go by how long its cache is: both are found
        here. Where likeliest tokens are said, all of `count` steps are looked at.
        """
        near = _SAME.get(self.logits.dtype, _SAME_OTHERS)
        apart, size = [0.0] * len(self._noted), [0.0] * len(self._noted)
        for at, row in enumerate(self._checked):
            prompt = ids[row][mask[row].bool()]
            read = torch.cat([prompt, self.said[row, : count - 1]])
            logits = self._loaded.model(input_ids=read[None]).logits[0, len(prompt) - 1 :]
            for i, (step, found) in enumerate(self._noted):
                wanted, own = logits[step - 1].double(), found[at].double()
                apart[i] += float(torch.linalg.vector_norm(own - own.mean() - wanted + wanted.mean()) ** 2)
                size[i] += float(torch.linalg.vector_norm(wanted - wanted.mean()) ** 2)
            if self._temperature == 0 and not self._are_likeliest(logits.float(), self.said[row, :count], near):
                return False
        return all(a <= near**2 * s for a, s in zip(apart, size, strict=True))

    def _are_likeliest(self, logits: Tensor, said: Tensor, near: float) -> bool:
        """Whether tokens up to the first end are those of the largest logits (tokens, vocabulary), or nearly."""
        behind = logits.amax(dim=1) - logits.gather(1, said[:, None])[:, 0]
        going = (said[:, None] == self._ends).any(dim=1).cumsum(0).roll(1)
        going[0] = 0
        return not bool(((behind > _BEHIND * near * logits.std(dim=1)) & (going == 0)).any())

"""Text that a model says by itself: calibration for users who have a checkpoint and nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sculptor.data.examples import IGNORED, Example
from sculptor.errors import CheckpointError, DataError
from sculptor.model.load import LoadedModel
from sculptor.progress import Bar, Progress

# Rows sampled side by side: as many as their caches (keys and values of every layer) fit into, within bounds.
_CACHE_BYTES = {"cuda": 6e9, "cpu": 1e9}
_ROWS = (4, 256)
_MAX_USER_TOKENS = 96
_MIN_WORDS = 8  # of a conversation, beside its template
_MARK = "\u241e"  # stands for the user's words while a template is taken apart
_MAX_ROUNDS = 1000


@torch.no_grad()
def sample_examples(
    loaded: LoadedModel, num_tokens: int, max_length: int, *, chat: bool, seed: int, progress: Progress
) -> tuple[Example, ...]:
    """Sequences sampled at temperature 1 until they hold `num_tokens` tokens.

    Args:
        loaded: a causal model.
        num_tokens: to stop at; the last sequence is cut to it.
        max_length: longest sequence.
        chat: sample a user's turn and the answer through the chat template, with the loss on the answer; else text
            from the beginning of a sequence.
        seed: of the sampling.
        progress: makes a progress bar.

    Raises:
        CheckpointError: if the model cannot sample text.
        DataError: if what it says is empty.
    """
    tokenizer, place = loaded.tokenizer, loaded.checkpoint.path
    if loaded.kind != "causal":
        raise CheckpointError(f"{place}: only a causal model can sample text; give --data files instead of self")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if chat and not tokenizer.chat_template:
        raise CheckpointError(f"{place}: --chat needs a chat template, and the tokenizer has none; leave it out")
    devices = [loaded.device.index or 0] if loaded.device.type == "cuda" else []
    most = _rows_at_once(loaded, max_length)
    found: list[Example] = []
    total = 0
    heard = _Heard(progress(total=num_tokens, desc="sample", unit="token"), num_tokens, loaded.pad_id)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for _ in range(_MAX_ROUNDS):
            if total >= num_tokens - 1:  # one token is no sequence
                break
            # Conversations end long before the longest: as many as the mean of those so far asks for.
            likely = max(2, total // len(found)) if chat and found else max_length
            rows = max(1, min(most, -(-(num_tokens - total) // likely)))
            sampled = (
                _converse(loaded, rows, max_length, heard) if chat else _speak(loaded, rows, start, max_length, heard)
            )
            for example in sampled:
                kept = min(example.length, num_tokens - total)
                if kept > 1:
                    found.append(Example(example.input_ids[:kept], example.labels[:kept]))
                    total += kept
            heard.up_to(total)
    heard.bar.close()
    found = [example for example in found if set(example.labels) != {IGNORED}]
    if not found:
        raise DataError(f"{place}: the model says nothing by itself; give --data files instead of self")
    return tuple(found)


class _Heard:
    """A streamer for `generate`: moves a bar with every token that is said, not only when a whole round is over."""

    def __init__(self, bar: Bar, most: int, pad_id: int) -> None:
        self.bar = bar
        self._most = most
        self._pad_id = pad_id
        self._shown = 0

    def put(self, tokens: Tensor) -> None:
        """The prompts (rows, tokens), which do not count; then one token of every row (rows,)."""
        if tokens.ndim == 1:
            self.up_to(self._shown + int((tokens != self._pad_id).sum()))

    def end(self) -> None:
        """All rows have ended."""

    def up_to(self, count: int) -> None:
        """Moves the bar on; where more was said than is kept, it waits."""
        count = min(count, self._most)
        if count > self._shown:
            self.bar.update(count - self._shown)
            self._shown = count


def _rows_at_once(loaded: LoadedModel, max_length: int) -> int:
    config = loaded.model.config.get_text_config()
    per_token = 2 * config.num_hidden_layers * config.hidden_size * (2 if loaded.device.type == "cuda" else 4)
    return int(min(max(_CACHE_BYTES[loaded.device.type] / (per_token * max_length), _ROWS[0]), _ROWS[1]))


def _speak(loaded: LoadedModel, rows: int, start: int, max_length: int, heard: _Heard) -> list[Example]:
    said = continue_prompts(loaded, [[start]] * rows, max_length - 1, [loaded.tokenizer.eos_token_id], heard=heard)
    return [Example((start, *ids), (start, *ids)) for ids in said if ids]


def template_tokens(loaded: LoadedModel) -> int:
    """How many tokens a chat template adds to a user's words, up to where the answer begins.

    Raises:
        CheckpointError: if it leaves out the words.
    """
    before, after = _around_words(loaded, answer=True)
    return len(_ids(loaded, before)) + len(_ids(loaded, after))


def _around_words(loaded: LoadedModel, *, answer: bool = False) -> tuple[str, str]:
    """What a chat template says before a user's words and after them."""
    shown = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=answer
    )
    before, found, after = shown.partition(_MARK)
    if not found:
        raise CheckpointError(f"{loaded.checkpoint.path}: the chat template leaves out the user's words")
    return before, after


def _ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False).input_ids)


def _converse(loaded: LoadedModel, rows: int, max_length: int, heard: _Heard) -> list[Example]:
    """A user's turn in the model's own words, then its answer, which has at least half of what the template leaves."""
    tokenizer = loaded.tokenizer
    left = max_length - template_tokens(loaded)
    if left < _MIN_WORDS:
        raise CheckpointError(
            f"{loaded.checkpoint.path}: the chat template takes {max_length - left} tokens, and sequences have {max_length}: "
            "too few for a conversation; give longer ones (--max-length), or leave out --chat"
        )
    before, after = _around_words(loaded)
    ends = [tokenizer.eos_token_id, *_ids(loaded, after.lstrip())[:1]]
    opening = _ids(loaded, before)
    questions = continue_prompts(loaded, [opening] * rows, min(_MAX_USER_TOKENS, left // 2), ends, heard=heard)
    prompts = []
    for ids in questions:
        text = tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True).strip()
        if text:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=True, return_dict=True, add_generation_prompt=True
            )
            prompts.append(list(rendered["input_ids"]))
    # Words that were cut inside of a character may take more tokens than they were.
    prompts = [prompt for prompt in prompts if len(prompt) < max_length]
    if not prompts:
        return []
    answers = continue_prompts(loaded, prompts, max_length - min(map(len, prompts)), ends, heard=heard)
    cut = [(prompt, ids[: max_length - len(prompt)]) for prompt, ids in zip(prompts, answers, strict=True)]
    return [Example((*prompt, *ids), (*(IGNORED,) * len(prompt), *ids)) for prompt, ids in cut if ids]


@torch.no_grad()
def continue_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    ends: Sequence[int],
    temperature: float = 1.0,
    *,
    heard: _Heard | None = None,
) -> list[list[int]]:
    """Continuations up to the first of `ends`, which is part of them; at temperature 0 the most likely ones."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = [[loaded.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    own = loaded.model.generation_config
    # Not the checkpoint's: a repetition penalty or beams would not be what the model says at temperature 1.
    loaded.model.generation_config = GenerationConfig(
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        use_cache=True,
        max_new_tokens=num_new,
        eos_token_id=list(ends),
        pad_token_id=loaded.pad_id,
    )
    try:
        output = loaded.model.generate(
            input_ids=torch.tensor(ids, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            streamer=heard,
        )
    finally:
        loaded.model.generation_config = own
    found = []
    for row in output[:, width:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found

"""Text that a model says by itself: calibration for users who have a checkpoint and nothing else."""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.configuration import reason_of
from sculptor.data.edges import special_ids
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import CheckpointError, DataError
from sculptor.model.decoding import CACHES, decode, padded_left
from sculptor.model.load import LoadedModel
from sculptor.model.room import cache_bytes
from sculptor.progress import Bar, Progress

# Rows sampled side by side: as many as their caches (keys and values of every layer) fit into, within bounds.
_CACHE_BYTES = {"cuda": 6e9, "cpu": 1e9}
_ROWS = (4, 512)
_LIKELY = 0.7  # of the longest, before there is a mean: how long a conversation is
_MAX_USER_TOKENS = 96
_DRAWN = 64  # tokens until one is a word
_MIN_WORDS = 8  # of a conversation, beside its template
_MARK = "\u241e"  # stands for the user's words while a template is taken apart
_MAX_ROUNDS = 1000
# Rounds on end of which so few rows say anything, until a model that says next to nothing is left with what there is.
_POOR, _POOR_ROUNDS = 0.05, 8
# What models raise where their caches do not go with how they are used.
_BREAKS = (ValueError, RuntimeError, AttributeError, TypeError, IndexError, KeyError, NotImplementedError)
_MORE = 1.15  # conversations than are likely to be needed
_STRETCH = {
    "cpu": 24
}  # tokens after which rows that have ended are left out; all of them on a GPU, where launches cost


@torch.no_grad()
def sample_examples(
    loaded: LoadedModel,
    num_tokens: int,
    max_length: int,
    *,
    chat: bool,
    seed: int,
    progress: Progress,
    name: str = "sample",
) -> tuple[Example, ...]:
    """Sequences sampled at temperature 1 until they hold `num_tokens` tokens, or the model has next to nothing to say.

    Args:
        loaded: a causal model.
        num_tokens: to stop at; the last sequence is cut to it.
        max_length: longest sequence.
        chat: sample a user's turn and the answer through the chat template, with the loss on the answer; else text: of a
            model with a chat template, whose sequences begin with a turn, from a word that is drawn,
            and of others from the beginning of a sequence.
        seed: of the sampling.
        progress: makes a progress bar, of this name.

    Raises:
        CheckpointError: if the model cannot sample text.
        DataError: if what it says is empty.
    """
    tokenizer, place = loaded.tokenizer, loaded.checkpoint.path
    if loaded.kind != "causal":
        raise CheckpointError(f"{place}: only a causal model can sample text; give --data files instead of self")
    if chat and not tokenizer.chat_template:
        raise CheckpointError(f"{place}: --chat needs a chat template, and the tokenizer has none; leave it out")
    devices = [loaded.device.index or 0] if loaded.device.type == "cuda" else []
    most = _rows_at_once(loaded, max_length)
    found: list[Example] = []
    total = 0
    with closing(progress(total=num_tokens, desc=name, unit="token")) as bar, torch.random.fork_rng(devices=devices):
        heard = _Heard(bar, num_tokens, loaded.pad_id)
        torch.manual_seed(seed)
        poor = 0
        for _ in range(_MAX_ROUNDS):
            if total >= num_tokens - 1 or poor == _POOR_ROUNDS:  # one token is no sequence
                break
            # Conversations end before the longest: as many as the mean of those so far asks for, and some more, since another
            # round for what is still lacking takes nearly as long as one of many rows.
            mean = total // len(found) if found else int(_LIKELY * max_length)
            likely = max(2, mean) if chat else max_length
            rows = max(1, min(most, math.ceil((_MORE if chat else 1.0) * (num_tokens - total) / likely)))
            speak = _converse if chat else _tell if tokenizer.chat_template else _speak
            said = speak(loaded, rows, max_length, heard)
            poor = poor + 1 if len(said) < _POOR * rows else 0
            for example in said:
                kept = min(example.length, num_tokens - total)
                if kept > 1:
                    found.append(Example(example.input_ids[:kept], example.labels[:kept]))
                    total += kept
            heard.up_to(total)
    said = [example for example in found if set(example.labels) != {IGNORED}]
    if found and not said:
        raise DataError(f"{place}: {num_tokens} tokens end before an answer begins; raise --calibration-tokens")
    found = said
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
    fit = _CACHE_BYTES[loaded.device.type] / (cache_bytes(loaded) * max_length)
    return int(min(max(fit, _ROWS[0]), _ROWS[1]))


def _speak(loaded: LoadedModel, rows: int, max_length: int, heard: _Heard) -> list[Example]:
    """Text from the beginning of a sequence."""
    start = _start(loaded)
    said = continue_prompts(loaded, [[start]] * rows, max_length - 1, [loaded.tokenizer.eos_token_id], heard=heard)
    return [Example((start, *ids), (start, *ids)) for ids in said if ids]


def _start(loaded: LoadedModel) -> int:
    """What a sequence begins with: the token for it, or that which ends the one before."""
    tokenizer = loaded.tokenizer
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)


def _tell(loaded: LoadedModel, rows: int, max_length: int, heard: _Heard) -> list[Example]:
    """Text that begins with a word."""
    tokenizer = loaded.tokenizer
    before = (
        [] if tokenizer.bos_token_id is None else [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
    )
    starts = [(*before, _word(loaded)) for _ in range(rows)]
    said = continue_prompts(loaded, starts, max_length - len(starts[0]), [tokenizer.eos_token_id], heard=heard)
    return [Example((*start, *ids), (*start, *ids)) for start, ids in zip(starts, said, strict=True) if ids]


def _word(loaded: LoadedModel) -> int:
    """A token of letters, any of them; of a vocabulary that has hardly any, one that is not special."""
    tokenizer = loaded.tokenizer
    special = special_ids(tokenizer)
    drawn: list[int] = torch.randint(min(len(tokenizer), loaded.architecture.vocab_size), (_DRAWN,)).tolist()
    plain = [i for i in drawn if i not in special] or drawn
    return next((i for i in plain if is_word(tokenizer.decode([i]))), plain[0])


def is_word(text: str) -> bool:
    """Two letters or more, and nothing else."""
    return len(text.strip()) > 1 and text.strip().isalpha()


def template_tokens(loaded: LoadedModel) -> int:
    """How many tokens a chat template adds to a user's words, up to where the answer begins.

    Raises:
        CheckpointError: if it leaves out the words.
    """
    before, after = _around_words(loaded, answer=True)
    return len(_ids(loaded, before)) + len(_ids(loaded, after))


def _around_words(loaded: LoadedModel, *, answer: bool = False) -> tuple[str, str]:
    """What a chat template says before a user's words and after them."""
    shown = _shown(loaded, _MARK, answer=answer)
    before, found, after = shown.partition(_MARK)
    if not found:
        raise CheckpointError(f"{loaded.checkpoint.path}: the chat template leaves out the user's words")
    return before, after


def _shown(loaded: LoadedModel, words: str, *, answer: bool) -> str:
    """A user's turn by itself, as the chat template writes it.

    Raises:
        CheckpointError: if it takes no such turn.
    """
    talk = [{"role": "user", "content": words}]
    try:
        found = loaded.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=answer)
    except Exception as cause:  # templates refuse what they like
        raise CheckpointError(
            f"{loaded.checkpoint.path}: the chat template takes no user's turn by itself ({reason_of(cause, 120)}); give another "
            "by --chat-template, or data: --data self is text outside of conversations"
        ) from cause
    return str(found)


def _ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False).input_ids)


def _converse(loaded: LoadedModel, rows: int, max_length: int, heard: _Heard) -> list[Example]:
    """A user's turn in the model's own words, then its answer, which has at least half of what the template leaves."""
    tokenizer = loaded.tokenizer
    left = max_length - template_tokens(loaded)
    if left < _MIN_WORDS:
        raise CheckpointError(
            f"{loaded.checkpoint.path}: the chat template takes {max_length - left} tokens, and sequences have {max_length}: "
            "too few for a conversation; raise --max-length"
        )
    before, after = _around_words(loaded)
    ends = [tokenizer.eos_token_id, *_ids(loaded, after.lstrip())[:1]]
    opening = _ids(loaded, before) or [_start(loaded)]
    questions = continue_prompts(loaded, [opening] * rows, min(_MAX_USER_TOKENS, left // 2), ends, heard=heard)
    prompts = []
    for ids in questions:
        text = tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True).strip()
        if text:
            prompts.append(_ids(loaded, _shown(loaded, text, answer=True)))
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
    """Continuations up to the first of `ends`, which is part of them; at temperature 0 the most likely ones.

    Raises:
        CheckpointError: if the model cannot generate.
    """
    from transformers import GenerationConfig

    own, model = loaded.model.generation_config, loaded.model
    # Not the checkpoint's: a repetition penalty or beams would not be what the model says at temperature 1.
    settings = GenerationConfig(
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=loaded.pad_id,
        return_dict_in_generate=True,
    )
    ids, mask = padded_left(loaded, prompts)
    said = decode(loaded, ids, mask, num_new, ends, temperature, heard=heard)
    if said is not None:
        return [_up_to(tokens, ends)[0] for tokens in said.tolist()]
    found: list[list[int]] = [[] for _ in prompts]
    rows, left = list(range(len(prompts))), num_new
    kept: Mapping[str, Any] = {}
    try:
        model.generation_config = settings
        stretch = _STRETCH.get(loaded.device.type, num_new)
        while rows and left:
            # Rows that have ended would be carried on to the end of the longest, which on a CPU takes its time.
            settings.max_new_tokens = min(left, stretch)
            made = _generate(loaded, ids, mask, kept, heard)
            new = made.sequences[:, ids.shape[1] :]
            left -= settings.max_new_tokens
            going = []
            for i, (row, tokens) in enumerate(zip(rows, new.tolist(), strict=True)):
                said_now, ended = _up_to(tokens, ends)
                found[row] += said_now
                going += [] if ended else [i]
            if going and left:
                name = next((name for name in CACHES if name in made), "")
                cache = _kept(model, made[name], going, len(rows)) if name else None
                kept = {} if cache is None else {name: cache}
                stretch = stretch if kept else left  # what was read is read again, once
            rows, ids = [rows[i] for i in going], made.sequences[going]
            mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)[going]
    finally:
        model.generation_config = own
    return found


def _up_to(tokens: Sequence[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Tokens up to the first of `ends`, and whether there is one."""
    stop = next((at + 1 for at, token in enumerate(tokens) if token in ends), None)
    return list(tokens[:stop]), stop is not None


def _generate(loaded: LoadedModel, ids: Tensor, mask: Tensor, kept: Mapping[str, Any], heard: _Heard | None) -> Any:
    """One call of transformers' own; without what was kept if the model does not go on with that."""
    try:
        return loaded.model.generate(
            input_ids=ids,
            attention_mask=mask,
            streamer=heard,
            **kept,
        )
    except torch.OutOfMemoryError:
        raise
    except _BREAKS as cause:
        if kept:
            return _generate(loaded, ids, mask, {}, heard)
        raise CheckpointError(
            f"{loaded.checkpoint.path}: {type(loaded.model).__name__} generates no text with this transformers "
            f"({reason_of(cause, 120)}); where its own text is wanted, give --data"
        ) from cause


def _kept(model: Any, cache: Any, rows: Sequence[int], count: int) -> Any:
    """What a model keeps of what it has read, of some rows of `count`; None where that cannot be told apart, or is nothing."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    # States of other kinds, and what a model keeps beside its cache, would stay those of all rows.
    alone = type(cache) is DynamicCache and {*map(type, cache.layers)} <= {DynamicLayer, DynamicSlidingWindowLayer}
    if not alone or not cache.get_seq_length():
        return None
    if len(rows) == count:
        return cache
    if any(getattr(module, "rope_deltas", None) is not None for module in model.modules()):
        return None
    cache.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
    return cache

"""What a model says by itself: greedy continuations, and whether they are the expected answers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sculptor.data.asking import answer_part, end_ids, question_of, render_question, spoken
from sculptor.data.edges import prompt_ids, target_start
from sculptor.data.examples import cut_middle
from sculptor.data.row_types import MessagesRow
from sculptor.errors import CheckpointError, DataError, SettingsError
from sculptor.evaluation.readers import Reader, open_reader
from sculptor.model.decoding import decode, padded_left
from sculptor.model.load import LoadedModel
from sculptor.progress import Bar
from sculptor.world import ALONE, World


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to one row.

    Attributes:
        where: file and line.
        prompt: what was asked.
        expected: the right answer, or the first of several.
        said: what the model says.
        exact: whether that is a right one; white space around it, and thinking before it, are ignored.
    """

    where: str
    prompt: str
    expected: str
    said: str
    exact: bool


def stops_of(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that end what the model says.

    Raises:
        CheckpointError: if its files name something else.
    """
    own = getattr(loaded.model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [] if own is None else [own]
    odd = next((token for token in listed if not isinstance(token, int)), None)
    if odd is not None:
        place = loaded.checkpoint.path / "generation_config.json"
        raise CheckpointError(f"{place}: eos_token_id has {odd!r}; expected numbers of tokens")
    return end_ids(loaded.tokenizer) | frozenset(listed)


# Of generation_config.json: what changes greedy answers, and the value that does not.
_CHANGES = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "guidance_scale": 1.0,
    "watermarking_config": None, "stop_strings": None, "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None,
}  # fmt: skip


def tell_left_out(loaded: LoadedModel, notice: Callable[[str], object]) -> None:
    """Tells, in one line, what answers leave out of what a model's files say of how it generates."""
    config = loaded.model.generation_config
    set_ = {name: getattr(config, name, None) for name in _CHANGES}
    left = [name for name, value in set_.items() if value not in (None, _CHANGES[name], [])]
    if (
        loaded.kind != "causal"
        and "forced_bos_token_id" in left
        and config.forced_bos_token_id in target_start(loaded.tokenizer)
    ):
        left.remove("forced_bos_token_id")
    if left:
        notice(
            f"{loaded.checkpoint.path.name}: answers are what the model itself finds likeliest, without the {', '.join(left)} of "
            "its generation_config.json"
        )


@torch.no_grad()
def answer_rows(
    loaded: LoadedModel,
    rows: Sequence[MessagesRow],
    max_length: int,
    max_new: int | None,
    batch_size: int,
    bar: Bar,
    world: World = ALONE,
) -> list[Answer]:
    """Greedy answers to the last turn of conversations, in the order of `rows`.

    Args:
        loaded: a causal model.
        rows: conversations.
        max_length: of prompt and answer together; the middle of an over-long prompt is cut.
        max_new: tokens of an answer; default those of the longest that is expected.
        batch_size: rows per forward.
        bar: counts rows.
        world: the processes that divide the rows; all get all answers.

    Raises:
        DataError: if no room is left for prompts.
    """
    tokenizer = loaded.tokenizer
    asked = [question_of(row, tokenizer) for row in rows]
    answers = [text for question in asked for text in (*question.expected, question.whole)]
    count = max_new or max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in answers) + 1
    if max_length - count < 1:
        raise DataError(
            f"{rows[0].where}: an answer of {count} tokens does not fit into {max_length}; raise --max-length"
        )
    prompts = [cut_middle(question.ids, max_length - count) for question in asked]
    stops = stops_of(loaded)
    order = world.share(sorted(range(len(rows)), key=lambda i: -len(prompts[i])))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, ids in zip(chosen, _continued(loaded, [prompts[i] for i in chosen], count, stops), strict=True):
            said = spoken(tokenizer, ids)
            exact = answer_part(said) in asked[i].expected
            found[i] = Answer(rows[i].where, asked[i].text, asked[i].expected[0], said, exact)
        bar.update(len(chosen))
    found = {i: answer for part in world.gather(found) for i, answer in part.items()}
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def say(
    loaded: LoadedModel, prompts: Sequence[str], max_length: int, max_new: int, batch_size: int, bar: Bar
) -> list[str]:
    """What a causal model says to prompts, greedily: as a user's turn where it has a chat template, else as a text to go on with.

    Args:
        loaded: the model.
        prompts: what is asked.
        max_length: of prompt and answer together; the middle of an over-long prompt is cut.
        max_new: tokens of an answer, at most.
        batch_size: prompts per forward.
        bar: counts prompts.

    Raises:
        SettingsError: if no room is left for prompts.
    """
    tokenizer = loaded.tokenizer
    if max_new >= max_length:
        raise SettingsError(
            f"--max-new-tokens {max_new}: leaves no room for a prompt in {max_length} tokens (--max-length)"
        )
    ids = [cut_middle(_asked(tokenizer, prompt), max_length - max_new) for prompt in prompts]
    stops = stops_of(loaded)
    order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, said in zip(chosen, _continued(loaded, [ids[i] for i in chosen], max_new, stops), strict=True):
            found[i] = answer_part(spoken(tokenizer, said))
        bar.update(len(chosen))
    return [found[i] for i in range(len(prompts))]


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return prompt_ids(tokenizer, prompt)
    text = render_question(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _continued(
    loaded: LoadedModel, prompts: Sequence[list[int]], num_new: int, stops: Collection[int]
) -> list[list[int]]:
    """What `greedy` says to prompts; on a GPU with steps that are recorded, where a model's can be."""
    said = decode(loaded, *padded_left(loaded, prompts), num_new, sorted(stops), 0.0)
    if said is None:
        return greedy(open_reader(loaded, prompts), num_new, stops)
    return [_until(ids, stops) for ids in said.tolist()]


def greedy(reader: Reader, num_new: int, stops: Collection[int]) -> list[list[int]]:
    """Greedy continuations up to one of `stops`, which is not part of them, or `num_new` tokens."""
    batch = reader.first_logits.shape[0]
    state = reader.fork(range(batch))
    ends = torch.tensor(sorted(stops), device=reader.first_logits.device)
    chosen = reader.first_logits.argmax(dim=1, keepdim=True)
    said = [chosen]
    ended = torch.isin(chosen[:, 0], ends)
    while len(said) < num_new and not bool(ended.all()):
        logits, state = reader.read(state, chosen)
        chosen = logits[:, -1].argmax(dim=1, keepdim=True)
        said.append(chosen)
        ended |= torch.isin(chosen[:, 0], ends)
    sequences = torch.cat(said, dim=1).tolist()
    return [_until(ids, stops) for ids in sequences]


def _until(ids: list[int], stops: Collection[int]) -> list[int]:
    """Tokens before the first of `stops`."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]

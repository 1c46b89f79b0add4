"""Prompt/completion rows: labels or choices ranked by their log-probability, and what the model says by itself.

A label's score is the summed log-probability of its tokens and the end of sequence. A row's own choices are scored without the
end of sequence, and once more over their number of characters, as lm-eval's acc and acc_norm are. How continuations of a
prompt are read is in `readers`.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sculptor.data.asking import spoken
from sculptor.data.edges import completion_ids, prompt_ids, target_ids, target_start
from sculptor.data.examples import cut_middle, no_embedding
from sculptor.data.rows import CompletionRow
from sculptor.errors import DataError
from sculptor.evaluation.answers import greedy, stops_of
from sculptor.evaluation.readers import Reader, open_reader
from sculptor.model.load import LoadedModel
from sculptor.progress import Bar
from sculptor.world import ALONE, World

# Of the continuations that are read at a time, by type of device, in entries: large vocabularies would fill any memory.
LOGITS = {"cuda": 2**28, "cpu": 2**26}


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row.

    Attributes:
        loss: summed negative log-probability of completion and end of sequence, in nats.
        num_tokens: how many tokens that is.
        ranked_right: whether the row's own label scores highest; None without labels.
        exact: whether greedy generation gives the completion or another reference; white space around it is ignored; None if
            not asked.
        normalized_right: of rows with choices, whether the right one scores highest per character.
        said: what greedy generation gives.
        cut: whether the middle of its prompt was left out.
    """

    loss: float
    num_tokens: int
    ranked_right: bool | None
    exact: bool | None
    normalized_right: bool | None = None
    said: str | None = None
    cut: bool = False


class _Score(NamedTuple):
    """Summed log-probability of a candidate, with the end of sequence and without."""

    whole: float
    bare: float


@torch.no_grad()
def score_rows(
    loaded: LoadedModel,
    rows: Sequence[CompletionRow],
    labels: Sequence[str],
    max_length: int,
    batch_size: int,
    bar: Bar,
    generate: bool = True,
    max_new: int | None = None,
    world: World = ALONE,
) -> list[RowScore]:
    """Scores rows in batches of prompts of similar length; results are in the order of `rows`.

    `generate=False` leaves out the greedy continuation, which takes longest; it has `max_new` tokens at most, by default those
    of the longest answer. Several processes divide the rows, and all get all results.

    Raises:
        DataError: if a completion or label does not fit, or has a token that the model has not.
    """
    tokenizer = loaded.tokenizer
    wanted = [_candidates(row, labels) for row in rows]
    encode = prompt_ids if loaded.kind == "causal" else lambda t, text: list(t(text).input_ids)
    answer = completion_ids if loaded.kind == "causal" else target_ids
    known = {text: answer(tokenizer, text) for candidates in wanted for text in candidates}
    longest = max(map(len, known.values()))
    num_new = 0 if not generate else max_new or max(longest, *(_length(answer, tokenizer, row) for row in rows))
    budget = max_length - (max(longest, num_new) if loaded.kind == "causal" else 0)
    if budget < 1 or longest > max_length:
        where = next(
            row.where for row, texts in zip(rows, wanted, strict=True) if longest in {len(known[t]) for t in texts}
        )
        raise DataError(f"{where}: a label of {longest} tokens does not fit into {max_length}; raise --max-length")
    whole = [encode(tokenizer, row.prompt) for row in rows]
    size, last = loaded.architecture.vocab_size, {text: max(ids, default=0) for text, ids in known.items()}
    for row, prompt, texts in zip(rows, whole, wanted, strict=True):
        largest = max(max(prompt, default=0), *(last[text] for text in texts))
        if largest >= size:
            raise DataError(f"{row.where}: {no_embedding(largest, size)}")
    prompts = [cut_middle(prompt, budget) for prompt in whole]
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise DataError(f"{row.where}: prompt is empty after tokenisation")
    stops = stops_of(loaded) if generate else ()
    start_ids = () if loaded.kind == "causal" else target_start(tokenizer)
    order = world.share(sorted(range(len(rows)), key=lambda i: -len(prompts[i])))
    results: dict[int, RowScore] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        candidates = [[known[text] for text in wanted[i]] for i in chosen]
        scores, greedily = _score_batch(loaded, [prompts[i] for i in chosen], candidates, num_new, stops)
        for i, score, ids in zip(chosen, scores, greedily, strict=True):
            row, own = rows[i], wanted[i].index(rows[i].completion)
            right, normalized = _ranked(row, wanted[i], score, labels)
            said = None if ids is None else spoken(tokenizer, _behind(ids, start_ids))
            references = {text.strip() for text in (row.completion, *row.references)}
            results[i] = RowScore(
                loss=-score[own].whole,
                num_tokens=len(known[row.completion]),
                ranked_right=right,
                exact=None if said is None else said in references,
                normalized_right=normalized,
                said=said,
                cut=len(whole[i]) > budget,
            )
        bar.update(len(chosen))
    results = {i: score for part in world.gather(results) for i, score in part.items()}
    return [results[i] for i in range(len(rows))]


def _candidates(row: CompletionRow, labels: Sequence[str]) -> list[str]:
    """What is scored behind a prompt: its own choices, or the labels; its completion in any case."""
    offered = row.choices or labels
    return [*offered, *([] if row.completion in offered else [row.completion])]


def _behind(ids: list[int], start: Sequence[int]) -> list[int]:
    """What is said behind what every target starts with."""
    return ids[len(start) :] if tuple(ids[: len(start)]) == tuple(start) else ids


def _length(answer: Callable[[Any, str], list[int]], tokenizer: Any, row: CompletionRow) -> int:
    """Tokens of the longest right answer."""
    return max((len(answer(tokenizer, text)) for text in row.references), default=0)


def _ranked(
    row: CompletionRow, texts: Sequence[str], scores: Sequence[_Score], labels: Sequence[str]
) -> tuple[bool | None, bool | None]:
    """Whether the right one ranks first, and whether it does per character."""
    own = texts.index(row.completion)
    if not all(math.isfinite(score.whole) for score in scores):  # nothing ranks first of what is no number
        return (False if row.choices or labels else None), (False if row.choices else None)
    if row.choices:
        places = range(len(row.choices))
        plain = max(places, key=lambda i: scores[i].bare)
        normalized = max(places, key=lambda i: scores[i].bare / max(1, len(texts[i].removeprefix(" "))))
        return row.choices[plain] == row.completion, row.choices[normalized] == row.completion
    if not labels:
        return None, None
    return max(range(len(labels)), key=lambda i: scores[i].whole) == own, None


def _score_batch(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    candidates: Sequence[Sequence[list[int]]],
    num_new: int,
    stops: Collection[int],
) -> tuple[list[list[_Score]], list[list[int] | None]]:
    """Scores of every candidate of every prompt, and what greedy decoding says in `num_new` tokens, if any."""
    reader = open_reader(loaded, prompts)
    said: list[list[int] | None] = [None] * len(prompts)
    if num_new:
        said = list(greedy(reader, num_new, stops))
    owners = [i for i, group in enumerate(candidates) for _ in group]
    flat = [candidate for group in candidates for candidate in group]
    scores: list[_Score] = []
    entries = max(map(len, flat), default=1) * reader.first_logits.shape[-1]
    rows = max(1, min(len(prompts), LOGITS[reader.device.type] // entries))
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        scores += _candidate_scores(reader, owners[part], flat[part], loaded.pad_id)
    bounds = [0]
    for group in candidates:
        bounds.append(bounds[-1] + len(group))
    return [scores[a:b] for a, b in itertools.pairwise(bounds)], said


def _candidate_scores(reader: Reader, owners: list[int], candidates: list[list[int]], pad_id: int) -> list[_Score]:
    """Log-probabilities of each candidate behind its prompt."""
    width = max(map(len, candidates))
    device = reader.device
    padded = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in candidates], device=device)
    real = torch.tensor([[1.0] * len(ids) + [0.0] * (width - len(ids)) for ids in candidates], device=device)
    first = reader.first_logits[torch.tensor(owners, device=device)][:, None]  # predicts the first token
    log_probs = _log_probs(first, padded[:, :1])
    if width > 1:
        rest, _ = reader.read(reader.fork(owners), padded[:, :-1])
        log_probs = torch.cat([log_probs, _log_probs(rest, padded[:, 1:])], dim=1)
    whole = (log_probs * real).sum(dim=1)
    last = log_probs.gather(1, real.sum(dim=1, keepdim=True).long() - 1)[:, 0]
    return [_Score(*pair) for pair in torch.stack([whole, whole - last], dim=1).tolist()]


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of tokens `ids` (r, w), by logits (r, w, vocabulary)."""
    return logits.gather(2, ids[:, :, None])[:, :, 0] - logits.logsumexp(dim=-1)

"""Prompt/completion rows: the labels ranked by their log-probability, and what the model says by itself.

A label's score is the summed log-probability of its tokens and the end of sequence. How continuations of a prompt are read is
in `readers`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sculptor.data.examples import completion_ids, cut_middle, prompt_ids, target_ids
from sculptor.data.rows import CompletionRow
from sculptor.errors import DataError
from sculptor.evaluation.readers import Reader, open_reader
from sculptor.model.load import LoadedModel
from sculptor.progress import Bar


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row.

    Attributes:
        loss: summed negative log-probability of completion and end of sequence, in nats.
        num_tokens: how many tokens that is.
        ranked_right: whether the row's own label scores highest; None without labels.
        exact: whether greedy generation gives the completion; white space around it is ignored; None if not asked.
    """

    loss: float
    num_tokens: int
    ranked_right: bool | None
    exact: bool | None


@torch.no_grad()
def score_rows(
    loaded: LoadedModel,
    rows: Sequence[CompletionRow],
    labels: Sequence[str],
    max_length: int,
    batch_size: int,
    bar: Bar,
    generate: bool = True,
) -> list[RowScore]:
    """Scores rows in batches of prompts of similar length; results are in the order of `rows`.

    `generate=False` leaves out the greedy continuation, which takes longest.

    Raises:
        DataError: if a completion or label does not fit.
    """
    tokenizer = loaded.tokenizer
    wanted = [[*labels, *([] if row.completion in labels else [row.completion])] for row in rows]
    encode = prompt_ids if loaded.kind == "causal" else lambda t, text: list(t(text).input_ids)
    answer = completion_ids if loaded.kind == "causal" else target_ids
    known = {text: answer(tokenizer, text) for candidates in wanted for text in candidates}
    longest = max(map(len, known.values()))
    budget = max_length - (longest if loaded.kind == "causal" else 0)
    if budget < 1 or longest > max_length:
        where = next(
            row.where for row, texts in zip(rows, wanted, strict=True) if longest in {len(known[t]) for t in texts}
        )
        raise DataError(f"{where}: a label of {longest} tokens does not fit into {max_length}; raise --max-length")
    prompts = [cut_middle(encode(tokenizer, row.prompt), budget) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise DataError(f"{row.where}: prompt is empty after tokenisation")
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    results: dict[int, RowScore] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        candidates = [[known[text] for text in wanted[i]] for i in chosen]
        scores, said = _score_batch(loaded, [prompts[i] for i in chosen], candidates, longest if generate else 0)
        for i, score, ids in zip(chosen, scores, said, strict=True):
            own = wanted[i].index(rows[i].completion)
            right = max(range(len(labels)), key=score.__getitem__) == own if labels and own < len(labels) else None
            right = False if labels and right is None else right
            exact = None
            if ids is not None:
                text = tokenizer.decode(ids, skip_special_tokens=True)
                exact = text.strip() == rows[i].completion.strip()
            results[i] = RowScore(
                loss=-score[own],
                num_tokens=len(known[rows[i].completion]),
                ranked_right=right,
                exact=exact,
            )
        bar.update(len(chosen))
    return [results[i] for i in range(len(rows))]


def _score_batch(
    loaded: LoadedModel, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]], num_new: int
) -> tuple[list[list[float]], list[list[int] | None]]:
    """Scores of every candidate of every prompt, and what greedy decoding says in `num_new` tokens, if any."""
    reader = open_reader(loaded, prompts)
    said: list[list[int] | None] = [None] * len(prompts)
    if num_new:
        said = list(_generate(reader, num_new, loaded.tokenizer.eos_token_id))
    owners = [i for i, group in enumerate(candidates) for _ in group]
    flat = [candidate for group in candidates for candidate in group]
    scores: list[float] = []
    for start in range(0, len(flat), len(prompts)):  # as many rows at once as there are prompts
        part = slice(start, start + len(prompts))
        scores += _candidate_scores(reader, owners[part], flat[part], loaded.pad_id)
    bounds = [0]
    for group in candidates:
        bounds.append(bounds[-1] + len(group))
    return [scores[a:b] for a, b in itertools.pairwise(bounds)], said


def _generate(reader: Reader, num_new: int, eos_id: int) -> list[list[int]]:
    """Greedy continuations up to the end of sequence or `num_new` tokens."""
    batch = reader.first_logits.shape[0]
    state = reader.fork(range(batch))
    chosen = reader.first_logits.argmax(dim=1, keepdim=True)
    said = [chosen]
    ended = chosen[:, 0] == eos_id
    while len(said) < num_new and not bool(ended.all()):
        logits, state = reader.read(state, chosen)
        chosen = logits[:, -1].argmax(dim=1, keepdim=True)
        said.append(chosen)
        ended |= chosen[:, 0] == eos_id
    sequences = torch.cat(said, dim=1).tolist()
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in sequences]


def _candidate_scores(reader: Reader, owners: list[int], candidates: list[list[int]], pad_id: int) -> list[float]:
    """Summed log-probability of each candidate behind its prompt."""
    width = max(map(len, candidates))
    device = reader.device
    padded = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in candidates], device=device)
    real = torch.tensor([[1.0] * len(ids) + [0.0] * (width - len(ids)) for ids in candidates], device=device)
    first = reader.first_logits[torch.tensor(owners, device=device)][:, None]  # predicts the first token
    logits = first
    if width > 1:
        rest, _ = reader.read(reader.fork(owners), padded[:, :-1])
        logits = torch.cat([first, rest], dim=1)
    log_probs = logits.log_softmax(dim=-1).gather(2, padded[:, :, None])[:, :, 0]
    return [float(x) for x in (log_probs * real).sum(dim=1)]

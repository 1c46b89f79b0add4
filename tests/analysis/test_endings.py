"""Tokens that are taken for the end of an answer: which they are, and what a calibration sees of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint

from sculptor import AnalyzeSettings
from sculptor.analysis.calibration import measure_moments
from sculptor.analysis.endings import SHARE, with_endings
from sculptor.analysis.sources import sample_sources
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.asking import end_ids, turn_end
from sculptor.data.edges import answer_end, special_ids
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import DataError
from sculptor.model.load import LoadedModel, load_model
from sculptor.progress import silent

END = 63


def row(first: int, length: int = 400, prompt: int = 100) -> Example:
    ids = tuple((first + 7 * i) % 60 for i in range(length))
    return Example(ids, (*(IGNORED,) * prompt, *ids[prompt:]))


def test_a_tenth_of_what_carries_loss_is_taken_for_the_end() -> None:
    rows = [row(first) for first in range(40)]
    found = [with_endings(each, END) for each in rows]
    taken = 0
    for before, after in zip(rows, found, strict=True):
        assert after.input_ids == before.input_ids
        moved = [at for at, (a, b) in enumerate(zip(before.labels, after.labels, strict=True)) if a != b]
        assert all(before.labels[at] != IGNORED and after.labels[at] == END for at in moved)
        taken += len(moved)
    assert taken / (40 * 300) == pytest.approx(SHARE, abs=4 * (SHARE / 12_000) ** 0.5)


def test_the_row_alone_decides() -> None:
    """Not its neighbours, nor how rows are put together: archives are the same with any number of processes."""
    assert with_endings(row(3), END) == with_endings(row(3), END)
    places = [[at for at, label in enumerate(with_endings(row(i), END).labels) if label == END] for i in (1, 2)]
    assert places[0] != places[1]


def test_what_ends_an_answer_counts_more(tmp_path: Path) -> None:
    """The gradient that raises the end, at every place where something is said, has a larger share of the moments."""
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "model")), torch.device("cpu"))
    rows = [row(first, 40, 8) for first in range(12)]
    target = loaded.architecture.targets[-1]
    pushes = end_gradients(loaded, target.module, rows)

    def share(rows: list[Example]) -> float:
        bar = silent(total=1, desc="", unit="")
        moment = measure_moments(loaded, [target], rows, gradients=True, bar=bar).outputs[target.name].double()
        return float((pushes @ moment * pushes).sum() / moment.trace() / pushes.square().sum())

    end = answer_end(loaded.tokenizer)
    assert share([with_endings(each, end) for each in rows]) > 1.2 * share(rows)


def end_gradients(loaded: LoadedModel, module: str, rows: list[Example]) -> torch.Tensor:
    """(tokens, outputs): of the loss of ending at each token of each row, by what the module gives."""
    found, end, kept = [], answer_end(loaded.tokenizer), list[torch.Tensor]()
    handle = loaded.model.get_submodule(module).register_forward_hook(
        lambda *call: kept.append(call[2].requires_grad_())
    )
    for each in rows:
        batch = loaded.batch([replace(each, labels=tuple(end if x != IGNORED else x for x in each.labels))], 0)
        logits = loaded.model(input_ids=batch.input_ids).logits[0, :-1]
        labels = batch.labels[0, 1:]
        loss = torch.nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [kept[-1]])
        found.append(gradient[0])
    handle.remove()
    return torch.cat(found).double()


def test_the_end_is_that_of_the_template(tmp_path: Path) -> None:
    """What a tuning on conversations learns to say, and not the tokenizer's, where the two differ."""
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "model")), torch.device("cpu"))
    tokenizer = loaded.tokenizer
    assert turn_end(tokenizer) == answer_end(tokenizer)
    other = next(i for i in sorted(special_ids(tokenizer)) if i != answer_end(tokenizer))
    word = tokenizer.convert_ids_to_tokens(other)
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} "
        + word
        + " {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
    )
    end_ids.cache_clear()
    assert turn_end(tokenizer) == other
    settings = AnalyzeSettings(data=("self",), chat=True, calibration_tokens=400, max_length=24)
    (found,) = sample_sources(loaded, settings, ("self",), silent)
    conversations = [each for each in found.examples if IGNORED in each.labels]
    taken = {
        label
        for each in conversations
        for at, label in enumerate(each.labels)
        if label not in (IGNORED, each.input_ids[at])
    }
    assert taken == {other}


def test_an_end_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "model")), torch.device("cpu"))
    loaded.tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    loaded.tokenizer.answer_end_id = 10**6
    end_ids.cache_clear()
    settings = AnalyzeSettings(data=("self",), chat=True, calibration_tokens=200, max_length=24)
    with pytest.raises(DataError, match="gives id 1000000, the model has"):
        sample_sources(loaded, settings, ("self",), silent)

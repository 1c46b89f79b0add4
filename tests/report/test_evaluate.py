"""Answers beside what was asked: what all prompts begin with is shown once."""

from dataclasses import replace

import pytest

from sculptor.evaluation.answers import Answer
from sculptor.evaluation.rows import Evaluation
from sculptor.report.evaluate import evaluate_text, shared_start

SYSTEM = "<|im_start|>system\nYou are a helpful assistant of a certain name<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([SYSTEM + "What is it?", SYSTEM + "Where is it?"], SYSTEM),
        ([SYSTEM + "What is it?"], ""),
        (["What is it?\n", "What is that?\n"], ""),
        ([SYSTEM, SYSTEM + "more"], SYSTEM),
        (["", SYSTEM], ""),
        ([], ""),
        (["a line of more than forty characters, without an end", "a line of more than forty characters, with\n"], ""),
    ],
)
def test_a_start_is_shared_in_whole_lines(prompts: list[str], shared: str) -> None:
    assert shared_start(prompts) == shared


def test_it_is_shown_once() -> None:
    answers = tuple(
        Answer(where=f"rows.jsonl:{i}", prompt=f"{SYSTEM}Question {i}?", expected="yes", said="no", exact=False)
        for i in (1, 2)
    )
    plain = Evaluation(
        loss=1.0,
        perplexity=2.7,
        accuracy=None,
        exact_match=None,
        num_rows=2,
        num_tokens=4,
        labels=None,
        answers=answers,
    )
    text = evaluate_text(plain)
    assert text.count("helpful assistant") == 1
    assert "  all      <|im_start|>system" in text
    assert "  asked    … Question 1?" in text
    alone = evaluate_text(replace(plain, answers=answers[:1]))
    assert "  asked    <|im_start|>system" in alone

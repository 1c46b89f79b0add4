"""What a record says of a run that another program trained."""

import math
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from sculptor.jobs.trainer_facts import result_of, told


def test_arguments_are_told_in_plain_words(tmp_path: Path) -> None:
    by_epochs = told(TrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="cosine", num_train_epochs=2))
    assert (by_epochs["arguments"], by_epochs["lr_scheduler_type"]) == ("TrainingArguments", "cosine")
    assert by_epochs["num_train_epochs"] == 2
    assert "max_steps" not in by_epochs
    by_steps = told(TrainingArguments(str(tmp_path), use_cpu=True, max_steps=7))
    assert by_steps["max_steps"] == 7
    assert "num_train_epochs" not in by_steps, "steps that are asked for go before it"
    assert not any("." in str(value) and "Type" in str(value) for value in by_steps.values()), "no names of enums"


def test_tokens_are_those_that_were_counted() -> None:
    state = TrainerState(global_step=3)
    assert result_of(state, [{"loss": 2.0}, {"loss": 1.0}], 5.0).tokens is None
    assert result_of(state, [{"loss": 2.0, "num_tokens": 40.0}, {"loss": 1.0, "num_tokens": 90.0}], 5.0).tokens == 90
    state.num_input_tokens_seen = 120
    found = result_of(state, [{"loss": 2.0}, {"loss": 1.0}], 5.0)
    assert (found.tokens, found.steps, found.first_loss, found.last_loss) == (120, 3, 2.0, 1.0)
    assert math.isnan(result_of(state, [], 5.0).last_loss)

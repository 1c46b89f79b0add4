"""What `train --replay` mixes into a task's rows: data of any form, and what the model says; and the steps of it all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sculptor.checkpoint.architecture import Architecture
from sculptor.data.chat import check_use
from sculptor.data.examples import Encoded, encode
from sculptor.data.replay import DEFAULT_SHARE, Replay, with_replay
from sculptor.data.rows import Data, Row, as_items, given_twice, names_of, read_sources, weight_of
from sculptor.errors import SettingsError
from sculptor.methods.settings import SELF, is_self
from sculptor.training.settings import TrainSettings
from sculptor.training.steps import Steps


def check_replay(replay: Data) -> None:
    """Refuses what can be refused before anything is read.

    Raises:
        SettingsError: for shares that leave nothing to the task, or data that are there twice.
    """
    whole = sum(_share(item) for item in as_items(replay))
    if whole >= 1:
        raise SettingsError(f"--replay: shares of {whole:g} in all leave nothing to the task; give less than 1")
    twice = given_twice(replay)
    if twice is not None:
        raise SettingsError(f"--replay {twice}: given twice")


def _share(item: Any) -> float:
    """Of an epoch."""
    share = weight_of(item)
    return DEFAULT_SHARE if share is None else share


def read_replay(
    replay: Data,
    rows: Sequence[Row],
    tokenizer: Any,
    architecture: Architecture,
    max_length: int,
    settings: TrainSettings,
    notice: Callable[[str], object],
) -> tuple[Replay, ...]:
    """The data that are mixed into a task's rows; of what the model says only the share, until it is loaded.

    Raises:
        SettingsError: as `check_replay`.
        DataError: if data cannot be used.
    """
    check_replay(replay)
    found = []
    for item in as_items(replay):
        if isinstance(item, str) and is_self(item):
            if architecture.kind != "causal":
                raise SettingsError("--replay self: only a causal model says something by itself; replay a file")
            found.append(Replay(SELF, _share(item), ()))
            continue
        (source,) = read_sources([item], settings.max_rows, settings.columns, notice, mixed=True, all_renamed=False)
        check_use([*rows, *source.rows], settings.chat_template)
        encoded = encode(source.rows, tokenizer, architecture.kind, max_length, architecture.vocab_size)
        name = names_of([item])[0]
        if (line := encoded.says(f"--replay {name}")) is not None:
            notice(line)
        found.append(Replay(name, _share(item), encoded.examples))
    return tuple(found)


def steps_of(encoded: Encoded, replays: Sequence[Replay], settings: TrainSettings) -> Steps:
    """What steps are made of where some of a task's rows are selected, and others mixed in.

    Args:
        encoded: all rows of the task.
        replays: what is mixed in.
        settings: of the training.
    """
    kept = encoded
    if settings.select_rows is not None:
        kept = replace(encoded, examples=encoded.examples[: settings.num_selected(len(encoded.examples))])
    return Steps.of(with_replay(encoded, replays), settings, with_replay(kept, replays).num_epoch)

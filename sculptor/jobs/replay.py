"""What `train --replay` mixes into a task's rows: data of any form, and the archive's own samples; and the steps of it all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sculptor.checkpoint.architecture import Architecture
from sculptor.data.chat import check_use
from sculptor.data.examples import Encoded, encode
from sculptor.data.replay import DEFAULT_SHARE, Replay, with_replay
from sculptor.data.rows import Data, Row, as_items, names_of, read_sources, weight_of
from sculptor.errors import SettingsError
from sculptor.methods.settings import SELF, is_self
from sculptor.model.samples import Samples
from sculptor.training.settings import TrainSettings
from sculptor.training.steps import Steps


def check_replay(replay: Data, settings: TrainSettings) -> None:
    """Refuses what can be refused before anything is read.

    Raises:
        SettingsError: for shares that leave nothing to the task, or samples that are there twice or steer, too.
    """
    whole = sum(_share(item) for item in as_items(replay))
    if whole >= 1:
        raise SettingsError(f"--replay: shares of {whole:g} in all leave nothing to the task; give less than 1")
    own = [item for item in as_items(replay) if isinstance(item, str) and is_self(item)]
    if len(own) > 1:
        raise SettingsError("--replay self: given twice")
    if own and settings.max_harm is not None:
        raise SettingsError(
            "--replay self with --max-harm: the samples that steer would be trained on, and say nothing any more; replay a file of "
            "text that the model says, or leave one out"
        )


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
    """The data that are mixed into a task's rows; of the archive's own samples only the share, until the archive is known.

    Raises:
        SettingsError: as `check_replay`.
        DataError: if data cannot be used.
    """
    check_replay(replay, settings)
    found = []
    for item in as_items(replay):
        if isinstance(item, str) and is_self(item):
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


def fill_in_samples(replays: tuple[Replay, ...], samples: Samples | None) -> tuple[Replay, ...]:
    """With the samples that steer in the place of `self`: those that report stay unseen.

    Raises:
        SettingsError: if they are asked for, and there are none.
    """
    found = []
    for replay in replays:
        if replay.name == SELF and not replay.examples:
            if samples is None:
                raise SettingsError("--replay self: the archive keeps no samples of the model; analyze with --samples")
            examples = tuple(sample.example for sample in samples.steering)
            replay = Replay(replay.name, replay.share, examples)
        found.append(replay)
    return tuple(found)


def steps_of(encoded: Encoded, replays: Sequence[Replay], settings: TrainSettings) -> Steps:
    """What steps are made of where some of a task's rows are selected, and others mixed in.

    Args:
        encoded: all rows of the task.
        replays: what is mixed in; samples of an archive that is not there yet may be missing.
        settings: of the training.
    """
    replays = [replay if replay.examples else replace(replay, examples=encoded.examples[:1]) for replay in replays]
    kept = encoded
    if settings.select_rows is not None:
        kept = replace(encoded, examples=encoded.examples[: settings.num_selected(len(encoded.examples))])
    return Steps.of(with_replay(encoded, replays), settings, with_replay(kept, replays).num_epoch)

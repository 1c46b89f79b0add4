"""Rows of other data among those of a task: a share of every epoch, again and again where they are few."""

from collections.abc import Sequence
from dataclasses import dataclass

from sculptor.data.examples import Encoded, Example
from sculptor.data.mixture import Mixture

DEFAULT_SHARE = 0.1


@dataclass(frozen=True, eq=False, slots=True)
class Replay:
    """What is mixed in: `share` of the rows of an epoch, above 0 and below 1, are of `examples`.

    There may be none yet of what the model will say: then the task's longest row stands for each.
    """

    name: str
    share: float
    examples: tuple[Example, ...]


def with_replay(task: Encoded, replays: Sequence[Replay]) -> Encoded:
    """What steps are made of: an epoch has the task's rows as before, and so many of the others that shares are right.

    Args:
        task: its own rows.
        replays: of positive shares, below 1 together.
    """
    if not replays:
        return task
    own = task.mixture or Mixture((len(task.examples),), (1.0,))
    rest = 1 - sum(replay.share for replay in replays)
    examples, sizes = list(task.examples), list(own.sizes)
    for replay in replays:
        wanted = -(-own.num_epoch * replay.share // rest)
        others = replay.examples or (max(task.examples, key=lambda row: row.length),)
        times = max(1, int(-(-wanted // len(others))))  # an epoch takes no row twice, but of these
        examples += others * times
        sizes.append(len(others) * times)
    whole = sum(own.weights)
    weights = [weight * rest / whole for weight in own.weights] + [replay.share for replay in replays]
    return Encoded(
        tuple(examples),
        task.num_dropped,
        task.num_cut,
        task.num_ended,
        Mixture(tuple(sizes), tuple(weights)),
        task.num_rewritten,
    )

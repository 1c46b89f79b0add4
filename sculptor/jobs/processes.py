"""A job in several processes: each with its own device, one of them with the output."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from sculptor import world as processes
from sculptor.checkpoint.staging import check_apart, partial_path, staging
from sculptor.errors import DataError, PeerError
from sculptor.world import World


def join(device: str) -> World:
    """Sets up the processes that a launcher has started, each with its own GPU, as a job's device is chosen.

    Raises:
        SettingsError: if they cannot be set up.
    """
    return processes.join(device != "cpu" and torch.cuda.is_available())


def on_this_machine() -> int:
    """How many of the processes share this machine's memory, as launchers say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def staged_together(
    world: World,
    output: Path,
    *,
    command: str,
    inputs: Iterable[str | Path],
    overwrite: bool,
    resume: bool,
    worth_keeping: Callable[[Path], bool],
) -> Iterator[Path]:
    """`staging` by the first process; the others find the directory there, and leave it alone.

    Args:
        world: all processes.
        output, command, overwrite, resume, worth_keeping: as for `staging`.
        inputs: what the run reads, which the output may not be or hold.
    """
    with ExitStack() as stack:

        def enter() -> Path:
            check_apart(output, inputs)
            return stack.enter_context(
                staging(
                    output,
                    command=command,
                    overwrite=overwrite,
                    resume=resume,
                    worth_keeping=worth_keeping,
                )
            )

        try:
            yield world.once(enter)
        except PeerError as error:
            if error.told:
                raise
            partial = partial_path(output)
            done = f": what is done is in {partial}" if worth_keeping(partial) else ""
            raise PeerError(f"{error} with --resume{done}") from error


def check_alike(world: World, key: Mapping[str, Any]) -> None:
    """Refuses processes that work on different things: two machines may hold other files under one path.

    Args:
        world: all processes.
        key: digests and settings, by what they are of.

    Raises:
        DataError: naming what differs.
    """
    keys = world.gather(key)
    with world.together():
        for rank, other in enumerate(keys) if world.first else ():
            different = sorted(name for name in key if other[name] != key[name])
            if different:
                raise DataError(
                    f"process {rank} of {world.size} has other inputs than the first ({', '.join(different)}); all of them have to "
                    "be started with the same options and see the same files"
                )

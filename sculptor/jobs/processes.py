"""A job in several processes: each with its own device, one of them with the output."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sculptor import world as processes
from sculptor.checkpoint.staging import check_apart, check_free, partial_path, staging
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where what comes out of several processes goes; the first one makes it there, the others find it and leave it alone.

    Attributes:
        world: all processes.
        output, command, overwrite, resume: as for `staging`.
    """

    world: World
    output: Path
    command: str
    overwrite: bool
    resume: bool

    def check(self, inputs: Iterable[str | Path]) -> None:
        """Refuses what `staged` would refuse, before any work.

        Raises:
            OutputError: if the output is or holds an input, exists, or something is left over.
        """

        def check() -> None:
            check_apart(self.output, inputs)
            check_free(self.output, command=self.command, overwrite=self.overwrite, resume=self.resume)

        self.world.once(check)

    @contextmanager
    def staged(self, inputs: Iterable[str | Path], worth_keeping: Callable[[Path], bool]) -> Iterator[Path]:
        """`staging` by the first process.

        Args:
            inputs: what the run reads, which the output may not be or hold.
            worth_keeping: as for `staging`.
        """
        with ExitStack() as stack:

            def enter() -> Path:
                check_apart(self.output, inputs)
                return stack.enter_context(
                    staging(
                        self.output,
                        command=self.command,
                        overwrite=self.overwrite,
                        resume=self.resume,
                        worth_keeping=worth_keeping,
                    )
                )

            try:
                yield self.world.once(enter)
            except PeerError as error:
                if error.told:
                    raise
                partial = partial_path(self.output)
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

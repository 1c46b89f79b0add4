"""The processes that work on one run, started by torchrun, `accelerate launch` or Slurm; alone, everything here is free.

Work is divided in two ways. In a training step every process takes its part of the rows, and what they find is added up
(`total`, `add_up`), or added up at one of them (`add_up_at`), which shows the others what it makes of it (`show`). Elsewhere
every process takes its part of the matrices or blocks, and the first one gets all results in their order (`in_order`), or
their names where they are files already: it alone says what is written, so outputs are the same bytes for any number of processes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sculptor.errors import PeerError, SculptorError, SettingsError
from sculptor.peers import (
    END,
    FAILED,
    PATIENCE,
    Sender,
    collectively,
    forget_host_group,
    host_group,
    line_of,
    pickled,
    received,
)

T = TypeVar("T")
Item = TypeVar("Item")

# Gradients are added up in pieces of about this size: large enough to be quick, small enough to need little memory.
_BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: where one is assumed, this is asked."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size} processes")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all do; the parts of all ranks together are the whole, each item once."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def total(self, *numbers: float) -> list[float]:
        """Sums over processes, exact for integers below 2^53."""
        if self.size == 1:
            return list(numbers)
        return collectively(lambda: _reduced(torch.tensor(numbers, dtype=torch.float64), dist.ReduceOp.SUM).tolist())

    def most(self, number: int) -> int:
        """The largest of all processes."""
        if self.size == 1:
            return number
        return int(collectively(lambda: _reduced(torch.tensor([number]), dist.ReduceOp.MAX)))

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank, for all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        collectively(lambda: dist.all_gather_object(found, value, group=host_group()))
        return found

    def from_first(self, value: T) -> T:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        found = [value]
        collectively(lambda: dist.broadcast_object_list(found, src=0, group=host_group()))
        return found[0]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sums of tensors over processes, in place and on their device; the same bits in all processes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            collectively(lambda bucket=bucket: _add_bucket(bucket))  # type: ignore[misc]

    def add_up_at(self, owner: int, tensor: Tensor) -> None:
        """The sum of a tensor over processes, in place, at one of them; at the others it means nothing any more."""
        collectively(lambda: dist.reduce(tensor, dst=owner))

    def show(self, owner: int, tensor: Tensor) -> None:
        """One process's tensor, in place, for all."""
        collectively(lambda: dist.broadcast(tensor, src=owner))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What has to go well in every process; if it does not in one, it ends in all, and the first that failed tells.

        Raises:
            PeerError: if it failed in another process only, or in one before this.
        """
        failed: BaseException | None = None
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            failed = error
        states = self.gather(failed is not None)
        if not any(states):
            return
        if states.index(True) == self.rank and failed is not None:
            raise failed
        raise PeerError("another process of this run failed", told=True) from failed

    def once(self, call: Callable[[], T]) -> T:
        """What the first process makes of a call that the others leave to it; if it fails, it ends in all.

        Raises:
            PeerError: if it failed, for the others.
        """
        found: Any = None
        with self.together():
            if self.first:
                found = call()
        result: T = self.from_first(found)
        return result

    def in_order(
        self, items: Sequence[Item], work: Callable[[Item], Iterable[T]], owners: Sequence[int] | None = None
    ) -> Iterator[T]:
        """The results of all items, in their order, for the first process; nothing for the others, which do their part here.

        Args:
            items: the same in all processes.
            work: gives the results of an item, one after another; tensors in them on the CPU. Of a `Future`, which may take its
                time while work goes on, the first process gets the result, but for its own, which it gets as they are.
            owners: the process that does each item; default by turns.
        """
        owners = [i % self.size for i in range(len(items))] if owners is None else owners
        if self.size == 1:
            for item in items:
                yield from work(item)
        elif self.first:
            for item, owner in zip(items, owners, strict=True):
                yield from work(item) if owner == 0 else received(owner)
        else:
            with Sender() as sender:
                try:
                    for item in (item for item, owner in zip(items, owners, strict=True) if owner == self.rank):
                        for result in work(item):
                            sender.send(result if isinstance(result, Future) else pickled(result))
                        sender.send(END)
                except SculptorError:
                    sender.send(FAILED)
                    sender.finish()
                    raise


ALONE = World()


def here() -> World:
    """The processes as they have been set up."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return ALONE


def asked() -> World:
    """What a launcher says in the environment, before anything is set up.

    Raises:
        SettingsError: if it contradicts itself.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return World(int(rank), int(size))
    except ValueError as cause:
        raise SettingsError(
            f"RANK {rank[:20]} of WORLD_SIZE {size[:20]}: expected numbers, the first below the second; start it with torchrun "
            "or accelerate launch"
        ) from cause


def join(on_gpu: bool) -> World:
    """Sets the processes up that a launcher has started, unless that was done; one process needs nothing.

    Raises:
        SettingsError: if they cannot be set up.
    """
    world = asked()
    if world.size == 1 or dist.is_initialized():
        return here()
    if on_gpu:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as cause:
        raise SettingsError(
            f"{world.size} processes (WORLD_SIZE): cannot be set up ({line_of(cause)}); start it with torchrun or accelerate launch"
        ) from cause
    return here()


def local_rank() -> int:
    """This process among those of its machine, which have one GPU each."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leave() -> None:
    """Undoes `join`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        forget_host_group()


def _reduced(numbers: Tensor, how: Any) -> Tensor:
    dist.all_reduce(numbers, op=how, group=host_group())
    return numbers


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, of one dtype each."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _add_bucket(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])

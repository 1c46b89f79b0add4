"""Several processes as a launcher starts them, on this machine's CPU: forked from one that has imported everything once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["together_preload"])


class Failed(Exception):
    """What went wrong in the processes: by rank, type and text of the error, None where nothing did."""

    def __init__(self, errors: list[tuple[str, str] | None], trace: str) -> None:
        super().__init__(trace)
        self.errors = errors


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun and accelerate tell a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def together(size: int, call: Callable[..., Any], *args: Any, by_rank: Any = None, **named: Any) -> list[Any]:
    """What a function gives in every process; all arguments are the same, but for one of `by_rank` that comes first."""
    _start_server()
    port = free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = []
    for rank, (_, end) in enumerate(pipes):
        own = args if by_rank is None else (by_rank[rank], *args)
        processes.append(
            _CONTEXT.Process(target=_run, args=(environment(rank, size, port), end, call, own, named), daemon=True)
        )
        processes[-1].start()
        end.close()
    found = []
    for start, _ in pipes:
        try:
            found.append(start.recv())
        except EOFError:
            found.append((None, ("killed", ""), ""))
    for process in processes:
        process.join()
    errors = [error for _, error, _ in found]
    if any(errors):
        raise Failed(errors, "\n".join(trace for _, _, trace in found))
    return [result for result, _, _ in found]


def _start_server() -> None:
    """Finds modules of this folder, which Python 3.11 does not hand on by itself."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _run(variables: dict[str, str], end: Any, call: Callable[..., Any], args: Any, named: Any) -> None:
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    result, error, trace = None, None, ""
    try:
        result = call(*args, **named)
    except BaseException as found:
        error, trace = (type(found).__name__, str(found)), traceback.format_exc()
    try:
        end.send((result, error, trace))
    except Exception:  # not to be pickled: the test looks at files
        end.send((None, error, trace))
    end.close()
    os._exit(0)


def train_until(steps: int, *args: Any, **named: Any) -> Any:
    """`sculptor.train`, told to stop after so many steps."""
    import sculptor

    told = iter([*[None] * (steps - 1), 15])
    return sculptor.train(*args, stop=lambda: next(told, None), **named)


def continue_until(steps: int, *args: Any, **named: Any) -> Any:
    """`sculptor.continual`, told to stop after so many steps of training."""
    import sculptor

    told = iter([*[None] * (steps - 1), 15])
    return sculptor.continual(*args, stop=lambda: next(told, None), **named)


def train_ahead(*args: Any, **named: Any) -> Any:
    """`sculptor.train`, fetching ahead as on a GPU: of everything that passes through, the next beside the current."""
    import sculptor
    from sculptor.streaming.slots import Slots
    from sculptor.training.stepping.block_update import BlockUpdater

    slots, updater = Slots.__init__, BlockUpdater.__init__
    Slots.__init__ = lambda self, count, *rest: slots(self, 2, *rest)  # type: ignore[method-assign]
    BlockUpdater.__init__ = lambda self, a, b, count, *rest: updater(self, a, b, 2, *rest)  # type: ignore[method-assign]
    return sculptor.train(*args, **named)


def held_bytes(*args: Any, **named: Any) -> tuple[int, int, int]:
    """What a process has of a divided model while it trains: bytes of slots, of weights, and of coordinates and moments."""
    import sculptor
    from sculptor.training.stepping.streamed import StreamedUpdates

    found: list[tuple[int, int, int]] = []
    step = StreamedUpdates.step

    def look(self: Any, rate_of: Any) -> None:
        weights = sum(region.memory.numel() for region in self.stream.weights._regions.values())
        state = sum(block.state.memory.numel() for block in self.blocks.values())
        found.append((self.stream.slots.num_bytes, weights, state))
        step(self, rate_of)

    StreamedUpdates.step = look  # type: ignore[method-assign]
    sculptor.train(*args, **named)
    return found[0]


def on_a_small_disk(*args: Any, **named: Any) -> Any:
    """`sculptor.train`, where the first process's disk is full at its first saved state."""
    import resource

    import sculptor

    if os.environ["RANK"] == "0":
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return sculptor.train(*args)


def train_on(rows: Path, model: Path, archive: Path, *rest: Any) -> Any:
    """`sculptor.train` on rows that each process has by itself."""
    import sculptor

    return sculptor.train(model, archive, [rows], *rest)


def world_tour() -> dict[str, Any]:
    """Everything that a process hears of others."""
    import torch

    from sculptor.world import join

    world = join(on_gpu=False)
    tensors = [
        torch.full((2, 5), float(world.rank)),
        torch.full((3,), 1 + world.rank),
        torch.zeros(4, 4).T,
        torch.ones(40),
    ]
    world.add_up(tensors)
    done: list[int] = []

    def work(item: int) -> Any:
        done.append(item)
        return ((item, part) for part in "ab")

    return {
        "total": world.total(1 + world.rank, 0.25),
        "most": world.most(world.rank),
        "gather": world.gather(f"of {world.rank}"),
        "from_first": world.from_first(f"of {world.rank}"),
        "once": world.once(lambda: f"done by {world.rank}"),
        "sums": [tensor.tolist() for tensor in tensors],
        "in_order": list(world.in_order(range(7), work)),
        "at_work": done,
    }


def fail_together(failing: int) -> None:
    from sculptor.errors import DataError
    from sculptor.world import join

    world = join(on_gpu=False)
    with world.together():
        pass
    with world.together():
        if world.rank == failing:
            raise DataError("here")


def fail_once() -> None:
    from sculptor.errors import DataError
    from sculptor.world import join

    def fail() -> None:
        raise DataError("here")

    join(on_gpu=False).once(fail)


def fail_at_work() -> None:
    from sculptor.errors import DataError
    from sculptor.world import join

    def work(item: int) -> Any:
        if item == 3:
            raise DataError("item 3")
        yield item

    list(join(on_gpu=False).in_order(range(5), work))


def work_later(failing: int) -> list[Any]:
    """Results that take their time while work goes on, one of which cannot be made."""
    from concurrent.futures import Future, ThreadPoolExecutor

    from sculptor.errors import OutputError
    from sculptor.world import join

    def late(item: int) -> str:
        if item == failing:
            raise (OutputError if item == 1 else ValueError)(f"item {item}")
        return f"late {item}"

    def work(item: int) -> Any:
        yield f"first {item}"
        yield pool.submit(late, item)

    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = join(on_gpu=False).in_order(range(5), work)
        return [found.result() if isinstance(found, Future) else found for found in coming]


def analyze_on_a_small_disk(*args: Any, **named: Any) -> Any:
    """`sculptor.analyze`, where the second process's disk is full at its first shard."""
    import resource
    import signal

    import sculptor

    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return sculptor.analyze(*args, **named)


def moved_bytes(logits: int | None, *args: Any, **named: Any) -> float:
    """`sculptor.train`: the bytes of blocks and gradients that a process gets of two in its second step, on average over both.

    Logits are made so many at a time.
    """
    import sculptor
    from sculptor.model.loss import SLICE
    from sculptor.training.loop import TrainingLoop
    from sculptor.world import World

    SLICE["cpu"] = logits or SLICE["cpu"]
    moved, marks = [0.0], []
    show, add, step = World.show, World.add_up_at, TrainingLoop._step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: Any, owner: int, tensor: Any) -> None:
            moved[0] += tensor.numel() * tensor.element_size() / 2
            call(self, owner, tensor)

        return made

    def marked(self: Any, *rest: Any) -> None:
        marks.append(moved[0])
        step(self, *rest)

    World.show, World.add_up_at, TrainingLoop._step = counted(show), counted(add), marked  # type: ignore[method-assign]
    sculptor.train(*args, **named)
    return marks[2] - marks[1]

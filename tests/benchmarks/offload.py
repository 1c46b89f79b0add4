"""Training a large shape: plain full fine-tuning, resident, and streamed, time and memory.

    python tests/benchmarks/shapes.py 7b MODEL --tokenizer DIR --device cuda
    python tests/benchmarks/offload.py MODEL full resident cpu:4 cpu:16 cpu:16:fused disk:4 [--preserve 0.5]

A row is MODE:ROWS[:fused|:device]: ROWS sequences of --length tokens per weight load, which is one micro-batch and one
step; device is AdamW there, not in host memory. `full` and `resident` take 16 rows in micro-batches of 4 unless told
otherwise (full:16:16). The protected directions are random and made in memory, so that no archive is needed; the weights are
those of MODEL. Plain full fine-tuning keeps weights, gradients and AdamW states in bf16. Prints one JSON line per row.
"""

import argparse
import gc
import json
import resource
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.store import Entry
from sculptor.checkpoint.architecture import Architecture, Target, inspect_architecture
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.data.batches import Batch
from sculptor.methods.kinds import make_method
from sculptor.methods.rule import num_free
from sculptor.methods.settings import AnalyzeSettings
from sculptor.methods.weights import Weights
from sculptor.model.load import checkpoint_activations, load_model, load_streamed
from sculptor.model.loss import batch_loss
from sculptor.planning.footprints import Workload, footprints
from sculptor.planning.matrices import PlannedMatrix
from sculptor.training.protect import attach_coordinates, protected_blocks
from sculptor.training.rates import Peaks
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.optimizer import kept_bytes
from sculptor.training.stepping.resident import ResidentUpdates, TrainedParameters
from sculptor.training.stepping.streamed import StreamedUpdates
from sculptor.training.stepping.updates import Updates


class RandomArchive(Mapping[str, MatrixRecord]):
    """What `sculptor analyze --basis random --preserve P` would have saved, made when it is read."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, preserve: float, device: torch.device
    ) -> None:
        self.path = checkpoint.path
        self.device = device
        self.method = make_method(AnalyzeSettings(basis="random", preserve=preserve))
        self.records = {t.name: self._record(t, preserve) for t in architecture.targets}
        self.matrices = [
            PlannedMatrix(t, r.rule, r.tensors)
            for t, r in zip(architecture.targets, self.records.values(), strict=False)
        ]
        self.open_names = list(self.records)
        self.num_free = sum(num_free(record.rule) for record in self.records.values())

    def _record(self, target: Target, preserve: float) -> MatrixRecord:
        rule = Weights(AnalyzeSettings(preserve=preserve)).plan(target.shape)
        tensors = {"output": f"{target.name} out", "input": target.input_group}
        return MatrixRecord(
            target.tensor, None, target.parameter, target.block, target.index, target.role, target.transposed,
            target.input_group, "bfloat16", "", 0.02, rule, {name: tensors[name] for name in rule.stored()},
        )  # fmt: skip

    def ahead(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """They are made, and nothing is read."""
        return nullcontext()

    def __getitem__(self, name: str) -> MatrixRecord:
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, name: str) -> Entry:
        """Random orthonormal columns, the same for the same side."""
        record = self[name]
        made = {key: self._basis(record.tensors[key], shape) for key, shape in record.rule.stored().items()}
        return Entry(record, made)

    identity = "random"

    def check_capacity(self) -> None: ...

    def _basis(self, name: str, shape: Any) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return torch.linalg.qr(torch.randn(shape, generator=generator, device=self.device)).Q


class PlainUpdates:
    """Full fine-tuning of the same matrices."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        self.num_trainable = sum(p.numel() for p in parameters)

    def begin(self, rate_of: Any) -> None: ...

    def pass_by(self) -> None: ...

    def clip(self) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))

    def step(self, rate_of: Any) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        self.optimizer.state.clear()


def measure(
    model: Any, updates: Updates | PlainUpdates, device: torch.device, rows: int, micro: int, length: int, steps: int
) -> dict[str, float]:
    """Seconds per step and peak device memory, after a step and a half of warming up."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    losses = []
    vocabulary = min(8000, int(model.config.vocab_size))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps + 1):
        if step == 1:
            synchronize(device)
            started = time.perf_counter()
        total = torch.zeros((), device=device)
        parts = rows // micro
        for _ in range(parts):
            ids = torch.randint(2, vocabulary, (micro, length), generator=generator).to(device)
            updates.begin(lambda peak: peak)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = batch_loss(model, Batch(ids, torch.ones_like(ids), ids), "causal")
            (found.total / (rows * (length - 1))).backward()
            updates.pass_by()
            total += found.total.detach()
        updates.clip()
        updates.step(lambda peak: peak)
        losses.append(round(float(total) / (rows * (length - 1)), 4))
    synchronize(device)
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    reserved = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else float("nan")
    return {
        "seconds": seconds,
        "tokens_per_s": rows * length / seconds,
        "peak_gb": peak,
        "reserved_gb": reserved,
        "losses": losses,
    }  # type: ignore[dict-item]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def link_speed(device: torch.device) -> dict[str, float]:
    """GB/s to the device, from it, and to it while copying from it, with pinned memory."""
    from sculptor.streaming.transfers import free_host_memory, host_memory

    if device.type != "cuda":
        return {}
    hosts = [host_memory(2**29, True) for _ in range(2)]
    devices = [torch.empty(2**29, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def timed(jobs: list[Callable[[], Any]]) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(4):
            for stream, job in zip(streams, jobs, strict=False):
                with torch.cuda.stream(stream):
                    job()
        synchronize(device)
        return 4 * 2**29 / (time.perf_counter() - started) / 1e9

    load = lambda: devices[0].copy_(hosts[0], non_blocking=True)  # noqa: E731
    store = lambda: hosts[1].copy_(devices[1], non_blocking=True)  # noqa: E731
    found = {"load": timed([load]), "store": timed([store]), "both": timed([load, store])}
    for host in hosts:
        free_host_memory(host)
    return found


def main() -> None:
    """All rows, one after the other; streamed rows of one tier share their preparation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--preserve", type=float, default=0.5)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/sculptor-scratch"))
    parser.add_argument("--optimizer-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--keep-inputs", action="store_true")
    parser.add_argument("--limit", type=float, help="GB of GPU memory that torch may take, cache and all")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.limit is not None:
        torch.cuda.set_per_process_memory_fraction(
            1e9 * options.limit / torch.cuda.get_device_properties(0).total_memory
        )
    checkpoint = open_checkpoint(options.model)
    architecture = inspect_architecture(checkpoint)
    archive: Any = RandomArchive(checkpoint, architecture, options.preserve, device)
    print(json.dumps({"link": link_speed(device)}), flush=True)
    before = ""
    model: Any = None
    updates: Any = None
    for row in options.rows:
        mode, *rest = row.split(":")
        variant = rest.pop() if rest[-1:] in (["fused"], ["device"]) else ""
        fused = variant == "fused"
        rows = int(rest[0]) if rest else 16
        micro = (int(rest[1]) if rest[1:2] else 4) if mode in ("full", "resident") else rows
        settings = TrainSettings(
            batch_size=rows, micro_batch_size=micro, learning_rate=1e-5, clip_by="matrix" if fused else "model",
            optimizer_mode="fused" if fused else "exact", optimizer_on="device" if variant == "device" else "auto",
            optimizer_dtype=options.optimizer_dtype,
            offload="none" if mode == "full" or mode == "resident" else mode,  # type: ignore[arg-type]
        )  # fmt: skip
        started = time.perf_counter()
        kind = f"{mode} {variant}"
        if kind != before:
            if updates is not None:
                updates.close()
            model = updates = None
            gc.collect()
            torch.cuda.empty_cache() if device.type == "cuda" else None
            model, updates = prepare(mode, checkpoint, architecture, archive, settings, device, options)
            before = kind
        prepared = time.perf_counter() - started
        free = psutil.virtual_memory().available
        found = measure(model, updates, device, rows, micro, options.length, options.steps)
        on_host = mode == "cpu" and not variant and device.type == "cuda"
        work = Workload(
            rows * options.length, rows // micro, fused, options.keep_inputs, on_host, row=options.length,
            kept=kept_bytes(settings),
        )  # fmt: skip
        plan = None if mode == "full" else footprints(checkpoint, architecture, archive.matrices, device, work)[
            "none" if mode == "resident" else mode
        ]  # fmt: skip
        print(
            json.dumps(
                {"row": row, **found, "prepare_s": prepared, "trainable": updates.num_trainable,
                 "max_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                 "rss_gb": psutil.Process().memory_info().rss / 1e9, "host_free_gb": free / 1e9}
                | ({} if plan is None else {
                    "planned_device_gb": sum(plan.device.values()) / 1e9, "planned_host_gb": sum(plan.host.values()) / 1e9,
                    "loaded_gb": plan.loaded / 1e9, "stored_gb": plan.stored / 1e9, "read_gb": plan.read / 1e9,
                    "written_gb": plan.written / 1e9, "tera_operations": plan.operations / 1e12,
                    "tera_folding": plan.folding / 1e12})
            ),
            flush=True,
        )  # fmt: skip


def prepare(
    mode: str, checkpoint: Checkpoint, architecture: Architecture, archive: Any, settings: TrainSettings,
    device: torch.device, options: argparse.Namespace,
) -> tuple[Any, Any]:  # fmt: skip
    """A model ready for training, and its updates."""
    peaks = Peaks(dict.fromkeys(archive.open_names, 1e-5), {})
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    if mode in ("full", "resident"):
        model = load_model(checkpoint, device, architecture).model
        checkpoint_activations(model)
        if mode == "full":
            return model, PlainUpdates(
                [model.get_parameter(t.parameter).requires_grad_(True) for t in architecture.targets]
            )
        attach_coordinates(model, archive, compute_dtype=compute, fold="manual")
        return model, ResidentUpdates(TrainedParameters(tuple(protected_blocks(model))), peaks, settings, device)
    trained = {target.parameter: compute for target in architecture.targets}
    tier: Any = mode
    loaded = load_streamed(
        checkpoint, device, tier, architecture, scratch=options.scratch, compute_dtypes=trained,
        keep_inputs=True if options.keep_inputs else None,
    )  # fmt: skip
    assert loaded.stream is not None
    return loaded.model, StreamedUpdates(loaded.model, loaded.stream, archive, {}, peaks, settings)


if __name__ == "__main__":
    main()

"""Training: sculptor's coordinates against plain full fine-tuning in the same process, time and peak memory.

    python tests/benchmarks/training.py MODEL ARCHIVE --device cuda --rows 16 --micro 4 --length 1024

Both train the same matrices with fused AdamW on random tokens, with activation checkpointing. Plain full
fine-tuning keeps weights, gradients and AdamW states in the weights' own dtype (the usual bf16 recipe).
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.model.load import checkpoint_activations, load_model
from sculptor.model.loss import batch_loss
from sculptor.training.protect import protect, protected_matrices


def train(model: Any, parameters: list[torch.nn.Parameter], options: argparse.Namespace, refresh: Any) -> float:
    """Tokens per second over the timed steps."""
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    model.train()
    for step in range(options.steps + 2):
        if step == 2:
            synchronize(device)
            started = time.perf_counter()
        for _ in range(options.rows // options.micro):
            ids = torch.randint(2, 8000, (options.micro, options.length), generator=generator).to(device)
            batch = Batch(ids, torch.ones_like(ids), ids)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = batch_loss(model, batch, "causal")
            (found.total / (options.rows * (options.length - 1))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        refresh()
    synchronize(device)
    return options.steps * options.rows * options.length / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Both methods, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    speeds = {}
    for method in ("full", "sculptor"):
        loaded = load_model(open_checkpoint(options.model), device)
        model = loaded.model
        checkpoint_activations(model)
        archive = Archive(options.archive)
        if method == "full":
            parameters = [model.get_parameter(record.parameter).requires_grad_(True) for record in archive.values()]
            refresh: Any = lambda: None  # noqa: E731
        else:
            protect(model, archive, compute_dtype=torch.bfloat16 if device.type == "cuda" else None, fold="manual")
            matrices = protected_matrices(model)
            parameters = [a for matrix in matrices for a in matrix.coordinates.values]
            refresh = lambda matrices=matrices: [matrix.refresh() for matrix in matrices]  # noqa: E731
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speeds[method] = train(model, parameters, options, refresh)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
        count = sum(p.numel() for p in parameters)
        print(f"{method}: {speeds[method]:,.0f} tok/s, peak {peak:.1f} GB, {count:,} trainable", flush=True)
        del loaded, model, parameters, refresh
        matrices = []
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"sculptor / full: {speeds['sculptor'] / speeds['full']:.2f}")


if __name__ == "__main__":
    main()

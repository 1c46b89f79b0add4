"""One optimizer step: plain full fine-tuning, LoRA, PEFT's OSF and sculptor, in one process on one batch.

    python tests/benchmarks/step.py MODEL --archive weights=DIR --archive curvature=DIR --device cuda [--json FILE]

Every method trains in the same plain loop, with fused AdamW on random tokens, clipped: `protect` as its users call it, and
`train` as `sculptor train` steps (folding once a step, its own optimizer and clipping). Plain full fine-tuning keeps
weights, gradients and AdamW states in the weights' own dtype. The first steps are not counted; medians of the others.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.model.load import checkpoint_activations, load_model
from sculptor.model.loss import batch_loss
from sculptor.training.protect import attach_coordinates, protect, protected_blocks
from sculptor.training.rates import peak_rates
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.resident import ResidentUpdates, TrainedParameters

Finish = Callable[[], object]


def plain_finish(model: Any) -> tuple[Finish, int]:
    """Clip, step and clear, of everything that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def finish() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return finish, sum(p.numel() for p in parameters)


def prepare(method: str, model: Any, options: argparse.Namespace) -> tuple[Any, Finish, int]:
    """The model as a method trains it, what ends a step, and how many numbers are trained."""
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers." in name
    ]
    if method == "plain":
        model.requires_grad_(False)
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)
        return model, *plain_finish(model)
    if method in ("lora", "osf"):
        import peft

        leaves = sorted({name.rpartition(".")[2] for name in names})
        config = (
            peft.LoraConfig(r=16, target_modules=leaves, task_type="CAUSAL_LM")
            if method == "lora"
            else peft.OSFConfig(target_modules=leaves, effective_rank=0.5, task_type="CAUSAL_LM")
        )
        model = peft.get_peft_model(model, config)
        return model, *plain_finish(model)
    how, name = method.split(" ")
    archive = Archive(dict(item.split("=") for item in options.archive)[name])
    soften = archive.method.defaults.soften or 0.0
    dtype = torch.bfloat16 if options.device == "cuda" else None
    if how == "protect":
        protect(model, archive, compute_dtype=dtype, soften=soften)
        return model, *plain_finish(model)
    attach_coordinates(model, archive, compute_dtype=dtype, fold="manual", soften=soften)
    settings = TrainSettings(learning_rate=1e-5)
    parameters = TrainedParameters(tuple(protected_blocks(model)), {})
    updates = ResidentUpdates(parameters, peak_rates(settings, archive, {}), settings, torch.device(options.device))

    def finish() -> None:
        updates.clip()
        updates.step(lambda peak: peak)

    return model, finish, updates.num_trainable


def run(method: str, options: argparse.Namespace, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Seconds of a step, tokens per second, and peak memory."""
    device = torch.device(options.device)
    loaded = load_model(open_checkpoint(options.model), device)
    if options.recompute:
        checkpoint_activations(loaded.model)
    model, finish, count = prepare(method, loaded.model, options)
    model.train()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(options.rows // options.micro):
        most = min(8000, loaded.architecture.vocab_size)
        ids = torch.randint(2, most, (options.micro, options.length), generator=generator).to(device)
        batches.append(Batch(ids, torch.ones_like(ids), ids))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []

    def step() -> None:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = batch_loss(model, batch, "causal")
            (found.total / (options.rows * (options.length - 1))).backward()
        finish()

    for i in range(options.steps + 3):
        synchronize(device)
        started = clock()
        step()
        synchronize(device)
        if i >= 3:
            seconds.append(clock() - started)
    if options.trace:
        trace(method, step, options.trace, device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    median = statistics.median(seconds)
    return {
        "method": method, "seconds": median, "tokens_per_second": options.rows * options.length / median, "peak_gb": peak,
        "trained": count,
    }  # fmt: skip


def trace(method: str, step: Finish, directory: Path, device: torch.device) -> None:
    """Where the time of one step goes."""
    with torch.profiler.profile(with_stack=False) as found:
        step()
        synchronize(device)
    directory.mkdir(parents=True, exist_ok=True)
    text = ""
    if device.type == "cuda":
        text += found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60)
    text += found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
    (directory / f"{method.replace(' ', '-')}.txt").write_text(text)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """All methods, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--archive", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", nargs="*", help="of plain, lora, osf, 'protect NAME', 'train NAME'; default all")
    parser.add_argument("--recompute", action="store_true", help="activations are computed again in the backward pass")
    parser.add_argument("--trace", type=Path, help="directory for a profile of one step of each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [item.partition("=")[0] for item in options.archive]
    own = [f"{how} {name}" for name in names for how in ("protect", "train")]
    rows = []
    print(f"{'method':<20} {'ms/step':>9} {'tok/s':>9} {'x plain':>8} {'GB':>6} {'trained':>12}")
    for method in options.methods or ["plain", "lora", "osf", *own]:
        row = run(method, options)
        rows.append(row)
        ratio, peak = row["seconds"] / rows[0]["seconds"], row["peak_gb"] or float("nan")
        print(
            f"{method:<20} {1e3 * row['seconds']:>9.1f} {row['tokens_per_second']:>9,.0f} {ratio:>8.2f} {peak:>6.1f} "
            f"{row['trained']:>12,}",
            flush=True,
        )
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

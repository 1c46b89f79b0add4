"""The default learning rate against absolute ones: validation loss after one epoch of one task, every rate in one process.

    python tests/benchmarks/rates.py MODEL OUT --train train.jsonl --validation validation.jsonl --text general.txt \
        --basis weights --device cuda --seeds 2

Prints a line per training and, last, the default's distance from the best absolute rate, by the mean over the seeds.
"""

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path

import sculptor
from sculptor.errors import SculptorError

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def main() -> None:
    """Analyzes once, then trains and evaluates at the default and at every rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--basis", default="weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    text = (options.text,) if options.basis in ("inputs", "curvature") else ()
    found = sculptor.AnalyzeSettings(basis=options.basis, data=text, device=options.device)
    sculptor.analyze(options.model, options.out / "subspaces", found)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    losses: dict[float | None, list[float]] = {}
    for seed, rate in itertools.product(seeds, (None, *RATES)):
        began = time.perf_counter()
        tuned = options.out / "tuned"
        settings = sculptor.TrainSettings(
            learning_rate=rate, seed=seed, max_rows=options.rows, micro_batch_size=options.micro_batch_size,
            device=options.device, offload="none", checkpoint_activations=False, max_harm=0.0,
        )  # fmt: skip
        try:
            sculptor.train(options.model, options.out / "subspaces", [options.train], tuned, settings)
            loss = sculptor.evaluate(tuned, [options.validation], device=options.device, batch_size=64).loss
        except SculptorError as error:  # a rate that diverges has no loss; what else it may be is said
            loss = float("inf")
            print(f"{rate or 'default'}: {error}", flush=True)
        shutil.rmtree(tuned, ignore_errors=True)
        losses.setdefault(rate, []).append(loss)
        line = {"model": options.model.name, "basis": options.basis, "seed": seed, "rate": rate or "default"}
        print(json.dumps({**line, "loss": loss, "seconds": round(time.perf_counter() - began, 1)}), flush=True)
    means = {rate: sum(each) / len(each) for rate, each in losses.items()}
    best = min((loss, rate) for rate, loss in means.items() if rate is not None)
    print(f"{options.model.name} {options.basis}: default {means[None]:.4f}, best {best[0]:.4f} at {best[1]:g}, "
          f"gap {means[None] - best[0]:+.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

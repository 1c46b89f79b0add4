"""What others do with several GPUs, on the same model and as many tokens: FSDP2, plainly or with PEFT's OSF; its leak.

    torchrun --nproc-per-node 2 tests/benchmarks/peers.py MODEL plain float32 osf [--tokens 16384] [--steps 8] [--device cuda]

Every block is sharded (`fully_shard`), gradients are clipped, the matrices of blocks are trained. `plain` has weights, gradients
and AdamW's moments in the model's dtype, `float32` keeps all of them in float32 and computes in bf16, as torchtitan does. Random
tokens; the first three steps are not counted; medians of the others. The leak is the part of the update that OSF promises not to
make: ||(U^T dW, dW V)|| / ||dW||, U and V the singular vectors that it keeps, over four matrices.
"""

import argparse
import gc
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sculptor.jobs.processes import join
from sculptor.world import leave


def prepare(method: str, options: argparse.Namespace, device: torch.device) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model as FSDP2 has it, and what is trained."""
    from transformers import AutoModelForCausalLM

    wide = method == "float32"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32 if wide else "auto")
    model = model if wide else model.to(device)  # what is wide goes there block by block
    matrices = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    model.requires_grad_(False)
    if method in ("plain", "float32"):
        for name in matrices:
            model.get_submodule(name).weight.requires_grad_(True)
    else:
        import peft

        leaves = sorted({name.rpartition(".")[2] for name in matrices})
        config = peft.OSFConfig(target_modules=leaves, effective_rank=options.preserve, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if wide else {}
    for block in next(module for name, module in model.named_modules() if name.endswith(".layers")):
        fully_shard(block, **policy)
    fully_shard(model, **policy)
    model.to(device)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def run(method: str, options: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of all processes together, peak memory, and the leak of OSF."""
    world = join(options.device)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    model, trained = prepare(method, options, device)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(world.rank)
    rows = options.tokens // options.length
    model.train()
    before = kept(model) if method == "osf" else {}
    seconds = []
    for _ in range(options.steps):
        ids = torch.randint(2, 1000, (rows, options.length), generator=generator).to(device)
        started = time.perf_counter()
        for part in ids.split(options.micro or rows):
            (model(input_ids=part, labels=part, use_cache=False).loss * len(part) / rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[3:] or seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found = {"tokens/s": round(world.size * options.tokens / median), "step s": round(median, 3)}
    return found | {"peak GiB": world.gather(round(peak, 1)), **({"leak": leak(model, before)} if before else {})}


def whole(value: torch.Tensor) -> torch.Tensor:
    """In one piece, in float32."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().float()


def product(module: Any) -> torch.Tensor:
    """What OSF trains of a matrix, as it is now."""
    low = module.osf_svd_params["default"]
    return (whole(low["U_low"]) * whole(low["S_low"])) @ whole(low["V_low"])


def kept(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of the first four matrices: what is trained, before it is, and the directions that OSF keeps, U and V."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "osf_svd_params") and len(found) < 4:
            u, _, v = torch.linalg.svd(whole(module.get_base_layer().weight), full_matrices=False)
            count = module.effective_rank["default"]
            found[name] = (product(module), u[:, :count], v[:count].T)
    return found


def leak(model: Any, before: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """Of the matrices that were looked at before, together."""
    forbidden = size = 0.0
    for name, (old, u, v) in before.items():
        update = product(model.get_submodule(name)) - old
        forbidden += float((u.T @ update).square().sum() + (update @ v).square().sum())
        size += float(update.square().sum())
    return math.sqrt(forbidden / size) if size else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("methods", nargs="+", choices=["plain", "float32", "osf"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step, per process")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro", type=int, help="rows per forward")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--preserve", type=float, default=0.5)
    options = parser.parse_args()
    world = join(options.device)
    for method in options.methods:
        if options.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = run(method, options)
        except (RuntimeError, ValueError, AttributeError) as cause:  # what others cannot do is a result, too
            found = {"error": " ".join(str(cause).split())[:200]}
        if world.first:
            print(json.dumps({"processes": world.size, "job": f"FSDP2 {method}", **found}), flush=True)
    leave()


if __name__ == "__main__":
    main()

"""Other people's scripts in several processes, around `sculptor.protect`; each is run by `together`."""

import hashlib
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

STEPS, ROWS, ACCUMULATION = 4, 4, 2


def rows_of(step: int) -> Any:
    """Of a whole step, (ACCUMULATION, ROWS, tokens), the same in all processes."""
    import torch

    return torch.randint(4, 44, (ACCUMULATION, ROWS, 9), generator=torch.Generator().manual_seed(step))


def part_of(rows: Any) -> Any:
    """Those of this process."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return rows[:, rank::size]


def protected(model: Path, archive: Path) -> Any:
    """A model that somebody has loaded, with coordinates."""
    from transformers import AutoModelForCausalLM

    import sculptor

    return sculptor.protect(AutoModelForCausalLM.from_pretrained(model), archive)


def join() -> None:
    """As a script of one's own does it."""
    import torch

    torch.distributed.init_process_group("gloo")


def fingerprint(model: Any) -> str:
    """Of all bits of a model."""
    import torch

    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def merged(model: Any, output: Path) -> str:
    """Merges and saves; the fingerprint of what came out."""
    import sculptor

    sculptor.merge(model)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    assert not model._forward_pre_hooks
    if os.environ.get("RANK", "0") == "0":
        model.save_pretrained(output)
    return fingerprint(model)


def alone(model: Path, archive: Path, output: Path) -> str:
    """The same rows in one process."""
    found = protected(model, archive)
    return _steps(found, found, lambda _: nullcontext(), output)


def ddp(model: Path, archive: Path, output: Path, **options: Any) -> tuple[str, list[str]]:
    """DistributedDataParallel by hand, with gradient accumulation; the buffers that it would broadcast come, too."""
    from torch.nn.parallel import DistributedDataParallel

    join()
    found = protected(model, archive)
    wrapped = DistributedDataParallel(found, **options)
    sent = [name for name in wrapped.named_module_buffers if "parametrizations" in name]
    quiet = lambda part: wrapped.no_sync() if part + 1 < ACCUMULATION else nullcontext()  # noqa: E731
    return _steps(found, wrapped, quiet, output), sent


def in_one(call: Any, *args: Any) -> Any:
    """In a process alone, which a test may not become itself: accelerate remembers how it was started."""
    from together import together

    return together(1, call, *args)[0]


def _steps(model: Any, wrapped: Any, quiet: Any, output: Path) -> str:
    import torch

    import sculptor

    optimizer = torch.optim.SGD(sculptor.parameter_groups(model), momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    for step in range(STEPS):
        for part, ids in enumerate(part_of(rows_of(step))):
            with quiet(part):
                (wrapped(input_ids=ids, labels=ids).loss / ACCUMULATION).backward()
        optimizer.step()
        optimizer.zero_grad()
    return merged(model, output)


def accelerated(model: Path, archive: Path, output: Path) -> str:
    """A loop of accelerate's, with its accumulation."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    found = protected(model, archive)
    optimizer = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(found, optimizer)
    for step in range(STEPS):
        for ids in part_of(rows_of(step)):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(input_ids=ids, labels=ids).loss)
                optimizer.step()
                optimizer.zero_grad()
    return merged(accelerator.unwrap_model(wrapped), output)


def trainer(model: Path, archive: Path, output: Path, **options: Any) -> str:
    """The Hugging Face Trainer; a step takes the same rows as one of `alone`."""
    from transformers import Trainer, TrainingArguments

    size = int(os.environ.get("WORLD_SIZE", "1"))
    flat = [ids for step in range(STEPS) for ids in rows_of(step).flatten(0, 1)]
    arguments = TrainingArguments(
        output_dir=str(output.parent / "trainer"), use_cpu=True, max_steps=STEPS, learning_rate=0.3, optim="sgd",
        per_device_train_batch_size=ROWS // size, gradient_accumulation_steps=ACCUMULATION, report_to=[], max_grad_norm=0.5,
        save_strategy="no", logging_strategy="no", lr_scheduler_type="constant", disable_tqdm=True, seed=1, **options,
    )  # fmt: skip
    found = protected(model, archive)
    Trainer(model=found, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in flat]).train()
    return merged(found, output)


def wrapped_first(model: Path, archive: Path) -> None:
    """DistributedDataParallel, which has listed the parameters before there are coordinates."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    import sculptor

    join()
    found = AutoModelForCausalLM.from_pretrained(model)
    wrapped = DistributedDataParallel(found)
    sculptor.protect(wrapped.module, archive)
    ids = torch.ones(2, 5, dtype=torch.int64)
    wrapped(input_ids=ids, labels=ids).loss.backward()


def sharded(model: Path, archive: Path, when: str, fold: Any = "automatic") -> None:
    """FSDP2: blocks and the rest, or the whole, after protection or before."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import sculptor

    join()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = AutoModelForCausalLM.from_pretrained(model)
    if when == "before":
        fully_shard(found, mesh=mesh)
    sculptor.protect(found, archive, fold=fold)
    if when == "blocks":
        for block in found.model.layers:
            fully_shard(block, mesh=mesh)
    if when != "before":
        fully_shard(found, mesh=mesh)
    ids = torch.ones(2, 5, dtype=torch.int64)
    found(input_ids=ids, labels=ids).loss.backward()


def flattened(model: Path, archive: Path) -> None:
    """FSDP1."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    join()
    found = FullyShardedDataParallel(protected(model, archive), device_id=torch.device("cpu"), use_orig_params=True)
    ids = torch.ones(2, 5, dtype=torch.int64)
    found(input_ids=ids, labels=ids).loss.backward()


def run_script(code: str, directory: Path) -> None:
    """A script as it stands, in a directory."""
    os.chdir(directory)
    exec(compile(code, "script", "exec"), {})

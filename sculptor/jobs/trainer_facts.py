"""What a record says of a run that another program trained: its arguments, and what its log counts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sculptor.training.loop import LoopResult

# Of a trainer's arguments, what a record tells.
_TOLD = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "optim", "seed", "bf16", "fp16", "beta", "loss_type",
)  # fmt: skip


def told(args: Any) -> dict[str, Any]:
    """What a record says of another program."""
    import transformers

    values = {name: getattr(args, name) for name in _TOLD if getattr(args, name, None) is not None}
    unused = "max_steps" if args.max_steps <= 0 else "num_train_epochs"  # the one gives way to the other
    values = {name: getattr(value, "value", value) for name, value in values.items() if name != unused}
    plain = {name: value if isinstance(value, int | float | bool) else str(value) for name, value in values.items()}
    return {"arguments": type(args).__name__, "transformers": transformers.__version__, **plain}


def result_of(state: Any, history: Sequence[Mapping[str, Any]], seconds: float) -> LoopResult:
    """What the trainer's log says; a loss is NaN that it did not log yet."""
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    losses = losses or [float(entry["train_loss"]) for entry in history if "train_loss" in entry] or [math.nan]
    counted = max(
        (entry["num_tokens"] for entry in history if "num_tokens" in entry), default=0
    )  # as TRL's trainers log
    best = None if state.best_metric is None else state.best_global_step
    return LoopResult(
        steps=state.global_step,
        first_loss=losses[0],
        last_loss=losses[-1],
        best_step=best,
        best_loss=None if best is None else float(state.best_metric),
        tokens=int(state.num_input_tokens_seen or counted) or None,
        seconds=seconds,
    )

"""The training loop: exact accumulation, global clipping, evaluation, saved states.

The loss of a step is the mean over all its tokens, whatever the split into micro-batches: their number is known
before the first backward. The norm that is clipped is that of the trained parameters' gradients.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.checkpoint.staging import writing
from sculptor.data.batches import Batch, BatchPlan, prepare
from sculptor.data.examples import Example
from sculptor.errors import SettingsError, Stopped, TrainingError
from sculptor.model.load import LoadedModel
from sculptor.model.loss import batch_loss, num_loss_tokens
from sculptor.progress import Bar, Progress
from sculptor.training.protect import ProtectedBlock
from sculptor.training.schedule import learning_rate
from sculptor.training.settings import TrainSettings
from sculptor.training.state import Position, StateStore, random_state, set_random_state

BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False, slots=True)
class TrainedParameters:
    """What the optimizer works on, by name: coordinates per block, and openly trained parameters."""

    blocks: tuple[ProtectedBlock, ...]
    extra: dict[str, nn.Parameter]

    def named(self) -> dict[str, nn.Parameter]:
        """All of them; coordinates are `<tensor>.A<i>`."""
        coordinates = {
            f"{matrix.coordinates.name}.A{i}": a
            for block in self.blocks
            for matrix in block.matrices
            for i, a in enumerate(matrix.coordinates.blocks)
        }
        return coordinates | self.extra

    def refresh(self) -> None:
        """Folds every matrix again, block by block."""
        for block in self.blocks:
            for matrix in block.matrices:
                matrix.refresh()


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What the loop did.

    Attributes:
        steps: optimizer steps in all.
        first_loss: training loss of the first step, `last_loss` of the last (nats per token).
        best_step: the step whose parameters are kept, None without evaluation.
        best_loss: its evaluation loss.
        tokens: tokens read, padding excluded; `seconds` spent, both over all parts of a resumed run.
    """

    steps: int
    first_loss: float
    last_loss: float
    best_step: int | None
    best_loss: float | None
    tokens: int
    seconds: float


class TrainingLoop:
    """One run over prepared examples. Holds the model, the optimizer and the saved state; `run` does the work.

    Args:
        loaded: a model that `protect(fold="manual")` has been called on.
        parameters: what is trained.
        examples: the training data.
        settings: resolved settings; `max_length` and `device` have been applied already.
        store: where states are saved.
        metrics: a JSONL file, one line per step and per evaluation.
        penalty: a term added to the loss of every step, or None.
        evaluate: gives the validation loss of the model as it is, or None for no evaluation.
        stop: polled after every step; a signal number ends the run after its state is saved.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        parameters: TrainedParameters,
        examples: Sequence[Example],
        settings: TrainSettings,
        *,
        store: StateStore,
        metrics: Path,
        penalty: Callable[[], Tensor] | None = None,
        evaluate: Callable[[], float] | None = None,
        stop: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.loaded = loaded
        self.parameters = parameters
        self.examples = examples
        self.settings = settings
        self.store = store
        self.metrics = metrics
        self.penalty = penalty
        self.evaluate = evaluate
        self.stop = stop
        self.plan = BatchPlan([example.length for example in examples], settings.batch_size, settings.seed)
        self.total = settings.total_steps(self.plan.steps_per_epoch)
        self.accelerator = make_accelerator(loaded.device)
        self.optimizer = make_optimizer(parameters, settings, loaded.device)
        self.position = Position(step=0)
        self.best: dict[str, Tensor] | None = None

    def run(self, progress: Progress) -> LoopResult:
        """Trains from the newest saved state, or from the start, to the end; leaves the best parameters in place.

        Raises:
            Stopped: after a signal, with the state saved.
            TrainingError: if the loss or the gradient stops being finite.
        """
        devices = [self.loaded.device.index or 0] if self.loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            return self._run(progress)

    def _run(self, progress: Progress) -> LoopResult:
        self._restore()
        self._truncate_metrics()
        bar = progress(total=self.total, desc="train", unit="step", initial=self.position.step)
        started = time.perf_counter() - self.position.seconds
        for step in range(self.position.step, self.total):
            self._step(step, bar, started)
            done = step + 1
            if self.evaluate is not None and (done % self._eval_every == 0 or done == self.total):
                self._evaluate(done)
            signal_number = self.stop()
            if done % self._save_every == 0 or done == self.total or signal_number:
                self._save()
            if signal_number and done < self.total:
                bar.close()
                raise Stopped(
                    f"stopped by signal {signal_number} after step {done} of {self.total}; the state is saved, "
                    "go on with --resume",
                    signal_number,
                )
        bar.close()
        if self.best is not None:
            self._load(self.best)
        self.parameters.refresh()
        position = self.position
        assert position.first_loss is not None
        assert position.last_loss is not None
        return LoopResult(
            steps=self.total,
            first_loss=position.first_loss,
            last_loss=position.last_loss,
            best_step=position.best_step,
            best_loss=position.best_loss,
            tokens=position.tokens,
            seconds=position.seconds,
        )

    @property
    def _save_every(self) -> int:
        return self.settings.save_every or max(1, min(500, self.total // 10))

    @property
    def _eval_every(self) -> int:
        return self.settings.eval_every or max(1, -(-self.total // 5))

    def _step(self, step: int, bar: Bar, started: float) -> None:
        rows = self.plan.rows(step)
        batches = self._micro_batches(rows, step)
        total_tokens = sum(num_loss_tokens(batch, self.loaded.kind) for batch in batches)
        model = self.loaded.model
        model.train()
        loss = 0.0
        for batch in batches:
            with self.accelerator.autocast():
                found = batch_loss(model, batch.to(self.loaded.device), self.loaded.kind)
            share = found.total / total_tokens
            if found.auxiliary is not None:
                share = share + found.auxiliary * (found.num_tokens / total_tokens)
            self.accelerator.backward(share)
            loss += float(share.detach())
        if self.penalty is not None:
            self.accelerator.backward(self.penalty())
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"loss {loss} and gradient norm {norm} at step {step + 1}: not finite; lower --learning-rate "
                f"({self.settings.learning_rate}) or look at rows of that step"
            )
        rate = learning_rate(self.settings, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parameters.refresh()
        model.eval()
        tokens = sum(batch.num_tokens for batch in batches)
        seconds = time.perf_counter() - started
        speed = (self.position.tokens + tokens) / seconds
        self.position = replace(
            self.position,
            step=step + 1,
            first_loss=loss if step == 0 else self.position.first_loss,
            last_loss=loss,
            tokens=self.position.tokens + tokens,
            seconds=seconds,
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s", refresh=False)
        bar.update(1)
        epoch = round((step + 1) / self.plan.steps_per_epoch, 4)
        self._log(
            step=step + 1, epoch=epoch, loss=loss, learning_rate=rate, grad_norm=norm, tokens=tokens, seconds=seconds
        )

    def _micro_batches(self, rows: list[int], step: int) -> list[Batch]:
        size, tokenizer = self.settings.micro_batch_size, self.loaded.tokenizer
        return [
            prepare(
                [self.examples[row] for row in rows[start : start + size]],
                self.loaded.kind,
                self.loaded.pad_id,
                tokenizer.mask_token_id,
                len(tokenizer),
                seed=((self.settings.seed * 1_000_003 + step) * 1_009 + start) % 2**63,
            )
            for start in range(0, len(rows), size)
        ]

    def _clip(self) -> float:
        parameters = list(self.parameters.named().values())
        limit = self.settings.clip or float("inf")
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def _evaluate(self, step: int) -> None:
        assert self.evaluate is not None
        loss = self.evaluate()
        if not math.isfinite(loss):
            raise TrainingError(f"evaluation loss {loss} after step {step}: not finite; lower --learning-rate")
        self._log(step=step, eval_loss=loss)
        if self.position.best_loss is None or loss < self.position.best_loss:
            self.position = replace(self.position, best_step=step, best_loss=loss)
            self.best = {name: a.detach().to("cpu", copy=True) for name, a in self.parameters.named().items()}

    def _log(self, **values: float) -> None:
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            length = file.tell()
        self.position = replace(self.position, metrics_bytes=length)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.named().items():
            tensors[name] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = value
        self.store.save(self.position, tensors | random_state(self.loaded.device), self.best)

    def _restore(self) -> None:
        found = self.store.load()
        if found is None:
            return
        self.position, tensors, self.best = found
        self._load(tensors)
        for name, parameter in self.parameters.named().items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"{name}.{key}"]
                # Fused AdamW keeps its step counter on the device, the others on the CPU.
                on_device = key != "step" or self.optimizer.defaults["fused"]
                self.optimizer.state[parameter][key] = value.to(parameter.device) if on_device else value
        set_random_state(tensors, self.loaded.device)
        self.parameters.refresh()

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.named().items():
            parameter.copy_(tensors[name])

    def _truncate_metrics(self) -> None:
        """Lines of steps that have to be done again go."""
        with writing(self.metrics):
            self.metrics.touch()
            os.truncate(self.metrics, min(self.position.metrics_bytes, self.metrics.stat().st_size))


def make_accelerator(device: torch.device) -> Any:
    """Device and mixed precision: bf16 autocast on a GPU, float32 on a CPU.

    Raises:
        SettingsError: if there is more than one process.
    """
    from accelerate import Accelerator

    num_processes = os.environ.get("WORLD_SIZE", "1")  # asked first: Accelerator would wait for the others
    if num_processes != "1":
        raise SettingsError(
            f"{num_processes} processes (WORLD_SIZE): sculptor trains in one for now; start it without a launcher"
        )
    precision = "bf16" if device.type == "cuda" else "no"
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, device_placement=False)
    except ValueError as cause:  # accelerate keeps one state per process
        raise SettingsError(
            f"accelerate is set up in this process for another device or precision than {device.type} and {precision}; "
            "train in a process of its own"
        ) from cause


def make_optimizer(parameters: TrainedParameters, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """Fused AdamW, one group per block, so that a block's state is a unit; weight decay on coordinates only."""
    groups: list[dict[str, Any]] = [
        {"params": block.parameters, "weight_decay": settings.weight_decay} for block in parameters.blocks
    ]
    if parameters.extra:
        groups.append({"params": list(parameters.extra.values()), "weight_decay": 0.0})
    fused = device.type in ("cpu", "cuda")
    assert settings.learning_rate is not None
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=fused)

"""The training loop: exact accumulation, global clipping, evaluation, saved states.

The loss of a step is the mean over all its tokens, whatever the split into micro-batches: their number is known
before the first backward. The norm that is clipped is that of the trained parameters' gradients.
"""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sculptor.checkpoint.staging import writing
from sculptor.data.batches import Batch, BatchPlan
from sculptor.data.examples import Example
from sculptor.data.mixture import Mixture
from sculptor.errors import Stopped, TrainingError
from sculptor.model.harm import Harm, NamedHarm
from sculptor.model.load import LoadedModel
from sculptor.model.loss import AsBase, num_loss_tokens
from sculptor.progress import Bar, Progress, silent
from sculptor.training.harm import HarmControl
from sculptor.training.passes import Passed
from sculptor.training.recorded import make_passes
from sculptor.training.saves import Saves
from sculptor.training.schedule import rates_of
from sculptor.training.settings import TrainSettings
from sculptor.training.state import Position, StateStore, by_rank, random_state, set_random_state, write_together
from sculptor.training.stepping.updates import LazyTensors, Updates, tensors_of
from sculptor.world import ALONE, World

_LOOKED_AT = 2000  # steps, for which shapes of micro-batches come often


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What the loop did.

    Attributes:
        steps: optimizer steps in all.
        first_loss: training loss of the first step, `last_loss` the mean over the last tenth of them (nats per token).
        best_step: the step whose parameters are kept, None without evaluation.
        best_loss: its evaluation loss.
        tokens: tokens read, padding excluded, None if a trainer counts none; `seconds` spent; over all parts of a resumed run.
        harm: of what is kept, on samples of the base that no step depended on; `steering_harm` on those that steer, both
            None without samples; `named` of protected names.
        max_harm: the limit that held, None without one; `scaled` is how many times the update was scaled back for it.
    """

    steps: int
    first_loss: float
    last_loss: float
    best_step: int | None
    best_loss: float | None
    tokens: int | None
    seconds: float
    harm: Harm | None = None
    steering_harm: float | None = None
    named: tuple[NamedHarm, ...] = ()
    max_harm: float | None = None
    scaled: int = 0


def num_last(steps: int) -> int:
    """The last tenth of so many steps."""
    return max(1, steps // 10)


class TrainingLoop:
    """One run over prepared examples. Holds the model, the optimizer and the saved state; `run` does the work.

    Args:
        loaded: a model that is prepared for training.
        updates: what is trained, and how.
        examples: the training data.
        settings: resolved settings; `max_length` and `device` have been applied already.
        store: where states are saved.
        metrics: a JSONL file, one line per step and per evaluation.
        penalty: a term added to the loss of every step, or None.
        evaluate: gives the validation loss of the model as it is, or None for no evaluation.
        stop: polled after every step; a signal number ends the run after its state is saved.
        mixture: which part of an epoch comes from which examples; None if it is all of them.
        world: the processes that share a step.
        report: told every line of the metrics, in the first process.
        harm: measures harm, and keeps it below a limit; None without samples.
        as_base: makes the model its base, for a KL term on the rows' own tokens; None without one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        updates: Updates,
        examples: Sequence[Example],
        settings: TrainSettings,
        *,
        store: StateStore,
        metrics: Path,
        penalty: Callable[[], Tensor] | None = None,
        evaluate: Callable[[], float] | None = None,
        stop: Callable[[], int | None] = lambda: None,
        mixture: Mixture | None = None,
        world: World = ALONE,
        report: Callable[[Mapping[str, float]], object] = lambda _: None,
        harm: HarmControl | None = None,
        as_base: AsBase | None = None,
    ) -> None:
        self.loaded = loaded
        self.updates = updates
        self.examples = examples
        self.settings = settings
        self.store = store
        self.metrics = metrics
        self.penalty = penalty
        self.evaluate = evaluate
        self.stop = stop
        self.world = world
        self.report = report
        self.harm = harm
        self.as_base = as_base
        lengths = [example.length for example in examples]
        num_epoch = len(lengths) if mixture is None else mixture.num_epoch
        self.plan = BatchPlan(lengths, settings.rows_of_step(num_epoch), settings.seed, self.world, mixture)
        self.total = settings.total_steps(num_epoch)
        self.position = Position(step=0)
        self.passes = make_passes(loaded, settings, as_base, updates.resident(), updates.refresh, self._first_batches)
        if harm is not None:
            harm.losses = self.passes.sample_losses
        self.saves = Saves(updates.num_trainable, settings, self.total)

    def run(self, progress: Progress) -> LoopResult:
        """Trains from the newest saved state, or from the start, to the end; leaves the best parameters in place.

        Raises:
            Stopped: after a signal, with the state saved.
            TrainingError: if the loss or the gradient stops being finite.
        """
        devices = [self.loaded.device.index or 0] if self.loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed + self.world.rank)  # dropout differs where rows do
            try:
                return self._run(progress if self.world.first else silent)
            finally:
                self.passes.close()

    def _run(self, progress: Progress) -> LoopResult:
        self._restore()
        self._truncate_metrics()
        with closing(progress(total=self.total, desc="train", unit="step", initial=self.position.step)) as bar:
            started = time.perf_counter() - self.position.seconds
            for step in range(self.position.step, self.total):
                self._step(step, bar, started)
                done = step + 1
                evaluates = self.evaluate is not None and (done % self._eval_every == 0 or done == self.total)
                if self.harm is not None and self.harm.due(done, self.total, evaluates):
                    self._check_harm(self.harm, done)
                if evaluates:
                    self._evaluate(done)
                signal_number = self.world.most(self.stop() or 0)
                # Processes agree where there is something to agree on: that waits for all of them.
                if signal_number or (self.saves.may_be(done) and self.world.from_first(self.saves.due(done))):
                    with self.saves.timed():
                        self._save()
                if signal_number:
                    raise Stopped(
                        f"stopped by signal {signal_number} after step {done} of {self.total}; the state is saved, "
                        "go on with --resume",
                        signal_number,
                    )
            self.loaded.model.eval()
            position = self.position
            if position.best_step is not None:
                self.updates.load(self.store.load_best(position.best_step), optimizer=self._keeps_state)
            assert position.first_loss is not None
            assert position.last_loss is not None
            last = position.harm if position.best_step is None else None
            steering, harm, named = (None, None, ()) if self.harm is None else self.harm.final(last)
        return LoopResult(
            steps=self.total,
            first_loss=position.first_loss,
            last_loss=position.last_loss,
            best_step=position.best_step,
            best_loss=position.best_loss,
            tokens=position.tokens,
            seconds=position.seconds,
            harm=harm,
            steering_harm=steering,
            named=named,
            max_harm=None if self.harm is None else self.harm.limit,
            scaled=position.scaled,
        )

    @property
    def _keeps_state(self) -> bool:
        """Whether an optimizer's state goes on in the archive: that of what is kept, not of steps behind it."""
        return self.settings.optimizer == "bayes-adam"

    @property
    def _eval_every(self) -> int:
        return self.settings.eval_every or max(1, -(-self.total // 5))

    def _step(self, step: int, bar: Bar, started: float) -> None:
        rows = self.plan.rows(step)
        batches = self._micro_batches(rows, step)
        counts = sum(num_loss_tokens(batch, self.loaded.kind) for batch in batches), sum(b.num_tokens for b in batches)
        total_tokens, tokens = map(int, self.world.total(*counts))
        passes = self.world.most(len(batches))
        rate_of = rates_of(self.settings, step, self.total)
        model = self.loaded.model
        if not model.training:  # asked first: it goes through every module
            model.train()
        passed: list[Passed] = []
        self.passes.begin_step()
        for batch in batches:
            self.updates.begin(rate_of)
            passed.append(self.passes.run(batch, total_tokens))
            self.updates.pass_by()
        for _ in range(passes - len(batches)):  # of other processes, which have more rows
            self.updates.begin(rate_of)
            self.updates.pass_by()
        if self.penalty is not None and self.world.first:  # once, where gradients add up
            self.penalty().backward()  # type: ignore[no-untyped-call]
        norm = self.updates.clip()
        # Only now, since a number waits for the device.
        loss, kl = self.world.total(
            sum(float(found.loss) for found in passed),
            sum(float(found.divergence) for found in passed if found.divergence is not None),
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"loss {loss} and gradient norm {norm} at step {step + 1}: not finite; lower {self._rate_setting} or look at "
                "rows of that step"
            )
        self.updates.step(rate_of)
        seconds = time.perf_counter() - started
        speed = (self.position.tokens + tokens) / seconds
        self.position = replace(
            self.position,
            step=step + 1,
            first_loss=loss if step == 0 else self.position.first_loss,
            last_loss=self._late(step, loss),
            tokens=self.position.tokens + tokens,
            seconds=seconds,
        )
        harm = "" if self.position.harm is None else f"harm {self.position.harm:.2g}, "
        bar.set_postfix_str(f"loss {loss:.3f}, {harm}{speed:,.0f} tok/s", refresh=False)
        bar.update(1)
        epoch = round((step + 1) / self.plan.steps_per_epoch, 4)
        name, peak = self._rate
        rate = {name: rate_of(peak)}
        rate |= {} if self.as_base is None else {"kl": kl}
        self._log(step=step + 1, epoch=epoch, loss=loss, **rate, grad_norm=norm, tokens=tokens, seconds=seconds)

    def _late(self, step: int, loss: float) -> float:
        """Of steps so far, as far as they are of the last tenth: that of one step says what its rows are like."""
        count = step - (self.total - num_last(self.total))
        before = self.position.last_loss
        return loss if count <= 0 or before is None else before + (loss - before) / (count + 1)

    @property
    def _rate(self) -> tuple[str, float]:
        """The setting that decides the learning rates, and its value."""
        if self.settings.learning_rate is not None:
            return "learning_rate", self.settings.learning_rate
        assert self.settings.relative_rate is not None
        return "relative_rate", self.settings.relative_rate

    @property
    def _rate_setting(self) -> str:
        name, value = self._rate
        return f"--{name.replace('_', '-')} ({value:.3g})"

    def _micro_batches(self, rows: list[int], step: int) -> list[Batch]:
        seed = (self.settings.seed * 1_000_003 + step) % 2**63
        return [self.loaded.batch(part, seed, self.passes.widths) for part in self._split(rows)]

    def _split(self, rows: list[int]) -> Iterator[list[Example]]:
        size = self.settings.micro_rows
        for start in range(0, len(rows), size):
            yield [self.examples[row] for row in rows[start : start + size]]

    def _first_batches(self) -> Iterator[list[Example]]:
        for step in range(min(self.total, _LOOKED_AT)):
            yield from self._split(self.plan.rows(step))

    def _check_harm(self, control: HarmControl, step: int) -> None:
        found = control.check()
        if not math.isfinite(found.harm):
            raise TrainingError(f"harm {found.harm} after step {step}: not finite; lower {self._rate_setting}")
        scaled = self.position.scaled + (found.scale < 1)
        self.position = replace(self.position, harm=found.harm, scaled=scaled)
        limited = {} if control.limit is None else {"harm_scale": found.scale}
        self._log(step=step, harm=found.harm, **limited)

    def _evaluate(self, step: int) -> None:
        assert self.evaluate is not None
        loss = self.evaluate()
        if not math.isfinite(loss):
            raise TrainingError(f"evaluation loss {loss} after step {step}: not finite; lower {self._rate_setting}")
        self._log(step=step, eval_loss=loss)
        if self.position.best_loss is None or loss < self.position.best_loss:
            self.position = replace(self.position, best_step=step, best_loss=loss)
            save = functools.partial(self.store.save_best, step)
            kept = self.updates.state() if self._keeps_state else self.updates.parameters()
            self.store.note_best(step, write_together(self.world, kept, save))

    def _log(self, **values: float) -> None:
        if not self.world.first:
            return
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            length = file.tell()
        self.position = replace(self.position, metrics_bytes=length)
        self.report(values)

    def _save(self) -> None:
        random = tensors_of(by_rank(self.world.gather(random_state(self.loaded.device))))
        state = self.updates.state()
        entries = {**state.entries, **random.entries}
        read = lambda name: (random if name in random.entries else state).read(name)  # noqa: E731
        write_together(self.world, LazyTensors(entries, read), functools.partial(self.store.save, self.position))

    def _restore(self) -> None:
        found = self.store.load()
        if found is None:
            return
        self.position, saved = found
        self.updates.load(saved, optimizer=True)
        set_random_state(saved, self.loaded.device, self.world.rank)

    def _truncate_metrics(self) -> None:
        """Lines of steps that have to be done again go."""
        if not self.world.first:
            return
        with writing(self.metrics):
            self.metrics.touch()
            os.truncate(self.metrics, min(self.position.metrics_bytes, self.metrics.stat().st_size))

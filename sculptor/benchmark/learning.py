"""How a method learns one task of a sequence: by one training, or with steps before and after it.

What these steps leave lies beside the task's output, `NN-task-something`, until that is complete; a run that was killed goes
on behind the last complete one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sculptor.archive.store import Archive
from sculptor.benchmark.adapters import train_adapter
from sculptor.benchmark.contenders import SHRUNK, analysis_of, data_of, samples_of, settings_of, shrink
from sculptor.benchmark.episodes import Episode, episodes_of
from sculptor.benchmark.plan import RULES_OF, Contender, Plan, PlannedTask
from sculptor.checkpoint.staging import partial_path
from sculptor.checkpoint.written import remove
from sculptor.data.rows import Data, check_weights, unweighted
from sculptor.edits.settings import BankSettings, Prune
from sculptor.jobs.bank_files import BANK_NAME, Bank
from sculptor.jobs.job import read_offload
from sculptor.methods.kinds import Kinds
from sculptor.methods.settings import AnalyzeSettings
from sculptor.progress import Progress
from sculptor.tasks.analyze import analyze
from sculptor.tasks.bank import add_to_bank
from sculptor.tasks.prune import prune
from sculptor.tasks.train import train
from sculptor.training.settings import TrainSettings
from sculptor.world import World


@dataclass(frozen=True, eq=False, slots=True)
class Learning:
    """A method at work; the fields are those of a run."""

    plan: Plan
    method: Contender
    partial: Path
    progress: Progress
    notice: Callable[[str], object]
    stop: Callable[[], int | None]
    rules: Kinds | None
    world: World

    @property
    def carries(self) -> bool:
        """Whether an archive goes along from task to task."""
        return self.method in ("sculptor", "random", "bayes-adam", "crispedit", *RULES_OF)

    def learn(self, task: PlannedTask, model: str, archive: Path | None, target: Path) -> None:
        """Makes a checkpoint that knows one task more.

        Args:
            task: to learn.
            model: the checkpoint before.
            archive: of it, where one goes along, and there was a task before.
            target: directory of the new checkpoint.
        """
        if not self.world.once(target.is_dir):  # else the run was killed before it was evaluated
            self._learn(task, model, archive, target)
        self.world.once(lambda: _clear(target))
        if self.method == "slm":
            self._remember(task, target)

    @property
    def bank(self) -> Path:
        """SLM's."""
        return self.partial / "bank"

    def num_kept_bytes(self, target: Path) -> int | None:
        """Of what goes along beside a checkpoint: an archive, or a bank."""
        if self.method == "slm":
            return Bank(self.bank).num_bytes
        return Archive(target / "subspaces", rules=self.rules).num_bytes if self.carries else None

    def _remember(self, task: PlannedTask, target: Path) -> None:
        """SLM's step after a task, which was learned from the base: what it changed goes into the bank."""
        if (self.bank / BANK_NAME).is_file() and task.name in Bank(self.bank).names:
            return
        told = self.plan.evaluate
        settings = BankSettings(max_length=told.max_length, batch_size=told.batch_size, device=self.plan.train.device)
        columns = self.plan.train_settings(task).columns
        add_to_bank(
            self.bank,
            self.plan.model,
            target,
            [unweighted(item) for item in task.data],
            name=task.name,
            columns=columns,
            settings=settings,
            progress=self.progress,
        )

    def _learn(self, task: PlannedTask, model: str, archive: Path | None, target: Path) -> None:
        if self.method in ("lora", "olora", "osf"):
            train_adapter(
                model,
                task.data,
                target,
                self.plan.train_settings(task),
                self.plan.adapter,
                self.method,
                progress=self.progress,
                stop=self.stop,
            )
            return
        settings = settings_of(self.plan, self.method, task)
        data = data_of(self.plan, self.method, task)
        if self.method in SHRUNK:
            whole = _beside(target, "whole")
            self._train(task, model, None, data, whole, settings)
            self.world.once(lambda: shrink(self.plan, self.method, task.name, model, whole, target, self.progress))
        elif self.method == "esacl":
            sparse, mask = self._make_room(task, model, target)
            self._train(task, sparse, mask, data, target, settings)
        elif self.method == "mamf":
            episodes, settings = episodes_of(self.plan, task, settings)
            self._train(task, self._run(episodes, task, model, target), None, data, target, settings)
        elif self.method == "slm":
            self._train(task, self.plan.model, None, data, target, settings)
        else:
            self._train(task, model, archive, data, target, settings)

    def _train(
        self,
        task: PlannedTask,
        model: str | Path,
        archive: Path | None,
        data: Data,
        target: Path,
        settings: TrainSettings,
    ) -> None:
        """By an archive, if only one that protects nothing; what is complete stays."""
        if self.world.once(target.is_dir):
            return
        train(
            model,
            archive or self._first_archive(model),
            data,
            target,
            settings,
            replay=self.plan.replay,
            resume=True,
            progress=self.progress,
            notice=lambda text: self.notice(f"{task.name}: {text}"),
            stop=self.stop,
            rules=self.rules,
        )

    def _first_archive(self, model: str | Path) -> Path:
        """The archive of the base, or one that frees everything."""
        path = self.partial / "archive"
        if not self.carries:
            self.world.once(lambda: remove(path))  # of the task before
        self._analyze(model, path, analysis_of(self.plan, self.method))
        return path

    def _analyze(self, model: str | Path, path: Path, settings: AnalyzeSettings) -> None:
        if not self.world.once(path.exists):
            analyze(
                model,
                path,
                settings,
                offload=read_offload(self.plan.train.offload),
                resume=True,
                progress=self.progress,
                rules=self.rules,
            )

    def _make_room(self, task: PlannedTask, model: str, target: Path) -> tuple[Path, Path]:
        """EsaCL's step before a task: the weights of least curvature become 0, and they alone are trained.

        Curvature is that of the plan's own calibration rows, or what the model says by itself, and of earlier tasks' rows.

        Returns:
            The pruned checkpoint, and the archive that frees its zeros.
        """
        moments, sparse, mask = (_beside(target, name) for name in ("moments", "sparse", "mask"))
        names = [one.name for one in self.plan.tasks]
        own: dict[str, Any] = {
            name: getattr(self.plan.analyze, name) for name in ("seed", "targets", "exclude", "device")
        }
        planned = self.plan.analyze
        curvature = planned if planned.resolved_basis == "curvature" else AnalyzeSettings(basis="curvature", **own)
        data = list(planned.data or ("self",))
        there, mark = {unweighted(item) for item in data}, "" if check_weights(data) is None else ":1"
        earlier = dict.fromkeys(item for one in self.plan.tasks[: names.index(task.name)] for item in one.data)
        data += [f"{item}{mark}" for item in earlier if item not in there]
        columns = planned.columns or (self.plan.train.columns if earlier else None)
        curvature = replace(curvature, data=tuple(data), columns=columns)
        share = self.plan.adapter.sparsity
        self._analyze(model, moments, curvature)
        if not self.world.once(sparse.is_dir):
            settings = Prune(sparsity=share)
            self.world.once(lambda: prune(model, sparse, settings, subspaces=moments, progress=self.progress))
        self._analyze(sparse, mask, AnalyzeSettings(rule="mask", free=share, samples=samples_of(self.plan), **own))
        return sparse, mask

    def _run(self, episodes: list[Episode], task: PlannedTask, model: str, target: Path) -> str | Path:
        """MAMF's step before a task: sub-tasks one after another, each trained plainly."""
        places = [_beside(target, str(i)) for i in range(1, len(episodes) + 1)]
        done = self.world.once(lambda: max((i for i, place in enumerate(places, 1) if place.is_dir()), default=0))
        last: str | Path = places[done - 1] if done else model
        for episode, place in zip(episodes[done:], places[done:], strict=True):
            self._train(task, last, None, [episode.rows], place, episode.settings)
            if last != model:
                self.world.once(functools.partial(remove, Path(last)))
            last = place
        return last


def _beside(target: Path, name: str) -> Path:
    return target.with_name(f"{target.name}-{name}")


def _clear(target: Path) -> None:
    """Removes what steps before and after a training have left."""
    for left in (partial_path(target), *target.parent.glob(f"{target.name}-*")):
        remove(left)

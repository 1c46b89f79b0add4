"""`sculptor.continual`: a sequence of tasks, one after another, with everything evaluated after each.

Everything is staged in `<output>.partial`: one directory per task while it is trained, scores.json, which grows by a row
per task, and `output`, which is put in its place at the end. A run that was killed goes on behind the last complete row, inside
a task at its last saved state.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sculptor import __version__
from sculptor.benchmark.adapters import check_adapter_settings, require_peft
from sculptor.benchmark.contenders import OF_MOMENTS, check_contender, joint_data, jointly, update_norm
from sculptor.benchmark.crispedit import KIND as CRISPEDIT
from sculptor.benchmark.episodes import check_episodes
from sculptor.benchmark.inputs import digests_beside, files_of, read_inputs
from sculptor.benchmark.learning import Learning
from sculptor.benchmark.plan import CONTENDERS, Contender, Plan, PlannedTask, Split, read_plan
from sculptor.benchmark.results import (
    ContinualReport,
    Scores,
    Stage,
    continual_readme,
    different,
    plain,
    published,
    report_of,
)
from sculptor.benchmark.stages import count_memory, draw_once, measure_stage, peak_memory
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import identity, open_checkpoint
from sculptor.checkpoint.staging import STAGED_NAME, move, put_in_place, write_json, writing
from sculptor.checkpoint.tokenizers import speech_digest
from sculptor.checkpoint.written import remove
from sculptor.data.chat import use_template
from sculptor.edits.settings import BankSettings
from sculptor.errors import OutputError, SettingsError
from sculptor.jobs.bank_files import Bank
from sculptor.jobs.job import open_model, read_offload
from sculptor.jobs.processes import Place, check_alike, join
from sculptor.jobs.readme import write_readme
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.model.load import LoadedModel, resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.routed import RoutedModel
from sculptor.validation import read_file, read_json
from sculptor.world import World

SCORES_NAME = "scores.json"
REPORT_NAME = "continual.json"


def continual(
    plan: str | Path,
    output: str | Path,
    *,
    method: Contender = "sculptor",
    overrides: Sequence[str] = (),
    seed: int | None = None,
    split: Split = "test",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
    rules: Kinds | None = None,
) -> ContinualReport:
    """Trains the tasks of a plan in order and evaluates all of them after each.

    Args:
        plan: PLAN.toml; its sections are the settings of `analyze`, `train` and `evaluate`.
        output: directory of the report, and of the last checkpoint in `model/`.
        method: sculptor as the plan says, or one to compare with at the same budget.
        overrides: `section.name=value` in the place of what the plan says.
        seed: of training, sampling and random directions; None for what the plan says.
        split: which files of the tasks are evaluated.
        overwrite: replace an existing output, at success; discard left-overs.
        resume: go on with a run that did not finish.
        progress: makes progress bars.
        notice: told, in a line, what was decided about memory for a task, and which settings the method has no use for.
        stop: polled after every training step; a signal number saves the state and ends the run.
        rules: kinds of rules beside sculptor's own.

    Returns:
        The matrix, its figures, and the change on general text.

    Raises:
        SculptorError: if the plan, an input or the output cannot be used.
    """
    if method not in CONTENDERS:
        raise SettingsError(f"--method {method}: expected one of {', '.join(CONTENDERS)}")
    resolved = read_plan(plan, overrides, rules)
    world = join(resolved.train.device)
    if seed is not None:
        resolved = replace(
            resolved, analyze=replace(resolved.analyze, seed=seed), train=replace(resolved.train, seed=seed)
        )
    check_contender(resolved, method)
    if method in ("lora", "olora", "osf"):
        require_peft()
        for task in resolved.tasks:
            check_adapter_settings(resolved.train_settings(task), method)
    if method in ("lora", "olora", "osf", "slm") and world.size > 1:
        whose = "a bank's rows are" if method == "slm" else "PEFT's methods run"
        raise SettingsError(f"--method {method} with {world.size} processes: {whose} in one; start it alone")
    output = Path(output).resolve()
    place = Place(world, output, "continual", overwrite, resume)
    with place.staged([plan, *files_of(resolved)], _has_scores) as partial:
        with world.together():
            run = _Run(resolved, method, split, partial, progress, notice, stop, rules, world)
        check_alike(world, run.key)
        stages = run.run()
        basis = make_method(resolved.analyze, known_kinds(rules)).terms.basis
        report = report_of(resolved, method, basis, split, stages, output)
        world.once(lambda: _place(report, resolved, run.key, partial, output, overwrite))
    return report


def _place(
    report: ContinualReport, plan: Plan, key: Mapping[str, Any], partial: Path, output: Path, overwrite: bool
) -> None:
    staged = partial / STAGED_NAME
    write_readme(staged / "model", continual_readme(plan, report))
    made_by = {"created_by": f"sculptor {__version__}"}
    write_json(staged / REPORT_NAME, made_by | {"plan": published(dict(key))} | plain(report) | {"output": output.name})
    write_json(staged / "sculptor.json", made_by | {"command": "continual"})
    put_in_place(partial, output, overwrite=overwrite)


def _has_scores(partial: Path) -> bool:
    return (partial / SCORES_NAME).is_file()


class _Run:
    """One run of a plan; `run` does the work."""

    def __init__(
        self,
        plan: Plan,
        method: Contender,
        split: Split,
        partial: Path,
        progress: Progress,
        notice: Callable[[str], object],
        stop: Callable[[], int | None],
        rules: Kinds | None,
        world: World,
    ) -> None:
        self.world = world
        self.rules = rules if method == "sculptor" else {"crispedit": CRISPEDIT} if method == "crispedit" else None
        self.plan = plan = jointly(plan) if method == "joint" else plan
        self.method = method
        self.partial = partial
        self.progress = progress
        self.notice = notice
        self.stop = stop
        self.learning = Learning(plan, method, partial, progress, notice, stop, self.rules, world)
        self.inputs = read_inputs(plan, split)  # before the first task is trained
        if method == "mamf":
            check_episodes(plan)
        own: dict[str, Any] = {
            "method": method,
            "split": split,
            "version": __version__,
            "evaluated rows": self.inputs.evaluated_digest,
        }
        checkpoint = open_checkpoint(plan.model)
        own |= {
            "model files": identity(checkpoint.digests_beside(())),
            "tokenizer and generation": speech_digest(checkpoint.path),
            "data files": self.inputs.trained_digest,
            "files beside": digests_beside(plan),
        }
        self.key: dict[str, Any] = json.loads(json.dumps(plan.to_json() | own))
        self.stages: list[Stage] = []

    def run(self) -> list[Stage]:
        self.stages = self.world.once(self._restored)
        given = [f"train.{name}" for name in OF_MOMENTS if getattr(self.plan.train, name) is not None]
        if given and self.method not in ("sculptor", "crispedit"):
            self.notice(f"without effect with --method {self.method}: {', '.join(given)}")
        steps = self._trainings()
        with closing(
            self.progress(total=len(steps), desc="tasks", unit="task", initial=max(0, len(self.stages) - 1))
        ) as bar:
            if not self.stages:
                self._finish_stage("base", self.plan.model, None, 0.0)
            model, archive = self.plan.model, None
            for i, (name, task) in enumerate(steps, 1):
                target = self.partial / f"{i:02d}-{name}"
                if i >= len(self.stages):
                    started = time.perf_counter()
                    device = resolve_device(self.plan.train.device)
                    count_memory(device)
                    self.learning.learn(task, model, archive, target)
                    seconds, kept = time.perf_counter() - started, self.learning.num_kept_bytes(target)
                    self._finish_stage(name, str(target), kept, seconds, model, peak_memory(device))
                    bar.update(1)
                if i > 1:
                    before = self.partial / f"{i - 1:02d}-{steps[i - 2][0]}"
                    self.world.once(functools.partial(remove, before))
                model, archive = str(target), target / "subspaces" if self.learning.carries else None
        self.world.once(lambda: self._keep_last(Path(model)))
        return self.stages

    def _keep_last(self, model: Path) -> None:
        """Moves what goes out to where the output is made."""
        staged = self.partial / STAGED_NAME
        with writing(staged):
            staged.mkdir(exist_ok=True)
        for made, name in ((self.learning.bank, "bank"), (model, "model")):
            if made.exists():  # else there is none, or a run that was killed after this had put it there
                remove(staged / name)
                move(made, staged / name)

    def _trainings(self) -> list[tuple[str, PlannedTask]]:
        """Name and task of every training."""
        tasks = self.plan.tasks
        if self.method != "joint":
            return [(task.name, task) for task in tasks]
        together = PlannedTask(name="joint", columns=tasks[0].columns, data=joint_data(self.plan), test=())
        return [("joint", together)]

    def _finish_stage(
        self,
        name: str,
        model: str,
        archive_bytes: int | None,
        seconds: float,
        before: str | None = None,
        peak_bytes: int | None = None,
    ) -> None:
        """Evaluates a checkpoint on everything and notes the row."""
        device, offload = resolve_device(self.plan.train.device), read_offload(self.plan.train.offload)
        routes = self.method == "slm" and before is not None
        with self.world.together():
            after = open_checkpoint(model)
            checkpoint = open_checkpoint(self.plan.model) if routes else after
            offload = "none" if routes else offload
            loaded = open_model(checkpoint, device, inspect_architecture(checkpoint), offload, progress=self.progress)
            use_template(loaded.tokenizer, self.plan.train.chat_template)
        with closing(loaded):
            if before is None and self.plan.evaluate.harm:
                why = self.world.once(lambda: draw_once(loaded, self.plan, self.partial, self.progress))
                if why:
                    self.notice(f"harm cannot be measured: {why}")
            routed = self._routed(loaded) if routes else None
            found = measure_stage(loaded, self.plan, self.inputs, self.partial, self.progress, self.world, routed)
        start = self.plan.model if routes else before
        update = None if start is None else self.world.once(lambda: update_norm(open_checkpoint(start), after))
        stage = Stage(
            name,
            found.scores,
            found.watch_loss,
            archive_bytes,
            seconds,
            found.watched,
            update,
            found.harm,
            peak_bytes,
        )
        self.stages.append(self.world.from_first(stage))
        noted = {"key": self.key, "stages": [asdict(stage) for stage in self.stages]}
        self.world.once(lambda: write_json(self.partial / SCORES_NAME, noted))

    def _routed(self, loaded: LoadedModel) -> RoutedModel:
        """The base with SLM's bank."""
        options = self.plan.evaluate
        told = BankSettings(max_length=options.max_length, batch_size=options.batch_size)
        return RoutedModel(Bank(self.learning.bank), loaded, 1, told, self.progress)

    def _restored(self) -> list[Stage]:
        """Rows of a run that was killed.

        Raises:
            OutputError: if it followed another plan.
        """
        path = self.partial / SCORES_NAME
        if not path.is_file():
            return []
        remedy = "pass --overwrite to start anew"
        found = read_json(Scores, read_file(path, OutputError, remedy), path, OutputError, remedy)
        if found.key != self.key:
            names = ", ".join(different(found.key, self.key))
            raise OutputError(f"{path}: left by a run of another plan ({names}); use the same or {remedy}")
        return list(found.stages)

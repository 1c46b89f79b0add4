"""`sculptor.SculptorCallback`: other people's trainers leave what `sculptor train` leaves.

For Trainer of transformers and what is made of it (TRL's SFTTrainer, DPOTrainer, GRPOTrainer). With a protected model, at every
save and at the end: merged checkpoint, updated archive and record, verified before they are put in their place.
"""

import json
import re
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sculptor.analysis.verify import Verification, verify_checkpoints
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.directory import tell_left_behind
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.staging import check_apart, check_free, put_in_place, staging, writing
from sculptor.data.collated import collated_examples
from sculptor.data.examples import Encoded, resolve_max_length
from sculptor.data.rows import Data, as_items, names_of, task_name
from sculptor.errors import ArchiveError, OutputError, SettingsError, TrainingError
from sculptor.jobs.finish import write_output
from sculptor.jobs.harm import harm
from sculptor.jobs.job import Rows, TrainJob, open_base, open_model, read_task, resolve_settings
from sculptor.jobs.memory import fit_memory
from sculptor.jobs.same_model import (
    autocast_of,
    check_buffers,
    check_computes,
    check_others,
    check_settings,
    check_size,
    check_tokenizer,
    has_moved,
)
from sculptor.jobs.train_report import TrainReport, written_line
from sculptor.jobs.trainer_facts import result_of, told
from sculptor.methods.kinds import Kinds
from sculptor.methods.method import measures_of
from sculptor.methods.settings import Carry
from sculptor.model.load import LoadedModel, load_tokenizer
from sculptor.model.samples import read_samples
from sculptor.progress import Progress, bars, silent
from sculptor.training.base import BaseWeights
from sculptor.training.protect import ProtectedMatrix, protected_matrices
from sculptor.training.settings import SaveDtype, TrainSettings
from sculptor.training.stepping.updates import Trained
from sculptor.world import ALONE, here

MERGED_NAME = "merged"


class SculptorCallback(TrainerCallback):  # type: ignore[misc]
    """Writes, verifies and records what a trainer makes of a protected model.

    Args:
        model: the checkpoint that was loaded, directory or hub name.
        subspaces: the archive that it was protected with.
        output: directory of the merged checkpoint at the end, with the updated archive in `subspaces/`.
        data: rows of the task as `train` takes them, where the archive goes on by what they measure [default: the trainer's
            own rows].
        carry: how the archive goes on, as in `TrainSettings`.
        memory_rows: rows whose moments are merged in, as there; `memory_weight` their weight.
        memory_weight: against those of one earlier source, as there.
        save_dtype: dtype of the output, as there.
        at_save: write `merged/` into each of the trainer's own checkpoints, too; into that of the last step only if the trainer
            keeps another model at the end, since it is the output otherwise.
        overwrite: replace an existing output.
        rules: kinds of rules beside sculptor's own.
        progress: makes progress bars [default: as the command line has them, unless the trainer shows none].
        notice: told in a line what was written, with its leak.

    Attributes:
        report: figures of the last output, as `train` returns them.
        verification: of it, as `verify` returns it.

    Raises:
        SculptorError: when training begins, if model, archive, rows or output cannot be used; when something is to be written
            that does not verify.
    """

    def __init__(
        self,
        model: str | Path,
        subspaces: str | Path,
        output: str | Path,
        *,
        data: Data = (),
        carry: Carry | None = None,
        memory_rows: int | None = None,
        memory_weight: float | None = None,
        save_dtype: SaveDtype = "keep",
        at_save: bool = True,
        overwrite: bool = False,
        rules: Kinds | None = None,
        progress: Progress | None = None,
        notice: Callable[[str], object] = print,
    ) -> None:
        self.base, self.subspaces, self.output = model, subspaces, Path(output).resolve()
        self.data = data
        self.settings = TrainSettings(
            carry=carry, memory_rows=memory_rows, memory_weight=memory_weight, save_dtype=save_dtype
        )
        self.at_save, self.overwrite = at_save, overwrite
        self.rules, self.notice, self._own_bars = rules, notice, progress is None
        self.progress = silent if progress is None else progress
        self.report: TrainReport | None = None
        self.verification: Verification | None = None
        self._job: TrainJob | None = None
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuses what could not be written, before any step."""
        self._began = time.perf_counter()
        if self._own_bars:
            self.progress = silent if getattr(args, "disable_tqdm", True) else bars
        if self.output.exists() and not self.overwrite:
            raise OutputError(f"{self.output}: exists already; choose another output or pass overwrite=True")
        run = Path(args.output_dir).resolve()
        _check_apart_from(run, self.output)
        here().once(lambda: check_free(self.output, command="trainer", overwrite=self.overwrite))
        merged = [run / "checkpoint-0" / MERGED_NAME] if self.at_save else []
        for place in (self.output, *merged):
            check_apart(place, [self.base, self.subspaces])
        spoken = given.get("processing_class")
        here().once(lambda: self._open(args, state, _unwrapped(given["model"]), given.get("train_dataloader"), spoken))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Writes `merged/` into the checkpoint that the trainer has just saved."""
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        is_output = state.global_step >= state.max_steps and not args.load_best_model_at_end
        if self.at_save and not is_output:
            here().once(lambda: self._write(place.resolve() / MERGED_NAME, True, args, state, given["model"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Writes the output, of the model that the trainer keeps."""
        here().once(lambda: self._write(self.output, self.overwrite, args, state, given["model"]))

    def _open(self, args: Any, state: Any, model: nn.Module, loader: Any, spoken: Any) -> None:
        checkpoint, architecture = open_base(self.base)
        tell_left_behind(checkpoint.path, checkpoint.files, self.notice)
        archive = Archive(self.subspaces, rules=self.rules)
        archive.check_base(checkpoint, self.progress)
        matrices = protected_matrices(model)
        _check(matrices, archive)
        check_size(model, architecture.vocab_size)
        check_others(model, checkpoint, architecture)
        check_settings(model, checkpoint)
        check_tokenizer(getattr(spoken, "tokenizer", spoken), load_tokenizer(checkpoint, architecture), self.notice)
        self._check_base(args, model, checkpoint, architecture)
        rate = float(args.learning_rate) or None
        settings = resolve_settings(
            replace(self.settings, learning_rate=rate, soften=matrices[0].coordinates.soften), archive
        )
        settings = replace(settings, max_length=resolve_max_length(None, architecture.max_positions))
        items = as_items(self.data)
        measured = measures_of(archive.method, "carry", settings.carry) != "nothing"
        if items:
            rows = read_task(checkpoint, architecture, items, (), settings, self.notice)
        else:
            if measured and architecture.kind != "causal":
                raise SettingsError(f"{architecture.model_class}: the archive goes on by rows of the task; give data=")
            with torch.random.fork_rng(_devices(model)):
                found = collated_examples(loader, self._num_measured(args, state, settings)) if measured else ()
            rows = Rows(Encoded(found, 0, 0), None, None)
        seen = getattr(loader, "dataset", None)
        names = names_of(items) if items else ("the trainer's rows",)
        job = TrainJob(
            checkpoint,
            architecture,
            archive,
            settings,
            names,
            rows.digest,
            rows.encoded,
            None,
            task_name(items[0]) if items else self.output.name,
            {},
            "placed by the trainer",
            rows_elsewhere=len(seen) if isinstance(seen, Sized) else 0,
            trainer=told(args),
        )
        device = next(model.parameters()).device
        self._job = fit_memory(
            job, self.settings.memory_rows, None, device, self.notice, ALONE, "memory_rows={}", 'carry="keep"'
        )

    def _num_measured(self, args: Any, state: Any, settings: TrainSettings) -> int:
        """Rows for the next archive: unless told otherwise no more than the run trains on."""
        most = settings.memory_rows or 0
        if self.settings.memory_rows is not None:
            return most
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return min(most, max(1, int(state.max_steps * step)))

    def _check_base(self, args: Any, model: Any, checkpoint: Checkpoint, architecture: Architecture) -> None:
        """Whether what is about to be trained is the base, but for its coordinates."""
        device = next(model.parameters()).device
        extra = _Guest(model, self.settings).extra
        loaded = open_model(checkpoint, device, architecture, "auto", progress=self.progress)
        with closing(loaded), BaseWeights(model, {})():
            check_buffers(model, loaded)
            if extra and any(has_moved(model, checkpoint, architecture, name) for name in extra):
                return  # taken up again, with parameters that are trained openly: the end tells
            check_computes(model, loaded, autocast_of(args), f"{checkpoint.path}")

    def _write(self, output: Path, overwrite: bool, args: Any, state: Any, model: Any) -> None:
        model = _unwrapped(model)
        assert self._job is not None
        device = next(model.parameters()).device
        job = self._job
        check_others(model, job.checkpoint, job.architecture)
        trained = _Guest(model, job.settings)
        loaded = LoadedModel(
            job.checkpoint, job.architecture, model, load_tokenizer(job.checkpoint, job.architecture), device
        )
        history = list(state.log_history)
        with (
            torch.random.fork_rng(_devices(model)),
            staging(
                output,
                command="trainer",
                overwrite=overwrite,
                resume=None,
                worth_keeping=lambda _: False,
            ) as partial,
        ):
            lines = "".join(json.dumps(entry, default=str) + "\n" for entry in history)
            with writing(partial / "metrics.jsonl"):
                (partial / "metrics.jsonl").write_text(lines, encoding="utf-8")
            result = result_of(state, history, time.perf_counter() - self._began)
            if output == self.output and read_samples(job.archive, job.architecture.vocab_size) is not None:
                result = replace(result, harm=harm(model, job.archive))
            self.report = write_output(job, loaded, trained, result, output, partial, self.progress)
            made = open_checkpoint(partial / "output")
            self.verification = verify_checkpoints(
                job.checkpoint, made, job.archive, device=device, progress=self.progress
            )
            _demand(self.verification, output)
            check_settings(model, job.checkpoint)
            with closing(open_model(made, device, job.architecture, "auto", progress=self.progress)) as written:
                check_computes(model, written, autocast_of(args), "what is written of it")
            # The trainer's own state was saved before: of the output at the end nothing but its own metrics say the leak.
            state.log_history.append(
                {"sculptor_leak": self.verification.leak, "step": state.global_step, "epoch": state.epoch}
            )
            with (
                writing(partial / "output" / "metrics.jsonl"),
                (partial / "output" / "metrics.jsonl").open("a") as file,
            ):
                file.write(json.dumps(state.log_history[-1]) + "\n")
            put_in_place(partial, output, overwrite=overwrite)
        self.notice(written_line(state.global_step, self.report, self.verification))


class _Guest(Trained):
    """A protected model that somebody else trains, and may go on training.

    Args:
        model: it.
        settings: resolved settings.
    """

    goes_on = True

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.settings = settings
        self._found = {matrix.coordinates.name: matrix.coordinates for matrix in protected_matrices(model)}
        own = {id(value) for coordinates in self._found.values() for value in coordinates.values}
        self._trained = [value for value in model.parameters() if value.requires_grad]
        self.extra = {
            name: value for name, value in model.named_parameters() if value.requires_grad and id(value) not in own
        }

    @property
    def num_trainable(self) -> int:
        return sum(value.numel() for value in self._trained)

    def fingerprints(self) -> dict[str, list[float]]:
        return {name: coordinates.fingerprint() for name, coordinates in self._found.items()}

    def coordinates(self, name: str) -> list[torch.Tensor] | None:
        found = self._found.get(name)
        return None if found is None else [value.detach() for value in found.values]


def _unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def _devices(model: nn.Module) -> list[int]:
    """Those whose random numbers are put back after we have drawn some."""
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []


def _check_apart_from(run: Path, output: Path) -> None:
    """Refuses an output that the trainer's own directory is in, or that lies in one of its checkpoints."""
    if output == run or output in run.parents:
        raise OutputError(f"{output}: is or holds the trainer's own directory {run}; choose a place in it or beside it")
    inside = output.relative_to(run).parts[0] if run in output.parents else ""
    if re.fullmatch(r"checkpoint-\d+", inside):
        raise OutputError(
            f"{output}: {run / inside} is the trainer's, which writes and removes it; choose a place beside it"
        )


def _check(matrices: Sequence[ProtectedMatrix], archive: Archive) -> None:
    if not matrices:
        raise ArchiveError(
            "the model is not protected; call sculptor.protect(model, archive) before the trainer is made"
        )
    if {matrix.coordinates.archive for matrix in matrices} != {archive.identity}:
        raise ArchiveError(f"{archive.path}: the model is protected with another archive; name that one")


def _demand(found: Verification, output: Path) -> None:
    if found.passed:
        return
    what = [*(m.name for m in found.matrices if not m.holds), *found.changed_elsewhere, *found.differences]
    raise TrainingError(
        f"{output}: not written, since it does not verify: leak {found.leak:.1e}, rounding explains {found.rounding:.1e}; "
        f"{len(what)} faults, first {what[0]}; did anything but the coordinates change?"
    )

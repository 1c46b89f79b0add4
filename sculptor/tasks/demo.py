"""`sculptor demo`: a tiny model that really knows something learns more, with and without protection.

Nothing is downloaded. A small Llama is trained from scratch on invented facts (capital and river of a hundred
countries), written as an ordinary checkpoint, and then goes through the same functions as any other: analyze,
train on a third relation, verify, evaluate. It does so without protection, and protected by the directions of its
weights, of what it says by itself, and of what the old facts use.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sculptor.checkpoint.staging import partial_path, writing
from sculptor.checkpoint.written import discard, not_ours
from sculptor.data.rows import CompletionRow
from sculptor.errors import OutputError
from sculptor.jobs.demo_model import KNOWN, MODEL_FILES, NUM_COUNTRIES, TAUGHT, invent_facts, make_model
from sculptor.methods.settings import SELF, AnalyzeSettings
from sculptor.progress import Progress, silent
from sculptor.tasks.analyze import analyze
from sculptor.tasks.evaluate import evaluate
from sculptor.tasks.train import train
from sculptor.tasks.verify import verify
from sculptor.training.settings import TrainSettings

_SELF_TOKENS = 4000
_TRAIN = TrainSettings(max_steps=150, learning_rate=2e-3, batch_size=100, micro_batch_size=100, device="cpu")


@dataclass(frozen=True, slots=True)
class DemoRow:
    """What one model can do.

    Attributes:
        name: which model.
        kept: share of the old facts it gives exactly; `old_loss` their loss in nats per token.
        learned: share of the new facts; `new_loss` their loss.
        verified: whether `verify` passed; None where nothing is protected.
    """

    name: str
    kept: float
    old_loss: float
    learned: float
    new_loss: float
    verified: bool | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The result of `demo`; `leak` is the largest of the protected runs."""

    output: Path
    num_parameters: int
    num_old: int
    num_new: int
    leak: float
    rows: tuple[DemoRow, ...]


def demo(output: str | Path, *, seed: int = 0, progress: Progress = silent) -> DemoReport:
    """Runs the demonstration.

    Args:
        output: a directory that does not exist yet; model, archives, tuned checkpoints and data stay there.
        seed: decides the facts and the model.
        progress: makes progress bars.

    Raises:
        OutputError: if the directory exists or cannot be written.
    """
    output = Path(output)
    if output.exists():
        raise OutputError(f"{output}: exists already; choose another --output")
    with writing(output):
        output.mkdir(parents=True)
    try:
        return _run(output, seed, progress)
    except BaseException:  # half a demonstration is of no use
        _remove(output)
        raise


def _remove(output: Path) -> None:
    """What a demonstration that failed has left, and nothing that somebody else put there."""
    made = [output / name for name, *_ in _variants(output)]
    for place in [*made, *(output / f"{path.name}-subspaces" for path in made)]:
        discard(partial_path(place))
        if place.is_dir() and not_ours(place) is None:
            shutil.rmtree(place, ignore_errors=True)
    for place in [output / "old.jsonl", output / "new.jsonl", *(output / "model" / name for name in MODEL_FILES)]:
        with suppress(OSError):
            place.unlink(missing_ok=True)
    for folder in (output / "model", output):
        with suppress(OSError):
            folder.rmdir()


def _run(output: Path, seed: int, progress: Progress) -> DemoReport:
    generator = torch.Generator().manual_seed(seed)
    facts = invent_facts(generator)
    old, new = output / "old.jsonl", output / "new.jsonl"
    _write_rows(old, [row for relation in KNOWN for row in facts[relation]])
    _write_rows(new, facts[TAUGHT])
    model = output / "model"
    num_parameters = make_model(model, facts, seed, progress)
    rows = [_measure("the model before", model, old, new, None, progress)]
    leak = 0.0
    for name, title, settings in _variants(old):
        archive, tuned = output / f"{name}-subspaces", output / name
        analyze(model, archive, settings, progress=progress)
        train(model, archive, [new], tuned, _TRAIN, progress=progress)
        passed = None
        if name != "plain":
            proof = verify(model, tuned, archive, device="cpu", progress=progress)
            passed, leak = proof.passed, max(leak, proof.leak)
        rows.append(_measure(title, tuned, old, new, passed, progress))
    return DemoReport(output, num_parameters, len(KNOWN) * NUM_COUNTRIES, NUM_COUNTRIES, leak, tuple(rows))


def _variants(old: Path) -> list[tuple[str, str, AnalyzeSettings]]:
    """Directory, title and analysis of every run."""
    return [
        ("plain", "plain fine-tuning", AnalyzeSettings(preserve=0.0, device="cpu")),
        ("weights", "protected: weights, 60 % of each matrix", AnalyzeSettings(preserve=0.6, device="cpu")),
        (
            "self",
            "protected: curvature, sampled text",
            AnalyzeSettings(basis="curvature", data=(SELF,), calibration_tokens=_SELF_TOKENS, device="cpu"),
        ),
        (
            "protected",
            "protected: curvature, old rows",
            AnalyzeSettings(basis="curvature", data=(str(old),), device="cpu"),
        ),
    ]


def _measure(name: str, path: Path, old: Path, new: Path, passed: bool | None, progress: Progress) -> DemoRow:
    kept = evaluate(path, [old], device="cpu", progress=progress)
    learned = evaluate(path, [new], device="cpu", progress=progress)
    assert kept.loss is not None
    assert learned.loss is not None
    return DemoRow(name, kept.exact_match or 0.0, kept.loss, learned.exact_match or 0.0, learned.loss, passed)


def _write_rows(path: Path, rows: Sequence[CompletionRow]) -> None:
    lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows]
    with writing(path):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

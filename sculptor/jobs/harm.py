"""`sculptor.harm`, for a training loop of one's own, and what the commands ask of the samples that it is measured on."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.modes import evaluating
from sculptor.errors import SettingsError
from sculptor.methods.kinds import Kinds
from sculptor.model.harm import Harm, measure_harm
from sculptor.model.samples import Samples, read_samples
from sculptor.training.harm import steps_between
from sculptor.training.settings import TrainSettings
from sculptor.training.steps import Steps

# Of harm in a run that keeps it below a limit, at least.
MEASUREMENTS = 20


def harm(
    model: Any,
    subspaces: str | Path | Archive,
    *,
    samples: Literal["reporting", "steering"] = "reporting",
    rules: Kinds | None = None,
) -> Harm:
    """KL(base || model) in nats a token on samples of the first base; the model is left as it was.

    Args:
        model: a causal transformers model, protected, merged or streamed.
        subspaces: an archive with samples, or its path.
        samples: the half that is for reports, or the half that a training may be steered by.
        rules: kinds of rules beside sculptor's own.

    Returns:
        The mean over tokens with its standard error.

    Raises:
        SculptorError: if the archive keeps no samples, or those of a larger vocabulary.
    """
    if samples not in ("reporting", "steering"):
        raise SettingsError(f"samples {samples!r}: expected reporting or steering")
    archive = subspaces if isinstance(subspaces, Archive) else Archive(subspaces, rules=rules)
    embeddings = model.get_input_embeddings().weight
    found = need_samples(archive, embeddings.shape[0])
    with evaluating(model):
        return measure_harm(model, getattr(found, samples), embeddings.device)


def need_samples(archive: Archive, vocab_size: int | None) -> Samples:
    """The samples of an archive.

    Raises:
        SettingsError: if it keeps none.
    """
    samples = read_samples(archive, vocab_size)
    if samples is None:
        raise SettingsError(f"{archive.path} keeps no samples of the model; analyze with --samples")
    return samples


def samples_for(archive: Archive, architecture: Architecture, settings: TrainSettings) -> Samples | None:
    """The samples that harm is measured on.

    Raises:
        SettingsError: if there are none, and something is asked for that needs them.
    """
    samples = read_samples(archive, architecture.vocab_size) if architecture.kind == "causal" else None
    asked = {"--max-harm": settings.max_harm, "--harm-every": settings.harm_every}
    needing = [option for option, value in asked.items() if value]
    if samples is None and needing:
        raise SettingsError(
            f"{', '.join(needing)}: {archive.path} keeps no samples of the model; analyze with --samples"
        )
    return samples


def with_measurements(
    settings: TrainSettings, archive: Archive, steps: Steps, samples: Samples | None
) -> TrainSettings:
    """The settings with a limit of harm, and the steps between measurements, where they were not given.

    There is a limit by itself for an archive of conversations that the model says. What else a model says by itself may mean
    little: the demo's, which was trained on answers alone, says nothing that anybody asks for.

    Args:
        settings: with everything else resolved.
        archive: that is trained in.
        steps: of the run: a function of the data, so that every run measures as often.
        samples: of the archive.
    """
    if samples is None or (settings.max_harm is None and not archive.manifest.settings.chat):
        settings = replace(settings, max_harm=settings.max_harm or 0.0)
    if samples is None or settings.harm_every is not None:
        return settings
    every = steps_between(sum(sample.example.length for sample in samples.steering), steps.mean * steps.rows)
    if settings.max_harm != 0:
        every = min(every, max(1, steps.total // MEASUREMENTS))
    return replace(settings, harm_every=every)

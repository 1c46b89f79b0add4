"""`sculptor.harm`: how far a model in memory is from what the base of an archive said, for a training loop of one's own."""

from pathlib import Path
from typing import Any, Literal

from sculptor.archive.store import Archive
from sculptor.errors import SettingsError
from sculptor.methods.kinds import Kinds
from sculptor.model.harm import Harm, measure_harm
from sculptor.model.samples import Samples, read_samples


def harm(
    model: Any,
    subspaces: str | Path | Archive,
    *,
    samples: Literal["reporting", "steering"] = "reporting",
    rules: Kinds | None = None,
) -> Harm:
    """KL(base || model) in nats a token on samples of the first base, at least; the model is left as it was.

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
    training = model.training
    try:
        return measure_harm(model, getattr(found, samples), embeddings.device)
    finally:
        model.train(training)


def need_samples(archive: Archive, vocab_size: int | None) -> Samples:
    """The samples of an archive.

    Raises:
        SettingsError: if it keeps none.
    """
    samples = read_samples(archive, vocab_size)
    if samples is None:
        raise SettingsError(f"{archive.path} keeps no samples of the model; analyze with --samples")
    return samples

"""Peak learning rates: of a matrix relative to the root mean square of its entries, unless an absolute one is given.

AdamW moves every coordinate by about the learning rate per step, and ||dW|| = ||A||: what counts is the step against the
size of the entries, which differs between models by a factor of ten.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.store import Archive
from sculptor.training.protect import protected_matrices
from sculptor.training.settings import TrainSettings

# A matrix that is (nearly) zero, as some are made at the beginning of a model's life, still learns.
RMS_FLOOR = 0.005


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak learning rates, by matrix of the archive, and by openly trained parameter."""

    matrices: Mapping[str, float]
    extra: Mapping[str, float]


def relative_peak(relative_rate: float, rms: float) -> float:
    """The rate of a matrix whose entries have this root mean square."""
    return relative_rate * max(rms, RMS_FLOOR)


def peak_rate(settings: TrainSettings, record: MatrixRecord) -> float:
    """Of the coordinates of a matrix, for resolved settings."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    assert settings.relative_rate is not None
    assert record.base_rms is not None
    return relative_peak(settings.relative_rate, record.base_rms)


def peak_rates(settings: TrainSettings, archive: Archive, extra_rms: Mapping[str, float]) -> Peaks:
    """Of everything that is trained, for resolved settings.

    Args:
        settings: resolved.
        archive: bound to its base (`Archive.check_base`).
        extra_rms: root mean square of the openly trained parameters.
    """
    matrices = {name: peak_rate(settings, archive[name]) for name in archive.open_names}
    if settings.learning_rate is not None:
        return Peaks(matrices, dict.fromkeys(extra_rms, settings.learning_rate))
    assert settings.relative_rate is not None
    return Peaks(matrices, {name: relative_peak(settings.relative_rate, rms) for name, rms in extra_rms.items()})


def parameter_groups(model: Any, *, relative_rate: float | None = None) -> list[dict[str, Any]]:
    """The coordinates of a protected model as parameter groups for any optimizer, each with its learning rate.

    Args:
        model: that `sculptor.protect` was called on.
        relative_rate: peak rate over the root mean square of a matrix; default that of the archive's method.

    Returns:
        `[{"params": [...], "lr": ...}, ...]`, one group per matrix; parameters that are trained beside the coordinates are
        the caller's to add.
    """
    groups = []
    for matrix in protected_matrices(model):
        coordinates = matrix.coordinates
        rms = coordinates.record.base_rms
        assert rms is not None
        rate = coordinates.relative_rate if relative_rate is None else relative_rate
        groups.append({"params": list(coordinates.values), "lr": relative_peak(rate, rms)})
    return groups

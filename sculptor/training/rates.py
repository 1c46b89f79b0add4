"""Peak learning rates: relative to the size of what they change, unless an absolute one is given.

AdamW moves every coordinate by about the learning rate per step, and ||dW|| = ||A||, so a step changes a matrix (m, n) of
which a share f is free by rate sqrt(f m n) in norm, against RMS(W0) sqrt(m n). Models differ in RMS by a factor of ten. What is
left of differences between models goes with width and depth: narrow and shallow ones bear larger relative steps.

    rate(A) = r max(RMS(W0), floor)        r = c / sqrt(f width depth), c by method

with f the free share over all matrices, width the median of min(m, n), depth the number of blocks, and a floor of a tenth of
the median RMS, since a matrix of zeros would never move. docs/benchmarks.md has the measurement. Coordinates in no unit of
W, as angles are, have rate(A) = c / sqrt(width depth): what share they are of the entries says nothing of their steps.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sculptor.archive.store import Archive
from sculptor.numerics.rounding import rms
from sculptor.training.settings import TrainSettings

_FLOOR_SHARE = 0.1
_LEAST_FREE = 0.01  # below, a rule's coordinates are no longer entries of the matrix in other bases


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak learning rates, by matrix of the archive, and by openly trained parameter."""

    matrices: Mapping[str, float]
    extra: Mapping[str, float]


def default_relative_rate(archive: Archive) -> float:
    """r, for the rules of an archive."""
    defaults = archive.method.defaults
    entries = sum(record.shape[0] * record.shape[1] for record in archive.values())
    free = max(_LEAST_FREE, archive.num_free / entries) if defaults.scaled else 1.0
    width = statistics.median(min(record.shape) for record in archive.values())
    depth = len({record.block for record in archive.values()})
    return float(defaults.rate / (free * width * depth) ** 0.5)


def matrix_scales(archive: Archive) -> dict[str, float]:
    """What a relative rate is relative to, by matrix that may change: its RMS, or the floor; 1 for angles and the like.

    Args:
        archive: bound to its base (`Archive.check_base`), so that every RMS is known.
    """
    if not archive.method.defaults.scaled:
        return dict.fromkeys(archive.open_names, 1.0)
    floor = _FLOOR_SHARE * median_rms(archive)
    return {name: max(archive[name].base_rms or 0.0, floor) for name in archive.open_names}


def median_rms(archive: Archive) -> float:
    """Over all matrices of the archive."""
    return statistics.median(record.base_rms or 0.0 for record in archive.values())


def peak_rates(settings: TrainSettings, archive: Archive, extra: Mapping[str, Tensor]) -> Peaks:
    """Of everything that is trained, for resolved settings.

    Openly trained parameters have the same r: matrices and embeddings of their own RMS, or the floor; vectors (norms, biases)
    of their RMS, or the median of the matrices'.

    Args:
        settings: resolved.
        archive: bound to its base.
        extra: openly trained parameters.
    """
    if settings.learning_rate is not None:
        same = settings.learning_rate
        return Peaks(dict.fromkeys(archive.open_names, same), dict.fromkeys(extra, same))
    rate = settings.relative_rate
    assert rate is not None
    median = median_rms(archive)
    own = {name: max(rms(value), median * (_FLOOR_SHARE if value.ndim > 1 else 1.0)) for name, value in extra.items()}
    scales = matrix_scales(archive)
    return Peaks({name: rate * s for name, s in scales.items()}, {name: rate * s for name, s in own.items()})


def parameter_groups(model: Any, *, relative_rate: float | None = None) -> list[dict[str, Any]]:
    """The coordinates of a protected model as parameter groups for any optimizer, each with its learning rate.

    Args:
        model: that `sculptor.protect` was called on.
        relative_rate: peak rate over the root mean square of a matrix; default what suits the archive's rules.

    Returns:
        `[{"params": [...], "lr": ...}, ...]`, one group per matrix; parameters that are trained beside the coordinates are
        the caller's to add.
    """
    from sculptor.training.protect import protected_matrices

    groups = []
    for matrix in protected_matrices(model):
        found = matrix.coordinates
        rate = found.relative_rate if relative_rate is None else relative_rate
        groups.append({"params": list(found.values), "lr": rate * found.scale})
    return groups

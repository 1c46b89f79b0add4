"""`analyze --protect NAME=FILE[:WEIGHT]`: named sources of calibration, and what an archive keeps to report on each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sculptor.analysis.evidence import Source
from sculptor.analysis.sources import calibration_sources, spread
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.examples import Example
from sculptor.data.rows import Notice, unweighted, weight_of
from sculptor.methods.settings import AnalyzeSettings
from sculptor.model.load import LoadedModel
from sculptor.model.protected import SECTION, describe_protected, hold_out, write_protected
from sculptor.model.samples import SUFFIX
from sculptor.world import World


@dataclass(frozen=True, eq=False, slots=True)
class Named:
    """One name: what is calibrated on, and what is kept of it to report on."""

    source: Source
    held_out: tuple[Example, ...]


def named_sources(
    checkpoint: Checkpoint, architecture: Architecture, settings: AnalyzeSettings, notice: Notice
) -> list[Named]:
    """A source for each name, with as many tokens as one of the data has, apart from what is kept to report on.

    Raises:
        DataError: if a file cannot be used.
    """
    found = []
    for name, item in settings.protected.items():
        whole = replace(settings, calibration_tokens=2**53, data=(), protect=(), chat=True)
        weight = weight_of(item) or 1.0
        (source,) = calibration_sources(checkpoint, architecture, whole, [unweighted(item)], notice)
        calibrated, held_out = hold_out(source.examples)
        calibrated = spread(calibrated, settings.tokens_per_source)
        found.append(Named(replace(source, examples=calibrated, weight=weight, protects=name), held_out))
    return found


def keep_protected(
    writer: ArchiveWriter,
    loaded: LoadedModel,
    settings: AnalyzeSettings,
    named: Sequence[Named],
    world: World,
    notice: Callable[[str], object],
) -> None:
    """Adds the section that names are reported on by, unless no text is to be kept."""
    if settings.samples is False or loaded.kind != "causal":
        return
    for each in named:
        if not each.held_out:
            notice(
                f"--protect {each.source.protects}: protected, but too few rows to report on it: expected at least two"
            )
    kept = [each for each in named if each.held_out]
    if kept:
        content = world.once(
            lambda: write_protected([describe_protected(loaded, each.source.protects, each.held_out) for each in kept])
        )
        if world.first:
            writer.add_section(SECTION, content, SUFFIX)

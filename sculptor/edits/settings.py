"""What an edit can be told. Every field's help is the text the command line shows."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sculptor.errors import SettingsError
from sculptor.validation import AtLeastOne, Name, NotNegative, Share, Texts, settings

By = Literal["curvature", "magnitude"]


@settings
class Interpolate:
    """Settings of `sculptor edit interpolate`."""

    command: ClassVar[str] = "interpolate"

    alpha: Share | None = None
    """Share of the difference that stays: 0 gives BASE, 1 gives TUNED."""


@settings
class Lines:
    """Settings of `sculptor edit lines`."""

    command: ClassVar[str] = "lines"

    alpha: Share | None = None
    """Share of the difference that stays in the first block of each stack, and outside of the blocks."""
    beta: Share | None = None
    """What the last block has more than the first; blocks between them lie on a line [default: 1 - ALPHA]."""


@settings
class Project:
    """Settings of `sculptor edit project`."""

    command: ClassVar[str] = "project"

    soft: NotNegative | None = None
    """Shrink free pairs by 1/(1 + SOFT * importance/mean), where the archive knows their importance [default: 0]."""
    alpha: Share | None = None
    """Share of what is left of the difference that stays [default: 1]."""


@settings
class Threshold:
    """Settings of `sculptor edit threshold`."""

    command: ClassVar[str] = "threshold"

    alpha: Share | None = None
    """Share of what is left of the difference that stays [default: 1]."""


EditSettings = Interpolate | Lines | Project | Threshold


@settings
class Prune:
    """Settings of `sculptor edit prune`."""

    sparsity: Share
    """Share of each matrix that becomes 0."""
    by: By = "curvature"
    """Which weights go first: those of least curvature, by the archive's moments, or the smallest."""


@settings
class Choose:
    """How `sculptor edit` chooses numbers that are not given."""

    choose: Texts = ()
    """Choose the numbers that are not given: rows of the task, JSONL or .txt; repeatable."""
    watch: Texts = ()
    """With --choose: text whose loss shows general ability; repeatable."""
    grid: Annotated[int, Field(ge=2, le=1001)] = 11
    """With --choose: how many values of --alpha are tried, from 0 to 1."""
    max_length: Annotated[int, Field(ge=8, le=2**31)] | None = None
    """With --choose: longest sequence in tokens [default: 1024 or the model's limit]."""
    batch_size: AtLeastOne | None = None
    """With --choose: rows per forward [default: 16, and on a GPU as many as go well]."""

    def __post_init__(self) -> None:
        if self.choose and not self.watch:
            raise SettingsError("--choose needs --watch: text whose loss shows what general ability is back")
        defaults = {"watch": (), "grid": 11, "max_length": None, "batch_size": None}
        idle = [name for name, value in defaults.items() if getattr(self, name) != value]
        if idle and not self.choose:
            raise SettingsError(f"--{idle[0].replace('_', '-')} without effect without --choose")

    @property
    def alphas(self) -> tuple[float, ...]:
        """What is tried of --alpha."""
        return tuple(i / (self.grid - 1) for i in range(self.grid))


@settings
class BankSettings:
    """How rows are read and routed."""

    max_length: Annotated[int, Field(ge=8, le=2**31)] | None = None
    """Longest sequence in tokens [default: 1024 or the model's limit]."""
    batch_size: AtLeastOne | None = None
    """Rows per forward [default: 16, and on a GPU as many as go well]."""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N."""

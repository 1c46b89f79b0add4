"""What an analysis can be told."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sculptor.analysis.calibration import Labels, Weighting
from sculptor.errors import SettingsError
from sculptor.numerics.allocation import STEPS
from sculptor.numerics.staircase import Constraint

BasisKind = Literal["weights", "random", "inputs", "curvature"]
Threshold = Literal["matrix", "model"]
BasisDtype = Literal["float32", "float64"]
SELF = "self"  # as a data file: text that the model itself says
DEFAULT_BUDGET = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeSettings:
    """Settings of `sculptor analyze`; everything that decides its result."""

    basis: BasisKind = "weights"
    """Where directions come from: the weights' singular vectors, chance, layer inputs, or inputs and gradients."""
    constraint: Constraint | None = None
    """What an update may not touch; default double. With moments, their staircase decides."""
    preserve: float | None = None
    """The same share of directions in every matrix; None for the adaptive rank."""
    min_retention: float | None = None
    """mrr of the adaptive rank; default 0.1."""
    target_retention: float | None = None
    """trr of the adaptive rank; default 0.8."""
    data: tuple[str, ...] = ()
    """Files whose rows are calibrated on, or measure the importance for the adaptive rank; "self" for sampled text."""
    chat: bool = False
    """Sample text through the chat template."""
    budget: float | None = None
    """Share of (output, input) pairs left free, with moments; default 0.6."""
    calibration_tokens: int = 100_000
    """Tokens to calibrate on, spread evenly over the files."""
    max_length: int | None = None
    """Longest calibration sequence; default 1024 or the model's limit."""
    keep: float = 0.5
    """Share of each moment's leading directions that the archive stores."""
    steps: int = STEPS
    """Row groups of the staircase, at most."""
    threshold: Threshold | None = None
    """Whether every matrix gets the budget, or all together; default all with curvature, every one with inputs."""
    fisher: Labels = "true"
    """Labels of the gradients: the rows' own, or drawn from the model."""
    weighting: Weighting | None = None
    """What a token's input counts: 1 (with inputs), or the squared gradient it receives (default with curvature)."""
    seed: int = 0
    """Of sampled text and labels, masking, and random directions."""
    targets: tuple[str, ...] = ()
    """Patterns of matrices to protect; default all."""
    exclude: tuple[str, ...] = ()
    """Patterns of matrices to leave out."""
    dtype: BasisDtype = "float32"
    """Dtype of the stored bases."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    device_memory: float | None = None
    """GB that calibration stays within, the model included, by reading the rows more often; default what is free on a
    GPU, 8 on a CPU."""

    def __post_init__(self) -> None:
        wrong = self._out_of_range() + (self._of_moments() if self.has_moments else self._of_ranks())
        if self.chat and SELF not in self.data:
            wrong.append("--chat without effect: it samples conversations for --data self")
        if wrong:
            raise SettingsError("; ".join(wrong))

    def _out_of_range(self) -> list[str]:
        shares = {
            "--preserve": self.preserve,
            "--min-retention": self.min_retention,
            "--target-retention": self.target_retention,
            "--budget": self.budget,
            "--keep": self.keep,
        }
        wrong = [
            f"{option} {value}: expected a share between 0 and 1, like 0.5"
            for option, value in shares.items()
            if value is not None and not 0 <= value <= 1
        ]
        if self.preserve == 1:
            wrong.append("--preserve 1: no direction would be left to train; use less than 1")
        if self.budget == 0 or self.keep == 0:
            wrong.append(f"--{'budget' if self.budget == 0 else 'keep'} 0: expected more than 0")
        if self.calibration_tokens < 1:
            wrong.append(f"--calibration-tokens {self.calibration_tokens}: expected at least 1")
        if self.device_memory is not None and not self.device_memory > 0:
            wrong.append(f"--device-memory {self.device_memory}: expected GB, more than 0")
        if not 1 <= self.steps <= 32:
            wrong.append(f"--steps {self.steps}: expected 1 to 32")
        words = {
            "--basis": (self.basis, BasisKind),
            "--constraint": (self.constraint or "double", Constraint),
            "--threshold": (self.threshold or "matrix", Threshold),
            "--fisher": (self.fisher, Labels),
            "--weighting": (self.weighting or "tokens", Weighting),
            "--dtype": (self.dtype, BasisDtype),
        }
        wrong += [
            f"{option} {value}: expected {', '.join(get_args(known))}"
            for option, (value, known) in words.items()
            if value not in get_args(known)
        ]
        if not 0 <= self.seed < 2**31:
            wrong.append(f"--seed {self.seed}: expected 0 to {2**31 - 1}")
        return wrong

    def _of_moments(self) -> list[str]:
        """What does not go with moments, or is missing."""
        given = {
            "--constraint": self.constraint,
            "--preserve": self.preserve,
            "--min-retention": self.min_retention,
            "--target-retention": self.target_retention,
        }
        unused = [option for option, value in given.items() if value is not None]
        wrong = [f"{', '.join(unused)} without effect with --basis {self.basis}: use --budget"] if unused else []
        if self.basis == "inputs":
            unused = [
                option
                for option, used in (
                    ("--fisher", self.fisher != "true"),
                    ("--weighting", self.weighting == "gradients"),
                    ("--steps", self.steps != STEPS),
                )
                if used
            ]
            if unused:
                wrong.append(f"{', '.join(unused)} without effect with --basis inputs: for curvature only")
        twice = sorted({item for item in self.data if self.data.count(item) > 1})
        if twice:
            wrong.append(f"--data {twice[0]} is given twice")
        if not self.data:
            wrong.append(f"--basis {self.basis} needs --data: files to calibrate on, or `--data self` for sampled text")
        return wrong

    def _of_ranks(self) -> list[str]:
        """What does not go with singular or random directions."""
        defaults = {field.name: field.default for field in fields(self)}
        moments = ("budget", "calibration_tokens", "keep", "steps", "threshold", "fisher", "weighting", "device_memory")
        unused = ["--" + name.replace("_", "-") for name in moments if getattr(self, name) != defaults[name]]
        wrong = []
        if unused:
            wrong.append(f"{', '.join(unused)} without effect with --basis {self.basis}; use inputs or curvature")
        if self.max_length is not None and not self.data:
            wrong.append("--max-length without effect: there is no --data")
        if SELF in self.data:
            wrong.append(f"--data self without effect with --basis {self.basis}; use inputs or curvature")
        if self.preserve is None:
            low, high = self.retention_range
            return [*wrong, f"--min-retention {low} is above --target-retention {high}"] if low > high else wrong
        given = {
            "--min-retention": self.min_retention is not None,
            "--target-retention": self.target_retention is not None,
            "--data": bool(self.data),
        }
        unused = [option for option, used in given.items() if used]
        if unused:
            wrong.append(
                f"{', '.join(unused)} without effect: --preserve fixes the rank of every matrix; drop one of the two"
            )
        return wrong

    @property
    def has_moments(self) -> bool:
        """Whether directions come from second moments."""
        return self.basis in ("inputs", "curvature")

    @property
    def input_weighting(self) -> Weighting:
        """What a token's input counts."""
        return self.weighting or ("gradients" if self.basis == "curvature" else "tokens")

    @property
    def one_threshold(self) -> bool:
        """Whether one threshold serves all matrices."""
        return self.basis == "curvature" if self.threshold is None else self.threshold == "model"

    @property
    def tokens_per_source(self) -> int:
        """The part of the calibration tokens that each file, or sampled text, has."""
        return -(-self.calibration_tokens // max(1, len(self.data)))

    @property
    def free_budget(self) -> float:
        """The budget, or its default."""
        return DEFAULT_BUDGET if self.budget is None else self.budget

    @property
    def retention_range(self) -> tuple[float, float]:
        """mrr and trr, the paper's 0.1 and 0.8 unless given."""
        minimum = 0.1 if self.min_retention is None else self.min_retention
        target = 0.8 if self.target_retention is None else self.target_retention
        return minimum, target

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AnalyzeSettings":
        """The settings that a manifest holds."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**known)

"""What an analysis can be told. Every field's help is the text the command line shows."""

import re
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from sculptor.errors import SettingsError
from sculptor.numerics.staircase import Constraint
from sculptor.validation import AtLeastOne, ColumnNames, Name, Off, Positive, Seed, Share, Texts, option, settings

# Kinds of rules of sculptor's own (`methods/kinds.py` says what they are, and what goes with them).
RULES = ("staircase", "lowrank", "mask", "rotation")
Basis = Literal["weights", "inputs", "curvature", "random"]
Threshold = Literal["matrix", "model"]
Labels = Literal["true", "sampled"]
# How rules go on after a task.
Carry = Literal["merge", "accumulate", "retake", "keep"]
Weighting = Literal["tokens", "gradients"]
BasisDtype = Literal["float32", "float64", "bfloat16"]
SELF = "self"  # as a data file: text that the model itself says
DEFAULT_BUDGET = 0.6
DEFAULT_FREE = 0.1
DEFAULT_RANK = 8
DEFAULT_ENERGY = 0.95
DEFAULT_BLOCK = 32
ROW_GROUPS = 7
# Of what a model says: a step takes about the same for few rows as for many, and what was measured on real models was so long.
# Of few tokens conversations are shorter, so that there are some dozens of them: thirteen are no measure of how a model answers.
SAMPLED_LENGTH, SAMPLED_ROWS = (128, 256), 30
CALIBRATION_TOKENS = 100_000  # unless told otherwise; `analysis/defaults.py` says how many on a CPU
_OF_WEIGHTS = ("constraint", "preserve", "min_retention", "target_retention")


def is_self(data: str) -> bool:
    """Whether data are what the model itself says, with a weight or without."""
    return data == SELF or data.startswith(f"{SELF}:")


# More than nothing.
_Part = Annotated[float, Field(gt=0, le=1)]


@settings
class AnalyzeSettings:
    """Settings of `sculptor analyze`; everything that decides its result."""

    rule: Name = "staircase"
    """Kind of rule: what is forbidden, and how what is left is trained."""
    basis: Basis | None = None
    """Where protected directions come from: the weights' singular vectors, what layers read, what they read and its effect
    on the loss, or chance (a control) [default: inputs with --rule lowrank, weights with the other rules and with
    --preserve, --constraint, --min-retention or --target-retention, else curvature]."""
    budget: _Part | None = None
    """inputs, curvature: share of (output, input) pairs left free [default: 0.6]."""
    data: Texts = ()
    """Rows to calibrate on, or `self` for text the model says [default: self, with --chat where there is a chat template];
    with weights, rows that measure importance for the adaptive rank; with --rule lowrank, rows whose inputs are protected
    from the start; repeatable."""
    protect: Texts = ()
    """NAME=FILE[:WEIGHT]: also protect what these rows need (safety, a tool format, a language), as much as one of --data
    unless a weight says otherwise, and report on it by name; inputs, curvature; repeatable."""
    chat: bool = False
    """With `--data self`: sample conversations through the chat template, and a quarter of the tokens as text without it."""
    chat_template: Name | None = None
    """For conversations: name of one of the tokenizer's templates, or a file [default: the tokenizer's own]."""
    columns: ColumnNames | None = None
    """Which columns of the data are which keys of ours: prompt=question,completion=answer."""
    max_rows: AtLeastOne | None = None
    """Rows to use of each of the data, the first ones [default: all]."""
    calibration_tokens: AtLeastOne | None = None
    """Tokens to calibrate on, over all files [default: 100000; on a CPU 5e11 over the model's parameters, between
    2000 and 30000]."""
    max_length: Annotated[int, Field(ge=8, le=2**31)] | None = None
    """Longest sequence in tokens [default: 1024 or the model's limit; 128 to 256 of what the model says]."""
    keep: _Part = 0.5
    """Share of each moment's directions that is stored."""
    row_groups: Annotated[int, Field(ge=1, le=32)] = ROW_GROUPS
    """curvature: row groups of the staircase, at most."""
    threshold: Threshold | None = None
    """Give every matrix the budget, or all together [default: model with curvature, matrix with inputs]."""
    fisher: Labels = "true"
    """curvature: gradients of the rows' own labels, or of labels drawn from the model."""
    weighting: Weighting | None = None
    """Count each token's input once, or by the squared gradient it receives [default: gradients with curvature]."""
    constraint: Constraint | None = None
    """weights, random: what an update may not touch: outputs and inputs, inputs, or their core [default: double]."""
    preserve: Share | None = None
    """weights, random: protect this share of directions in every matrix, 0 to below 1 [default: adaptive rank; 0 with
    --rule rotation]."""
    min_retention: Share | None = None
    """Adaptive rank: share of the least important matrix [default: 0.1]."""
    target_retention: Share | None = None
    """Adaptive rank: share at mean importance [default: 0.8]."""
    free: _Part | None = None
    """mask: share of each matrix's entries that is trained, the smallest ones [default: 0.1]."""
    rank: AtLeastOne | None = None
    """lowrank: directions of its inputs that a task may use of each matrix, at most [default: 8]."""
    energy: _Part | None = None
    """lowrank: share of what a task reads, in squared norm, that is protected after it [default: 0.95]."""
    block_size: Annotated[int, Field(ge=2, le=2**31)] | None = None
    """rotation: outputs that are turned together [default: 32]."""
    samples: Annotated[bool | None, Off("no-samples")] = None
    """Keep some of the model's own words and what it predicts there, which `train` and `verify` measure harm on [default:
    where the model is run anyway, and can sample]."""
    seed: Seed = 0
    """Of sampling, masking and random directions."""
    targets: Texts = ()
    """Protect only matrices that match, e.g. 'q_proj' or 'mlp.*'; repeatable."""
    exclude: Texts = ()
    """Leave out matrices that match; repeatable."""
    dtype: BasisDtype = "float32"
    """Dtype of the stored bases; what is stored is what is protected."""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N."""
    attn_implementation: Name | None = None
    """With data: attention of the model: eager, sdpa, flash_attention_2, ... [default: transformers' choice]."""
    device_memory: Positive | None = None
    """inputs, curvature: GB to stay within, by reading the rows more often [default: what is free on a GPU, 8 on a CPU]."""

    def __post_init__(self) -> None:
        if self.chat and self.data and not any(map(is_self, self.data)):
            raise SettingsError("--chat without effect: it samples conversations for --data self")
        _ = self.protected

    def given(self, *names: str) -> list[str]:
        """Those of some options that are not at their defaults."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        return [option(name) for name in names if getattr(self, name) != defaults[name]]

    @property
    def protected(self) -> dict[str, str]:
        """The data of every protected name.

        Raises:
            SettingsError: if one is no name with data, or is there twice.
        """
        found: dict[str, str] = {}
        for text in self.protect:
            name, equals, data = text.partition("=")
            if not equals or not data or not re.fullmatch(r"[\w-]{1,40}", name) or is_self(data):
                raise SettingsError(
                    f"--protect {text!r}: expected NAME=FILE, with at most 40 letters, digits, - and _ in the name"
                )
            if name in found:
                raise SettingsError(f"--protect {name}: the name is given twice")
            found[name] = data
        return found

    @property
    def resolved_basis(self) -> Basis:
        """The basis, or the default: of the rule, and of options that are for the weights' directions alone."""
        if self.basis is not None:
            return self.basis
        if self.rule == "lowrank":
            return "inputs"
        return "weights" if self.rule != RULES[0] or self.given(*_OF_WEIGHTS) else "curvature"

    @property
    def tokens_per_source(self) -> int:
        """The part of the calibration tokens that each file, or sampled text, has."""
        return -(-(self.calibration_tokens or CALIBRATION_TOKENS) // max(1, len(self.data) + len(self.protect)))

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

"""What archive.json says: facts about every matrix, no tensors. The format is docs/archive-format.md, version 3."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, PlainValidator, ValidationInfo

from sculptor.archive.version2 import upgrade
from sculptor.checkpoint.reader import part_name
from sculptor.checkpoint.windows import WHOLE, Window
from sculptor.errors import ArchiveError
from sculptor.methods.kinds import KINDS, Kinds, parse_rule
from sculptor.methods.rule import Rule
from sculptor.methods.settings import RULES, AnalyzeSettings
from sculptor.validation import (
    STRICT,
    Count,
    FileName,
    FloatDtype,
    Name,
    NotNegative,
    Positive,
    Sha256,
    parse,
    read_json,
    sign,
)

FORMAT = "sculptor-subspaces"
VERSION = 3
# Optional sections there may be beside the matrices; a reader refuses others, since it would lose them.
SECTIONS = frozenset({"samples", "protected", "optimizer"})
REMEDY = "run `sculptor analyze` again"


def _rule(value: Any, info: ValidationInfo) -> Rule:
    return parse_rule(value, (info.context or {}).get("kinds", KINDS))


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """What the archive knows of one matrix.

    Attributes:
        tensor: in the checkpoint; `part` which slice of its first dimension, None for all of it.
        parameter: the model's parameter it is loaded into.
        block: path of its block; `index` is the block's position, `role` the path inside it.
        transposed: the file stores (in, out).
        input_group: the same for matrices that read the same input.
        base_dtype, base_digest, base_rms: of the matrix in the checkpoint the archive is bound to; the root mean square of
            its entries is None in archives of version 2.
        rule: what may change in it, with its shape.
        tensors: stored tensor by the rule's own name for it; matrices that read the same input may share one.
        window: where in the parameter it is.
    """

    __pydantic_config__ = STRICT

    tensor: Name
    part: Count | None
    parameter: Name
    block: Name
    index: Count
    role: Name
    transposed: bool
    input_group: Name
    base_dtype: FloatDtype
    base_digest: Sha256
    base_rms: NotNegative | None
    rule: Annotated[Rule, PlainValidator(_rule)]
    tensors: Mapping[Name, Name] = field(default_factory=dict)
    window: Window = WHOLE

    @property
    def name(self) -> str:
        """What it is called; the key of the record."""
        return part_name(self.tensor, self.part)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in)."""
        return self.rule.shape

    @property
    def stored_shape(self) -> tuple[int, int]:
        """As the checkpoint stores it."""
        m, n = self.rule.shape
        return (n, m) if self.transposed else (m, n)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of the archive is, and the SHA-256 of its bytes."""

    __pydantic_config__ = STRICT

    file: FileName
    dtype: Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
    shape: tuple[Count, ...]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """One source of rows that an analysis calibrated on.

    Attributes:
        source: as it was given.
        rows: how many were read, of `tokens` tokens, `tokens_with_loss` of which are predicted.
        protects: the name it was given for (`--protect`), if any.
        weight: of its moments among those of all sources.
    """

    __pydantic_config__ = STRICT

    source: Name
    rows: Count
    tokens: Count
    tokens_with_loss: Count
    protects: Name | None = None
    weight: Positive = 1.0


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One entry of the history: the analysis first, then every task trained on top.

    Attributes:
        name: of the entry.
        kind: analysis or training.
        weights: of the sources of moments that it added.
        calibration: what these were, for an analysis.
        details: for people.
        opened: tensors outside of the archive that the task trained without protection.
    """

    __pydantic_config__ = STRICT

    name: Name
    kind: Literal["analysis", "training"]
    weights: tuple[Positive, ...] = ()
    calibration: tuple[SourceFacts, ...] = ()
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    opened: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True)
class FrozenMatrices:
    """Matrices below a numbered path that no rule is for; they stay as they are.

    Attributes:
        role: what they are called below that path.
        num_tensors: how many there are, with `num_parameters` entries.
        reason: why no rule is for them.
    """

    __pydantic_config__ = STRICT

    role: Name
    num_tensors: Count
    num_parameters: Count
    reason: Name = "no plain linear map"


@dataclass(frozen=True, slots=True)
class Section:
    """An optional part of an archive: one file beside the shards, with the SHA-256 of its bytes."""

    __pydantic_config__ = STRICT

    file: FileName
    num_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Manifest:
    """archive.json as a value; `sections` are optional parts by name."""

    __pydantic_config__ = STRICT

    created_by: Name
    model_class: Name
    base_identity: Sha256 | Literal[""]
    settings: AnalyzeSettings
    tasks: Annotated[tuple[TaskRecord, ...], Field(min_length=1)]
    matrices: Mapping[Name, MatrixRecord]
    tensors: Mapping[Name, StoredTensor]
    files: Mapping[FileName, Count]
    not_targeted: tuple[FrozenMatrices, ...] = ()
    sections: Mapping[Name, Section] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A signed JSON object; the inverse of `from_json`."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION} | json.loads(json.dumps(asdict(self)))
        return content | {"sha256": sign(content)}

    @property
    def source_weights(self) -> tuple[float, ...]:
        """Weights of the sources of moments, in the order they were added; empty without moments."""
        return tuple(weight for task in self.tasks for weight in task.weights)

    def check(self) -> None:
        """Checks that records, tensors and files belong together.

        Raises:
            ValueError: naming the first that does not.
        """
        if not self.matrices:
            raise ValueError("no matrices")
        for name, record in self.matrices.items():
            if record.name != name:
                raise ValueError(f"{name}: its record is of {record.name}")
            if record.rule.kind != self.settings.rule:
                raise ValueError(
                    f"{name}: a rule of kind {record.rule.kind} in an archive of kind {self.settings.rule}"
                )
            self._check_tensors(name, record)
        for stored in self.tensors.values():
            if stored.file not in self.files:
                raise ValueError(f"{stored.file} is not among the files")
        unknown = sorted(set(self.sections) - SECTIONS)
        if unknown:
            raise ValueError(f"section {unknown[0]!r} is unknown to this sculptor; use the version that wrote it")

    def _check_tensors(self, name: str, record: MatrixRecord) -> None:
        expected = record.rule.stored()
        if set(expected) != set(record.tensors):
            different = sorted(set(expected) ^ set(record.tensors))
            raise ValueError(f"{name}: tensors {', '.join(different)} do not go with its rule")
        for key, shape in expected.items():
            stored = self.tensors.get(record.tensors[key])
            if stored is None:
                raise ValueError(f"{name}: {record.tensors[key]} is not stored")
            same = [size is None or size == found for size, found in zip(shape, stored.shape, strict=False)]
            if len(shape) != len(stored.shape) or not all(same):
                raise ValueError(
                    f"{name}: {record.tensors[key]} of shape {list(stored.shape)} does not go with its rule"
                )

    @classmethod
    def from_json(cls, text: bytes, path: object, kinds: Kinds = KINDS) -> "Manifest":
        """Parses archive.json of version 3 or 2.

        Raises:
            ArchiveError: if it is another format or version, has changed since it was written, or lacks something.
        """
        content = parse(text, path, ArchiveError, REMEDY)
        if content.get("format") != FORMAT:
            raise ArchiveError(f'{path}: not a subspace archive ("format" is not "{FORMAT}")')
        version = content.get("version")
        if version == 2:
            try:
                content = upgrade(content)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as cause:
                raise ArchiveError(f"{path}: damaged manifest of version 2 ({cause}); {REMEDY}") from cause
        elif version != VERSION:
            raise ArchiveError(
                f"{path}: archive version {version!r}, this sculptor reads versions 2 and {VERSION}; {REMEDY} or use the "
                "version that wrote it"
            )
        elif content.pop("sha256", None) != sign(content):
            raise ArchiveError(f"{path}: has changed since it was written (its digest differs); {REMEDY}")
        for key in ("format", "version"):
            content.pop(key, None)
        manifest = read_json(cls, json.dumps(content), path, ArchiveError, REMEDY, kinds=kinds)
        if manifest.settings.rule == RULES[0] and manifest.settings.basis is None:  # the default, when it was written
            manifest = replace(manifest, settings=replace(manifest.settings, basis="weights"))
        try:
            manifest.check()
        except ValueError as cause:
            raise ArchiveError(f"{path}: damaged manifest ({cause}); {REMEDY}") from cause
        return manifest

"""What archive.json says: facts about every matrix, no tensors. The format is docs/archive-format.md."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sculptor.errors import ArchiveError
from sculptor.numerics.bases import Form
from sculptor.numerics.staircase import Constraint, Staircase

# Moments give every matrix steps of its own.
ArchiveConstraint = Constraint | Literal["staircase"]

FORMAT = "sculptor-subspaces"
VERSION = 2


@dataclass(frozen=True, slots=True)
class SideRecord:
    """One stored side of a matrix.

    Attributes:
        tensor: holds its directions; matrices that read the same input may share one.
        form: whether these are the protected directions or their complement.
        directions: how many are protected, or told apart by the staircase.
        values: tensor with their eigenvalues in the second moment; None where directions come from weights.
        rest: mean eigenvalue of all other directions.
        profiles: tensor (tasks, 65) with each task's share of the moment on the leading 64 directions and the rest.
    """

    tensor: str
    form: Form
    directions: int
    values: str | None = None
    rest: float = 0.0
    profiles: str | None = None


@dataclass(frozen=True, slots=True)
class Added:
    """Directions that one task added to a matrix, after those that were there."""

    task: int
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """What the archive knows of one matrix.

    Attributes:
        name: the tensor in the checkpoint; the key of the record.
        parameter: the model's parameter it is loaded into.
        block: path of its block; `index` is the block's position, `role` the path inside it.
        shape: (m, n) = (out, in); `transposed` says that the file stores (in, out).
        input_group: the same for matrices that read the same input.
        base_dtype, base_digest: of the tensor in the checkpoint the archive is bound to.
        steps: the staircase, (stop row, reach) pairs.
        output, input: the stored sides; None where none is stored.
        spectrum: tensor with all singular values, descending; None at preserve 0.
        retention: share of directions asked for, or of pairs; `importance` is the paper's I, None without data.
        energy: what the protected part holds: of ||W||^2 at analysis, or of the curvature as it is.
        added: which task added what, in order; task 0 is the analysis.
        traces: (tr C, tr G) of every source of moments before it was scaled; empty where directions come from weights.
    """

    name: str
    parameter: str
    block: str
    index: int
    role: str
    shape: tuple[int, int]
    transposed: bool
    input_group: str
    base_dtype: str
    base_digest: str
    steps: tuple[tuple[int, int], ...]
    output: SideRecord | None
    input: SideRecord | None
    spectrum: str | None
    retention: float
    importance: float | None
    energy: float
    added: tuple[Added, ...]
    traces: tuple[tuple[float, float], ...] = ()

    @property
    def has_moments(self) -> bool:
        """Whether eigenvalues are stored with the directions, so that tasks can be merged in."""
        return self.input is not None and self.input.values is not None

    @property
    def staircase(self) -> Staircase:
        """Which pairs are frozen."""
        return Staircase(*self.shape, self.steps)

    @property
    def preserved(self) -> float:
        """Protected directions over all, on the side that protects most: the F of `--preserve F`.

        With moments, the share of frozen pairs: their staircase has no single number of directions.
        """
        if self.staircase.num_free == 0 or self.has_moments:
            return self.staircase.frozen_share
        sides = [side.directions for side in (self.output, self.input) if side is not None]
        return max(sides, default=0) / min(self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of the archive is, and the SHA-256 of its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One entry of the history: the analysis first, then every task trained on top."""

    name: str
    kind: str  # "analysis" or "training"
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """archive.json as a value."""

    created_by: str
    model_class: str
    base_identity: str
    basis: str
    constraint: ArchiveConstraint
    settings: Mapping[str, Any]
    tasks: tuple[TaskRecord, ...]
    matrices: Mapping[str, MatrixRecord]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    not_targeted: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the inverse of `from_json`."""
        return {"format": FORMAT, "version": VERSION} | asdict(self)

    @property
    def source_weights(self) -> tuple[float, ...]:
        """Weights of the sources of moments, in the order of `MatrixRecord.traces`; empty without moments."""
        return tuple(float(weight) for task in self.tasks for weight in task.details.get("weights", ()))

    def check(self) -> None:
        """Checks that records, sides and staircases belong together.

        Raises:
            ValueError: naming the first that does not.
        """
        if self.constraint not in ("double", "input", "core", "staircase"):
            raise ValueError(f"constraint {self.constraint!r} is unknown")
        if not self.matrices:
            raise ValueError("no matrices")
        for name, record in self.matrices.items():
            counts = []
            for side, dim in zip((record.output, record.input), record.shape, strict=True):
                counts.append(0 if side is None else side.directions)
                if side is not None:
                    stored = side.directions if side.form == "leading" else dim - side.directions
                    if self.tensors[side.tensor].shape != (dim, stored):
                        raise ValueError(f"{name}: {side.tensor} does not hold {side.directions} directions of {dim}")
            for side in (record.output, record.input):
                absent = [t for t in (side.values, side.profiles) if t and t not in self.tensors] if side else []
                if absent:
                    raise ValueError(f"{name}: {absent[0]} is not stored")
            if not _fits(self.constraint, record, *counts):
                raise ValueError(f"{name}: steps {record.steps} are not those of {counts} protected directions")
            if record.spectrum is not None and record.spectrum not in self.tensors:
                raise ValueError(f"{name}: {record.spectrum} is not stored")

    @classmethod
    def from_json(cls, content: Any, path: object) -> "Manifest":
        """Parses archive.json.

        Raises:
            ArchiveError: if it is another format or version, or lacks something.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ArchiveError(f'{path}: not a subspace archive ("format" is not "{FORMAT}")')
        if content.get("version") != VERSION:
            raise ArchiveError(
                f"{path}: archive version {content.get('version')}, this sculptor reads version {VERSION}; "
                "run `sculptor analyze` again or use the version that wrote it"
            )
        values = {key: value for key, value in content.items() if key not in ("format", "version")}
        try:
            values["matrices"] = {name: matrix_from_json(record) for name, record in values["matrices"].items()}
            values["tensors"] = {
                name: StoredTensor(**(tensor | {"shape": tuple(tensor["shape"])}))
                for name, tensor in values["tensors"].items()
            }
            values["tasks"] = tuple(TaskRecord(**task) for task in values["tasks"])
            values["not_targeted"] = tuple(values["not_targeted"])
            values["files"] = {str(name): int(size) for name, size in values["files"].items()}
            manifest = cls(**values)
            manifest.check()
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise ArchiveError(f"{path}: damaged manifest ({cause}); run `sculptor analyze` again") from cause


def _fits(constraint: ArchiveConstraint, record: MatrixRecord, outputs: int, inputs: int) -> bool:
    """Whether a matrix's staircase is one of the archive's kind, and tells apart only what is stored."""
    found = record.staircase
    if found == Staircase.closed(*record.shape):
        return True
    if record.has_moments:
        return found.outputs <= outputs and found.inputs <= inputs
    return constraint != "staircase" and found == Staircase.of(constraint, *record.shape, outputs, inputs)


def matrix_from_json(record: Mapping[str, Any]) -> MatrixRecord:
    """One entry of `matrices`."""
    values = dict(record)
    values["shape"] = tuple(values["shape"])
    values["steps"] = tuple((stop, reach) for stop, reach in values["steps"])
    values["output"] = SideRecord(**values["output"]) if values["output"] else None
    values["input"] = SideRecord(**values["input"]) if values["input"] else None
    values["added"] = tuple(Added(**added) for added in values["added"])
    values["traces"] = tuple((float(c), float(g)) for c, g in values["traces"])
    result = MatrixRecord(**values)
    _ = result.staircase  # a staircase that does not descend is an error here, not later
    return result

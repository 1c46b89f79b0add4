"""What `card` measures: data, abilities and watched texts, read before any model is."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.data.columns import Columns
from sculptor.data.files import read_file_rows
from sculptor.data.rows import Data, Row, as_items, names_of
from sculptor.errors import DataError, SettingsError
from sculptor.evaluation.ifeval import MISSING, Check, find_checker
from sculptor.evaluation.rows import read_evaluation_rows
from sculptor.evaluation.series import Reading, Series, ifeval_series, read_series, refusal_series
from sculptor.jobs.card_report import RESERVED, Role
from sculptor.model.load import LoadedModel
from sculptor.progress import Progress

_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
_ANSWERS = ("completion", "choices", "messages", "text", "answer", "answers", "target", "response", "output", "label")


@dataclass(frozen=True, eq=False, slots=True)
class Measure:
    """Rows that are measured together.

    Attributes:
        name: of the file, without folder and ending.
        role: what they were given as.
        rows: of any form; empty where `prompts` are asked.
        prompts: rows that say what is asked and not what is right: refusals are counted, or instructions checked.
        check: lm-eval's checker of instructions, where the prompts have some.
    """

    name: str
    role: Role
    rows: Sequence[Row] = ()
    prompts: Sequence[Mapping[str, Any]] = ()
    check: Check | None = None

    @property
    def counts_refusals(self) -> bool:
        """Whether answers are looked through for phrases."""
        return bool(self.prompts) and self.check is None

    def of(self, loaded: LoadedModel, reading: Reading, progress: Progress) -> list[Series]:
        """Its figures of one model."""
        if self.check is not None:
            return ifeval_series(loaded, self.prompts, self.check, reading, progress)
        if self.prompts:
            return refusal_series(loaded, [str(row["prompt"]) for row in self.prompts], reading, progress)
        if self.role == "watched":
            reading = Reading(reading.max_length, reading.batch_size, None, False)
        found = read_series(loaded, self.rows, reading, progress)
        return found[-1:] if self.role == "watched" else found


def read_measures(
    data: Data,
    abilities: Sequence[str | Path],
    watch: Data,
    columns: str | Columns | None,
    max_rows: int | None,
    notice: Callable[[str], object],
) -> tuple[list[Measure], list[str]]:
    """Everything that is measured, and what is left out, with the reason.

    Raises:
        DataError: if rows cannot be used.
        SettingsError: if two would be called the same.
    """
    tasks, watched = as_items(data), as_items(watch)
    found = [
        Measure(_stem(name), "task", read_evaluation_rows([item], None, columns, max_rows, notice))
        for name, item in zip(names_of(tasks), tasks, strict=True)
    ]
    left_out = []
    for file in _files(abilities):
        measure = _ability(file, max_rows)
        if isinstance(measure, str):
            left_out.append(measure)
            notice(measure)
        else:
            found.append(measure)
    found += [
        Measure(_stem(name), "watched", read_evaluation_rows([item], None, None, max_rows, notice))
        for name, item in zip(names_of(watched), watched, strict=True)
    ]
    names = Counter(measure.name for measure in found)
    twice = [name for name, count in names.items() if count > 1 or name in RESERVED]
    if twice:
        raise SettingsError(
            f"two things would be called {twice[0]}; rename a file, so that --fail-if can tell them apart"
        )
    return found, left_out


def _stem(name: str) -> str:
    """A file's name without its ending; no blanks and signs, which `--fail-if` could not name."""
    return "".join("-" if c.isspace() or c in "<>" else c for c in Path(name).stem)


def _files(abilities: Sequence[str | Path]) -> list[Path]:
    files = []
    for given in map(Path, abilities):
        inside = sorted(item for item in given.iterdir() if item.suffix in _ENDINGS) if given.is_dir() else [given]
        if not inside:
            raise DataError(
                f"--abilities {given}: no rows in this folder; expected files that end in {', '.join(_ENDINGS)}"
            )
        files += inside
    return files


def _ability(file: Path, max_rows: int | None) -> Measure | str:
    """Rows with something to compare an answer with, or prompts alone; why it is left out, where no checker is here."""
    given = [row for _, row in zip(range(max_rows or 2**62), read_file_rows(file), strict=False)]
    if not given:
        raise DataError(f"{file}: no rows")
    bare = [row for _, row in given if isinstance(row, dict) and "prompt" in row and not {*_ANSWERS} & row.keys()]
    if not bare:
        return Measure(_stem(file.name), "ability", read_evaluation_rows([str(file)], None, None, max_rows))
    if len(bare) < len(given):
        raise DataError(f"{file}: {len(bare)} of {len(given)} rows are prompts without an answer; expected all or none")
    for where, row in given:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise DataError(f"{where}: 'prompt' is {str(row['prompt'])[:40]!r}; expected some text")
    if not all("instruction_id_list" in row and "kwargs" in row for row in bare):
        return Measure(_stem(file.name), "ability", prompts=bare)
    check = find_checker()
    return (
        f"{file.name} is left out: {MISSING}"
        if check is None
        else Measure(_stem(file.name), "ability", (), bare, check)
    )

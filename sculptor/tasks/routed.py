"""`evaluate --bank`: every row is answered with the weights of the tasks that it is nearest to, whatever else is in the batch."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.rows import CompletionRow, Row
from sculptor.edits.settings import BankSettings
from sculptor.evaluation.rows import NOTHING, Evaluation, Generation, evaluate_rows, labels_of
from sculptor.jobs.bank_files import Bank
from sculptor.model.load import LoadedModel
from sculptor.model.put import put_tensors
from sculptor.progress import Progress
from sculptor.tasks.bank import Mix, mixed, route_rows


@dataclass(eq=False)
class RoutedModel:
    """A model in memory that takes the weights of one mix of tasks after another.

    Attributes:
        bank: of the model's checkpoint.
        loaded: the model, resident.
        top: how many tasks answer a row.
        settings: how rows are read.
    """

    bank: Bank
    loaded: LoadedModel
    top: int
    settings: BankSettings
    progress: Progress
    _changed: frozenset[str] = frozenset()  # tensors that are not the base's for now

    def evaluate(self, rows: Sequence[Row], labels: Sequence[str] | None, generation: Generation) -> Evaluation:
        """As `evaluate_rows`; answers to look at are those of the rows that are measured first.

        Raises:
            SculptorError: as that.
        """
        self._put(())
        listed = list(rows)
        pairs = [row for row in listed if isinstance(row, CompletionRow)]
        ranked = labels_of(pairs, labels) if pairs and not any(row.choices for row in pairs) else None
        mixes = route_rows(self.bank, self.loaded, listed, self.top, self.settings, self.progress)
        groups: dict[Mix, list[Row]] = defaultdict(list)
        for mix, row in zip(mixes, listed, strict=True):
            groups[mix].append(row)
        found = []
        for mix, chosen in groups.items():
            self._put(mix)
            length, size = self.settings.max_length, self.settings.batch_size
            found.append(
                evaluate_rows(self.loaded, chosen, ranked, length, size, generation=generation, progress=self.progress)
            )
        self._put(())
        counts = Counter(mix[0][0] for mix in mixes)
        return replace(together(found, generation.show), routed={name: counts[name] for name in self.bank.names})

    def _put(self, mix: Mix) -> None:
        checkpoint: Checkpoint = self.loaded.checkpoint
        wanted = frozenset(name for task, _ in mix for name in self.bank.deltas(task).names)
        names = wanted | self._changed

        def make(name: str) -> Tensor:
            return mixed(self.bank, mix, name, checkpoint[name]) if name in wanted else checkpoint[name]

        if names:
            put_tensors(self.loaded, checkpoint, names, make)
        self._changed = wanted


def together(parts: Sequence[Evaluation], show: int) -> Evaluation:
    """What parts of some rows come to."""
    if not parts:
        return NOTHING
    rows, tokens = sum(part.num_rows for part in parts), sum(part.num_tokens for part in parts)

    def share(name: str) -> float | None:
        values = [(getattr(part, name), part.num_rows) for part in parts]
        return None if values[0][0] is None else sum(value * count for value, count in values) / rows

    losses = [part.loss * part.num_tokens for part in parts if part.loss is not None]
    loss = sum(losses) / tokens if losses else None
    return replace(
        parts[0],
        loss=loss,
        perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        accuracy=share("accuracy"),
        acc_norm=share("acc_norm"),
        exact_match=share("exact_match"),
        num_rows=rows,
        num_tokens=tokens,
        answers=tuple(answer for part in parts for answer in part.answers)[:show],
        num_dropped=sum(part.num_dropped for part in parts),
        num_cut=sum(part.num_cut for part in parts),
    )

"""Everything that is read from disk, as one function of bytes each: it works, or ends in one line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.archive.store import Archive
from sculptor.benchmark.plan import read_plan
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import read_record
from sculptor.data.rows import read_rows
from sculptor.errors import SculptorError, Stopped
from sculptor.training.state import StateStore

PLAN = """model = "model"
[analyze]
preserve = 0.5
[train]
max_steps = 2
[[tasks]]
name = "one"
data = ["rows.jsonl"]
test = ["rows.jsonl"]
"""


@dataclass(frozen=True)
class Reader:
    """A file that is read: where it is, what a sound one holds, and what reads it."""

    file: Path
    sound: bytes
    read: Callable[[], object]

    def try_bytes(self, content: bytes) -> str | None:
        """Reads other content; the error's line, or None. Anything but an error of ours goes through."""
        self.file.write_bytes(content)
        try:
            self.read()
        except SculptorError as error:
            line = str(error)
            assert "\n" not in line, line
            return line
        finally:
            self.file.write_bytes(self.sound)
        return None


def make_readers(path: Path) -> dict[str, Reader]:
    """All readers, over small sound files in a directory."""
    model = save_checkpoint(path / "model", max_shard_size="20KB")
    rows = write_rows(path / "rows.jsonl", task_rows(count=6))
    analyze(model, path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    count = [0]

    def stop() -> int | None:
        count[0] += 1
        return 15 if count[0] >= 2 else None

    settings = TrainSettings(max_steps=4, save_every=1, batch_size=4, device="cpu")
    try:
        train(model, path / "archive", [rows], path / "out", settings, stop=stop)
    except Stopped:
        state = next((path / "out.partial" / "state").glob("step-*"))
    (path / "plan.toml").write_text(PLAN)
    record = model / "sculptor.json"
    record.write_text(json.dumps({"lineage": [{"base_digests": {"a": "0" * 64}, "dtypes": {"a": "bfloat16"}}]}))
    key = json.loads((state / "state.json").read_text())
    shard = sorted(model.glob("model-*.safetensors"))[0]

    def reader(file: Path, read: Callable[[], object]) -> Reader:
        return Reader(file, file.read_bytes(), read)

    return {
        "header": reader(shard, lambda: open_checkpoint(model)),
        "index": reader(model / "model.safetensors.index.json", lambda: open_checkpoint(model)),
        "config": reader(model / "config.json", lambda: inspect_architecture(open_checkpoint(model))),
        "manifest": reader(path / "archive" / "archive.json", lambda: Archive(path / "archive")),
        "record": reader(record, lambda: read_record(model)),
        "state": reader(state / "state.json", lambda: StateStore(state.parent, key["key"], key["fingerprints"]).load()),
        "plan": reader(path / "plan.toml", lambda: read_plan(path / "plan.toml")),
        "rows": reader(rows, lambda: read_rows([rows])),
    }

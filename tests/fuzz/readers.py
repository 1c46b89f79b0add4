"""Everything that is read from disk, as one function of bytes each: it works, or ends in one line."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import save_file
from sculptor_cli.main import main

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.archive.store import Archive
from sculptor.benchmark.plan import read_plan
from sculptor.checkpoint.adapter import Adapter
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.old_text import measure_reread
from sculptor.checkpoint.places import find_places
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import read_record
from sculptor.checkpoint.vocabulary import plan_growth
from sculptor.data.rows import read_rows
from sculptor.errors import SculptorError, Stopped
from sculptor.model.samples import read_samples
from sculptor.training.state import StateStore
from sculptor.validation import sign

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


OPTIONS = """subspaces = "archive"
data = ["rows.jsonl:0.5", "more.jsonl:0.5"]
output = "out"
max-steps = 2
add-tokens = ["<new>"]
learning-rate = 1e-3
overwrite = true
"""
RECORD = json.dumps(
    {"command": "edit interpolate", "settings": {"alpha": 0.5, "output": "out", "save_dtype": "keep"}, "analyzed": True,
     "lineage": [], "data": {"weights": [0.5, 0.5], "replay": [{"name": "self", "share": 0.2}]}}
)  # fmt: skip


def save_adapter(path: Path) -> Path:
    """A LoRA adapter as PEFT writes it, without PEFT."""
    path.mkdir()
    part = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{part}A.weight": torch.ones(2, 32), f"{part}B.weight": torch.ones(32, 2)}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "model"}))
    return path


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
        except (SculptorError, click.UsageError) as error:
            line = error.format_message() if isinstance(error, click.UsageError) else str(error)
            assert "\n" not in line, line
            return line
        finally:
            self.file.write_bytes(self.sound)
        return None


def make_readers(path: Path) -> dict[str, Reader]:
    """All readers, over small sound files in a directory."""
    model = save_checkpoint(path / "model", max_shard_size="20KB")
    rows = write_rows(path / "rows.jsonl", task_rows(count=6))
    analyze(model, path / "archive", AnalyzeSettings(preserve=0.5, samples=True, device="cpu"))
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
    (path / "options.toml").write_text(OPTIONS)
    (path / "record.json").write_text(RECORD)
    adapter = save_adapter(path / "adapter")
    base = open_checkpoint(model)
    places = find_places(base)
    manifest = path / "archive" / "archive.json"
    signed = manifest.read_bytes()
    samples = next((path / "archive").glob("samples*"))

    def resigned() -> object:
        """The samples as if it was them that the archive was written with: else their digest stops everything."""
        content = json.loads(signed)
        content["sections"]["samples"]["sha256"] = hashlib.sha256(samples.read_bytes()).hexdigest()
        del content["sha256"]
        manifest.write_text(json.dumps(content | {"sha256": sign(content)}))
        try:
            return read_samples(Archive(path / "archive"), 64)
        finally:
            manifest.write_bytes(signed)

    def grow() -> object:
        growth = plan_growth(open_checkpoint(model), ["<new>"])
        return measure_reread(model, growth, [(4, 5, 6)])

    def options(file: Path, *words: str) -> object:
        command: click.Command = main
        for word in words:
            assert isinstance(command, click.Group)
            command = command.commands[word] if word in command.commands else command.get_command(None, word)  # type: ignore[arg-type,assignment]
        context, name = click.Context(main, info_name="sculptor"), words[0]
        if len(words) > 1:
            context, name = click.Context(main.get_command(context, words[0]), context, name), words[1]  # type: ignore[arg-type]
        return command.make_context(name, ["a", "b", "--config", str(file)][len(words) % 2 :], context)

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
        "samples": reader(samples, resigned),
        "tokenizer": reader(model / "tokenizer.json", grow),
        "adapter": reader(adapter / "adapter_config.json", lambda: dict(Adapter(adapter, base, places))),
        "adapter weights": reader(adapter / "adapter_model.safetensors", lambda: dict(Adapter(adapter, base, places))),
        "options": reader(path / "options.toml", lambda: options(path / "options.toml", "train")),
        "record of options": reader(path / "record.json", lambda: options(path / "record.json", "edit", "interpolate")),
        "rows": reader(rows, lambda: read_rows([rows])),
    }

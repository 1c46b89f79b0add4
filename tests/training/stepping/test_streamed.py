"""Training with one block at a time against training with all of them there, number for number."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    GROUPED,
    IDS,
    SMALL,
    Result,
    make_tokenizer,
    save_checkpoint,
    slowly,
    task_rows,
    write_rows,
)
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train, verify
from sculptor.errors import OutputError, SettingsError, Stopped, TrainingError
from sculptor.jobs.train_report import TrainReport
from sculptor.model.loss import SLICE
from sculptor.streaming.regions import FileRegion, HostRegion
from sculptor.streaming.slots import Slots
from sculptor.training.stepping.block_update import BlockUpdater
from sculptor.training.stepping.streamed import StreamedUpdates
from sculptor.validation import sign

COVERS = ["sculptor.training.stepping.waiting"]
STEPS = 4
ROUTED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
LOCAL: dict[str, Callable[[], Any]] = {
    "mixtral-router": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, **IDS, num_local_experts=4, **ROUTED)
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**(GROUPED | IDS), num_experts=4, moe_intermediate_size=16, **ROUTED)
    ),
    "albert": lambda: transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**(SMALL | {"num_hidden_layers": 3}), embedding_size=16, pad_token_id=1)
    ),
    "deep": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(GROUPED | {"num_hidden_layers": 4}), **IDS)
    ),
    "shallow": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(GROUPED | {"num_hidden_layers": 1}), **IDS)
    ),
    "opt-skipping": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **(SMALL | {"num_hidden_layers": 4}), ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.4, **IDS
        )
    ),
}
FUSED = {"micro_batch_size": 6, "clip_by": "matrix"}
RESIDENT_AND_STREAMED = ("none", "bases", "cpu", "disk")


@pytest.fixture(autouse=True)
def local_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in LOCAL.items():
        monkeypatch.setitem(FAMILIES, name, make)


def settings(offload: str, **changes: Any) -> TrainSettings:
    """Three micro-batches a step, and a gradient that is always clipped."""
    values = {
        "max_steps": STEPS,
        "batch_size": 6,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "clip": 0.1,
        "device": "cpu",
        "save_every": 100,  # saving brings every block up to date: most steps are to be taken in passing
    }
    return TrainSettings(**values | {"offload": offload} | changes)


class Task:
    """A checkpoint, its archive and rows, and runs on them side by side."""

    def __init__(self, path: Path, family: str = "llama", rows: str | None = None, **options: Any) -> None:
        self.path = path
        self.model = save_checkpoint(path / "model", family, dtype=options.pop("dtype", torch.float32))
        if family == "albert":
            make_tokenizer(wrapped=True).save_pretrained(self.model)
        kind = rows or ("text" if family in ("bert", "albert") else "pairs")
        self.data = write_rows(path / "task.jsonl", task_rows(kind))
        self.evaluation = write_rows(path / "eval.jsonl", task_rows(kind, 5))
        chosen = {"preserve": 0.5} | options
        if chosen.get("basis"):
            chosen = {"data": (str(self.data),), **options}
        analyze(self.model, path / "archive", AnalyzeSettings(**chosen, device="cpu"))

    def run(self, name: str, run_settings: TrainSettings, **options: Any) -> TrainReport:
        return train(self.model, self.path / "archive", [self.data], self.path / name, run_settings, **options)

    def compare(self, names: tuple[str, ...] = RESIDENT_AND_STREAMED, atol: float = 0.0, **changes: Any) -> None:
        """The same run in every way; all that is left of it is equal, and nothing else is left."""
        for name in names:
            self.run(name, settings(name, **changes))
            assert not (self.path / f"{name}.partial").exists()
            assert_same_output(self.path / names[0], self.path / name, atol)


def lines_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_output(first: Path, second: Path, atol: float = 0.0) -> None:
    """Metrics, weights and archives are the same, bit for bit or within a tolerance."""
    lines = lines_of(first), lines_of(second)
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for expected, found in zip(*lines, strict=True):
        assert found == (pytest.approx(expected, abs=atol, rel=0) if atol else expected)
    assert_same_tensors(tensors_of(first), tensors_of(second), atol)
    archives = tensors_of(first / "subspaces"), tensors_of(second / "subspaces")
    if atol:  # singular vectors of nearly the same update differ by a sign or a rotation, what they span does not
        archives = tuple({name: v @ v.T if v.ndim == 2 else v for name, v in found.items()} for found in archives)
    assert_same_tensors(*archives, atol)


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert first
    assert first.keys() == second.keys()
    for name, expected in first.items():
        if atol:
            torch.testing.assert_close(second[name], expected, atol=atol, rtol=0)
        assert atol or (expected.dtype == second[name].dtype and torch.equal(expected, second[name])), name


# A block that is used several times: whole gradients add up and are projected, where a resident matrix projects each.
SHARED = 1e-5


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *slowly("gpt2", "t5"),
        *slowly(
            "qwen3-moe", "albert", "llama-tied", "qwen3", "gemma2", "opt", "neox", "phi3", "bert", "mixtral-router"
        ),
    ],
)
def test_streamed_training_is_resident_training(family: str, tmp_path: Path) -> None:
    task = Task(tmp_path, family)
    task.compare(atol=SHARED if family == "albert" else 0.0)
    lines = lines_of(tmp_path / "none")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["grad_norm"] > 0.1 for line in lines)
    before, after = tensors_of(task.model), tensors_of(tmp_path / "disk")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    every = set(Archive(tmp_path / "archive"))
    assert changed <= every
    assert all("experts" in name for name in every - changed), "that no token is sent to"
    assert len([name for name in changed if "experts" in name]) >= 12 or not any("experts" in name for name in every)
    assert verify(task.model, tmp_path / "disk", tmp_path / "archive", device="cpu").passed


@pytest.mark.parametrize("family", ["llama-tied", *slowly("mixtral-router", "t5", "gpt2")])
def test_streamed_training_is_resident_training_in_bfloat16_too(family: str, tmp_path: Path) -> None:
    task = Task(tmp_path, family, dtype=torch.bfloat16)
    task.compare(precision="bfloat16", save_dtype="float32")
    assert verify(task.model, tmp_path / "disk", tmp_path / "archive", device="cpu").passed


@pytest.mark.slow
@pytest.mark.parametrize(("constraint", "preserve"), [("double", 0.8), ("input", 0.5), ("core", 0.3)])
def test_constraints_hold_while_streaming(constraint: str, preserve: float, tmp_path: Path) -> None:
    task = Task(tmp_path, constraint=constraint, preserve=preserve)
    task.compare(("none", "disk"))
    assert verify(task.model, tmp_path / "disk", tmp_path / "archive", device="cpu").passed


def test_a_matrix_without_bases_is_streamed(tmp_path: Path) -> None:
    Task(tmp_path, preserve=0).compare()


def test_a_narrow_checkpoint_is_streamed(tmp_path: Path) -> None:
    Task(tmp_path, dtype=torch.bfloat16).compare(("none", "disk"))


@pytest.mark.parametrize("pattern", ["*.layers.1.*", "*.layers.0.*", "down_proj"])
def test_blocks_and_matrices_outside_the_archive_are_streamed(pattern: str, tmp_path: Path) -> None:
    Task(tmp_path, targets=(pattern,)).compare(("none", "cpu"))


def test_frozen_matrices_are_streamed(tmp_path: Path) -> None:
    """Some matrices of the first block and all of the second have nothing left to train."""
    task = Task(tmp_path)
    file = tmp_path / "archive" / "archive.json"
    content = json.loads(file.read_text())
    for name, record in content["matrices"].items():
        if "layers.1" in name or "mlp" in name:
            record["rule"]["steps"] = [record["rule"]["shape"]]
    content.pop("sha256")
    file.write_text(json.dumps(content | {"sha256": sign(content)}))
    task.compare()
    before, after = tensors_of(task.model), tensors_of(tmp_path / "disk")
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 4


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 6, "clip": 0, "optimizer_mode": "fused"}])
def test_a_single_block_is_streamed(changes: dict[str, Any], tmp_path: Path) -> None:
    """It is the first and the last, so it never leaves."""
    task = Task(tmp_path, "shallow")
    common = {name: value for name, value in changes.items() if name != "optimizer_mode"}
    task.run("none", settings("none", **common))
    task.run("cpu", settings("cpu", **changes))
    assert_same_output(tmp_path / "none", tmp_path / "cpu")


def test_blocks_that_are_skipped_at_random_are_streamed(tmp_path: Path) -> None:
    """A matrix that no gradient reaches in a step is not stepped."""
    Task(tmp_path, "opt-skipping").compare(("none", "disk"), max_steps=8, micro_batch_size=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip_by", "atol"),
    [
        ("model", 0.0),
        ("matrix", 1e-6),  # the norm over all is summed in another order
    ],
)
def test_a_block_that_the_last_micro_batch_skips_counts(clip_by: str, atol: float, tmp_path: Path) -> None:
    Task(tmp_path, "opt-skipping").compare(("none", "cpu"), atol, max_steps=8, clip_by=clip_by)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *slowly(torch.bfloat16)])
@pytest.mark.parametrize(
    ("basis", "offload"), [("curvature", "cpu"), ("inputs", "disk"), *slowly(("curvature", "disk"))]
)
def test_an_archive_with_moments_goes_on_the_same(basis: str, offload: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of the weights that were written, which with bf16 are not those that were trained."""
    task = Task(tmp_path, basis=basis, dtype=dtype)
    for name in ("none", offload):
        run = task.run(name, settings(name, memory_rows=8, also_train=("norm",)))
        assert run.carry == "merge"
    assert lines_of(tmp_path / "none") == lines_of(tmp_path / offload)
    assert_same_tensors(tensors_of(tmp_path / "none"), tensors_of(tmp_path / offload))
    archives = [Archive(tmp_path / name / "subspaces") for name in ("none", offload)]
    assert_same_tensors(tensors_of(archives[0].path), tensors_of(archives[1].path))
    assert [record.rule for record in archives[0].values()] == [record.rule for record in archives[1].values()]
    assert not (tmp_path / f"{offload}.partial").exists()
    assert verify(task.model, tmp_path / offload, tmp_path / "archive", device="cpu").passed


@pytest.mark.parametrize(
    ("patterns", "clip_by"),
    [(("norm",), "model"), (("lm_head",), "model"), (("embed_tokens", "*.k_norm.*", "*layernorm*"), "matrix")],
)
def test_openly_trained_parameters_learn_the_same(patterns: tuple[str, ...], clip_by: str, tmp_path: Path) -> None:
    task = Task(tmp_path, "qwen3")
    task.compare(("none", "cpu"), also_train=patterns, clip_by=clip_by)
    before, after = tensors_of(task.model), tensors_of(tmp_path / "cpu")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed > set(Archive(tmp_path / "archive"))


def test_a_tied_embedding_learns_the_same(tmp_path: Path) -> None:
    Task(tmp_path, "llama-tied").compare(("none", "disk"), also_train=("embed_tokens",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "constraint", "clip", "atol"),
    [
        ("llama", "double", 0.1, 0.0),
        ("llama", "core", 0.1, 1e-6),  # several coordinates a matrix: the norm over all is summed in another order
        ("gpt2", "double", 0.0, 0.0),
        ("albert", "double", 0.1, SHARED),
    ],
)
def test_clipping_by_matrix_is_the_same(family: str, constraint: str, clip: float, atol: float, tmp_path: Path) -> None:
    Task(tmp_path, family, constraint=constraint).compare(("none", "disk"), clip_by="matrix", clip=clip, atol=atol)


@pytest.mark.parametrize(
    "changes", [{"weight_decay": 20.0, "seed": 7}, {"schedule": "constant", "warmup": 0, "save_dtype": "bfloat16"}]
)
def test_every_other_setting_means_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    Task(tmp_path).compare(("none", "disk"), **changes)


def test_inputs_on_the_host_change_nothing(tmp_path: Path) -> None:
    task = Task(tmp_path, "gpt2")
    task.compare(("none", "cpu"))
    task.run("inputs", settings("cpu", offload_inputs=True))
    assert_same_output(tmp_path / "none", tmp_path / "inputs")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_of_some_tokens_at_a_time_are_streamed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLICE, "cpu", 2 * 64)
    Task(tmp_path, family, rows="text").compare(("none", "cpu"), atol=1e-5)


@pytest.fixture
def two_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has: of everything that passes through, the next beside the current."""
    slots, updater = Slots.__init__, BlockUpdater.__init__
    monkeypatch.setattr(Slots, "__init__", lambda self, count, *rest: slots(self, 2, *rest))
    monkeypatch.setattr(BlockUpdater, "__init__", lambda self, a, b, count, *rest: updater(self, a, b, 2, *rest))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "offload", "constraint", "changes"),
    [
        ("deep", "cpu", "double", {}),
        ("albert", "cpu", "double", {}),
        ("deep", "disk", "double", {"optimizer_mode": "fused"}),
        *slowly(
            ("deep", "disk", "core", {}),
            ("gpt2", "cpu", "double", {"offload_inputs": True}),
            ("t5", "disk", "double", {}),
            ("deep", "cpu", "double", {"optimizer_on": "host"}),
        ),
    ],
)
def test_a_slot_more_changes_nothing(
    family: str,
    offload: str,
    constraint: str,
    changes: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    task = Task(tmp_path, family, constraint=constraint)
    common = FUSED if "optimizer_mode" in changes else {}
    task.run("none", settings("none", **common))
    request.getfixturevalue("two_slots")
    task.run("more", settings(offload, **common, **changes))
    assert_same_output(tmp_path / "none", tmp_path / "more", SHARED if family == "albert" else 0.0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"also_train": ("norm",), "weight_decay": 20.0}),
        *slowly(
            ("gpt2", {"clip_by": "matrix"}),
            ("t5", {"clip": 0}),
            ("opt-skipping", {"max_steps": 8, "micro_batch_size": 6}),
        ),
    ],
)
def test_an_optimizer_in_host_memory_does_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    task = Task(tmp_path, family)
    task.run("none", settings("none", **changes))
    task.run("host", settings("cpu", **changes, optimizer_on="host"))
    assert_same_output(tmp_path / "none", tmp_path / "host")


def test_an_optimizer_in_host_memory_is_saved_and_taken_up(tmp_path: Path) -> None:
    task = Task(tmp_path)
    changes: dict[str, Any] = {"max_steps": 6, "eval_every": 1}
    task.run("whole", settings("none", **changes), eval_data=[task.evaluation])
    chosen = settings("cpu", **changes, optimizer_on="host")
    with pytest.raises(Stopped):
        task.run("cut", chosen, eval_data=[task.evaluation], stop=iter([None, None, 15]).__next__)
    task.run("cut", settings("none", **changes), eval_data=[task.evaluation], resume=True)
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


def test_an_optimizer_in_host_memory_needs_blocks_there() -> None:
    for offload, mode in (("none", "exact"), ("disk", "exact"), ("cpu", "fused")):
        with pytest.raises(SettingsError, match=r"^--optimizer-on host without effect"):
            settings(offload, optimizer_on="host", optimizer_mode=mode, **FUSED)


@pytest.mark.parametrize(
    ("family", "offload", "clip"),
    [
        ("llama", "cpu", 0.1),
        ("gpt2", "disk", 0.0),
        *slowly(
            ("llama", "disk", 0.0),
            ("gpt2", "cpu", 0.1),
            ("t5", "disk", 0.1),
            ("mixtral-router", "cpu", 0.1),
            ("opt-skipping", "cpu", 0.1),
        ),
    ],
)
def test_updates_within_the_backward_pass_give_the_same(family: str, offload: str, clip: float, tmp_path: Path) -> None:
    task = Task(tmp_path, family)
    for mode in ("exact", "fused"):
        task.run(mode, settings(offload, **FUSED | {"clip": clip, "optimizer_mode": mode}))
    assert_same_output(tmp_path / "exact", tmp_path / "fused")


def test_updates_within_the_backward_pass_allow_the_rest(tmp_path: Path) -> None:
    """Further parameters, evaluations and saved states."""
    task = Task(tmp_path)
    changes = {**FUSED, "also_train": ("norm", "lm_head"), "eval_every": 1, "weight_decay": 20.0}
    for mode in ("exact", "fused"):
        chosen = settings("cpu", **changes, optimizer_mode=mode)
        with pytest.raises(Stopped):
            task.run(mode, chosen, eval_data=[task.evaluation], stop=iter([None, 15]).__next__)
        task.run(mode, chosen, eval_data=[task.evaluation], resume=True)
    assert_same_output(tmp_path / "exact", tmp_path / "fused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clip_by": "matrix"},
            r"^--optimizer-mode fused: a step of 6 rows in micro-batches of 2 .*--micro-batch-size",
        ),
        ({"micro_batch_size": 6}, r"^--optimizer-mode fused: .*--clip-by matrix or --clip 0"),
    ],
)
def test_updates_that_would_come_too_early_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        settings("cpu", optimizer_mode="fused", **changes)
    assert "\n" not in str(refused.value)


def test_a_block_that_is_used_several_times_is_not_updated_within_the_backward_pass(tmp_path: Path) -> None:
    task = Task(tmp_path, "albert")
    with pytest.raises(TrainingError, match=r"albert_layer_groups.0 is used several times .* use exact"):
        task.run("out", settings("cpu", **FUSED, optimizer_mode="fused"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "offload"), [("llama", "disk"), ("bert", "cpu")])
def test_the_best_evaluation_is_kept(family: str, offload: str, tmp_path: Path) -> None:
    """The rows of the evaluation are not like those of the task, so an earlier step is best."""
    task = Task(tmp_path, family)
    rows = [{"prompt": "w1 w2", "completion": f"w{30 + i}"} for i in range(5)]
    if family == "bert":
        rows = [{"text": f"w{30 + i} w{30 + i} w33 w33 w33"} for i in range(5)]
    other = write_rows(tmp_path / "other.jsonl", rows)
    for name in ("none", offload):
        rate = 0.5 if family == "bert" else 0.1
        chosen = settings(name, max_steps=8, eval_every=1, learning_rate=rate, clip=0, schedule="constant")
        report = task.run(name, chosen, eval_data=[other])
        losses = {line["step"]: line["eval_loss"] for line in lines_of(tmp_path / name) if "eval_loss" in line}
        assert len(losses) == 8
        best = min(losses, key=losses.__getitem__)
        assert best < 8
        assert (report.loop.best_step, report.loop.best_loss) == (best, losses[best])
        assert_same_output(tmp_path / "none", tmp_path / name)


@pytest.mark.parametrize(("family", "offload"), [("llama", "disk"), *slowly(("gpt2", "cpu"))])
def test_a_stopped_run_goes_on_bit_for_bit(family: str, offload: str, tmp_path: Path) -> None:
    task = Task(tmp_path, family)
    chosen = settings(offload, max_steps=6, save_every=1, eval_every=2)
    task.run("whole", chosen, eval_data=[task.evaluation])
    with pytest.raises(Stopped, match=r"after step 2 of 6; the state is saved"):
        task.run("cut", chosen, eval_data=[task.evaluation], stop=iter([None, 15]).__next__)
    assert not (tmp_path / "cut").exists()
    task.run("cut", chosen, eval_data=[task.evaluation], resume=True)
    assert not (tmp_path / "cut.partial").exists()
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("before", "after", "evaluate"),
    [
        ("cpu", "none", True),
        ("none", "disk", True),
        *slowly(("none", "cpu", False), ("disk", "none", False)),
    ],
)
def test_a_state_can_be_taken_up_in_another_way(before: str, after: str, evaluate: bool, tmp_path: Path) -> None:
    task = Task(tmp_path)
    changes: dict[str, Any] = {"max_steps": 6, "also_train": ("norm",)} | ({"eval_every": 1} if evaluate else {})
    options: dict[str, Any] = {"eval_data": [task.evaluation]} if evaluate else {}
    task.run("whole", settings("none", **changes), **options)
    with pytest.raises(Stopped):
        task.run("cut", settings(before, **changes), **options, stop=iter([None, None, 15]).__next__)
    task.run("cut", settings(after, **changes), **options, resume=True)
    assert_same_output(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_skipped_blocks_are_saved_and_taken_up(tmp_path: Path) -> None:
    """A block that no gradient has reached yet has no moments to save."""
    task = Task(tmp_path, "opt-skipping")
    changes: dict[str, Any] = {"max_steps": 5, "batch_size": 2, "micro_batch_size": 2}
    task.run("whole", settings("none", **changes))
    for offload in ("cpu", "disk"):
        with pytest.raises(Stopped):
            task.run(offload, settings(offload, **changes), stop=iter([15]).__next__)
        task.run(offload, settings(offload, **changes), resume=True)
        assert_same_output(tmp_path / "whole", tmp_path / offload)


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    task = Task(tmp_path)
    for offload in ("cpu", "disk"):
        with pytest.raises(TrainingError, match=r"at step \d+: not finite; lower --learning-rate"):
            task.run(offload, settings(offload, learning_rate=1e30, clip=0, schedule="constant"))
        assert not (tmp_path / offload).exists()
        assert not (tmp_path / f"{offload}.partial").exists()


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    task = Task(tmp_path, preserve=0)  # the coordinates of a block and their moments are more than fits
    request.getfixturevalue("small_disk")
    with pytest.raises(OutputError, match=r"scratch.*: cannot write .*free some space") as refused:
        task.run("out", settings("disk"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("offload", "ending"),
    [
        ("none", "finished"),
        ("disk", "merged"),
        ("cpu", "stopped"),
        *slowly(("cpu", "finished"), ("disk", "finished"), ("disk", "stopped")),
    ],
)
def test_no_file_stays_open(offload: str, ending: str, tmp_path: Path) -> None:
    """A deleted file keeps its room as long as it is open, and a process may train several tasks."""
    task = Task(tmp_path, **({"basis": "curvature"} if ending == "merged" else {}))
    if ending == "stopped":
        with pytest.raises(Stopped):
            task.run("out", settings(offload), stop=iter([15]).__next__)
    else:
        task.run("out", settings(offload))
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [name for name in (str(path.readlink()) for path in links) if name.startswith(str(tmp_path))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offload", "basis"),
    [
        ("none", "curvature"),
        ("disk", "curvature"),
        *slowly(("cpu", "curvature"), ("cpu", "weights"), ("disk", "weights")),
    ],
)
def test_nothing_of_a_run_stays_in_memory(offload: str, basis: str, tmp_path: Path) -> None:
    task = Task(tmp_path, **({"basis": basis} if basis != "weights" else {}))
    before = holders()
    task.run("out", settings(offload, also_train=("lm_head",)))
    assert [item for item in holders() if all(item is not other for other in before)] == []


def holders() -> list[Any]:
    """Everything alive that holds weights or moments."""
    kinds = (transformers.LlamaForCausalLM, HostRegion, FileRegion, StreamedUpdates)
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in kinds]


def test_a_stopped_run_leaves_its_state_only(tmp_path: Path) -> None:
    task = Task(tmp_path)
    with pytest.raises(Stopped):
        task.run("out", settings("disk"), stop=iter([15]).__next__)
    assert [path.name for path in (tmp_path / "out.partial").iterdir() if path.is_dir()] == ["state"]


def test_the_command_streams(cli: Callable[..., Result], tmp_path: Path) -> None:
    task = Task(tmp_path)
    for offload in RESIDENT_AND_STREAMED:
        arguments = ("--subspaces", tmp_path / "archive", "--data", task.data, "-o", tmp_path / offload)
        options = ("--max-steps", 2, "--batch-size", 4, "--device", "cpu", "--offload", offload)
        found = cli("train", task.model, *arguments, *options)
        assert found.code == 0, found.err
        assert_same_output(tmp_path / "none", tmp_path / offload)
    assert json.loads((tmp_path / "disk" / "sculptor.json").read_text())["settings"]["offload"] == "disk"
    refused = cli("train", task.model, *arguments, *options, "--optimizer-mode", "fused", "--overwrite")
    assert refused.code == 2
    assert len(refused.err.strip().splitlines()) == 1
    assert "--optimizer-mode fused" in refused.err

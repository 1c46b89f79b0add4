"""protect and merge: other people's loops and optimizers keep the constraint, and the folded weight is never stale."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tokenizer, save_checkpoint, slowly
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from sculptor import AnalyzeSettings, Archive, analyze, merge, protect, verify
from sculptor.errors import ArchiveError, CapacityError, TrainingError, VerificationError
from sculptor.model.load import checkpoint_activations
from sculptor.training.linear import SMALL
from sculptor.training.protect import protected_blocks, protected_matrices
from sculptor.validation import sign

COVERS = ["sculptor.training.coordinates", "sculptor.training.merging"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "plain": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}


@pytest.fixture(params=["one by one", "stacked"], autouse=True)
def stacks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of folding: small matrices go together on a GPU, and do here as well."""
    if request.param == "stacked":
        monkeypatch.setitem(SMALL, "cpu", 10**9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and archive of a few families."""
    root = tmp_path_factory.mktemp("made")
    found = {}
    for family in ("llama", "gpt2"):
        for constraint in ("double", "input", "core"):
            path = root / f"{family}-{constraint}"
            save_checkpoint(path / "model", family)
            settings = AnalyzeSettings(preserve=0.5, constraint=constraint, device="cpu")  # type: ignore[arg-type]
            analyze(path / "model", path / "archive", settings)
            found[f"{family}-{constraint}"] = (path / "model", path / "archive")
    return found


def load(made: dict[str, tuple[Path, Path]], key: str = "llama-double") -> tuple[Any, Archive]:
    path, archive = made[key]
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    return model, Archive(archive)


def batch(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 44, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def leak(archive: Archive, before: dict[str, torch.Tensor], model: Any) -> float:
    """Largest ||frozen part of dW|| / ||dW|| of the merged model."""
    worst = 0.0
    for name, record in archive.items():
        update = model.get_parameter(record.parameter).detach().double() - before[record.parameter].double()
        update = update.T if record.transposed else update
        found = archive.read(name)
        assert float(update.norm()) > 0
        violation = found.rule.violation(found.tensors, update, update, torch.zeros_like(update))
        worst = max(worst, violation.norm / float(update.norm()))
    return worst


@pytest.mark.parametrize("key", ["llama-double", "llama-core", "gpt2-input", "gpt2-double"])
def test_outputs_are_unchanged_and_only_coordinates_train(made: dict[str, tuple[Path, Path]], key: str) -> None:
    model, archive = load(made, key)
    reference = model(**batch(0)).logits
    assert protect(model, archive) is model
    assert torch.equal(model(**batch(0)).logits, reference)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == archive.num_free
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in trainable)
    merge(model)
    assert torch.equal(model(**batch(0)).logits, reference)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("key", ["llama-double", "gpt2-core", *slowly("llama-input", "llama-core", "gpt2-double")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_plain_loop_keeps_the_constraint(made: dict[str, tuple[Path, Path]], key: str, optimizer: str) -> None:
    model, archive = load(made, key)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    protect(model, archive)
    stepper = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(8):
        loss = model(**batch(0)).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert len(set(losses)) == len(losses)  # a stale folded weight would repeat a loss
    final = model(**batch(0)).logits
    merge(model)
    torch.testing.assert_close(model(**batch(0)).logits, final, atol=2e-5, rtol=1e-4)
    targets = {record.parameter for record in archive.values()}
    for name, parameter in model.named_parameters():
        assert (name in targets) or torch.equal(parameter, before[name])
    assert leak(archive, before, model) < 5e-6  # float32 rounding of W', not of the method


def test_all_adamw_flavours_agree(made: dict[str, tuple[Path, Path]]) -> None:
    results = []
    for flavour in ("plain", "foreach", "fused"):
        model, archive = load(made)
        protect(model, archive)
        stepper = OPTIMIZERS[flavour]([p for p in model.parameters() if p.requires_grad])
        for step in range(5):
            model(**batch(step)).loss.backward()
            stepper.step()
            stepper.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=1e-4)


def test_gradient_descent_equals_dense_descent_projected_in_float64(made: dict[str, tuple[Path, Path]]) -> None:
    """An independent reference: dense SGD whose step is projected by the constraint's own equation."""
    model, archive = load(made)
    reference = load(made)[0].double()
    projectors = {}
    for name, record in archive.items():
        u, _, vh = torch.linalg.svd(reference.get_parameter(record.parameter).detach())
        k = min(record.shape) // 2
        projectors[record.parameter] = (
            torch.eye(record.shape[0], dtype=torch.float64) - u[:, :k] @ u[:, :k].T,
            torch.eye(record.shape[1], dtype=torch.float64) - vh[:k].T @ vh[:k],
        )
        assert name == record.parameter
    protect(model, archive)
    stepper = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(4):
        model(**batch(step)).loss.backward()
        stepper.step()
        stepper.zero_grad()
        reference.zero_grad()
        reference(**batch(step)).loss.backward()
        with torch.no_grad():
            for name, (left, right) in projectors.items():
                weight = reference.get_parameter(name)
                weight -= 0.05 * left @ weight.grad @ right
    merge(model)
    for name in projectors:
        torch.testing.assert_close(
            model.get_parameter(name).double(), reference.get_parameter(name).detach(), atol=2e-5, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("flavour", ["plain", "fused"])
def test_an_evaluation_between_backward_and_step_does_not_leave_a_stale_weight(
    made: dict[str, tuple[Path, Path]], flavour: str, set_to_none: bool
) -> None:
    def train(evaluate: bool) -> list[float]:
        model, archive = load(made)
        protect(model, archive)
        stepper = OPTIMIZERS[flavour]([p for p in model.parameters() if p.requires_grad])
        losses = []
        for step in range(4):
            loss = model(**batch(step)).loss
            loss.backward()
            if evaluate:
                with torch.no_grad():
                    model(**batch(99))
            stepper.step()
            if evaluate:
                with torch.no_grad():
                    model(**batch(99))
            stepper.zero_grad(set_to_none=set_to_none)
            losses.append(float(loss.detach()))
        with torch.no_grad():
            losses.append(float(model(**batch(0)).loss))
        return losses

    assert train(evaluate=True) == train(evaluate=False)


def test_accumulation_equals_one_batch(made: dict[str, tuple[Path, Path]]) -> None:
    gradients = []
    for parts in (1, 4):
        model, archive = load(made)
        protect(model, archive)
        whole = batch(0, rows=8)["input_ids"]
        for part in whole.chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients(made: dict[str, tuple[Path, Path]]) -> None:
    gradients = []
    for recompute in (False, True):
        model, archive = load(made)
        protect(model, archive)
        model.train()
        if recompute:
            checkpoint_activations(model)
        model(**batch(0), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_values_set_by_hand_and_loaded_states_are_seen(made: dict[str, tuple[Path, Path]]) -> None:
    model, archive = load(made)
    protect(model, archive)
    start = model(**batch(0)).logits
    with torch.no_grad():
        for matrix in protected_matrices(model):
            for a in matrix.coordinates.values:
                a.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    moved = model(**batch(0)).logits
    assert not torch.equal(start, moved)
    state = model.state_dict()
    other, _ = load(made)
    protect(other, archive)
    other(**batch(0))
    other.load_state_dict(state)
    assert torch.equal(other(**batch(0)).logits, moved)


def test_manual_folding_waits_for_refresh(made: dict[str, tuple[Path, Path]]) -> None:
    model, archive = load(made)
    protect(model, archive, fold="manual")
    start = model(**batch(0)).logits
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.01)
    assert torch.equal(model(**batch(0)).logits, start)
    for matrix in protected_matrices(model):
        matrix.refresh()
    assert not torch.equal(model(**batch(0)).logits, start)


def test_blocks_are_units(made: dict[str, tuple[Path, Path]]) -> None:
    model, archive = load(made)
    protect(model, archive)
    blocks = protected_blocks(model)
    assert [block.path for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert [len(block.matrices) for block in blocks] == [7, 7]
    parameters = [id(p) for block in blocks for p in block.parameters]
    assert sorted(parameters) == sorted(id(p) for p in model.parameters() if p.requires_grad)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen fixed sequences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in batch(index, rows=1).items()}


@pytest.mark.parametrize("flavour", ["adamw_torch", "adamw_torch_fused"])
def test_the_hugging_face_trainer(made: dict[str, tuple[Path, Path]], tmp_path: Path, flavour: str) -> None:
    model, archive = load(made)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    protect(model, archive)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim=flavour,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    merge(model)
    assert leak(archive, before, model) < 5e-6


def test_wrong_models_are_refused(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, archive = load(made)
    torch.manual_seed(9)
    with pytest.raises(ArchiveError, match="archive of another model"):
        protect(FAMILIES["llama"](), archive)
    with pytest.raises(ArchiveError, match=r"lacks 14 of them"):
        protect(FAMILIES["gpt2"](), archive)
    with pytest.raises(ArchiveError, match=r"load the model with dtype=torch.float32"):
        protect(AutoModelForCausalLM.from_pretrained(made["llama-double"][0], dtype=torch.bfloat16), archive)
    with pytest.raises(ArchiveError, match="not protected"):
        merge(model)
    protect(model, archive)
    with pytest.raises(ArchiveError, match="protected already"):
        protect(model, archive)


def test_what_was_saved_under_protection_is_told_from_another_model(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, archive = load(made)
    protect(model, archive)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(
        made["llama-double"][0], tmp_path / "saved", dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"]
    )
    with pytest.raises(VerificationError, match=r"saved while it was protected.*call sculptor\.merge"):
        verify(made["llama-double"][0], tmp_path / "saved", archive.path, device="cpu")


def test_shapes_are_named_before_dtypes(made: dict[str, tuple[Path, Path]]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=2))
    with pytest.raises(ArchiveError, match=r"in the archive, \[16, 16\] in the model"):
        protect(other.to(torch.bfloat16), made["llama-double"][1])


def test_a_failed_protect_leaves_the_model_as_it_was(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    from sculptor.archive.shards import save_tensors

    model, archive = load(made)
    shutil.copytree(archive.path, tmp_path / "damaged")
    last = list(archive)[-1]
    file = tmp_path / "damaged" / archive.manifest.tensors[f"{last}.input"].file
    tensors = load_file(file)
    tensors[f"{last}.input"] = -tensors[f"{last}.input"]
    save_tensors(tensors, file)
    with pytest.raises(ArchiveError, match="has changed since it was written"):
        protect(model, tmp_path / "damaged")
    assert not protected_matrices(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_merge_that_overflows_says_so(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", dtype=torch.float16)
    analyze(path, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    protect(model, tmp_path / "archive")
    with torch.no_grad():
        protected_matrices(model)[0].coordinates.values[0].fill_(1e6)
    with pytest.raises(TrainingError, match=r"merged values overflow torch.float16"):
        merge(model)


def test_no_capacity_is_refused(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    import json
    import shutil

    model, archive = load(made)
    shutil.copytree(archive.path, tmp_path / "full")
    content = json.loads((tmp_path / "full" / "archive.json").read_text())
    for record in content["matrices"].values():
        record["rule"]["steps"] = [list(record["rule"]["shape"])]
    content.pop("sha256")
    content["sha256"] = sign(content)
    (tmp_path / "full" / "archive.json").write_text(json.dumps(content))
    with pytest.raises(CapacityError, match="no capacity left: all 14 matrices are frozen"):
        protect(model, tmp_path / "full")


def test_a_bf16_checkpoint_loaded_in_float32_belongs(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    analyze(path, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        reference = model(**batch(0)).logits
        protect(model, tmp_path / "archive")
        assert torch.equal(model(**batch(0)).logits, reference)


def test_gradients_kept_elsewhere_do_not_leave_a_stale_weight(made: dict[str, tuple[Path, Path]]) -> None:
    """A fused step that no version counter sees, with gradients that are put into .grad for the step alone."""
    model, archive = load(made)
    protect(model, archive)
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-2, fused=True)
    kept = torch.autograd.grad(model(**batch(0)).loss, values)
    for value, gradient in zip(values, kept, strict=True):
        value.grad = gradient
    optimizer.step()
    for value in values:
        value.grad = None
    with torch.no_grad():
        seen = model(**batch(1)).loss
    for matrix in protected_matrices(model):
        matrix.refresh()
    with torch.no_grad():
        assert torch.equal(seen, model(**batch(1)).loss)


def test_values_changed_behind_every_counter_are_seen(made: dict[str, tuple[Path, Path]]) -> None:
    model, archive = load(made)
    protect(model, archive)
    before = model(**batch(1)).loss
    value = protected_matrices(model)[0].coordinates.values[0]
    value.data.view(-1).numpy()[:] = 0.1
    assert not torch.equal(before, model(**batch(1)).loss)


@pytest.mark.parametrize("how", ["to", "half"])
def test_a_cast_leaves_coordinates_in_float32(made: dict[str, tuple[Path, Path]], how: str) -> None:
    model, archive = load(made)
    protect(model, archive)
    model = model.to(torch.bfloat16) if how == "to" else model.half()
    wanted = torch.bfloat16 if how == "to" else torch.float16
    values = [p for p in model.parameters() if p.requires_grad]
    assert {value.dtype for value in values} == {torch.float32}
    loss = model(**batch(0)).loss
    loss.backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in values)
    assert {matrix.module.weight.dtype for matrix in protected_matrices(model)} == {wanted}
    torch.optim.AdamW(values, lr=1e-3).step()
    merge(model)


@pytest.mark.slow
def test_layerdrop_trains_what_is_left(tmp_path: Path) -> None:
    from conftest import task_rows, write_rows
    from transformers import BartConfig, BartForConditionalGeneration

    from sculptor import TrainSettings, train, verify

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, encoder_layerdrop=0.9, decoder_layerdrop=0.9,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, decoder_start_token_id=1, forced_eos_token_id=0,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    from conftest import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(tmp_path / "model", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    for offload in ("none", "disk"):
        settings = TrainSettings(max_steps=4, batch_size=8, micro_batch_size=2, offload=offload, device="cpu")
        train(tmp_path / "model", tmp_path / "archive", [rows], tmp_path / offload, settings)
        assert verify(tmp_path / "model", tmp_path / offload, tmp_path / "archive", device="cpu").passed


@pytest.mark.parametrize("how", ["in place", "behind autograd", "in its place", "moved", "copied"])
def test_what_others_write_into_a_folded_weight_is_not_lost_in_silence(
    made: dict[str, tuple[Path, Path]], how: str
) -> None:
    model, archive = load(made)
    protect(model, archive)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model(**batch(0)).loss.backward()
    optimizer.step()
    weight = model.model.layers[0].mlp.up_proj.weight
    delta = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    if how == "in its place":  # as PEFT merges safely
        weight.data = weight.data + delta
    elif how == "behind autograd":  # as it merges
        weight.data += delta
    else:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(delta)
    what: dict[str, Callable[[], Any]] = {"moved": model.float, "copied": lambda: copy.deepcopy(model)}
    with pytest.raises(TrainingError, match=r"up_proj.weight: something .* was written into .* call sculptor.merge"):
        what.get(how, lambda: merge(model))()
    model.model.layers[0].mlp.up_proj.parametrizations.weight[0].source.expire()
    merge(model)
    assert not protected_matrices(model)


def test_a_diverged_run_is_said_to_be_one(made: dict[str, tuple[Path, Path]]) -> None:
    model, archive = load(made)
    protect(model, archive)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
        model(**batch(0))
    with pytest.raises(TrainingError, match=r"not finite|overflow"):
        merge(model)


def test_a_new_head_is_not_frozen_in_silence(made: dict[str, tuple[Path, Path]]) -> None:
    path, archive = made["llama-double"]
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    with pytest.warns(UserWarning, match=r"^score\.weight is new to LlamaForCausalLM, .*; to train it: ") as told:
        protect(model, archive)
    assert not model.score.weight.requires_grad
    exec(str(told[0].message).rpartition("to train it: ")[2], {"model": model})
    assert model.score.weight.requires_grad
    assert all(
        "parametrizations" in name for name, p in model.named_parameters() if p.requires_grad and name != "score.weight"
    )


@pytest.mark.filterwarnings("error")
def test_there_is_no_new_head_where_there_is_none(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    path, archive = made["llama-double"]
    protect(AutoModel.from_pretrained(path), archive)
    headed = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    headed.save_pretrained(tmp_path / "headed")
    make_tokenizer().save_pretrained(tmp_path / "headed")
    analyze(tmp_path / "headed", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))

    class Own(type(headed)):  # type: ignore[misc]
        """Somebody's own, of the same head."""

    protect(Own.from_pretrained(tmp_path / "headed"), tmp_path / "archive")

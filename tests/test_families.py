"""Every family that transformers can build small: protected, trained, streamed, scored as a plain loop scores it, or refused.

`pytest -m slow tests/test_families.py` writes docs/models.md from what it saw when SCULPTOR_WRITE_MODELS is set.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS, make_tokenizer, write_rows
from families import SUPPORTED, mappings, tiny
from packaging.version import Version

import sculptor
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [
    {
        "prompt": " ".join(WORDS[(7 * i + 3 * j) % 38] for j in range(3 + (5 * i) % 9)),
        "completion": " ".join(WORDS[(i + j) % 4] for j in range(1 + i % 3)),
    }
    for i in range(6)
]
TEXTS = [{"text": row["prompt"]} for row in PAIRS]
CASES = [(kind, name) for kind, names in SUPPORTED.items() for name in names]
OLDER = Version(transformers.__version__) < Version("5.24")
FAST = [("causal", "llama")]


def reference_loss(model: Any, tokenizer: Any, kind: str) -> float:
    """Nats per target token by a plain loop: one row at a time, no padding, no cache."""
    total, count = 0.0, 0
    for row in PAIRS:
        prompt = tokenizer(row["prompt"]).input_ids
        target = [*tokenizer(row["completion"]).input_ids, 0]
        with torch.no_grad():
            if kind == "causal":
                found = model(torch.tensor([prompt + target]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            else:
                source, wanted = torch.tensor([prompt]), torch.tensor([target])
                try:
                    found = model(input_ids=source, labels=wanted).logits[0]
                except AttributeError:  # a configuration without a start token
                    start = torch.tensor([[model.config.pad_token_id]])
                    found = model(input_ids=source, decoder_input_ids=torch.cat([start, wanted[:, :-1]], 1)).logits[0]
        total -= float(found.double().log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())
        count += len(target)
    return total / count


def run_family(kind: str, name: str, path: Path) -> dict[str, Any]:
    """Everything a user would do with a family; asserts what has to hold."""
    class_name = mappings()[kind][name]
    class_name = class_name if isinstance(class_name, str) else class_name[0]
    tiny(name, class_name).save_pretrained(path / "model")
    make_tokenizer(wrapped=kind == "masked").save_pretrained(path / "model")
    rows = write_rows(path / "rows.jsonl", TEXTS if kind == "masked" else PAIRS)
    model = path / "model"

    losses = {
        (size, offload): sculptor.evaluate(model, [rows], device="cpu", batch_size=size, offload=offload).loss
        for offload in ("none", "disk")
        for size in (1, 2, 6)
    }
    if kind == "masked":
        expected = losses[1, "none"]
    else:
        plain = getattr(transformers, class_name).from_pretrained(model, dtype=torch.float32).eval()
        plain.config.use_cache = False
        expected = reference_loss(plain, transformers.AutoTokenizer.from_pretrained(model), kind)
    assert losses == pytest.approx(dict.fromkeys(losses, expected), abs=1e-5)

    sculptor.analyze(model, path / "weights", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    curvature = sculptor.AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu")
    report = sculptor.analyze(model, path / "curvature", curvature)
    first, last = {}, {}
    for offload in ("none", "disk"):
        for size in (1, 2, 6):
            settings = sculptor.TrainSettings(
                max_steps=1 if size < 6 else 2, batch_size=6, micro_batch_size=size, learning_rate=1e-3, device="cpu",
                offload=offload, seed=3,
            )  # fmt: skip
            output = path / f"tuned-{offload}-{size}"
            loop = sculptor.train(model, path / "weights", [rows], output, settings).loop
            first[offload, size], last[offload, size] = loop.first_loss, loop.last_loss
        assert sculptor.verify(model, path / f"tuned-{offload}-6", path / "weights", device="cpu").passed
    if kind != "masked" and not _drops_out(model):
        assert first == pytest.approx(dict.fromkeys(first, expected), abs=1e-5)
    assert last["none", 6] == pytest.approx(last["disk", 6], abs=1e-5)
    architecture = inspect_architecture(open_checkpoint(model))
    return {
        "family": name,
        "class": class_name,
        "protected": sorted({target.role for target in architecture.targets}),
        "frozen": [f"{item.role} ({item.reason})" for item in report.not_targeted],
    }


def _drops_out(model: Path) -> bool:
    """Whether the family trains with dropout by default, so that a training loss is not an evaluation's."""
    config = json.loads((model / "config.json").read_text())
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in config.items())


@pytest.mark.parametrize(("kind", "name"), FAST)
def test_some_families(kind: str, name: str, tmp_path: Path) -> None:
    run_family(kind, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_family(kind: str, name: str, tmp_path: Path) -> None:
    if OLDER and name in ("internlm3", "umt5"):
        pytest.skip("not there yet, or refused: padding moves what it predicts")
    found = run_family(kind, name, tmp_path)
    place = os.environ.get("SCULPTOR_WRITE_MODELS")
    if place is not None:
        Path(place).mkdir(parents=True, exist_ok=True)
        (Path(place) / f"{kind}-{name}.json").write_text(json.dumps(found))
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"| {name} | {found['class']} |" in page or place is not None


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("causal", "bert", "no causal model as it is configured"),
        ("causal", "xlnet", "no causal model as it is configured|does not run on text alone"),
        ("causal", "prophetnet", "padding moves what"),
        ("masked", "convbert", "padding moves what"),
        ("masked", "xmod", "does not run on text alone"),
        ("masked", "ibert", "no linear maps in repeated blocks"),
    ],
)
def test_a_family_that_is_refused(cli: Callable[..., Any], kind: str, name: str, message: str, tmp_path: Path) -> None:
    import re

    tiny(name, mappings()[kind][name]).save_pretrained(tmp_path / "model")
    make_tokenizer(wrapped=kind == "masked").save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", TEXTS)
    found = cli("evaluate", tmp_path / "model", "--data", rows, "--device", "cpu")
    assert found.code == 1
    assert found.err.count("\n") == 1
    assert re.search(message, found.err)


def test_the_page_names_what_is_tested() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert len(CASES) >= 60
    missing = [name for _, name in CASES if f"\n| {name} | " not in page]
    assert missing == []


@pytest.mark.parametrize(
    ("kind", "name", "role", "reason"),
    [
        ("causal", "bart", "encoder_attn", "no text reaches it"),
        ("causal", "llama4_text", "router", "no plain linear map"),
        ("causal", "mamba", "dt_proj", "no calibration row reaches it"),
        ("masked", "nomic_bert", "q_proj", "split or joined when it is loaded"),
    ],
)
def test_what_is_left_out_is_named(kind: str, name: str, role: str, reason: str, tmp_path: Path) -> None:
    tiny(name, mappings()[kind][name]).save_pretrained(tmp_path / "model")
    make_tokenizer(wrapped=kind == "masked").save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", TEXTS if kind == "masked" else PAIRS)
    settings = sculptor.AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu")
    report = sculptor.analyze(tmp_path / "model", tmp_path / "archive", settings)
    assert any(role in item.role and item.reason == reason for item in report.not_targeted)
    training = sculptor.TrainSettings(max_steps=1, batch_size=3, device="cpu")
    sculptor.train(tmp_path / "model", tmp_path / "archive", [rows], tmp_path / "out", training)
    assert sculptor.verify(tmp_path / "model", tmp_path / "out", tmp_path / "archive", device="cpu").passed


def test_every_matrix_below_a_numbered_path_is_protected_or_named(tmp_path: Path) -> None:
    """Towers beside the language model, too: a vision model's blocks, a projector."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       eos_token_id=0, pad_token_id=1)  # fmt: skip
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                image_size=16, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    architecture = inspect_architecture(open_checkpoint(tmp_path / "model"))
    named = sum(item.num_parameters for item in architecture.not_targeted)
    named += sum(target.shape[0] * target.shape[1] for target in architecture.targets)
    below = sum(
        value.numel()
        for name, value in model.named_parameters()
        if value.ndim >= 2 and any(part.isdigit() for part in name.split("."))
    )
    assert named == below
    assert {item.reason for item in architecture.not_targeted} >= {"no text reaches it"}
    assert not any("vision" in target.role for target in architecture.targets)
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    for basis in ("weights", "curvature"):
        data = () if basis == "weights" else (str(rows),)
        settings = sculptor.AnalyzeSettings(basis=basis, data=data, device="cpu")  # type: ignore[arg-type]
        sculptor.analyze(tmp_path / "model", tmp_path / basis, settings)
    losses = [
        sculptor.evaluate(tmp_path / "model", [rows], device="cpu", offload=offload).loss  # type: ignore[arg-type]
        for offload in ("none", "disk")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for offload in ("none", "disk"):
        training = sculptor.TrainSettings(max_steps=2, batch_size=3, device="cpu", offload=offload)  # type: ignore[arg-type]
        sculptor.train(tmp_path / "model", tmp_path / "curvature", [rows], tmp_path / offload, training)
        found = sculptor.verify(tmp_path / "model", tmp_path / offload, tmp_path / "curvature", device="cpu")
        assert found.passed


def refused(found: Any, message: str) -> bool:
    return found.code == 1 and found.err.count("\n") == 1 and message in found.err


def wrapper(name: str) -> Any:
    """A small model that asks for sound or pictures beside text."""
    if name == "whisper":
        config: Any = transformers.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=30, max_target_positions=32,
            pad_token_id=1, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
            suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
        return transformers.WhisperForConditionalGeneration(config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    text = {"vocab_size": 64, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_key_value_heads": 4,
            "head_dim": 8, "num_local_experts": 2, "max_position_embeddings": 64}  # fmt: skip
    vision = {"intermediate_size": 128, "vision_output_dim": 32, "image_size": 28, "patch_size": 14,
              "projector_input_dim": 32, "projector_output_dim": 32}  # fmt: skip
    config = transformers.Llama4Config(text_config=sizes | ids | text, vision_config=sizes | vision)
    return transformers.Llama4ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["whisper", "llama4"])
def test_what_does_not_run_on_text_alone_is_refused_alike_everywhere(
    cli: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    model, rows = tmp_path / "model", write_rows(tmp_path / "rows.jsonl", PAIRS)
    wrapper(name).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    found = cli("evaluate", model, "--data", rows, "--device", "cpu")
    if found.code == 0:
        pytest.skip(f"transformers {transformers.__version__} runs {name} on text alone")
    message = found.err
    assert "does not run on text alone" in message
    assert refused(cli("analyze", model, "-o", tmp_path / "archive", "--preserve", 0.5, "--device", "cpu"), message)
    assert refused(cli("estimate", model), message)
    assert refused(cli("data", rows, "--model", model), message)
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize("name", ["vit", "clip", "siglip"])
def test_what_is_no_language_model_is_refused_before_work(cli: Callable[..., Any], name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 64, "max_position_embeddings": 64}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    model: Any
    if name == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**vision))
    elif name == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "model")
    found = cli("analyze", tmp_path / "model", "-o", tmp_path / "archive", "--preserve", 0.5, "--device", "cpu")
    assert refused(found, "language")
    assert refused(cli("estimate", tmp_path / "model"), "language")
    assert not (tmp_path / "archive").exists()

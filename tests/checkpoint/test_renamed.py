"""Saving a model anew names tensors as today, and leaves out what it does not read: verify sees through that, and no further."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_checkpoint
from safetensors.torch import load_file, save_file

import sculptor
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.renamed import in_common_names
from sculptor.errors import VerificationError
from sculptor.report.verify import verify_text

Tensors = dict[str, torch.Tensor]


def bert_of_old(tensors: Tensors) -> Tensors:
    named = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    return named | {"cls.seq_relationship.weight": torch.ones(2, 32)}


OLD: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "prefix": ("gpt2", lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()}),
    "buffer": ("gpt2", lambda tensors: tensors | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}),
    "tied twice": (
        "gpt2",
        lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
    ),
    "frequencies": ("llama", lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "names and a head": ("bert", bert_of_old),
}


def change(path: Path, how: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    save_file(how(load_file(file)), file, {"format": "pt"})


@pytest.fixture(params=OLD)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base in an older form, and what a loop of one's own saved of it."""
    family, older = OLD[request.param]
    base = save_checkpoint(tmp_path / "base", family)
    change(base, older)
    sculptor.analyze(base, tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    cls: Any = getattr(transformers, Checkpoint(base).config["architectures"][0])
    model = cls.from_pretrained(base).eval()
    sculptor.protect(model, tmp_path / "archive")
    ids = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(sculptor.parameter_groups(model), lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    sculptor.merge(model).save_pretrained(tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "out")
    return tmp_path


def verify(path: Path) -> Any:
    return sculptor.verify(path / "base", path / "out", path / "archive", device="cpu")


def test_what_was_saved_anew_verifies_under_its_old_names(saved: Path) -> None:
    found = verify(saved)
    assert (found.passed, found.num_changed) == (True, found.num_targets)


def test_a_changed_matrix_fails_whatever_it_is_called(saved: Path) -> None:
    name = next(
        name
        for name, value in load_file(saved / "out" / "model.safetensors").items()
        if ".0." in name and value.ndim == 2
    )
    change(saved / "out", lambda tensors: tensors | {name: tensors[name] + 0.1})
    assert not verify(saved).passed


@pytest.mark.parametrize("what", ["lost", "added"])
def test_what_the_model_reads_is_missed_and_what_is_new_is_seen(saved: Path, what: str) -> None:
    def damage(tensors: Tensors) -> Tensors:
        if what == "added":
            return tensors | {"model.layers.7.mlp.up_proj.weight": torch.ones(3, 3)}
        lost = next(
            name
            for name in tensors
            if name.endswith(("norm.weight", "ln_1.weight", "LayerNorm.weight", "LayerNorm.gamma"))
        )
        return {name: value for name, value in tensors.items() if name != lost}

    change(saved / "out", damage)
    with pytest.raises(VerificationError, match="1 missing, 0 added" if what == "lost" else "0 missing, 1 added"):
        verify(saved)


def test_a_second_copy_that_is_another_is_not_left_out(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "gpt2")
    out = save_checkpoint(tmp_path / "out", "gpt2")
    change(base, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    first, second, *_ = in_common_names(Checkpoint(base), Checkpoint(out))
    assert set(first) - set(second) == {"lm_head.weight"}


@pytest.fixture
def copied(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A base, its archive, and a copy of it as what was made of it."""
    base = save_checkpoint(tmp_path / "base", request.param)
    sculptor.analyze(base, tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    shutil.copytree(base, tmp_path / "out")
    return tmp_path


def named(how: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {how(name): value for name, value in tensors.items()}


PARTS: list[tuple[str, Callable[[str], str]]] = [
    ("llama", lambda name: name.removeprefix("model.") if ".layers.1.mlp" in name else name),
    ("llama", lambda name: name.removeprefix("model.") if ".mlp." in name else name),
    ("llama", lambda name: f"model.{name}" if name.startswith("model.") else name),
    ("llama", lambda name: f"model.{name}" if name.startswith("model.layers.0") else name),
    ("mixtral", lambda name: name.replace("layers.0.block_sparse_moe.gate", "layers.0.mlp.gate")),
    ("mixtral", lambda name: name.replace("block_sparse_moe.gate", "mlp.gate")),
]


@pytest.mark.parametrize(("copied", "how"), PARTS, indirect=["copied"])
def test_names_that_saving_never_makes_do_not_pass(copied: Path, how: Callable[[str], str]) -> None:
    """transformers 5 finds every tensor under them; others find random weights in a part of the model."""
    change(copied / "out", named(how))
    found = verify(copied)
    assert not found.passed
    assert found.differences[0].startswith("names of tensors: ")
    assert verify_text(found).endswith("FAILED: 1 difference in what else is loaded")


@pytest.mark.parametrize("copied", ["llama"], indirect=True)
def test_other_names_for_all_are_told(copied: Path) -> None:
    change(copied / "out", named(lambda name: name.removeprefix("model.")))
    found = verify(copied)
    assert found.passed
    assert "tensors have other names, first embed_tokens.weight for " in found.notes[0]
    assert f"note: {found.notes[0]}" in verify_text(found)


@pytest.mark.parametrize("copied", ["llama"], indirect=True)
def test_what_is_left_out_is_told(copied: Path) -> None:
    """Layers that predict further tokens, which transformers leaves alone and servers use."""
    change(copied / "base", lambda tensors: tensors | {"model.layers.2.eh_proj.weight": torch.ones(3, 6)})
    shutil.rmtree(copied / "archive")
    sculptor.analyze(copied / "base", copied / "archive", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    found = verify(copied)
    assert found.passed
    assert found.notes == (
        "left out of the base, which transformers does not load, or has elsewhere: model.layers.2.eh_proj.weight",
    )


@pytest.mark.parametrize("copied", ["llama"], indirect=True)
def test_what_older_programs_look_for_elsewhere_is_told(copied: Path) -> None:
    file = copied / "base" / "config.json"
    config = json.loads(file.read_text())
    config.pop("rope_parameters")
    file.write_text(json.dumps(config | {"rope_theta": 500000.0}))
    transformers.AutoModelForCausalLM.from_pretrained(copied / "base").save_pretrained(copied / "out")
    shutil.rmtree(copied / "archive")
    sculptor.analyze(copied / "base", copied / "archive", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    found = verify(copied)
    assert found.passed
    (note,) = found.notes
    assert note.startswith("config.json tells rope_theta in rope_parameters alone")
    assert note.endswith("it was 500000.0")

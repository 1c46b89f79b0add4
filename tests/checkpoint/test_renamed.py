"""Saving a model anew names tensors as today, and leaves out what it does not read: verify sees through that, and no further."""

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
    first, second = in_common_names(Checkpoint(base), Checkpoint(out))
    assert set(first) - set(second) == {"lm_head.weight"}

"""Which tensors of two checkpoints belong together, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, slowly
from edited import as_model, change_tensors, save_tuned, tensors_of

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.edits.pairs import open_pairs
from sculptor.errors import CheckpointError, EditError

COVERS = ["sculptor.edits.passes"]


@pytest.mark.parametrize("copy_base", [True, False])
@pytest.mark.parametrize("family", ["llama-tied", "mixtral", *slowly("llama", "t5")])
def test_every_tensor_has_its_partner(family: str, copy_base: bool, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", family)
    tuned = save_tuned(base, tmp_path / "tuned", max_shard_size="20KB")
    pairs = open_pairs(base, tuned, copy_base=copy_base)
    before, after = tensors_of(base), tensors_of(tuned)
    assert set(pairs.by_name) == set(before)
    assert pairs.source.path == (base if copy_base else tuned)
    for name in pairs.by_name:
        found = pairs.read(name, None, pairs.source[name])
        assert torch.equal(found[0], before[name])
        assert torch.equal(found[1], after[name])


@pytest.mark.parametrize(("layout", "family"), [("unprefixed", "llama"), ("tied twice", "llama-tied")])
@pytest.mark.parametrize("of_base", [True, False])
@pytest.mark.parametrize("copy_base", [True, False])
def test_names_may_differ_where_parameters_do_not(
    layout: str, family: str, of_base: bool, copy_base: bool, tmp_path: Path
) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    other = as_model(layout, tmp_path / "other", model)
    base, tuned = (other, model) if of_base else (model, other)
    pairs = open_pairs(base, tuned, copy_base=copy_base)
    assert set(pairs.by_name) == set(open_checkpoint(base if copy_base else tuned))
    for name in pairs.by_name:
        found = pairs.read(name, None, pairs.source[name])
        assert torch.equal(*found)


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda found: found.pop(NORM), f"no tensor for {NORM}"),
    "shape": (lambda found: found.update({NORM: torch.zeros(7)}), r"norm.weight has shape \[(7|32)\]"),
    "integers": (lambda found: found.update({NORM: torch.zeros(32, dtype=torch.int32)}), f"{NORM} is int32"),
}


@pytest.mark.parametrize("copy_base", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_another_model_is_refused(case: str, copy_base: bool, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    change, message = REFUSED[case]
    change_tensors(tuned, change)
    with pytest.raises(EditError, match=message) as error:
        open_pairs(base, tuned, copy_base=copy_base)
    assert "; an edit needs " in str(error.value)


@pytest.mark.parametrize("copy_base", [True, False])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_values_that_are_not_finite_name_their_file(which: str, copy_base: bool, tmp_path: Path) -> None:
    paths = {"base": save_checkpoint(tmp_path / "base")}
    paths["tuned"] = save_tuned(paths["base"], tmp_path / "tuned")
    change_tensors(paths[which], lambda found: found[NORM].fill_(float("nan")))
    pairs = open_pairs(paths["base"], paths["tuned"], copy_base=copy_base)
    with pytest.raises(CheckpointError, match=rf"{paths[which]}: tensor {NORM} has 32 NaN"):
        pairs.read(NORM, None, pairs.source[NORM])

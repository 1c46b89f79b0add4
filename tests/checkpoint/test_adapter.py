"""LoRA adapters as PEFT saves them, against PEFT's own merge; what is not plain LoRA is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from edited import change_tensors, save_adapter, tensors_of
from fuzz.readers import save_adapter as save_by_hand

from sculptor.checkpoint.adapter import Adapter
from sculptor.checkpoint.places import find_places
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import CheckpointError

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def opened(base: Path, adapter: Path) -> Adapter:
    checkpoint = open_checkpoint(base)
    return Adapter(adapter, checkpoint, find_places(checkpoint))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 40, "up_proj": 2},
        },
    ),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "some": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": ["layers.0.self_attn.v_proj"],
            "layers_to_transform": [0, 1],
        },
    ),
    "pattern": ("llama", {"target_modules": r".*\.1\..*_proj"}),
    "one block of two stacks": ("t5", {"target_modules": ["q", "v"], "layers_to_transform": [1]}),
    "one layer": ("llama", {"target_modules": ["mlp.down_proj"], "layers_to_transform": 1}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "seq2seq": ("t5", {"target_modules": ["q", "v", "wo"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = save_checkpoint(tmp_path / "base", family)
    model = save_adapter(base, tmp_path / "adapter", **settings)
    adapter = opened(base, tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    changed = {name for name, value in tensors_of(base).items() if not torch.equal(merged[name], value)}
    assert changed == set(adapter)
    assert len(adapter) == len(changed)
    for name in changed:
        assert adapter[name].dtype == torch.float64
        torch.testing.assert_close(adapter[name].float(), merged[name], atol=2e-6, rtol=1e-5)
    with pytest.raises(KeyError):
        _ = adapter["nothing"]


def configured(change: dict[str, Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: change_tensors(path, lambda found: found.update({new: found.pop(old)}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (configured({"use_dora": True}), "use_dora is not supported"),
    "bias": (configured({"bias": "all"}), "bias 'all' is not supported"),
    "lora_bias": (configured({"lora_bias": True}), "lora_bias is not supported"),
    "tokens": (configured({"trainable_token_indices": [1]}), "trainable_token_indices is not supported"),
    "other": (configured({"peft_type": "IA3"}), "peft_type 'IA3' is not supported"),
    "new": (configured({"use_something": {"a": 1}}), "use_something is not supported"),
    "pissa": (configured({"init_lora_weights": "pissa"}), "init_lora_weights 'pissa' changes the base's own weights"),
    "rank": (configured({"r": 0}), "a rank below 1"),
    "pattern": (configured({"rank_pattern": {"(": 2}}), "'\\(' is no pattern"),
    "type": (configured({"lora_alpha": "x"}), "lora_alpha"),
    "json": (lambda path: (path / "adapter_config.json").write_text("{") and None, "damaged"),
    "pickle": (lambda path: (path / "adapter_model.safetensors").unlink(), "only safetensors is read"),
    "empty": (lambda path: change_tensors(path, lambda found: found.clear()), "holds no tensor"),
    "half": (lambda path: change_tensors(path, lambda found: found.pop(FIRST)), "no A for model.layers.0"),
    "nan": (lambda path: change_tensors(path, lambda found: found[FIRST].fill_(float("nan"))), "NaN or infinite"),
    "shape": (
        lambda path: change_tensors(path, lambda found: found.update({FIRST: torch.zeros(4, 7)})),
        "do not make a change of model.layers.0.self_attn.q_proj.weight",
    ),
    "target": (configured({"target_modules": ["v_proj"]}), r"leaves out \(target_modules\)"),
    "target pattern": (configured({"target_modules": ".*v_proj"}), r"leaves out \(target_modules\)"),
    "exclude": (configured({"exclude_modules": ["self_attn.q_proj"]}), r"leaves out \(exclude_modules\)"),
    "exclude pattern": (configured({"exclude_modules": ".*layers.0.*"}), r"leaves out \(exclude_modules\)"),
    "layers": (configured({"layers_to_transform": [1]}), r"leaves out \(layers_to_transform\)"),
    "layer": (configured({"layers_to_transform": 1}), r"leaves out \(layers_to_transform\)"),
    "no pattern": (configured({"target_modules": "("}), r"'\(' is no pattern"),
    "magnitude": (renamed(FIRST, FIRST.replace("lora_A", "lora_magnitude_vector")), "is of no plain LoRA"),
    "module": (renamed(FIRST, FIRST.replace("q_proj", "w_proj")), "is it the adapter's base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(case: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    base, adapter = plain
    shutil.copytree(adapter, tmp_path / "adapter")
    change, message = REFUSED[case]
    change(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message) as error:
        list(opened(base, tmp_path / "adapter").values())
    assert str(tmp_path / "adapter") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("adapter")
    base = save_checkpoint(path / "base")
    save_adapter(base, path / "adapter", target_modules=["q_proj"])
    return base, path / "adapter"


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "llama-tied")
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head.weight, which is tied to another parameter"):
        opened(base, tmp_path / "adapter")


def test_another_base_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is it the adapter's base\?"):
        opened(save_checkpoint(tmp_path / "other", "gpt2"), plain[1])


def test_a_rank_that_is_not_that_of_the_tensors_is_refused(tmp_path: Path) -> None:
    """It divides the scale: all of the change would be too large or too small."""
    base, path = open_checkpoint(save_checkpoint(tmp_path / "base")), save_by_hand(tmp_path / "adapter")
    assert Adapter(path, base, find_places(base))
    file = path / "adapter_config.json"
    file.write_text(file.read_text().replace('"q_proj": 2', '"q_proj": 4'))
    with pytest.raises(
        CheckpointError, match=r"lora_A.weight is of rank 2, by adapter_config.json of 4, which decides the"
    ):
        Adapter(path, base, find_places(base))

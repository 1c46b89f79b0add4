"""Roles, depths and shared names, by structure."""

from pathlib import Path

import pytest
from conftest import save_checkpoint

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.places import find_places
from sculptor.checkpoint.reader import open_checkpoint


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_every_tensor_has_a_place_and_matrices_the_role_of_the_architecture(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", family))
    places = find_places(checkpoint)
    assert set(places) == set(checkpoint)
    for target in inspect_architecture(checkpoint).targets:
        place = places[target.tensor]
        assert (place.transposed, place.parameter) == (target.transposed, target.parameter)
        # Of experts that loading stacks, an edit sees the parameter, an archive each matrix in it.
        assert place.role == target.role or (target.window.rows is not None and place.role in target.parameter)
        assert place.depth == target.index  # two blocks in each stack: the first is 0, the last 1


def test_depth_is_counted_in_each_stack(tmp_path: Path) -> None:
    places = find_places(open_checkpoint(save_checkpoint(tmp_path / "model", "t5")))
    for stack in ("encoder", "decoder"):
        for i in (0, 1):
            inner = places[f"{stack}.block.{i}.layer.0.SelfAttention.q.weight"]
            assert (inner.depth, inner.role) == (i, f"{stack}.layer.0.SelfAttention.q")
        assert places[f"{stack}.final_layer_norm.weight"].depth is None
    assert places["shared.weight"].depth is None
    assert "decoder.embed_tokens.weight" in places["shared.weight"].tied


def test_tied_parameters_have_one_name(tmp_path: Path) -> None:
    tied = find_places(open_checkpoint(save_checkpoint(tmp_path / "tied", "llama-tied")))
    assert tied["model.embed_tokens.weight"].tied == ("lm_head.weight",)
    free = find_places(open_checkpoint(save_checkpoint(tmp_path / "free", "llama")))
    assert not any(place.tied for place in free.values())


def test_what_loading_joins_is_not_whole(tmp_path: Path) -> None:
    places = find_places(open_checkpoint(save_checkpoint(tmp_path / "model", "mixtral")))
    experts = {name: place for name, place in places.items() if ".experts." in name}
    assert experts
    assert not any(place.whole for place in experts.values())
    assert {place.role for place in experts.values()} == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert all(place.whole for name, place in places.items() if name not in experts)


def test_a_stack_of_one_block_begins_and_ends_there(tmp_path: Path) -> None:
    import transformers
    from conftest import GROUPED, IDS, make_tokenizer

    config = transformers.LlamaConfig(**(GROUPED | IDS | {"num_hidden_layers": 1}))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    places = find_places(open_checkpoint(tmp_path / "model"))
    assert places["model.layers.0.self_attn.q_proj.weight"].depth == 0

"""The adaptive rank, its undefined cases, and the measured importance against a plain computation."""

from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.analysis.ranks import adaptive_retention, measure_cosines, normalize_importance, protected_count
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import encode
from sculptor.data.rows import read_rows
from sculptor.errors import SettingsError
from sculptor.model.load import load_model
from sculptor.progress import silent


def test_retention_is_the_paper_s_formula() -> None:
    assert adaptive_retention(1.0, 0.1, 0.8) == pytest.approx(0.8)
    assert adaptive_retention(0.5, 0.1, 0.8) == pytest.approx(0.45)
    assert adaptive_retention(-0.3, 0.1, 0.8) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("retention", "shape", "k"),
    [(0.5, (7, 9), 3), (0.29, (100, 200), 29), (1.7, (8, 8), 7), (1.0, (5, 9), 4), (0.0, (5, 5), 0), (0.9, (1, 4), 0)],
)
def test_one_direction_always_stays_free(retention: float, shape: tuple[int, int], k: int) -> None:
    assert protected_count(retention, shape) == k


def test_importance_has_mean_1() -> None:
    found = normalize_importance({"a": 0.2, "b": 0.6, "c": -0.2})
    assert sum(found.values()) / 3 == pytest.approx(1.0)
    assert normalize_importance({"a": -0.5, "b": 0.1}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_cosines_equal_a_plain_computation(tmp_path: Path, family: str) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m", family)), torch.device("cpu"))
    rows = read_rows([write_rows(tmp_path / "d.jsonl", task_rows("text" if family == "bert" else "pairs", 6))])
    examples = encode(rows, loaded.tokenizer, loaded.kind, 32).examples
    targets = loaded.architecture.targets
    bar = silent(total=1, desc="", unit="")
    found = measure_cosines(loaded, targets, examples, 0, bar)
    assert found.keys() == {target.name for target in targets}
    assert all(-1 <= value <= 1 for value in found.values())
    if family != "llama":
        return
    # Independent: hidden states from the model's own output, the square map by hand.
    block: list[float] = []
    query: list[float] = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            states = loaded.model.model(ids, output_hidden_states=True).hidden_states
            layer = loaded.model.model.layers[0]
            normed = layer.input_layernorm(states[0])
            y = layer.self_attn.q_proj(normed)
        block += torch.cosine_similarity(states[0][0].double(), states[1][0].double(), dim=1).tolist()
        query += torch.cosine_similarity(normed[0].double(), y[0].double(), dim=1).tolist()
    by_role = {target.role: found[target.name] for target in targets if target.index == 0}
    assert by_role["self_attn.q_proj"] == pytest.approx(sum(query) / len(query), abs=1e-6)
    assert by_role["mlp.up_proj"] == pytest.approx(sum(block) / len(block), abs=1e-6)
    assert by_role["mlp.down_proj"] == by_role["mlp.up_proj"] == by_role["self_attn.k_proj"]


def test_data_changes_ranks_and_none_means_the_target(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    data = write_rows(tmp_path / "d.jsonl", task_rows())
    analyze(path, tmp_path / "plain", AnalyzeSettings(device="cpu"))
    analyze(path, tmp_path / "adaptive", AnalyzeSettings(device="cpu", data=(str(data),)))
    plain, adaptive = Archive(tmp_path / "plain"), Archive(tmp_path / "adaptive")
    assert all(record.retention == 0.8 and record.importance is None for record in plain.values())
    assert all(record.preserved == int(0.8 * min(record.shape)) / min(record.shape) for record in plain.values())
    importance = [record.importance for record in adaptive.values()]
    assert sum(i for i in importance if i is not None) / len(importance) == pytest.approx(1.0)
    assert len({record.preserved for record in adaptive.values()}) > 2
    for record in adaptive.values():
        assert record.importance is not None
        assert record.retention == pytest.approx(0.1 + max(0, record.importance) * 0.7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preserve": 1.5}, "--preserve 1.5: expected a share between 0 and 1, like 0.5"),
        ({"preserve": -0.1}, "--preserve -0.1"),
        ({"preserve": 1.0}, "--preserve 1: no direction would be left"),
        ({"preserve": float("nan")}, "--preserve nan"),
        ({"preserve": 0.5, "data": ("x",)}, "--data without effect"),
        ({"preserve": 0.5, "min_retention": 0.2}, "--min-retention without effect"),
        ({"min_retention": 0.9}, "--min-retention 0.9 is above --target-retention 0.8"),
        ({"target_retention": 2}, "--target-retention 2"),
    ],
)
def test_contradictions_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AnalyzeSettings(**wrong)  # type: ignore[arg-type]

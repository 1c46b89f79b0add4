"""The measured importance against a plain computation."""

from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.analysis.cosines import measure_cosines
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import encode
from sculptor.data.rows import read_rows
from sculptor.methods.staircase import StaircaseRule
from sculptor.model.load import load_model
from sculptor.progress import silent


def rules(archive: Archive) -> list[StaircaseRule]:
    found = [record.rule for record in archive.values()]
    return [rule for rule in found if isinstance(rule, StaircaseRule)]


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
    analyze(path, tmp_path / "plain", AnalyzeSettings(basis="weights", device="cpu"))
    analyze(path, tmp_path / "adaptive", AnalyzeSettings(basis="weights", device="cpu", data=(str(data),)))
    plain, adaptive = Archive(tmp_path / "plain"), Archive(tmp_path / "adaptive")
    assert all(rule.retention == 0.8 and rule.importance is None for rule in rules(plain))
    assert all(rule.figures().preserved == int(0.8 * min(rule.shape)) / min(rule.shape) for rule in rules(plain))
    importance = [rule.importance for rule in rules(adaptive)]
    assert sum(i for i in importance if i is not None) / len(importance) == pytest.approx(1.0)
    assert len({rule.figures().preserved for rule in rules(adaptive)}) > 2
    for rule in rules(adaptive):
        assert rule.importance is not None
        assert rule.retention == pytest.approx(0.1 + max(0, rule.importance) * 0.7)

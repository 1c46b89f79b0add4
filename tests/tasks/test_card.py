"""`card`: figures are those of `evaluate`, changes are in pairs, and thresholds decide the exit code."""

import json
import math
import shutil
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, card, evaluate, train, verify
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import resolve_max_length
from sculptor.errors import DataError, OutputError, SculptorError, SettingsError
from sculptor.evaluation.refusals import PHRASES, is_refusal
from sculptor.evaluation.series import Series, change
from sculptor.jobs.card_report import CardReport, failures, parse_threshold
from sculptor.model.harm import Harm
from sculptor.model.load import load_model
from sculptor.model.sampling import continue_prompts
from sculptor.report.card import check_card_file

COVERS = ["sculptor.evaluation.series", "sculptor.report.card", "sculptor.jobs.card_report", "sculptor.jobs.measures"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its archive, what a task made of it, and something of each kind to measure."""
    path = tmp_path_factory.mktemp("card")
    save_checkpoint(path / "base")
    rows = task_rows()
    write_rows(path / "rows.jsonl", rows)
    analyze(path / "base", path / "archive", AnalyzeSettings(preserve=0.5, samples=True, device="cpu"))
    settings = TrainSettings(max_steps=5, batch_size=8, learning_rate=1e-2, device="cpu")
    train(path / "base", path / "archive", [path / "rows.jsonl"], path / "tuned", settings)
    write_rows(path / "text.jsonl", task_rows("text", 6))
    abilities = path / "abilities"
    abilities.mkdir()
    words = [f" {row['completion'].strip()}" for row in rows]
    offered = [{"prompt": r["prompt"], "choices": [w, " w30"], "gold": 0} for r, w in zip(rows, words, strict=True)]
    write_rows(abilities / "picks.jsonl", offered)
    write_rows(abilities / "asks.jsonl", [{"prompt": row["prompt"]} for row in rows[:5]])
    return path


def carded(cli: Callable[..., Result], made: Path, *more: object) -> Result:
    return cli("card", made / "base", made / "tuned", *more, "--device", "cpu")


def test_it_is_what_evaluate_and_verify_say(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    found = carded(
        cli, made, "--data", made / "rows.jsonl", "--abilities", made / "abilities", "--watch", made / "text.jsonl",
        "--subspaces", made / "archive", "--json", tmp_path / "card.json", "--html", tmp_path / "card.html",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert max(map(len, found.out.splitlines())) <= 100
    content = json.loads((tmp_path / "card.json").read_text())
    (tuned,) = content["tuned"]
    lines = {(line["name"], line["figure"]): line for line in tuned["lines"]}
    for name, place in (("rows", made / "rows.jsonl"), ("picks", made / "abilities" / "picks.jsonl")):
        for model in ("base", "tuned"):
            own = evaluate(made / model, [place], device="cpu")
            for figure in ("accuracy", "acc_norm", "exact_match", "loss"):
                expected = getattr(own, figure)
                assert ((name, figure) in lines) == (expected is not None)
                if expected is not None:
                    assert lines[name, figure][model] == pytest.approx(expected, rel=1e-6)
    text = evaluate(made / "tuned", [made / "text.jsonl"], device="cpu")
    assert lines["text", "loss"]["tuned"] == pytest.approx(text.loss, rel=1e-6)
    assert 0 <= lines["asks", "refused"]["base"] <= 1
    asked = [json.loads(line)["prompt"] for line in (made / "abilities" / "asks.jsonl").read_text().splitlines()]
    for model in ("base", "tuned"):
        loaded = load_model(open_checkpoint(made / model), torch.device("cpu"))
        most = resolve_max_length(None, loaded.architecture.max_positions) // 2
        said = continue_prompts(
            loaded, loaded.tokenizer(asked).input_ids, min(64, most), [loaded.tokenizer.eos_token_id], 0.0
        )
        texts = loaded.tokenizer.batch_decode(said, skip_special_tokens=True)
        assert lines["asks", "length"][model] == pytest.approx(
            statistics.mean(len(text.strip()) for text in texts), abs=1
        )
    assert all(phrase in found.out.replace("\n  ", " ") for phrase in PHRASES), "what counts is shown"
    assert content["phrases"] == list(PHRASES)
    proof = verify(made / "base", made / "tuned", made / "archive", device="cpu", harm=True)
    assert (tuned["leak"]["passed"], tuned["leak"]["leak"]) == (proof.passed, proof.leak)
    assert proof.harm is not None
    assert tuned["harm"]["nats"] == pytest.approx(proof.harm.nats, rel=1e-6)
    assert tuned["harm"]["first"] == pytest.approx(proof.harm.first, rel=1e-6)
    for line in tuned["lines"]:
        assert line["change"] == pytest.approx(line["tuned"] - line["base"], abs=1e-9)
        assert line["low"] <= line["change"] <= line["high"]
    page = (tmp_path / "card.html").read_text()
    assert "picks" in page
    assert "samples" in page


def test_only_a_card_is_replaced_by_one(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    """`--overwrite` with a slip of the path takes no model's files."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((made / "base" / name).read_bytes())
        before = (tmp_path / name).read_bytes()
        found = carded(cli, made, "--data", made / "rows.jsonl", "--json", tmp_path / name, "--overwrite")
        assert (found.code, found.err.count("\n")) == (2, 1)
        assert "--json" in found.err
        assert (tmp_path / name).read_bytes() == before
    place = tmp_path / "card.json"
    place.write_text(json.dumps({field.name: None for field in fields(CardReport)}))
    check_card_file(place, overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        check_card_file(place, overwrite=False)


def test_a_model_is_no_different_from_itself(made: Path) -> None:
    found = card(made / "base", [made / "base"], [made / "rows.jsonl"], watch=[made / "text.jsonl"], device="cpu")
    (same,) = found.tuned
    assert [(line.change, line.change_error) for line in same.lines] == [(0, 0)] * len(same.lines)
    assert same.harm is not None
    assert abs(same.harm.nats) < 1e-6
    assert (found.harm_of, found.passed, same.leak) == ("base", True, None)


def test_changes_are_in_pairs() -> None:
    """The textbook's paired interval; not that of two samples."""
    before, after = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    found = change(Series("accuracy", tuple(before), (1,) * 6), Series("accuracy", tuple(after), (1,) * 6))
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    assert found == pytest.approx((statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(6)))
    with pytest.raises(DataError, match="other tokens"):
        change(Series("loss", (1.0,), (3,)), Series("loss", (1.0,), (4,)))


@pytest.mark.parametrize(
    ("threshold", "code"),
    [
        ("text>-9", 1),
        ("text<-9", 0),
        ("rows.loss<9", 1),
        ("harm>0", 1),
        ("harm>9", 0),
        ("harm.first>0", 1),
        ("harm.first>9", 0),
        ("rows<-101", 0),
    ],
)
def test_thresholds_decide_the_exit_code(cli: Callable[..., Result], made: Path, threshold: str, code: int) -> None:
    more = ("--data", made / "rows.jsonl", "--watch", made / "text.jsonl", "--max-rows", 4, "--no-exact-match")
    found = carded(cli, made, *more, "--fail-if", threshold, "--fail-if", "harm>50")
    assert (found.code, found.err) == (code, "")
    assert ("FAILED: tuned" in found.out, f"FAILS {threshold}: found" in found.out) == (code == 1, code == 1)


def test_strict_wants_the_interval_to_hold(made: Path) -> None:
    """The change is between a threshold and the interval's end: it passes, unless it has to be shown."""
    rows, place = [made / "rows.jsonl"], (made / "base", [made / "tuned"])
    (first,) = card(*place, rows, exact_match=False, device="cpu").tuned
    line = next(line for line in first.lines if line.figure == "loss")
    assert line.change < line.high < math.inf
    limit = [f"rows.loss>{(line.change + line.high) / 2}"]
    for strict, passed in ((False, True), (True, False)):
        found = card(*place, rows, exact_match=False, fail_if=limit, strict=strict, device="cpu")
        assert found.passed is passed
        assert bool(found.tuned[0].failed) is not passed


def test_an_archive_without_samples_gates_too(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    """Harm is then on what the base says here."""
    analyze(made / "base", tmp_path / "plain", AnalyzeSettings(basis="weights", preserve=0.5, device="cpu"))
    train(
        made / "base",
        tmp_path / "plain",
        [made / "rows.jsonl"],
        tmp_path / "out",
        TrainSettings(max_steps=1, device="cpu"),
    )
    found = cli(
        "card", made / "base", tmp_path / "out", "--data", made / "rows.jsonl", "--subspaces", tmp_path / "plain",
        "--fail-if", "unverified", "--device", "cpu", "--json", tmp_path / "card.json",
    )  # fmt: skip
    assert found.code == 0, found.err
    content = json.loads((tmp_path / "card.json").read_text())
    assert content["harm_of"] == "base"
    assert content["tuned"][0]["leak"]["passed"]


def test_an_update_that_leaks_fails_unverified(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", seed=5)
    arguments = ("--subspaces", made / "archive", "--fail-if", "unverified", "--device", "cpu")
    found = cli("card", made / "base", made / "tuned", tmp_path / "other", *arguments)
    assert found.code == 1
    assert "FAILED: other" in found.out
    assert "verify PASSED" in found.out


@pytest.mark.parametrize(
    ("more", "needles"),
    [
        (("--fail-if", "piqa<-1"), ("'piqa' is not measured", "measured are harm, harm.first, rows")),
        (("--fail-if", "leak>1"), ("needs --subspaces",)),
        (("--fail-if", "rows"), ("expected NAME<VALUE",)),
        (("--fail-if", "rows.instructions<0"), ("'rows.instructions' is not measured",)),
        (("--strict",), ("--strict without effect",)),
        (("--data", "ROWS"), ("two things would be called rows",)),
        (("--json", "ROWS"), ("is or holds the input",)),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_and_2(
    cli: Callable[..., Result], made: Path, more: tuple[str, ...], needles: tuple[str, ...]
) -> None:
    rows = made / "rows.jsonl"
    found = carded(cli, made, "--data", rows, "--max-rows", 2, *(rows if word == "ROWS" else word for word in more))
    assert (found.code, len(found.err.strip().splitlines())) == (2, 1), found.err
    assert all(needle in found.err for needle in needles), found.err


def test_a_model_that_predicts_no_numbers_passes_nothing(
    cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    """Its weights are finite."""
    other = shutil.copytree(made / "base", tmp_path / "other")
    values = load_file(other / "model.safetensors")
    values["model.norm.weight"] = torch.full_like(values["model.norm.weight"], 3e38)
    save_file(values, other / "model.safetensors", {"format": "pt"})
    rows = made / "rows.jsonl"
    found = cli("card", made / "base", other, "--data", rows, "--fail-if", "harm>1", "--device", "cpu")
    assert (found.code, len(found.err.strip().splitlines())) == (2, 1), found.err
    assert "other: predicts no numbers on samples (nan); it cannot be measured" in found.err
    assert not found.out
    for file in (rows, made / "text.jsonl", made / "abilities" / "picks.jsonl"):
        found = cli("evaluate", other, "--data", file, "--device", "cpu")
        assert found.code == 1
        assert f"predicts no numbers on {file.name}" in found.err
    chosen = ("--choose", rows, "--watch", made / "text.jsonl", "-o", tmp_path / "edited", "--device", "cpu")
    found = cli("edit", "interpolate", made / "base", other, *chosen)
    assert found.code == 1
    assert "predicts no numbers on the rows" in found.err
    assert failures([parse_threshold("harm>1")], [], Harm(math.nan, 0.0, 0.0, 0.0, 2, 2), None, [], strict=False)


def test_thresholds_are_read_as_they_are_written() -> None:
    assert parse_threshold(" a.b > +1e-2 ").value == 0.01
    assert not parse_threshold("piqa<-1").above
    for wrong in ("", "piqa", "<1", "piqa<", "piqa<nan", "piqa<1.2.3", "a<1<2"):
        with pytest.raises(SettingsError, match="expected NAME<VALUE"):
            parse_threshold(wrong)


def test_an_answer_has_to_leave_room_for_a_prompt(made: Path) -> None:
    with pytest.raises(SettingsError, match="--max-new-tokens 500: leaves no room for a prompt in 64 tokens"):
        card(made / "base", [made / "tuned"], abilities=[made / "abilities"], max_new_tokens=500, device="cpu")


def test_refusals_are_told_by_words_near_the_beginning() -> None:
    assert is_refusal("I\u2019m  sorry, but no.")
    assert is_refusal("Well.\nI CANNOT do that")
    assert not is_refusal("Here you are." + " " * 300 + "x" * 300 + " I cannot")
    assert not is_refusal("")


def test_instructions_are_checked_where_the_checker_is(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out with a word where it is not; else its verdicts are the figures."""
    row: dict[str, Any] = {"prompt": "w5 w6", "key": 1, "instruction_id_list": ["a", "b"], "kwargs": [{}, {}]}
    rows = write_rows(tmp_path / "ifeval.jsonl", [row, row | {"prompt": "w7"}])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told: list[str] = []
    found = card(made / "base", [made / "tuned"], abilities=[rows], device="cpu", notice=told.append)
    assert found.left_out == tuple(told)
    assert "needs lm-eval" in told[0]
    module: Any = types.ModuleType("lm_eval.tasks.ifeval.utils")
    module.process_results = lambda doc, said: {"inst_level_strict_acc": [True, doc["prompt"] == "w7"]}
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", module)
    found = card(made / "base", [made / "tuned"], abilities=[rows], max_new_tokens=3, device="cpu")
    assert [(line.figure, line.base) for line in found.tuned[0].lines] == [
        ("followed", 0.5), ("instructions", 0.75), ("length", pytest.approx(5.5))
    ]  # fmt: skip
    module.process_results = lambda doc, said: 1 / 0
    with pytest.raises(SculptorError, match="cannot judge"):
        card(made / "base", [made / "tuned"], abilities=[rows], max_new_tokens=3, device="cpu")

"""`analyze --protect NAME=FILE`: a source with its own weight and lines, on rows kept from calibration, through every command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import Archive
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import Example
from sculptor.errors import ArchiveError
from sculptor.model.load import load_model
from sculptor.model.protected import SECTION, hold_out, read_protected

COVERS = ["sculptor.model.protected"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("protect")
    save_checkpoint(path / "base")
    write_rows(path / "general.jsonl", task_rows("text", 8))
    write_rows(path / "tools.jsonl", task_rows(count=24))
    write_rows(path / "danish.jsonl", task_rows("text", 3))
    turned = [{"prompt": row["prompt"], "completion": "w33"} for row in task_rows()]
    write_rows(path / "task.jsonl", turned)
    return path


def analyzed(cli: Callable[..., Result], made: Path, output: Path, *more: object) -> Result:
    arguments = ("--data", made / "general.jsonl", "--budget", 0.7, "--calibration-tokens", 600, "--device", "cpu")
    return cli("analyze", made / "base", "-o", output, *arguments, *more)


@pytest.mark.slow
def test_a_name_has_its_lines_in_every_report(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    names = ("--protect", f"tools={made / 'tools.jsonl'}:2", "--protect", f"danish={made / 'danish.jsonl'}")
    found = analyzed(cli, made, tmp_path / "archive", *names)
    assert found.code == 0, found.err
    assert "Calibrated on tools.jsonl (protects tools): " in found.out
    archive = Archive(tmp_path / "archive")
    (task,) = archive.manifest.tasks
    assert [(c.source, c.protects, c.weight) for c in task.calibration] == [
        ("general.jsonl", None, 1), ("tools.jsonl", "tools", 2), ("danish.jsonl", "danish", 1)
    ]  # fmt: skip
    assert task.weights == (1, 2, 1)
    assert archive.manifest.settings.protect == ("tools=tools.jsonl", "danish=danish.jsonl")
    assert str(made) not in (tmp_path / "archive" / "archive.json").read_text()
    shown = cli("inspect", tmp_path / "archive")
    assert "protects tools: tools.jsonl, 21 rows" in shown.out
    assert ", weight 2\n" in shown.out
    trained = cli(
        "train", made / "base", "--subspaces", tmp_path / "archive", "--data", made / "task.jsonl", "-o", tmp_path / "tuned",
        "--max-steps", 6, "--batch-size", 8, "--learning-rate", "1e-2", "--device", "cpu", "--html", tmp_path / "t.html",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    result = json.loads((tmp_path / "tuned" / "sculptor.json").read_text())["result"]
    proof = cli(
        "verify", made / "base", tmp_path / "tuned", "--subspaces", tmp_path / "tuned" / "subspaces", "--harm",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert proof.code == 2, "the next archive is of the tuned model"
    proof = cli("verify", made / "base", tmp_path / "tuned", "--subspaces", tmp_path / "archive", "--harm", "--json")
    told = proof.json["named"]
    assert [each["name"] for each in told] == [each["name"] for each in result["named"]] == ["danish", "tools"]
    for one, other in zip(told, result["named"], strict=True):
        assert one["rise"] == pytest.approx(other["rise"], rel=1e-4, abs=1e-6)
    for report in (trained.out, (tmp_path / "t.html").read_text()):
        assert "tools" in report
        assert "danish" in report
    against_definition(made, tmp_path / "tuned", archive, told)
    kept, gone = read_protected(archive), read_protected(Archive(tmp_path / "tuned" / "subspaces"))
    assert [(k.name, k.losses) for k in kept] == [(k.name, k.losses) for k in gone], "carried to the next archive"
    card = cli("card", made / "base", tmp_path / "tuned", "--subspaces", tmp_path / "archive", "--device", "cpu")
    assert f"tools: loss {told[1]['rise']:+.4f}" in card.out
    arguments = (made / "base", tmp_path / "tuned", "--subspaces", tmp_path / "archive", "--device", "cpu")
    gate = cli("card", *arguments, "--fail-if", f"tools>{told[1]['rise'] - 0.01}", "--fail-if", "danish>99")
    assert gate.code == 1
    assert gate.out.count("FAILS") == 1
    assert cli("card", *arguments, "--data", write_rows(tmp_path / "tools.jsonl", task_rows())).code == 2, "which one?"


@pytest.mark.slow
def test_a_streamed_model_is_reported_on_alike(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    assert analyzed(cli, made, tmp_path / "archive", "--protect", f"tools={made / 'tools.jsonl'}").code == 0
    told = []
    for offload in ("none", "disk"):
        trained = cli(
            "train", made / "base", "--subspaces", tmp_path / "archive", "--data", made / "task.jsonl", "-o",
            tmp_path / offload, "--max-steps", 3, "--batch-size", 8, "--device", "cpu", "--offload", offload, "--json",
        )  # fmt: skip
        assert trained.code == 0, trained.err
        told.append(trained.json["loop"]["named"])
    assert told[0] == told[1]
    assert told[0][0]["rise"] != 0


def against_definition(made: Path, tuned: Path, archive: Archive, told: list[dict[str, float]]) -> None:
    """The rise of the loss on the rows that are kept, in float64."""
    models = [
        load_model(open_checkpoint(place), torch.device("cpu")).model.double() for place in (made / "base", tuned)
    ]
    for each, kept in zip(told, read_protected(archive), strict=True):
        sums, count = [0.0, 0.0], 0
        for sample in kept.samples:
            ids, labels = torch.tensor([sample.example.input_ids]), torch.tensor(sample.example.labels[1:])
            on = labels != -100
            count += int(on.sum())
            for i, model in enumerate(models):
                logs = model(ids).logits[0, :-1].detach().log_softmax(-1)[on]
                sums[i] -= float(logs.gather(1, labels[on][:, None]).sum())
        assert each["rise"] == pytest.approx((sums[1] - sums[0]) / count, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_weight_protects_more(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    """The moments are sums of sources, each of unit trace times its weight: by the name's weight, other bases."""
    texts = []
    for weight in (1, 1, 50):
        output = tmp_path / f"w{len(texts)}"
        assert analyzed(cli, made, output, "--protect", f"tools={made / 'tools.jsonl'}:{weight}").code == 0
        texts.append(Archive(output).manifest.matrices)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        (("--protect", "tools"), "expected NAME=FILE"),
        (("--protect", "a b=x"), "expected NAME=FILE"),
        (("--protect", "a=self"), "expected NAME=FILE"),
        (("--protect", "a=x", "--protect", "a=y"), "the name is given twice"),
        (("--protect", "a=nowhere.jsonl"), "nowhere.jsonl"),
        (("--protect", "a=nowhere.jsonl", "--basis", "weights"), "--protect without effect"),
    ],
)
def test_wrong_names_are_one_line(
    cli: Callable[..., Result], made: Path, tmp_path: Path, more: tuple[str, ...], needle: str
) -> None:
    found = cli("analyze", made / "base", "-o", tmp_path / "out", "--device", "cpu", *more)
    assert found.code in (1, 2)
    assert len(found.err.strip().splitlines()) == 1
    assert needle in found.err
    assert not list(tmp_path.iterdir())


def test_no_samples_keeps_no_text(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    found = analyzed(cli, made, tmp_path / "a", "--no-samples", "--protect", f"tools={made / 'tools.jsonl'}")
    assert found.code == 0, found.err
    assert read_protected(Archive(tmp_path / "a")) == ()


def test_what_is_kept_is_read_with_care(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    assert analyzed(cli, made, tmp_path / "a", "--protect", f"tools={made / 'tools.jsonl'}").code == 0
    archive = Archive(tmp_path / "a")
    with pytest.raises(ArchiveError, match="protected names is damaged"):
        read_protected(archive, vocab_size=3)
    file = tmp_path / "a" / archive.manifest.sections[SECTION].file
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ArchiveError):
        read_protected(Archive(tmp_path / "a"))


def test_rows_to_report_on_are_kept_from_calibration() -> None:
    examples = [Example((1, i), (1, i)) for i in range(2, 26)]
    calibrated, apart = hold_out(examples)
    assert (len(calibrated), len(apart)) == (21, 3)
    assert not set(calibrated) & set(apart)
    assert hold_out(examples[:5]) == (tuple(examples[:5]), tuple(examples[:5]))
    assert hold_out(examples[:1]) == (tuple(examples[:1]), ())

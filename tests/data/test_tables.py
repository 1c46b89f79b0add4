"""Through the datasets library: every form of data says what the equal JSONL says, to the last token."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, evaluate, preview, train
from sculptor.data.labelled import Classes, labelled
from sculptor.data.rows import digest_rows, names_of, read_rows, read_sources
from sculptor.data.tables import dataset_rows
from sculptor.errors import DataError

COVERS = ["sculptor.data.files", "sculptor.data.reference"]
TALK = [
    {
        "messages": [
            {"role": "user", "content": "w1"},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": "w3"},
            {"role": "assistant", "content": "w4", "weight": 1},
        ]
    },
    {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
]


@pytest.fixture
def datasets() -> Any:
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


def forms_of(datasets: Any, path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same rows in every form."""
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(path / "rows.parquet")
    (path / "parquet").write_bytes((path / "rows.parquet").read_bytes())
    made.save_to_disk(path / "saved")
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(path / "splits")
    (path / "folder").mkdir()
    for split, part in (("train", made), ("test", made.select([0]))):
        part.to_parquet(path / "folder" / f"{split}.parquet")
    (path / "array.json").write_text(json.dumps(rows))
    (arrow,) = (path / "saved").glob("*.arrow")
    stream = datasets.load_dataset("parquet", data_files=str(path / "rows.parquet"), split="train", streaming=True)
    return {
        "parquet": path / "rows.parquet", "unnamed parquet": path / "parquet", "saved": path / "saved", "arrow": arrow,
        "splits": path / "splits", "split": f"{path / 'splits'}@train", "folder": path / "folder",
        "split of a folder": f"{path / 'folder'}@train", "slice": f"{path / 'folder'}@train[:100]",
        "array": path / "array.json", "Dataset": made, "formatted": made.with_format("numpy"), "stream": stream,
        "DatasetDict": datasets.DatasetDict(train=made, other=made), "generator": (row for row in rows), "list": rows,
    }  # fmt: skip


@pytest.mark.parametrize("rows", [task_rows(count=5), TALK], ids=["pairs", "messages"])
def test_every_form_is_the_equal_jsonl(datasets: Any, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    expected = digest_rows(read_rows(write_rows(tmp_path / "rows.jsonl", rows)))
    for name, given in forms_of(datasets, tmp_path, rows).items():
        assert digest_rows(read_rows(given)) == expected, name
    assert len(read_rows(f"{tmp_path / 'splits'}@test")) == len(read_rows(f"{tmp_path / 'folder'}@test")) == 1


def test_the_commands_read_them_alike(datasets: Any, cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = task_rows(count=6)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "rows.parquet")
    forms = {"parquet": tmp_path / "rows.parquet", "Dataset": made, "generator": (row for row in rows)}
    expected = preview(model, file, rows=6)
    for name in ("Dataset", "generator"):
        found = preview(model, forms[name], rows=6)
        assert [row.examples for row in found.rows] == [row.examples for row in expected.rows], name
        assert found.num_tokens == expected.num_tokens
    shown = [cli("data", given, "--model", model, "--json", "--rows", 6).json for given in (file, forms["parquet"])]
    for found in shown:
        for key in ("sources", "rows"):
            found[key] = [{k: v for k, v in part.items() if k not in ("name", "where")} for part in found[key]]
    assert shown[0] == shown[1]
    measured = [evaluate(model, given, device="cpu").loss for given in (file, forms["Dataset"])]
    assert measured[0] == measured[1]


def test_a_transform_and_columns_that_were_left_out_stay_so(datasets: Any) -> None:
    made = datasets.Dataset.from_list([{"prompt": f"q{i}", "completion": " RAW", "weight": i % 2} for i in range(4)])
    shouted = made.with_transform(
        lambda rows: {"prompt": rows["prompt"], "completion": [c.lower() for c in rows["completion"]]}
    )
    assert [row.completion for row in read_rows(shouted)] == [" raw"] * 4
    assert len(read_rows(made.with_format("torch", columns=["prompt", "completion"]))) == 4
    assert len(read_rows(made.with_format("numpy"))) == 2, "the weight of a row is 0 or 1"


def test_a_dataset_is_trained_and_recorded(datasets: Any, cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in task_rows(count=12)]
    made = datasets.Dataset.from_list(rows)
    settings = AnalyzeSettings(basis="curvature", device="cpu", columns={"prompt": "q", "completion": "a"})  # type: ignore[arg-type]
    analyze(model, tmp_path / "archive", settings, data=made)
    manifest = json.loads((tmp_path / "archive" / "archive.json").read_text())
    assert manifest["settings"]["data"] == ["Dataset"]
    assert manifest["settings"]["columns"] == "prompt=q,completion=a"
    digests = []
    for name, given in (("a", made), ("b", iter(rows))):
        said: list[str] = []
        options = TrainSettings(max_steps=2, batch_size=4, device="cpu", columns="prompt=q,completion=a")
        found = train(model, tmp_path / "archive", given, tmp_path / name, options, eval_data=rows, notice=said.append)
        assert any("q as prompt, a as completion" in line for line in said)
        record = json.loads((tmp_path / name / "sculptor.json").read_text())
        assert record["data"]["files"] == [{"a": "Dataset", "b": "list"}[name]]
        digests.append((record["data"]["rows_sha256"], found.loop.last_loss))
    assert digests[0] == digests[1]


def test_a_hub_name_is_read_with_config_and_split(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here; everything else is what a name on the hub goes through."""
    for config, word in (("main", "w1"), ("other", "w2")):
        (tmp_path / config).mkdir()
        for split, count in (("train", 3), ("test", 2)):
            made = datasets.Dataset.from_list([{"text": f"{word} w3"}] * count)
            made.to_parquet(tmp_path / config / f"{split}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    asked: list[Any] = []
    for name in ("load_dataset", "get_dataset_split_names"):
        real = getattr(datasets, name)

        def redirect(place: str, config: Any = None, real: Any = real, **more: Any) -> Any:
            assert place == "owner/name"
            asked.append((config, more))
            return real(str(tmp_path), config, **more)

        monkeypatch.setattr(datasets, name, redirect)
    assert [row.text for row in read_rows("owner/name:other@test")] == ["w2 w3"] * 2  # type: ignore[union-attr]
    assert asked == [("other", {"split": "test"})]
    assert len(read_rows("owner/name:main")) == 3
    assert len(read_rows("owner/name:main@train[:2]")) == 2
    asked.clear()
    assert len(read_rows("owner/name:main@train", 1)) == 1
    assert asked == [("main", {"streaming": True})]  # no more is fetched than is asked for
    (first, _) = read_sources(["owner/name:main@test:0.3", "owner/name:other:0.7"])
    assert (first.name, first.weight, len(first.rows)) == ("owner/name:main@test", 0.3, 2)
    assert names_of("owner/name:main@test:0.3") == ("owner/name:main@test",)
    with pytest.raises(DataError, match=r"owner/name: no such file or folder here; as a hub name the datasets .*main"):
        read_rows("owner/name")
    with pytest.raises(DataError, match="no split 'dev'; it has"):
        read_rows("owner/name:main@dev", 1)


def test_what_cannot_be_read_is_one_line(datasets: Any, tmp_path: Path) -> None:
    forms = forms_of(datasets, tmp_path, task_rows(count=5))
    datasets.DatasetDict(a=forms["Dataset"], b=forms["Dataset"]).save_to_disk(tmp_path / "two")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fold").mkdir()
    for name in ("train", "test"):
        write_rows(tmp_path / "fold" / f"{name}.jsonl", task_rows(count=2))
    for given, message in (
        (tmp_path / "two", "has the splits a, b; choose one: .*@SPLIT"),
        (f"{tmp_path / 'two'}@c", "no split 'c'; it has a, b"),
        (f"{tmp_path / 'fold'}@dev", "no split 'dev'; it has train, test"),
        (f"{forms['saved']}@train", "without splits; leave out @train"),
        (tmp_path / "broken.parquet", "broken.parquet: the datasets library cannot read it"),
        (tmp_path / "empty", "empty: the datasets library cannot read it"),
        (f"{tmp_path / 'array.json'}@train", "is one file, without configs or splits"),
        ("owner/nothing@train", "no such file or folder here; as a hub name the datasets library cannot"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_rows(given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".bak", ".orig", ".old", ".tmp", ".1", ".lock", ".gz"])
def test_a_folder_has_no_second_copies_of_its_files(datasets: Any, tmp_path: Path, ending: str) -> None:
    """The library would take them, too."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / f"rows.jsonl{ending}").write_text('{"text": "OLD"}\n')
    with pytest.raises(DataError, match=f"rows.jsonl{ending} would be read, too"):
        read_rows(tmp_path)
    (tmp_path / f"rows.jsonl{ending}").unlink()
    assert len(read_rows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("my_test.jsonl", "good.jsonl"), "good.jsonl"),
        (("a.jsonl", "b.csv"), "b.csv"),
        (("a.jsonl", "B.JSONL"), "B.JSONL"),
        (("train.jsonl", "extra.jsonl", "README.md"), "extra.jsonl"),
    ],
)
def test_a_folder_is_read_whole_or_refused(datasets: Any, tmp_path: Path, names: tuple[str, ...], left: str) -> None:
    """The library alone would take the one that is named like a split, or the kind that most files are of."""
    for name in names:
        content = "prompt,completion\na,b\n" if name.endswith("csv") else '{"prompt": "a", "completion": "b"}\n'
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{left} would not be read beside"):
        read_rows(tmp_path)
    (tmp_path / left).unlink()
    assert len(read_rows(tmp_path)) == 1


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for given in (tmp_path / "rows.parquet", tmp_path, "owner/name"):
        with pytest.raises(DataError, match=r"pip install 'sculptor-subspaces\[data\]'"):
            read_rows(given)
    assert read_rows(write_rows(tmp_path / "rows.jsonl", task_rows(count=2)))


def test_a_folder_says_what_its_files_say(datasets: Any, tmp_path: Path) -> None:
    """The library alone guesses types: 1.0 for 1 beside an empty cell, nothing for NA, a time for a date."""
    table = "prompt,completion\n1,2\n,3\nNA,null\ntrue,1.50\n2020-01-01,007\n"
    lines = [{"prompt": "2020-01-01", "completion": "1"}, {"prompt": "w", "completion": "2020-01-02T03:04:05"}]
    made = datasets.Dataset.from_list(lines)
    for kind in ("csv", "jsonl", "parquet"):
        (tmp_path / kind).mkdir()
        for name in ("train-00000", "train-00001", "test"):
            file = tmp_path / kind / f"{name}.{kind}"
            if kind == "parquet":
                made.to_parquet(file)
            else:
                file.write_text(table if kind == "csv" else "".join(json.dumps(row) + "\n" for row in lines))
        files = [tmp_path / kind / f"{name}.{kind}" for name in ("train-00000", "train-00001")]
        assert digest_rows(read_rows(tmp_path / kind)) == digest_rows(read_rows(files)), kind
        assert digest_rows(read_rows(f"{tmp_path / kind}@test")) == digest_rows(read_rows(files[0])), kind
    completions = [row.completion for row in read_rows(tmp_path / "csv")]  # type: ignore[union-attr]
    assert completions[:5] == ["2", "3", "null", "1.50", "007"]
    (tmp_path / "csv" / "train-00001.csv").write_text(f"{table}a,b,c\n")
    with pytest.raises(DataError, match=r"train-00001.csv:7: 3 cells, the head has 2"):
        read_rows(tmp_path / "csv")


def test_names_of_digits_are_no_choices_and_minus_one_is_no_class() -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["1", "2", "3"])
    features = datasets.Features({"gold": kind, "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"gold": 0, "label": 1}, {"gold": 2, "label": -1}]
    made = datasets.Dataset.from_list(rows, features=features)
    assert [row for _, row in dataset_rows(made, "d")] == [{"gold": 0, "label": "yes"}, {"gold": 2, "label": None}]


def test_digits_that_name_numbers_are_not_numbers() -> None:
    """A column of 0, 1, 2 whose names are 1, 2, 3, for a model that has no such names: what is stored counts."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    )
    made = datasets.Dataset.from_dict({"text": ["w1"] * 3, "label": [0, 1, 2]}, features=features)

    def read(*names: str) -> list[int | None]:
        return [labelled(row, where, Classes(names)).index for where, row in dataset_rows(made, "d")]

    assert read("LABEL_0", "LABEL_1", "LABEL_2") == [0, 1, 2]
    assert read("3", "2", "1") == [2, 1, 0], "by name, where the model has them"
    assert [row["label"] for _, row in dataset_rows(made, "d")] == ["1", "2", "3"]

"""Plans: paths, overrides, and one line that names the place for everything that is wrong in them."""

from pathlib import Path
from typing import Any

import pytest

from sculptor.benchmark.plan import read_plan
from sculptor.errors import DataError, SculptorError, SettingsError

PLAN = """
model = "base"
watch = ["general.txt"]

[analyze]
basis = "curvature"
data = ["rows/old.jsonl", "self"]
budget = 0.7

[train]
learning_rate = 1e-3
max_steps = 5

[evaluate]
batch_size = 4

[adapter]
rank = 2

[[tasks]]
name = "first"
data = ["rows/first.jsonl"]
test = "rows/test.jsonl"
labels = ["yes", "no"]

[[tasks]]
name = "second-task_2"
data = "rows/second.jsonl"
test = ["rows/test.jsonl"]
validation = ["rows/validation.jsonl"]
epochs = 3
learning_rate = 2e-3
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a plan and what it names."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows").mkdir()
    for name in ("general.txt", *(f"rows/{n}.jsonl" for n in ("old", "first", "second", "test", "validation"))):
        (tmp_path / name).write_text("w1 w2\n")
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


def changed(place: Path, old: str, new: str) -> Path:
    assert old in PLAN
    (place / "plan.toml").write_text(PLAN.replace(old, new))
    return place / "plan.toml"


def one_line(error: type[SculptorError], path: Path, *needles: str, overrides: tuple[str, ...] = ()) -> None:
    with pytest.raises(error) as caught:
        read_plan(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message, message


def test_everything_is_filled_in(place: Path) -> None:
    plan = read_plan(place / "plan.toml")
    assert [task.name for task in plan.tasks] == ["first", "second-task_2"]
    assert plan.tasks[0].labels == ("yes", "no")
    assert plan.tasks[1].labels is None
    assert plan.analyze.basis == "curvature"
    assert plan.analyze.budget == 0.7
    assert plan.analyze.keep == 0.5
    assert plan.train.max_steps == 5
    assert plan.evaluate.batch_size == 4
    assert plan.evaluate.exact_match is True
    assert plan.adapter.rank == 2
    assert plan.to_json()["train"]["learning_rate"] == 1e-3


def test_paths_are_relative_to_the_plan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    for path in (place / "plan.toml", Path("..") / "plan.toml"):
        plan = read_plan(path)
        assert plan.model == str(place / "base")
        assert plan.watch == (str(place / "general.txt"),)
        assert plan.analyze.data == (str(place / "rows" / "old.jsonl"), "self")
        assert plan.tasks[0].data == (str(place / "rows" / "first.jsonl"),)
        assert plan.tasks[0].test == (str(place / "rows" / "test.jsonl"),)
        assert plan.tasks[0].validation == ()
        assert plan.tasks[1].data == (str(place / "rows" / "second.jsonl"),)
        assert plan.tasks[1].validation == (str(place / "rows" / "validation.jsonl"),)


def test_a_name_that_is_no_path_stays(place: Path) -> None:
    path = changed(place, 'model = "base"', 'model = "organisation/model"')
    assert read_plan(path).model == "organisation/model"
    absolute = str(place / "base")
    assert read_plan(changed(place, 'model = "base"', f'model = "{absolute}"')).model == absolute


def test_a_task_s_own_settings_come_first(place: Path) -> None:
    plan = read_plan(place / "plan.toml")
    assert plan.train_settings(plan.tasks[0]) == plan.train
    own = plan.train_settings(plan.tasks[1])
    assert (own.epochs, own.learning_rate, own.max_steps) == (
        3,
        2e-3,
        None,
    )  # max_steps of the plan would go before epochs


def test_files_of_a_split(place: Path) -> None:
    plan = read_plan(place / "plan.toml")
    assert plan.rows_of(plan.tasks[1], "validation") == (str(place / "rows" / "validation.jsonl"),)
    assert plan.rows_of(plan.tasks[0], "test") == (str(place / "rows" / "test.jsonl"),)
    with pytest.raises(SettingsError, match="task first: no validation files in the plan"):
        plan.rows_of(plan.tasks[0], "validation")


@pytest.mark.parametrize(
    ("override", "section", "name", "expected"),
    [
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.max_steps = 7", "train", "max_steps", 7),
        ("train.epochs=0.5", "train", "epochs", 0.5),
        ("train.schedule=linear", "train", "schedule", "linear"),
        ('train.schedule="linear"', "train", "schedule", "linear"),
        ("train.device=cuda:1", "train", "device", "cuda:1"),
        ('train.also_train=["norm", "embed"]', "train", "also_train", ("norm", "embed")),
        ("train.checkpoint_activations=true", "train", "checkpoint_activations", True),
        ('analyze.data=["self"]', "analyze", "data", ("self",)),
        ("analyze.budget=0.9", "analyze", "budget", 0.9),
        ("evaluate.exact_match=false", "evaluate", "exact_match", False),
        ("adapter.rank=3", "adapter", "rank", 3),
    ],
)
def test_overrides(place: Path, override: str, section: str, name: str, expected: Any) -> None:
    plan = read_plan(place / "plan.toml", [override])
    assert getattr(getattr(plan, section), name) == expected
    assert plan.tasks == read_plan(place / "plan.toml").tasks


def test_overrides_of_the_plan_itself(place: Path) -> None:
    overrides = ["model=rows", "watch=[]", "train.max_steps=3", "train.max_steps=4"]
    plan = read_plan(place / "plan.toml", overrides)
    assert plan.model == str(place / "rows")
    assert plan.watch == ()
    assert plan.train.max_steps == 4  # the last one


def test_an_override_makes_a_section(place: Path) -> None:
    path = changed(place, "[adapter]\nrank = 2\n", "")
    assert read_plan(path, ["adapter.alpha=5"]).adapter.alpha == 5


def test_an_overridden_path_is_relative_to_the_plan(place: Path) -> None:
    plan = read_plan(place / "plan.toml", ['analyze.data=["rows/first.jsonl"]'])
    assert plan.analyze.data == (str(place / "rows" / "first.jsonl"),)


@pytest.mark.parametrize("data", ["self", '"self"', "rows/old.jsonl"])
def test_one_file_may_stand_without_a_list(place: Path, data: str) -> None:
    """As a task's files may, and as `--data self` is written everywhere else."""
    plan = read_plan(place / "plan.toml", [f"analyze.data={data}"])
    assert plan.analyze.data == ("self" if "self" in data else str(place / data),)


def test_one_general_text_may_stand_without_a_list(place: Path) -> None:
    path = changed(place, 'watch = ["general.txt"]', 'watch = "general.txt"')
    assert read_plan(path).watch == (str(place / "general.txt"),)


def test_what_is_mixed_in_is_relative_to_the_plan(place: Path) -> None:
    assert read_plan(place / "plan.toml").replay == ()
    plan = read_plan(place / "plan.toml", ['replay=["rows/old.jsonl:0.05","self:0.2"]'])
    assert plan.replay == (f"{place / 'rows' / 'old.jsonl'}:0.05", "self:0.2")


@pytest.mark.parametrize(
    ("override", "needles"),
    [
        ("train.learning_rate", ("--set 'train.learning_rate'", "expected section.name=value")),
        ("=3", ("--set '=3'", "expected section.name=value")),
        ("model.path=x", ("--set 'model.path=x'", "model is no section")),
        ("tasks.name=x", ("--set 'tasks.name=x'", "tasks is no section")),
        ("train=3", ("plan.toml", "train is not a section", "[train]")),
        ("tasks=3", ("plan.toml", "no tasks")),
        ("tasks=[]", ("plan.toml", "no tasks")),
        ("tasks=[3]", ("plan.toml: task 1", "is no table")),
        ("model=3", ("plan.toml", "model is missing")),
        ("replay=3", ("plan.toml: replay", "expected a string or a list")),
        ("trian.learning_rate=3", ("plan.toml", "unknown 'trian'", "train")),
        ("train.learning_rat=3", ("plan.toml [train]", "unknown 'learning_rat'", "learning_rate")),
        ("analyze.budgets=1", ("plan.toml [analyze]", "unknown 'budgets'")),
        ("evaluate.split=test", ("plan.toml [evaluate]", "unknown 'split'")),
        ("adapter.r=1", ("plan.toml [adapter]", "unknown 'r'", "rank")),
        ("train.learning_rate=-1", ("plan.toml [train]", "learning_rate -1: expected more than 0")),
        ("train.schedule=square", ("plan.toml [train]", "schedule square: expected")),
        ("train.learning_rate=fast", ("plan.toml [train]", "learning_rate fast: expected a number")),
        ("train.max_steps=[3]", ("plan.toml [train]", "max_steps [3]: expected a whole number")),
        ("analyze.budget=all", ("plan.toml [analyze]", "budget all: expected a number")),
        ("analyze.budget=2", ("plan.toml [analyze]", "budget 2: expected at most 1")),
        ("analyze.preserve=0.5", ("plan.toml [analyze]", "--preserve without effect")),
        ("analyze.basis=fisher", ("plan.toml [analyze]", "basis fisher: expected")),
    ],
)
def test_wrong_overrides_name_their_place(place: Path, override: str, needles: tuple[str, ...]) -> None:
    one_line(SettingsError, place / "plan.toml", *needles, overrides=(override,))


@pytest.mark.parametrize(
    ("old", "new", "needles"),
    [
        ('model = "base"', "", ("plan.toml", "model is missing")),
        ('model = "base"', 'model = ["base"]', ("plan.toml", "model is missing")),
        ('model = "base"', 'model = "base"\nmodels = 3', ("plan.toml", "unknown 'models'")),
        ('name = "first"\n', "", ("plan.toml: task 1", "has no name")),
        ('data = "rows/second.jsonl"\n', "", ("plan.toml: task 2", "has no data")),
        ('test = "rows/test.jsonl"\n', "", ("plan.toml: task 1", "has no test")),
        ('name = "first"', "name = 1", ("plan.toml: task 1", "name 1")),
        ('name = "first"', 'name = "a/b"', ("plan.toml: task 1", "name a/b: expected another form")),
        ('name = "first"', 'name = "../up"', ("plan.toml: task 1", "name ../up: expected another form")),
        ('name = "first"', 'name = ""', ("plan.toml: task 1", "name : expected some text")),
        ('name = "second-task_2"', 'name = "first"', ("plan.toml", "two tasks are called first")),
        ("epochs = 3", "epoch = 3", ("plan.toml: task 2", "unknown 'epoch'", "epochs")),
        ('data = "rows/second.jsonl"', "data = 3", ("plan.toml: task 2", "expected a string or a list")),
        ('data = "rows/second.jsonl"', "data = [3]", ("plan.toml: task 2", "expected a string or a list")),
        ('test = "rows/test.jsonl"', "test = true", ("plan.toml: task 1", "expected a string or a list")),
    ],
)
def test_wrong_plans_name_their_place(place: Path, old: str, new: str, needles: tuple[str, ...]) -> None:
    one_line(SettingsError, changed(place, old, new), *needles)


@pytest.mark.parametrize(
    ("old", "new", "needles"),
    [
        ('labels = ["yes", "no"]', "labels = 3", ("plan.toml: task 1", "labels")),
        ("epochs = 3", 'epochs = "three"', ("plan.toml: task 2", "epochs")),
        ("epochs = 3", "epochs = 0", ("plan.toml: task 2", "epochs 0: expected more than 0")),
        ("learning_rate = 2e-3", "learning_rate = -1", ("plan.toml: task 2", "learning_rate -1: expected more than 0")),
        ('watch = ["general.txt"]', "watch = 3", ("plan.toml", "watch")),
        ('watch = ["general.txt"]', "watch = [3]", ("plan.toml", "watch")),
        ('data = ["rows/old.jsonl", "self"]', "data = 3", ("plan.toml [analyze]", "data")),
        ('data = ["rows/old.jsonl", "self"]', "data = [3]", ("plan.toml [analyze]", "data")),
        ("batch_size = 4", "batch_size = 0", ("plan.toml [evaluate]", "batch")),
        ("batch_size = 4", 'batch_size = "many"', ("plan.toml [evaluate]", "batch_size")),
        ("rank = 2", "rank = 0", ("plan.toml [adapter]", "rank")),
        ("rank = 2", 'rank = "high"', ("plan.toml [adapter]", "rank")),
    ],
)
def test_wrong_values_are_found_before_any_work(place: Path, old: str, new: str, needles: tuple[str, ...]) -> None:
    """A plan runs for hours: what is wrong with its last task is to be said at the start, in one line."""
    one_line(SettingsError, changed(place, old, new), *needles)


def test_no_duplicate_of_a_directory_that_the_run_itself_makes(place: Path) -> None:
    """Task directories are numbered, so any name goes: even those that the run uses itself."""
    for name in ("model", "archive", "joint"):
        assert read_plan(changed(place, 'name = "first"', f'name = "{name}"')).tasks[0].name == name


def test_a_plan_that_cannot_be_read(place: Path) -> None:
    one_line(DataError, place / "none.toml", "none.toml: no such plan")
    one_line(DataError, place / "base", "base: not a TOML file")
    (place / "broken.toml").write_text('model = "base\n')
    one_line(DataError, place / "broken.toml", "broken.toml: not a TOML file", "line 1")
    (place / "binary.toml").write_bytes(b"\xff\xfe\x00")
    one_line(DataError, place / "binary.toml", "binary.toml: not a TOML file")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_a_plan_of_any_size_and_depth_is_one_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "plan.toml").write_text(f'model = "m"\nx = {value}\n')
    with pytest.raises(DataError, match="not a TOML file") as caught:
        read_plan(tmp_path / "plan.toml")
    assert len(str(caught.value).replace(str(tmp_path), "")) < 250
    assert "\n" not in str(caught.value)

"""Plain fine-tuning with a measure against forgetting: each against a loop of a dozen lines in float64."""

import copy
import json
import math
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Result, make_tokenizer, save_checkpoint, slowly, task_rows, write_rows
from plans import two_tasks
from safetensors.torch import load_file
from together import together

from sculptor import AnalyzeSettings, analyze, evaluate, train
from sculptor.benchmark.contenders import data_of, joint_data, settings_of, update_norm
from sculptor.benchmark.episodes import episodes_of, shorten
from sculptor.benchmark.plan import Contender, Plan, read_plan
from sculptor.benchmark.runner import continual
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import SettingsError, Stopped

COVERS = ["sculptor.benchmark.episodes", "sculptor.benchmark.learning"]
RATE, STEPS = 1e-2, 3
PLAN = two_tasks(
    train={
        "max_steps": STEPS,
        "batch_size": 64,
        "micro_batch_size": 64,
        "learning_rate": RATE,
        "schedule": "constant",
        "warmup": 0,
        "clip": 0,
    },
    analyze={"preserve": 0.5},
    adapter={"decay": 20, "replay": 0.5, "keep": 0.4},
)
Weights = dict[str, torch.Tensor]


def rows_of(name: str) -> list[dict[str, str]]:
    rows = task_rows(count=16)
    return rows if name == "first" else [row | {"completion": f"w{9 - int(row['completion'][1:])}"} for row in rows]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contenders")
    save_checkpoint(path / "base")
    for name in ("first", "second"):
        write_rows(path / f"{name}.jsonl", rows_of(name))
    (path / "plan.toml").write_text(PLAN)
    return path


@pytest.fixture
def plan(place: Path) -> Plan:
    return read_plan(place / "plan.toml")


def reference(
    place: Path,
    start: Weights,
    rows: list[dict[str, str]],
    *,
    decay: float = 0.0,
    by_entropy: bool = False,
    kl: float = 0.0,
) -> Weights:
    """AdamW on the matrices of the blocks, whole batches, in float64."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(place / "base")).double()
    model.load_state_dict({name: value.double() for name, value in start.items()})
    model.requires_grad_(False)
    trained = {name: p.requires_grad_(True) for name, p in model.named_parameters() if "_proj" in name}
    before = {name: p.detach().clone() for name, p in trained.items()}
    old = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    tokenizer = make_tokenizer()
    for _ in range(STEPS):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
            answer = [*tokenizer.encode(row["completion"], add_special_tokens=False), 0]
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logs = logits.log_softmax(-1)
            if kl:
                seen = old(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                known = seen.log_softmax(-1).detach()
                total = total + kl * (known.exp() * (known - logs)).sum()
            for i, token in enumerate(answer):
                weight = 1.0
                if by_entropy:
                    p = sorted(logs[i].exp().tolist())[-20:]
                    weight = -sum(x / sum(p) * math.log(x / sum(p)) for x in p) / math.log(20)
                total, count = total - weight * logs[i, token], count + 1
        (total / count).backward()
        with torch.no_grad():
            for name, p in trained.items():
                p -= RATE * decay * (p - before[name])
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}


def weights(model: Path) -> Weights:
    return load_file(model / "model.safetensors")


def assert_same_update(start: Weights, found: Weights, expected: Weights) -> None:
    for name, value in start.items():
        update = expected[name].double() - value.double()
        # AdamW makes a whole step of a gradient that is next to nothing, whatever rounding says of its sign.
        assert float((found[name].double() - expected[name].double()).norm()) <= 2e-3 * float(update.norm()) + 1e-6, (
            name
        )


def trained(place: Path, output: Path, plan: Plan, method: Contender, task: int = 0) -> Weights:
    chosen = plan.tasks[task]
    archive = place / "nothing-preserved"
    if not archive.exists():
        analyze(place / "base", archive, AnalyzeSettings(preserve=0.0, device="cpu"))
    settings = settings_of(plan, method, chosen)
    train(place / "base", archive, list(data_of(plan, method, chosen)), output, settings)
    return weights(output)


@pytest.mark.parametrize("offload", ["none", *slowly("cpu")])
def test_eaft_weighs_tokens_by_entropy(place: Path, tmp_path: Path, plan: Plan, offload: Any) -> None:
    start = weights(place / "base")
    plan = replace(plan, train=replace(plan.train, offload=offload))
    expected = reference(place, start, rows_of("first"), by_entropy=True)
    assert_same_update(start, trained(place, tmp_path / "eaft", plan, "eaft"), expected)


def test_kl_holds_predictions_near_those_of_the_base(place: Path, tmp_path: Path, plan: Plan) -> None:
    start = weights(place / "base")
    plan = replace(plan, adapter=replace(plan.adapter, kl=3.0))
    expected = reference(place, start, rows_of("first"), kl=3.0)
    assert_same_update(start, trained(place, tmp_path / "kl", plan, "kl"), expected)


def test_l2_pulls_towards_the_base(place: Path, tmp_path: Path, plan: Plan) -> None:
    start = weights(place / "base")
    found = trained(place, tmp_path / "l2", plan, "l2")
    assert_same_update(start, found, reference(place, start, rows_of("first"), decay=20.0))
    assert sum(float((found[n] - start[n]).norm()) for n in start) > 0


def test_replay_mixes_the_rows_of_earlier_tasks_in(place: Path, tmp_path: Path, plan: Plan) -> None:
    """With half of each epoch, two tasks of one size are one batch of all their rows."""
    start = weights(place / "base")
    found = trained(place, tmp_path / "replay", plan, "replay", task=1)
    assert_same_update(start, found, reference(place, start, rows_of("first") + rows_of("second")))
    assert data_of(plan, "replay", plan.tasks[0]) == plan.tasks[0].data, "nothing came before"
    share = replace(plan, adapter=replace(plan.adapter, replay=0.25))
    assert [weight for _, weight in data_of(share, "replay", plan.tasks[1])] == [0.75, 0.25]
    epochs = replace(plan, train=replace(plan.train, max_steps=None, epochs=2, batch_size=8, micro_batch_size=8))
    assert settings_of(epochs, "replay", plan.tasks[1]).max_steps == 4, "the steps of plain fine-tuning"
    usual = replace(plan, train=replace(plan.train, max_steps=None, batch_size=None, micro_batch_size=None))
    found_settings = settings_of(usual, "replay", plan.tasks[1])
    assert (found_settings.max_steps, found_settings.batch_size) == (20, 4), "and its rows, five passes over 16"


def test_few_rows_are_passed_over_as_often_together(place: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    (place / "epochs.toml").write_text(
        PLAN.replace(f"max_steps = {STEPS}\n", "").replace("batch_size = 64", "batch_size = 4")
    )

    def steps(method: Contender, *more: object) -> int:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        found = cli("continual", place / "epochs.toml", "-o", output, "--method", method, *more)
        assert found.code == 0, found.err
        count: int = json.loads((output / "model" / "sculptor.json").read_text())["result"]["steps"]
        return count

    assert steps("full") == 20, "five passes over 16 rows, 4 in a step"
    assert steps("joint") == 40, "as many over both tasks' rows"
    assert steps("joint", "--set", "train.epochs=1") == 8
    assert steps("joint", "--set", "train.batch_size=8", "--set", "train.epochs=1") == 4
    (place / "epochs.toml").write_text((place / "epochs.toml").read_text().replace("batch_size = 4\n", "", 1))
    assert steps("joint", "--set", "train.epochs=2", "--set", "train.clip=0.5") == 16, "of 4 rows, as each has them"


def run(cli: Callable[..., Result], place: Path, output: Path, *more: object) -> Any:
    found = cli("continual", place / "plan.toml", "-o", output, "--json", *more)
    assert found.code == 0, found.err
    return found.json


def test_interpolate_keeps_a_share_of_every_task(place: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    report = run(cli, place, tmp_path / "out", "--method", "interpolate")
    start = weights(place / "base")
    expected = start
    for name in ("first", "second"):
        before, whole = expected, reference(place, expected, rows_of(name))
        expected = {key: before[key].double() + 0.4 * (whole[key] - before[key].double()) for key in whole}
    assert_same_update(start, weights(tmp_path / "out" / "model"), expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".sculptor", "continual.json", "model", "sculptor.json",
    ]  # fmt: skip
    assert report["stages"][0]["update"] is None
    assert report["stages"][1]["update"] > 0


@pytest.mark.slow
def test_lines_keeps_more_of_deep_blocks(place: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    run(cli, place, tmp_path / "out", "--method", "lines")
    start = weights(place / "base")
    depth, expected = 1 + max(int(name.split(".")[2]) for name in start if ".layers." in name), start
    for task in ("first", "second"):
        before, whole = expected, reference(place, expected, rows_of(task))
        kept = {name: int(name.split(".")[2]) / (depth - 1) if ".layers." in name else 0.0 for name in whole}
        shares = {name: 0.4 + 0.6 * each for name, each in kept.items()}
        expected = {key: before[key].double() + shares[key] * (whole[key] - before[key].double()) for key in whole}
    assert_same_update(start, weights(tmp_path / "out" / "model"), expected)


def one_task(place: Path, tmp_path: Path) -> Path:
    plan = tmp_path / "plan.toml"
    text = PLAN[: PLAN.index('[[tasks]]\nname = "second"')].replace("max_steps = 3", "max_steps = 16")
    plan.write_text(text.replace("preserve = 0.5", 'basis = "curvature"\ndata = ["first.jsonl"]'))
    for name in ("base", "first.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    return plan


@pytest.mark.slow
def test_esacl_trains_what_it_has_pruned_alone(place: Path, tmp_path: Path) -> None:
    told: list[str] = []
    sparse = ["adapter.sparsity=0.25", "adapter.select=0.5"]
    continual(one_task(place, tmp_path), tmp_path / "out", method="esacl", overrides=sparse, notice=told.append)
    assert "first: --select-rows 0.5: 8 of 16 rows are trained on" in told
    before, after = weights(place / "base"), weights(tmp_path / "out" / "model")
    for name, value in before.items():
        changed = float((after[name] != value).float().mean())
        assert changed == pytest.approx(0.25, abs=0.01) if "_proj" in name else changed == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("01-")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["esacl", "mamf", "bayes-adam", "lines", "slm"])
def test_a_stopped_run_of_several_steps_goes_on(place: Path, tmp_path: Path, method: Contender) -> None:
    plan, more = one_task(place, tmp_path), {"method": method}
    continual(plan, tmp_path / "whole", **more)
    polls = iter([*2 * [None, None, signal.SIGTERM], *[None] * 99])
    stopped = 0
    while not (tmp_path / "cut").exists():
        try:
            continual(plan, tmp_path / "cut", resume=stopped > 0, stop=lambda: next(polls), **more)
        except Stopped:
            stopped += 1
    assert stopped
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert all(torch.equal(value, weights(tmp_path / "whole" / "model")[name])
               for name, value in weights(tmp_path / "cut" / "model").items())  # fmt: skip


@pytest.mark.slow
def test_slm_forgets_nothing_where_rows_find_their_task(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "second.jsonl", [row | {"prompt": f"w30 w31 {row['prompt']}"} for row in rows_of("second")])
    for name in ("base", "first.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "plan.toml").write_text(PLAN.replace("max_steps = 3", "max_steps = 16"))
    report = continual(tmp_path / "plan.toml", tmp_path / "out", method="slm")
    base, first, last = report.stages
    assert last.scores["first"].loss == pytest.approx(first.scores["first"].loss, rel=1e-6)
    assert last.scores["first"].loss < base.scores["first"].loss
    assert last.scores["second"].loss < base.scores["second"].loss
    assert [stage.archive_bytes for stage in report.stages][1:] == sorted(
        (tmp_path / "out/bank/first.safetensors").stat().st_size * scale + extra
        for scale, extra in ((1, 0), (1, (tmp_path / "out/bank/second.safetensors").stat().st_size))
    )
    told = evaluate(tmp_path / "base", [str(tmp_path / "first.jsonl")], bank=tmp_path / "out/bank", device="cpu")
    assert told.loss == pytest.approx(last.scores["first"].loss, rel=1e-5)


def test_mamf_draws_sub_tasks_in_half_of_the_steps(plan: Plan) -> None:
    plan = replace(plan, adapter=replace(plan.adapter, episodes=5, ways=2))
    task = plan.tasks[1]
    episodes, own = episodes_of(plan, task, replace(plan.train, max_steps=21))
    assert [episode.settings.max_steps for episode in episodes] == [2] * 5
    assert own.max_steps == 11
    everything = {row["completion"] for name in ("first", "second") for row in rows_of(name)}
    for episode in episodes:
        found = {row["completion"] for row in episode.rows}
        assert len(found) == 2
        assert found < everything
    assert len({tuple(sorted({row["completion"] for row in episode.rows})) for episode in episodes}) > 1
    again, _ = episodes_of(plan, task, replace(plan.train, max_steps=21))
    assert [episode.rows for episode in again] == [episode.rows for episode in episodes]
    with pytest.raises(SettingsError, match="3 steps of task second are too few"):
        episodes_of(plan, task, plan.train)


def test_a_prompt_lists_the_drawn_labels() -> None:
    labels = ["very negative", "negative", "good"]
    prompt = "Option: very negative, negative, good\nText: negative, good\nAnswer:"
    assert shorten(prompt, labels, {"good", "very negative"}) == (
        "Option: very negative, good\nText: negative, good\nAnswer:"
    )
    assert shorten("Text: good", labels, {"good"}) == "Text: good"


@pytest.mark.slow
def test_rescaled_has_the_norms_of_another_run(place: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    like = run(cli, place, tmp_path / "ours")
    more = ("--method", "rescaled", "--set", f"adapter.like={tmp_path / 'ours'}")
    report = run(cli, place, tmp_path / "out", *more)
    for one, other in zip(report["stages"][1:], like["stages"][1:], strict=True):
        assert one["update"] == pytest.approx(other["update"], rel=1e-5)
    start = weights(place / "base")
    expected = start
    for name, stage in zip(("first", "second"), like["stages"][1:], strict=True):
        before, whole = expected, reference(place, expected, rows_of(name))
        size = math.sqrt(sum(float((whole[key] - before[key].double()).square().sum()) for key in whole))
        share = stage["update"] / size
        assert share < 1
        expected = {key: before[key].double() + share * (whole[key] - before[key].double()) for key in whole}
    assert_same_update(start, weights(tmp_path / "out" / "model"), expected)
    published = json.loads((tmp_path / "out" / "continual.json").read_text())["plan"]["adapter"]["like"]
    assert published == "ours", "no folders"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["interpolate", "replay"])
def test_several_processes_do_the_same(place: Path, tmp_path: Path, method: Contender) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("micro_batch_size = 64", "micro_batch_size = 8"))
    for name in ("base", "first.jsonl", "second.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    continual(plan, tmp_path / "one", method=method)
    together(2, continual, plan, tmp_path / "two", method=method)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_the_norm_of_an_update(place: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    before, after = weights(place / "base"), weights(other)
    expected = math.sqrt(sum(float((after[n].double() - before[n].double()).square().sum()) for n in before))
    found = update_norm(open_checkpoint(place / "base"), open_checkpoint(other))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("rescaled", [], r"\[adapter\] like is missing"),
        ("rescaled", ["adapter.like=nowhere"], "nowhere"),
        ("l2", ["train.weight_decay=0.1"], r"weight_decay without effect with --method l2"),
        ("kl", ["train.kl_weight=1"], "kl_weight without effect with --method kl"),
        ("esacl", ["train.select_rows=0.5"], "select_rows without effect with --method esacl"),
        ("eaft", ["train.token_weights=entropy"], "token_weights without effect with --method eaft"),
    ],
)
def test_what_has_no_effect_is_refused(
    place: Path, tmp_path: Path, cli: Callable[..., Result], method: str, changes: list[str], message: str
) -> None:
    sets = [part for change in changes for part in ("--set", change)]
    found = cli("continual", place / "plan.toml", "-o", tmp_path / "out", "--method", method, *sets)
    assert found.code in (1, 2)

    assert re.search(message, found.err), found.err
    assert found.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def tasks_of(place: Path, tmp_path: Path, **changes: str) -> Path:
    """The plan with what its tasks are trained on in another way."""
    text = PLAN
    for name, data in changes.items():
        found = f'data = ["{name}.jsonl"]'
        assert found in text
        text = text.replace(found, f"data = {data}")
    for folder in ("base", "first.jsonl", "second.jsonl"):
        (tmp_path / folder).symlink_to(place / folder)
    (tmp_path / "plan.toml").write_text(text)
    return tmp_path / "plan.toml"


@pytest.mark.parametrize("method", ["slm", "mamf", "joint"])
def test_weights_in_a_task_s_data(place: Path, tmp_path: Path, method: Contender) -> None:
    plan = tasks_of(place, tmp_path, first='["first.jsonl:0.7", "second.jsonl:0.3"]')
    steps = ["adapter.episodes=1", "evaluate.harm=false"]
    report = continual(plan, tmp_path / "out", method=method, overrides=steps)
    assert len(report.stages) == (2 if method == "joint" else 3)


def test_joint_data_have_the_shares_of_their_tasks(place: Path, tmp_path: Path) -> None:
    plan = read_plan(tasks_of(place, tmp_path, first='["first.jsonl:3", "second.jsonl:1"]'))
    found = [item.rsplit(":", 1) for item in joint_data(plan)]
    assert [(Path(name).name, float(weight)) for name, weight in found] == [
        ("first.jsonl", 24.0), ("second.jsonl", 8.0), ("second.jsonl", 16.0),
    ]  # fmt: skip
    plain = read_plan(place / "plan.toml")
    assert joint_data(plain) == tuple(item for task in plain.tasks for item in task.data)


def test_esacl_refuses_weights_and_knows_data_that_calibrate_already(place: Path, tmp_path: Path) -> None:
    weighted = tasks_of(place, tmp_path, first='["first.jsonl:0.7", "second.jsonl:0.3"]')
    with pytest.raises(SettingsError, match=r"--method esacl: .* data with weights"):
        continual(weighted, tmp_path / "out", method="esacl")
    (place / "again.toml").write_text(
        PLAN.replace("preserve = 0.5", 'basis = "curvature"\ndata = ["first.jsonl:2", "second.jsonl:1"]')
    )
    few = ["adapter.sparsity=0.5", "train.max_steps=1", "evaluate.harm=false", "analyze.calibration_tokens=200"]
    assert len(continual(place / "again.toml", tmp_path / "esacl", method="esacl", overrides=few).stages) == 3


def test_mamf_refuses_what_has_no_labels_before_any_work(place: Path, tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}] * 4
    plan = tasks_of(place, tmp_path, second='["talk.jsonl"]')
    write_rows(tmp_path / "talk.jsonl", talk)
    with pytest.raises(SettingsError, match="--method mamf: task second has no labels"):
        continual(plan, tmp_path / "out", method="mamf")
    assert not list(tmp_path.glob("out*"))


def test_a_limit_holds_for_other_methods_and_not_for_peft_s(place: Path, tmp_path: Path) -> None:
    limit = ["train.max_harm=0.001", "train.harm_every=1"]
    free, held = (
        continual(place / "plan.toml", tmp_path / name, method="full", overrides=more)
        for name, more in (("free", []), ("held", limit))
    )
    assert free.harm is not None
    assert held.harm is not None
    assert held.harm.nats < 0.01 < free.harm.nats
    with pytest.raises(SettingsError, match=r"\[train\] max_harm, harm_every without effect with --method lora"):
        continual(place / "plan.toml", tmp_path / "lora", method="lora", overrides=limit)

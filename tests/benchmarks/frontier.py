"""The frontier of a real chat model: what each method learns of a sequence of tasks, against the harm that it does.

    python tests/benchmarks/frontier.py prepare --model DIR --data DIR
    python tests/benchmarks/frontier.py SUITE --model DIR --data DIR --output DIR [--jobs 8] [--deadline 540]

DATA holds cl/<task>/{train,validation,test}.jsonl, text/wikitext2-test.txt, and abilities/*.jsonl. `prepare` adds
DATA/prepared-MODEL: the model's greedy answers to abilities/helpful_prompts.jsonl (how it goes on, where it has no chat
template), whose loss is watched. After its last task every run is asked for its abilities, too,
and those of ANSWERED for answers to IFEval, which take minutes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import abilities
from continual import ORDERS, Run, run_suites

DEVICE = "cuda"
SAID = 128  # tokens of an answer


def plan_text(model: Path, data: Path, run: Run) -> str:
    """The plan of one run: what the comparison gives every method; the rest are defaults."""
    tasks = "".join(
        f'[[tasks]]\nname = "{task}"\n'
        + "".join(
            f'{key} = "{data}/cl/{task}/{file}.jsonl"\n'
            for key, file in (("data", "train"), ("validation", "validation"), ("test", "test"))
        )
        for task in ORDERS[run.order]
    )
    rate = f"learning_rate = {run.rate}" if run.rate else ""
    return f'''model = "{model}"
watch = ["{data}/text/wikitext2-test.txt", "{answers(model, data)}"]
[analyze]
{calibration(model, run)}[train]
epochs = 2
max_rows = 1500
batch_size = 32
micro_batch_size = 32
max_length = 512
schedule = "linear"
checkpoint_activations = false
save_every = 100000
{rate}
[evaluate]
exact_match = {"true" if run.order == "said" else "false"}
max_length = 512
batch_size = 256
{tasks}'''


def answers(model: Path, data: Path) -> Path:
    """What the base says."""
    return data / f"prepared-{model.name}" / "own.jsonl"


def calibration(model: Path, run: Run) -> str:
    """Of our own method: what the model says, through its chat template if it has one."""
    if any(item.startswith(("analyze.basis", "analyze.rule")) for item in run.sets):
        return ""
    chat = "chat = true\n" if (model / "chat_template.jinja").is_file() else ""
    return f'basis = "curvature"\ndata = ["self"]\n{chat}max_length = 256\ncalibration_tokens = 30000\n'


WEIGHTS = ("analyze.basis=weights", "analyze.preserve=0.5")
_BEST = (("sculptor", 0.0), ("joint", 5e-5))
ANSWERED = {(order, method) for order in ("6", "6r") for method, _ in _BEST}
SUITES: dict[str, list[Run]] = {
    # Every rate is shown, so nothing is chosen; 0 is the default.
    "ours": [
        *(Run("1", "sculptor", rate, split="test") for rate in (0.0, 1e-3, 2e-4)),
        Run("1", "sculptor", 1e-3, ("train.max_harm=0.05",), split="test"),
        Run("1", "sculptor", 2e-3, split="test"),
        Run("2", "sculptor", 0.0, split="test"),
        Run("2", "sculptor", 1e-3, split="test"),
        Run("1", "sculptor", 1e-4, WEIGHTS, split="test"),
        *(Run("1", "sculptor", rate, seed=seed, split="test") for seed in (1, 2) for rate in (0.0, 1e-3)),
    ],
    # The default again in the other order and with other seeds, and what comes nearest to it.
    "again": [
        Run("2", "sculptor", 0.0, split="test"),
        *(Run("1", "sculptor", 0.0, seed=seed, split="test") for seed in (1, 2)),
        Run("2", "replay", 5e-5, split="test"),
        Run("2", "kl", 5e-5, split="test"),
        Run("2", "sculptor", 2e-4, split="test"),
        *(Run("1", "joint", 5e-5, seed=seed, split="test") for seed in (1, 2)),
        Run("2", "joint", 5e-5, split="test"),
    ],
    # Published systems, each at two rates (0 is the default of those that are rules of ours).
    "systems": [
        *(Run("1", method, 0.0, split="test") for method in ("inflora", "sara", "orthsr", "crispedit")),
        *(Run("1", method, 1e-4, split="test") for method in ("bayes-adam", "esacl", "mamf", "lines")),
        Run("1", "slm", 5e-4, split="test"),
        *(Run("1", method, 1e-4, split="test") for method in ("osf", "interpolate", "l2", "eaft")),
        *(Run("1", method, 1e-3, split="test") for method in ("inflora", "orthsr")),
        Run("1", "sara", 2e-4, split="test"),
        *(Run("1", method, 5e-5, split="test") for method in ("bayes-adam", "esacl", "mamf", "lines")),
        Run("1", "slm", 2e-4, split="test"),
    ],
    # Six tasks in sequence, of the methods that came nearest.
    "six": [
        Run("6", "sculptor", 0.0, split="test"),
        *(Run("6", method, 5e-5, split="test") for method in ("joint", "replay", "full")),
        Run("6", "crispedit", 0.0, split="test"),
        Run("6", "sculptor", 2e-4, split="test"),
    ],
    # A base model without a chat template, at rates that suit weights of a fifth of the size (Gemma 3 270M).
    "base-model": [
        Run("1", "sculptor", 0.0, split="test"),
        *(Run("1", method, 2e-5, split="test") for method in ("joint", "replay", "full")),
        Run("1", "sculptor", 2e-4, split="test"),
        Run("1", "crispedit", 0.0, split="test"),
        *(Run("1", method, 1e-5, split="test") for method in ("joint", "full")),
    ],
    "base-model-rates": [
        Run("1", "replay", 5e-5, split="test"),
        Run("1", "sculptor", 5e-5, split="test"),
        *(Run("1", method, 5e-5, split="test") for method in ("joint", "full")),
        Run("1", "kl", 2e-5, split="test"),
        Run("1", "replay", 1e-5, split="test"),
        Run("1", "lora", 2e-4, split="test"),
    ],
    "six-protected": [Run("6", "sculptor", 0.0, split="test"), Run("6", "crispedit", 0.0, split="test")],
    # The six tasks with other seeds; means over three are of these and of "six".
    "six-seeds": [Run("6", method, rate, seed=seed, split="test") for seed in (1, 2) for method, rate in _BEST],
    # The six tasks in both orders with three seeds, the baselines nearest to it, and the four tasks once more.
    "both-orders": [
        *(Run(order, "sculptor", 0.0, seed=seed, split="test") for seed in range(3) for order in ("6", "6r")),
        *(Run("6", "joint", 5e-5, seed=seed, split="test") for seed in range(3)),
        *(Run("1", "sculptor", 0.0, seed=seed, split="test") for seed in range(3)),
        *(Run(order, "crispedit", 0.0, split="test") for order in ("6", "6r")),
        *(Run(order, method, 5e-5, split="test") for method in ("replay", "full", "kl") for order in ("6", "6r")),
        *(Run(order, "sculptor", 0.0, ("train.max_harm=0.02",), split="test") for order in ("6", "6r")),
        Run("2", "sculptor", 0.0, split="test"),
    ],
    # How much text beside conversations protects text, and rows of its own answers what it answers.
    "texts": [
        *(Run(order, "sculptor", 0.0, seed=seed, split="test") for seed in range(3) for order in ("6", "6r")),
        *(Run("6", "sculptor", 0.0, ('replay=["self:0.1"]',), seed=seed, split="test") for seed in range(3)),
        *(Run(order, "sculptor", 0.0, ('analyze.data=["self","GENERAL"]',), split="test") for order in ("6", "6r")),
    ],
    # Answers that are said: JSON, calls of functions, worked sums, a house's own style.
    "said": [
        *(Run("said", "sculptor", 0.0, seed=seed, split="test") for seed in range(3)),
        *(Run("said", method, 5e-5, split="test") for method in ("joint", "replay", "full", "kl")),
        Run("said", "crispedit", 0.0, split="test"),
        *(Run("said", method, 1e-4, split="test") for method in ("joint", "replay", "full")),
        Run("said", "lora", 2e-4, split="test"),
    ],
    # The same with what keeps conversations that are of none of these tasks as they were.
    "said-kept": [
        *(Run("said", "sculptor", 0.0, (f"train.max_harm={limit}",), split="test") for limit in (0.02, 0.05, 0.1)),
        *(Run("said", "sculptor", 0.0, (f'replay=["self:{share}"]',), split="test") for share in (0.1, 0.3)),
        Run("said", "sculptor", 0.0, ("train.max_harm=0.05",), seed=1, split="test"),
        Run("said", "full", 5e-5, ('replay=["self:0.1"]',), split="test"),
    ],
    # Systems that needed more time or memory than the others.
    "rest": [
        *(Run("1", method, 1e-4, split="test") for method in ("l2", "eaft", "esacl")),
        Run("1", "orthsr", 0.0, split="test"),
        Run("1", "slm", 5e-4, split="test"),
    ],
    "rates": [
        Run("1", "sculptor", 3e-4, WEIGHTS, split="test"),
        *(Run("1", "kl", rate, split="test") for rate in (1e-4, 5e-5)),
        *(Run("1", "joint", rate, split="test") for rate in (1e-4, 5e-5)),
        *(Run("1", "replay", rate, split="test") for rate in (1e-4, 5e-5, 2e-5)),
        *(Run("1", "full", rate, split="test") for rate in (1e-4, 5e-5, 2e-5)),
        *(Run("1", "lora", rate, split="test") for rate in (5e-4, 2e-4)),
        Run("1", "full", 1e-5, split="test"),
        Run("1", "replay", 2e-4, split="test"),
    ],
}


def prepare(model: Path, data: Path) -> None:
    """The model's own answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    lines = (data / "abilities" / "helpful_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    questions = [text for text in questions if len(text) < 400][:250]
    chats = [[{"role": "user", "content": text}] for text in questions]
    if tokenizer.chat_template is None:
        batch = tokenizer(questions, return_tensors="pt", padding=True).to(DEVICE)
    else:
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        ).to(DEVICE)
    said = base.generate(**batch, max_new_tokens=SAID, do_sample=False)[:, batch["input_ids"].shape[1] :]
    file = answers(model, data)
    file.parent.mkdir(exist_ok=True)
    rows = list[dict[str, Any]]()
    for question, chat, answer in zip(
        questions, chats, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True
    ):
        if (
            not answer.strip() or len(tokenizer.encode(answer)) > 2 * SAID
        ):  # text need not become the tokens again that it was
            continue
        if tokenizer.chat_template is None:
            rows.append({"prompt": question, "completion": answer})
        else:
            rows.append({"messages": [*chat, {"role": "assistant", "content": answer.strip()}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _file_name(run: Run) -> str:
    """Runs that differ by their seed alone differ behind the last dash."""
    return "-".join(
        [run.method, f"order{run.order}", f"{run.rate:g}" if run.rate else "default", *run.sets, str(run.seed)]
    )


def measure(data: Path, name: str, run: Path, *, answered: bool) -> None:
    """Prints what the model of a run can still do; which rows are right stays beside it, for `abilities.py compare`."""
    file = run.parent / "abilities" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    abilities.read(run / "model", data, file, answers=answered)
    found = json.loads(file.read_text(encoding="utf-8"))
    print(json.dumps({suite: abilities.mean(found[suite]) for suite in abilities.SUITES}))


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        measure(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[5]), answered=sys.argv[4] == "answered")
    elif sys.argv[1:2] == ["prepare"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", type=Path, required=True)
        parser.add_argument("--data", type=Path, required=True)
        arguments = parser.parse_args(sys.argv[2:])
        prepare(arguments.model, arguments.data)
    else:
        run_suites(
            SUITES,
            plan_text,
            __doc__ or "",
            lambda given, run: [
                sys.executable,
                __file__,
                "measure",
                str(given.data),
                _file_name(run),
                "answered" if (run.order, run.method) in ANSWERED else "choices",
            ],
        )


if __name__ == "__main__":
    main()

"""Small real checkpoints on disk, and the real command run in this process."""

import json
import math
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny, and tests run side by side: more threads, also of commands that tests start, only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import few_samples  # noqa: F401
import pytest
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

WORDS = [f"w{i}" for i in range(40)]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **IDS)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, **IDS, tie_word_embeddings=True)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(GROUPED | IDS))),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, **IDS)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, **IDS)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, **IDS)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, **IDS)),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SMALL, **IDS, original_max_position_embeddings=64)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **IDS,
        )
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, **IDS)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, **IDS)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=1,
            eos_token_id=0,
            pad_token_id=1,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, pad_token_id=1)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, **IDS, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def make_tokenizer(wrapped: bool = False) -> Any:
    """One token per word; id 0 ends a sequence, 1 pads, 2 masks, 3 is unknown; `wrapped`: as BERT's, in two tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: i for i, word in enumerate(["<end>", "<pad>", "<mask>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if wrapped:
        tokenizer.add_special_tokens(["<cls>", "<sep>"])
        tokenizer.post_processor = TemplateProcessing("<cls> $A <sep>", special_tokens=[("<cls>", 44), ("<sep>", 45)])
    own = {"cls_token": "<cls>", "sep_token": "<sep>"} if wrapped else {}
    return transformers.PreTrainedTokenizerFast(
        **own, tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )


def save_checkpoint(
    path: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> Path:
    """A random model of a family with the tokenizer, saved by transformers."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    # T5 starts large and divides no attention score: four times that, and float32 knows its gradients to 5e-4 only.
    with torch.no_grad():
        for parameter in model.parameters():  # away from the tiny defaults, so that updates and rounding are real
            if parameter.ndim >= 2 and family != "t5":
                parameter.mul_(4)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(wrapped=family == "bert").save_pretrained(path)
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_rows(kind: str = "pairs", count: int = 24) -> list[dict[str, Any]]:
    """Rows that a model can learn: the completion repeats a word of the prompt."""
    words = [WORDS[i % len(WORDS)] for i in range(2 * count)]
    if kind == "text":
        return [{"text": " ".join(words[i : i + 5] + [WORDS[7]] * (i % 3))} for i in range(count)]
    return [{"prompt": f"{words[i]} {words[(3 * i) % 7]} w0", "completion": words[i % 4]} for i in range(count)]


def slowly(*cases: Any) -> list[Any]:
    """More cases of a parametrized test, for the slow set."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def stairs(archive: Any, name: str) -> Any:
    """The staircase rule of a matrix."""
    from sculptor.methods.staircase import StaircaseRule

    rule = archive[name].rule
    assert isinstance(rule, StaircaseRule)
    return rule


def frozen_norm(update: Any, staircase: Any, output: Any, input: Any) -> float:
    """||frozen part of dW||, in float64."""
    from sculptor.numerics.bases import frozen_parts

    return math.hypot(*(float(part.norm()) for part in frozen_parts(update, staircase, output, input)))


def factors(archive: Any, name: str) -> Any:
    """The truncated moments (G or None, C) of a matrix."""
    return stairs(archive, name).factors(archive.read(name).tensors)


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output as JSON."""
        return json.loads(self.out)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests go first: no worker is left with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


COMMANDS = (
    "estimate", "data", "analyze", "train", "inspect", "verify", "evaluate", "card", "chat", "edit", "bank", "continual",
    "frontier", "convert", "demo",
)  # fmt: skip


def losses_of_a_plain_loop(model: Any) -> list[float]:
    """What somebody's own loop sees of a protected model."""
    import sculptor

    optimizer = torch.optim.AdamW(sculptor.parameter_groups(model))
    ids = torch.arange(4, 40).view(4, 9)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def unknown_options(said: str, arguments: Sequence[str]) -> set[str]:
    """Options that a message names and its command has not, unless they were asked for, or are of another command that it names."""
    import click
    from sculptor_cli.main import main

    command: click.Command | None = main
    for argument in arguments:
        if isinstance(command, click.Group) and not argument.startswith("-"):
            command = command.get_command(click.Context(command), argument)
    if command is None or command is main or said.startswith("Usage:"):  # its help
        return set()
    named = [command, *(main.get_command(click.Context(main), word) for word in re.findall(r"[a-z]+", said))]
    named += [main.get_command(click.Context(main), "train")] if command.name == "continual" else []  # by --set train.*
    known = {name for each in named if each for p in each.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    given = {argument.partition("=")[0] for argument in arguments}
    # Lines of other programs, or of another command of ours.
    own = re.sub(r"as by `sculptor.*|`[^`]*`", "", said)
    return {name for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", own) if name not in known | given}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `sculptor ARGUMENTS` in this process."""

    def run_command(*arguments: object) -> Result:
        from sculptor_cli.main import run

        monkeypatch.setattr("sculptor.progress.SHOWN_AFTER", 1e9)  # what a slow machine shows is no part of a test
        monkeypatch.setattr("sys.argv", ["sculptor", *map(str, arguments)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with pytest.raises(SystemExit) as stopped:
            run()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        captured = capsys.readouterr()
        assert not unknown_options(captured.err, list(map(str, arguments)))
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return run_command


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 kB: what a full disk looks like to the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded randomness."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of really trained models and public data, where it exists."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "models").is_dir():
        pytest.skip("no really trained models here")
    return path
